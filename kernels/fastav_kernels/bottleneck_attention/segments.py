"""What attends what: the segments of a packed matrix of rows, and the checks of what comes in."""

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
        clips: C, at least 1.
        num_frames: T of a clip, at least 1.
        num_tokens: N of a frame, at least 1.
        num_bottleneck: Z of a clip; 0 for plain attention.
        frames: How frames meet.
        need_bottleneck: Whether the bottleneck's own result is wanted; its keys and values are seen either way.
    """

    clips: int
    num_frames: int
    num_tokens: int
    num_bottleneck: int
    frames: Frames
    need_bottleneck: bool = True

    @property
    def alone(self) -> bool:
        """Whether a clip is one sequence, so that this is plain attention."""
        return self.frames == "joint" or self.num_frames == 1

    @property
    def token_rows(self) -> int:
        """Rows of tokens, C*T*N: the bottleneck's first row."""
        return self.clips * self.num_frames * self.num_tokens

    @property
    def in_rows(self) -> int:
        """Rows of the packed matrix."""
        return self.token_rows + self.clips * self.num_bottleneck

    @property
    def out_rows(self) -> int:
        """Rows of the output."""
        copies = self.num_frames if self.frames == "mean" else 1
        return self.token_rows + (self.clips * copies * self.num_bottleneck if self.need_bottleneck else 0)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that meet: the work is 4 d of them a head forward, 10 d backward."""
        T, N, Z = self.num_frames, self.num_tokens, self.num_bottleneck
        if self.frames == "joint":
            T, N = 1, T * N
        keys = T * (N + Z) if self.frames == "mean" else T * N + Z
        return self.clips * (T * N * (N + Z) + (Z * keys if self.need_bottleneck else 0))

    def check(self, qkv: Tensor) -> None:
        """Raises ValueError where sizes are impossible or the matrix is not of them."""
        if self.frames not in KINDS:
            raise ValueError(f'frames "{self.frames}" is unknown; there is: {", ".join(KINDS)}')
        if min(self.clips, self.num_frames, self.num_tokens) < 1 or self.num_bottleneck < 0:
            raise ValueError(
                f"clips {self.clips}, num_frames {self.num_frames}, num_tokens {self.num_tokens} must be at least 1 "
                f"and num_bottleneck {self.num_bottleneck} at least 0"
            )
        if qkv.ndim != 4 or qkv.shape[0] != self.in_rows or qkv.shape[1] != 3:
            raise ValueError(f"qkv is {list(qkv.shape)}; [{self.in_rows}, 3, heads, head_dim] expected")
        if not qkv.is_floating_point():
            raise ValueError(f"qkv is {qkv.dtype}; a floating dtype expected")
