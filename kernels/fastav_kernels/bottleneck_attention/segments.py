"""Sizes of a packed matrix of rows, which define what attends to what, and the checks of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Frames = Literal["mean", "shared", "joint"]

KINDS: tuple[Frames, ...] = ("mean", "shared", "joint")


@dataclass(frozen=True, slots=True)
class Segments:
    """Sizes of a packed matrix.

    Attributes:
        clips: Number of clips C, at least 1.
        num_frames: Frames per clip T, at least 1.
        num_tokens: Tokens per frame N, at least 1.
        num_bottleneck: Bottleneck tokens per clip Z; 0 for plain attention.
        frames: How frames and bottleneck attend to each other: `mean`, `shared` or `joint`.
        need_bottleneck: Whether the result of the bottleneck rows is computed. Its keys and values are always used.
    """

    clips: int
    num_frames: int
    num_tokens: int
    num_bottleneck: int
    frames: Frames
    need_bottleneck: bool = True

    @property
    def alone(self) -> bool:
        """Whether a clip is a single sequence, so that this is plain attention."""
        return self.frames == "joint" or self.num_frames == 1

    @property
    def token_rows(self) -> int:
        """Number of token rows, C*T*N; also the index of the first bottleneck row."""
        return self.clips * self.num_frames * self.num_tokens

    @property
    def in_rows(self) -> int:
        """Number of rows of the packed matrix."""
        return self.token_rows + self.clips * self.num_bottleneck

    @property
    def out_rows(self) -> int:
        """Number of rows of the output."""
        copies = self.num_frames if self.frames == "mean" else 1
        return self.token_rows + (self.clips * copies * self.num_bottleneck if self.need_bottleneck else 0)

    @property
    def pairs(self) -> int:
        """Number of query-key pairs. Each takes 4 d operations per head in the forward pass, 10 d in the backward."""
        T, N, Z = self.num_frames, self.num_tokens, self.num_bottleneck
        if self.frames == "joint":
            T, N = 1, T * N
        keys = T * (N + Z) if self.frames == "mean" else T * N + Z
        return self.clips * (T * N * (N + Z) + (Z * keys if self.need_bottleneck else 0))

    def check(self, qkv: Tensor) -> None:
        """Raises a ValueError if sizes are out of range or the matrix does not have this shape and a floating dtype."""
        if self.frames not in KINDS:
            raise ValueError(f'frames "{self.frames}" is unknown; expected one of: {", ".join(KINDS)}')
        if min(self.clips, self.num_frames, self.num_tokens) < 1 or self.num_bottleneck < 0:
            raise ValueError(
                f"got clips {self.clips}, num_frames {self.num_frames}, num_tokens {self.num_tokens}, which must be at "
                f"least 1, and num_bottleneck {self.num_bottleneck}, which must be at least 0"
            )
        if qkv.ndim != 4 or qkv.shape[0] != self.in_rows or qkv.shape[1] != 3:
            raise ValueError(f"qkv has shape {list(qkv.shape)}, expected [{self.in_rows}, 3, heads, head_dim]")
        if not qkv.is_floating_point():
            raise ValueError(f"qkv has dtype {qkv.dtype}, expected a floating dtype")
