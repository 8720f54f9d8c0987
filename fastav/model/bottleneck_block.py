"""A transformer block whose rows are the tokens of one tower and the bottleneck's, in one pass.

The residual streams stay two tensors, `x` (tokens) and `z` (bottleneck). They are joined only where a
LayerNorm writes its output, so that the projections and the MLP are one matrix product each and a compiler
has no copy left to make; only the attention knows which row sees which
(`fastav_kernels.bottleneck_attention`).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from fastav.core.errors import UserError
from fastav.model.tower import ClipDropPath, Tower, block_flops
from fastav_kernels.bottleneck_attention import Frames, Segments, best, bottleneck_attention


class BottleneckBlock(nn.Module):
    """Takes a timm `Block` over, under the same parameter names, and runs it on tokens and bottleneck.

    One pre-norm transformer layer (SSW60, equations 1 and 2) on `[x || z]`, where every frame is a sequence
    of its own (`frames` mean, shared) or the clip is one (joint, or a single frame).

    Args:
        block: timm's block; its attention is plain (`use_bottleneck_blocks` checks that).
        frames: How frames meet the bottleneck, see `fastav_kernels.bottleneck_attention`. With `mean` each
            frame's copy of the bottleneck passes the whole layer before the copies are averaged.
        attention: Implementation of the attention, `auto` for the best one.
        need_bottleneck: Whether a later layer reads the bottleneck of this one; in the last layer its rows end at the
            attention's keys and values.
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
            x_CTND: Tokens of C sequences of T frames; C is `clips` times the audio windows, window by window.
            z_CZD: Bottleneck tokens.
            clips: Clips B; stochastic depth draws once for each, for its tokens and its bottleneck together.

        Returns:
            New tokens and bottleneck, in the shapes given; the old bottleneck where `need_bottleneck` is false.
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
        """Adds a residual branch, given as packed rows, to both streams."""
        split = x.numel() // x.shape[-1]
        dx, dz = rows[:split].view(x.shape), rows[split:].view(z.shape)
        factor_B = drop.draw(clips, rows) if isinstance(drop, ClipDropPath) else None
        if factor_B is not None:
            dx, dz = (_scaled(branch, factor_B) for branch in (dx, dz))
        return x + dx, z + dz

    @staticmethod
    def _add_one(x: Tensor, rows: Tensor, drop: nn.Module, clips: int) -> Tensor:
        """Adds a residual branch of tokens alone."""
        dx = rows.view(x.shape)
        factor_B = drop.draw(clips, rows) if isinstance(drop, ClipDropPath) else None
        return x + (dx if factor_B is None else _scaled(dx, factor_B))

    def flops(self, num_frames: int, num_tokens: int, num_bottleneck: int) -> int:
        """Operations of the layer for one sequence of T frames of N tokens and Z bottleneck tokens."""
        T, N, Z = num_frames, num_tokens, num_bottleneck
        if self.frames == "joint":
            T, N = 1, T * N
        copies = T if self.frames == "mean" else 1
        # A query of a frame's token sees N + Z keys; one of the bottleneck N + Z for each copy, or all T*N +
        # Z.
        keys = N + Z if self.frames == "mean" else T * N + Z
        asked = copies * Z if self.need_bottleneck else 0
        return block_flops(self, T * N + Z, T * N + asked, T * N * (N + Z) + asked * keys)


def use_bottleneck_blocks(
    tower: Tower, start: int, frames: Frames, attention: str, last_needs_bottleneck: bool
) -> None:
    """Replaces a ViT's blocks from number `start` on by `BottleneckBlock`s.

    Args:
        tower: The ViT.
        start: Number of the first block.
        frames: See `BottleneckBlock`.
        attention: Likewise.
        last_needs_bottleneck: Whether the last block's bottleneck is read.

    Raises:
        UserError: where an attention is not plain (normalised queries, a gate, dropout), naming the tower.
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
    """Names the attention of the fusion layers, and whether the recipe or a measurement chose it.

    Args:
        attention: The config's key: an implementation, or `auto`.
        tower: One whose last block is a fusion layer.
        segments: Shape of its attention for one clip.
        device: Where the model is.
        dtype: `float32` or `bfloat16`.
    """
    if attention != "auto":
        return f"PyTorch's, in fusion layers {attention} (requested)"
    block: Any = tower.blocks[-1]
    name = best(device, dtype, block.attn.head_dim, segments)
    return f"PyTorch's, in fusion layers {name} (chosen by auto)"


def _rows(x: Tensor, z: Tensor) -> Tensor:
    """Joins two streams [..., D] as rows [R, D], tokens first."""
    return torch.cat([x.flatten(0, -2), z.flatten(0, -2)])


def _scaled(branch: Tensor, factor_B: Tensor) -> Tensor:
    """Multiplies all rows of clip b, [B * W, ...] window by window, with its factor."""
    factor = factor_B.repeat_interleave(branch.shape[0] // factor_B.shape[0])
    return branch * factor.view(-1, *[1] * (branch.ndim - 1))
