"""MBT's start from an image ViT: blocks for both modalities, patches for tubelets, positions for all the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastav.core.errors import UserError
from fastav.data.clip import Modality
from fastav.model.tower import Tower
from fastav.model.weights import read_safetensors

_WHERE = "model.fusion.image_vit"


class FusionToFill(Protocol):
    """What is read of an `MBTFusion`, whose module imports this one.

    Attributes:
        config: Its config, an `MBT`.
        prefix: Class tokens of each modality, 0 or 1.
        fuses: Whether it has bottleneck tokens.
        frame_grid: Tubelets along time, height and width.
        mel_grid: Patches along bands and time.
    """

    config: Any
    prefix: int
    fuses: bool
    frame_grid: tuple[int, int, int]
    mel_grid: tuple[int, int]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module.named_parameters`."""
        ...


def start_from_image_vit(fusion: FusionToFill, towers: Mapping[Modality, Tower], file: str) -> None:
    """Fills a model from an image ViT's file (timm's names); its head is left alone.

    Raises:
        UserError: The file cannot be read, or is another network's.
    """
    copy_image_vit(fusion, towers, read_safetensors(Path(file), _WHERE))


@torch.no_grad()
def copy_image_vit(fusion: FusionToFill, towers: Mapping[Modality, Tower], vit: Mapping[str, Tensor]) -> None:
    """As `start_from_image_vit`, of its parameters; what the authors' `initialise_from_train_state` does.

    The audio's class token stays as it is, as there. Bottleneck tokens are positions, too: the grid at the size whose
    sides multiply to their number.

    Raises:
        UserError: A parameter is missing or of another shape, or there is no such grid.
    """
    config = fusion.config
    needed = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "norm.weight", "norm.bias"}
    if fusion.prefix:
        needed.add("cls_token")
    for name in sorted(needed):
        if name not in vit:
            raise UserError(f'{_WHERE}: has no "{name}"; expected an image ViT with timm\'s parameter names')
    kernel = vit["patch_embed.proj.weight"]
    fills = {
        "embed.audio.weight": kernel,
        "embed.video.weight": kernel if config.sampled else tubelet_kernel(kernel, config.tubelet, config.frame_kernel),
        "embed.audio.bias": vit["patch_embed.proj.bias"],
        "embed.video.bias": vit["patch_embed.proj.bias"],
        "norm.weight": vit["norm.weight"],
        "norm.bias": vit["norm.bias"],
    }
    fills |= _positions(fusion, vit["pos_embed"], "cls_token" in vit)
    if fusion.prefix:
        fills["class_token.video"] = vit["cls_token"]
    own = dict(fusion.named_parameters())
    for name, value in fills.items():
        _fill(own[name], name, value)
    for tower in towers.values():
        for name, parameter in tower.net.blocks.named_parameters():
            if f"blocks.{name}" not in vit:
                raise UserError(f'{_WHERE}: has no "blocks.{name}", which the towers\' depth and width ask for')
            _fill(parameter, f"blocks.{name}", vit[f"blocks.{name}"])


def _positions(fusion: FusionToFill, positions_1ND: Tensor, classed: bool) -> dict[str, Tensor]:
    """The position tables of both modalities and of the bottleneck."""
    first, patches = positions_1ND[0, : int(classed)], positions_1ND[0, int(classed) :]
    side = math.isqrt(len(patches))
    if side * side != len(patches):
        raise UserError(f"{_WHERE}: has {len(patches)} position embeddings, which do not form a square grid")
    grid_HWD = patches.unflatten(0, (side, side))
    prefix = first if fusion.prefix else first[:0]
    time, height, width = fusion.frame_grid
    frame = zoomed(grid_HWD, (height, width)).flatten(0, 1)
    fills = {
        "position.video": torch.cat([prefix, frame.repeat(time, 1)])[None],
        "position.audio": torch.cat([prefix, zoomed(grid_HWD, fusion.mel_grid).flatten(0, 1)])[None],
    }
    if fusion.fuses:
        tokens = fusion.config.tokens
        rows = math.isqrt(tokens)
        if rows * (tokens // rows) != tokens:
            raise UserError(
                f"model.fusion.tokens: {tokens} given, with image_vit the product of two neighbouring sides expected "
                "(1, 2, 3, 4, 6, 8, 9, 12, ...)"
            )
        fills["bottleneck"] = torch.cat([prefix, zoomed(grid_HWD, (rows, tokens // rows)).flatten(0, 1)])[None]
    return fills


def _fill(parameter: Tensor, name: str, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise UserError(f'{_WHERE}: "{name}" has shape {list(value.shape)}, expected {list(parameter.shape)}')
    parameter.copy_(value)


def tubelet_kernel(kernel_DCHW: Tensor, frames: int, how: str) -> Tensor:
    """Returns the kernel of tubelets of so many frames that an image's patch kernel becomes, [D, C, frames, H, W]."""
    if how == "average":
        return kernel_DCHW.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    kernel = kernel_DCHW.new_zeros(*kernel_DCHW.shape[:2], frames, *kernel_DCHW.shape[2:])
    kernel[:, :, frames // 2] = kernel_DCHW
    return kernel


def zoomed(grid_HWD: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns a grid of position embeddings at another size: bilinear, corners on corners (scipy's `zoom`, order 1)."""
    if tuple(grid_HWD.shape[:2]) == size:
        return grid_HWD
    made = functional.interpolate(grid_HWD.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=True)
    return made[0].permute(1, 2, 0)
