"""Transformer blocks that process the tokens of one tower and the bottleneck tokens in one pass.

The residual streams stay two tensors, `x` (tokens) and `z` (bottleneck). They are concatenated only where a LayerNorm
writes its output: projections and MLP are one matrix product each, and a compiler can fuse the concatenation away. Only
the attention knows which row attends to which (`fastav_kernels.bottleneck_attention`).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from fastav.core.errors import UserError, did_you_mean
from fastav.model.tower import ClipDropPath, Tower, block_flops
from fastav_kernels.bottleneck_attention import IMPLEMENTATIONS, Frames, Segments, best, bottleneck_attention


class BottleneckBlock(nn.Module):
    """Runs a timm `Block`, with its modules and parameter names, on tokens and bottleneck.

    One pre-norm transformer layer (SSW60, equations 1 and 2) on `[x || z]`. Either each frame is a sequence (`frames`
    mean, shared), or the whole clip is one (joint, or a single frame).

    Args:
        block: timm's block, with plain attention (`use_bottleneck_blocks` checks that).
        frames: How frames and bottleneck attend to each other, see `fastav_kernels.bottleneck_attention`. With `mean`
            each frame's copy of the bottleneck passes the whole layer before the copies are averaged.
        attention: Implementation of the attention; `auto` for the one that `best` returns.
        need_bottleneck: Whether a later layer reads the new bottleneck. If not (last layer), only its keys and values
            are computed.
    """

    norm1: Any
    attn: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    def __init__(self, block: nn.Module, frames: Frames, attention: str, need_bottleneck: bool = True) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.frames: Frames = frames
        self.attention, self.need_bottleneck = attention, need_bottleneck

    def forward(self, x_CTND: Tensor, z_CZD: Tensor, clips: int) -> tuple[Tensor, Tensor]:
        """Runs the layer.

        Args:
            x_CTND: Tokens of C sequences of T frames with N tokens each. C = clips * windows, the windows of a clip in
                consecutive rows.
            z_CZD: Bottleneck tokens.
            clips: Number of clips B. Stochastic depth draws once per clip, for its tokens and bottleneck together.

        Returns:
            New tokens and bottleneck, in the same shapes; the old bottleneck if `need_bottleneck` is false.
        """
        C, T, N, _ = x_CTND.shape
        Z = z_CZD.shape[1]
        attn = self.attn
        qkv = attn.qkv(_rows(self.norm1(x_CTND), self.norm1(z_CZD)))
        heads = bottleneck_attention(
            qkv.view(-1, 3, attn.num_heads, attn.head_dim),
            clips=C,
            num_frames=T,
            num_tokens=N,
            num_bottleneck=Z,
            frames=self.frames,
            need_bottleneck=self.need_bottleneck,
            impl=self.attention,
        )
        branch = self.ls1(attn.proj_drop(attn.proj(heads.flatten(1))))
        if not self.need_bottleneck:
            x = self._add_one(x_CTND, branch, self.drop_path1, clips)
            branch = self.ls2(self.mlp(self.norm2(x).flatten(0, -2)))
            return self._add_one(x, branch, self.drop_path2, clips), z_CZD
        z = z_CZD
        if self.frames == "mean":
            z = z_CZD.unsqueeze(1).expand(-1, T, -1, -1)
        x, z = self._add(x_CTND, z, branch, self.drop_path1, clips)
        branch = self.ls2(self.mlp(_rows(self.norm2(x), self.norm2(z))))
        x, z = self._add(x, z, branch, self.drop_path2, clips)
        return x, z.mean(1) if self.frames == "mean" else z

    @staticmethod
    def _add(x: Tensor, z: Tensor, rows: Tensor, drop: nn.Module, clips: int) -> tuple[Tensor, Tensor]:
        """Adds a residual branch, given as concatenated rows, to both streams."""
        split = x.numel() // x.shape[-1]
        dx, dz = rows[:split].view(x.shape), rows[split:].view(z.shape)
        factor_B = drop.draw(clips, rows) if isinstance(drop, ClipDropPath) else None
        if factor_B is not None:
            dx, dz = (_scaled(branch, factor_B) for branch in (dx, dz))
        return x + dx, z + dz

    @staticmethod
    def _add_one(x: Tensor, rows: Tensor, drop: nn.Module, clips: int) -> Tensor:
        """Adds a residual branch to the tokens only."""
        dx = rows.view(x.shape)
        factor_B = drop.draw(clips, rows) if isinstance(drop, ClipDropPath) else None
        return x + (dx if factor_B is None else _scaled(dx, factor_B))

    def flops(self, num_frames: int, num_tokens: int, num_bottleneck: int) -> int:
        """Returns the operations of the layer for one sequence of T frames of N tokens, and Z bottleneck tokens."""
        T, N, Z = num_frames, num_tokens, num_bottleneck
        if self.frames == "joint":
            T, N = 1, T * N
        copies = T if self.frames == "mean" else 1
        # A frame token attends to N + Z keys; a bottleneck token to N + Z in each copy (`mean`), otherwise to T*N + Z.
        keys = N + Z if self.frames == "mean" else T * N + Z
        queries = copies * Z if self.need_bottleneck else 0
        return block_flops(self, T * N + Z, T * N + queries, T * N * (N + Z) + queries * keys)


def check_attention(attention: str) -> None:
    """Checks the recipe's key `model.fusion.attention`.

    Args:
        attention: Its value: `auto`, or the name of an implementation.

    Raises:
        UserError: There is no implementation of that name.
    """
    known = ["auto", *IMPLEMENTATIONS]
    if attention not in known:
        raise UserError(f'model.fusion.attention: "{attention}" is unknown{did_you_mean(attention, known)}')


def use_bottleneck_blocks(
    tower: Tower, start: int, frames: Frames, attention: str, last_needs_bottleneck: bool
) -> None:
    """Replaces a ViT's blocks, from number `start` on, by `BottleneckBlock`s.

    Args:
        tower: The ViT.
        start: Number of the first block to replace, counted from 0.
        frames: How frames and bottleneck attend to each other, see `BottleneckBlock`.
        attention: Implementation of the attention, or `auto`.
        last_needs_bottleneck: Whether the new bottleneck of the last block is read.

    Raises:
        UserError: The attention of a block is not plain (it has normalised queries, a gate or dropout).
    """
    for number, block in enumerate(tower.blocks):
        if number < start:
            continue
        attn: Any = block.attn
        plain = (
            type(attn) is Attention
            and all(isinstance(getattr(attn, name), nn.Identity) for name in ("q_norm", "k_norm", "norm"))
            and getattr(attn, "gate", None) is None
            and attn.attn_drop.p == 0
        )
        if not plain:
            raise UserError(
                f'{tower.where}: block {number} of "{tower.name}" has normalised queries, a gate or dropout in '
                'its attention; fusion "bottleneck" needs plain attention'
            )
        need_bottleneck = last_needs_bottleneck or number + 1 < len(tower.blocks)
        tower.replace_block(number, BottleneckBlock(block, frames, attention, need_bottleneck))


def describe_attention(attention: str, tower: Tower, segments: Segments, device: str, dtype: str) -> str:
    """Describes the attention of the fusion layers, and whether the recipe or a measurement chose it.

    Args:
        attention: `model.fusion.attention` of the recipe: an implementation, or `auto`.
        tower: A tower whose last block is a fusion layer.
        segments: Shape of that block's attention for one clip.
        device: Device of the model, such as `cuda:0`.
        dtype: Compute type: `float32` or `bfloat16`.
    """
    if attention != "auto":
        return f"PyTorch's, in fusion layers {attention} (requested)"
    block: Any = tower.blocks[-1]
    name = best(device, dtype, block.attn.head_dim, segments)
    return f"PyTorch's, in fusion layers {name} (chosen by auto)"


def _rows(x: Tensor, z: Tensor) -> Tensor:
    """Concatenates two streams [..., D] as rows [R, D], tokens first."""
    return torch.cat([x.flatten(0, -2), z.flatten(0, -2)])


def _scaled(branch: Tensor, factor_B: Tensor) -> Tensor:
    """Multiplies all rows of each clip with its factor; `branch` is [B * W, ...], a clip's windows in a row."""
    factor = factor_B.repeat_interleave(branch.shape[0] // factor_B.shape[0])
    return branch * factor.view(-1, *[1] * (branch.ndim - 1))
