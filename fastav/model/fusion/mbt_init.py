"""Initialises MBT from an image ViT: blocks, patch embeddings (as tubelets) and position embeddings."""

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
    """The attributes of `MBTFusion` that are used here; its module imports this one, so it cannot be imported.

    Attributes:
        config: The config, an `MBT`.
        prefix: Number of class tokens of each modality, 0 or 1.
        fuses: Whether the fusion has bottleneck tokens.
        frame_grid: Number of tubelets along time, height and width.
        mel_grid: Number of patches along the two axes of the spectrogram, time and mel bands.
    """

    config: Any
    prefix: int
    fuses: bool
    frame_grid: tuple[int, int, int]
    mel_grid: tuple[int, int]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `nn.Module.named_parameters`."""
        ...


def start_from_image_vit(fusion: FusionToFill, towers: Mapping[Modality, Tower], file: str) -> None:
    """Initialises fusion and towers from a file of an image ViT (timm's parameter names), except for the head.

    Raises:
        UserError: The file cannot be read, or is of a network that does not fit.
    """
    copy_image_vit(fusion, towers, read_safetensors(Path(file), _WHERE))


@torch.no_grad()
def copy_image_vit(fusion: FusionToFill, towers: Mapping[Modality, Tower], vit: Mapping[str, Tensor]) -> None:
    """Initialises fusion and towers from the parameters of an image ViT, as the authors' `initialise_from_train_state`.

    As in their code, the audio class token keeps its initial value, and bottleneck tokens are position embeddings: the
    ViT's grid, resized so that it has as many positions as there are tokens.

    Raises:
        UserError: A parameter is missing or has another shape, or no such grid exists for the number of tokens.
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
                raise UserError(f'{_WHERE}: has no "blocks.{name}", which towers of this depth and width need')
            _fill(parameter, f"blocks.{name}", vit[f"blocks.{name}"])


def _positions(fusion: FusionToFill, positions_1ND: Tensor, classed: bool) -> dict[str, Tensor]:
    """Returns the position embeddings of both modalities, and the bottleneck."""
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
                f"model.fusion.tokens = {tokens}: with image_vit, expected n * n, n * (n + 1) or n * (n + 2) tokens "
                "(1, 2, 3, 4, 6, 8, 9, 12, ...)"
            )
        fills["bottleneck"] = torch.cat([prefix, zoomed(grid_HWD, (rows, tokens // rows)).flatten(0, 1)])[None]
    return fills


def _fill(parameter: Tensor, name: str, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise UserError(f'{_WHERE}: "{name}" has shape {list(value.shape)}, expected {list(parameter.shape)}')
    parameter.copy_(value)


def tubelet_kernel(kernel_DCHW: Tensor, frames: int, how: str) -> Tensor:
    """Converts the patch kernel of an image ViT to a tubelet kernel, [D, C, frames, H, W].

    Args:
        kernel_DCHW: Patch kernel.
        frames: Frames per tubelet.
        how: `MBT.frame_kernel`.
    """
    if how == "average":
        return kernel_DCHW.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    kernel = kernel_DCHW.new_zeros(*kernel_DCHW.shape[:2], frames, *kernel_DCHW.shape[2:])
    kernel[:, :, frames // 2] = kernel_DCHW
    return kernel


def zoomed(grid_HWD: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a grid of position embeddings: bilinear with aligned corners, as scipy's `zoom` of order 1."""
    if tuple(grid_HWD.shape[:2]) == size:
        return grid_HWD
    grid_1DHW = grid_HWD.permute(2, 0, 1)[None]
    resized_1DHW = functional.interpolate(grid_1DHW, size=size, mode="bilinear", align_corners=True)
    return resized_1DHW[0].permute(1, 2, 0)
