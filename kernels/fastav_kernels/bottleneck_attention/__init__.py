"""Attention of frames that exchange information through bottleneck tokens, on one packed matrix of q, k and v rows.

Rows of the packed input, C clips of T frames of N tokens and Z bottleneck tokens each:

    0 ... C*T*N           token (clip c, frame t, token n) is row (c*T + t)*N + n
    C*T*N ... + C*Z       bottleneck (clip c, token z) is row C*T*N + c*Z + z

so that one matrix product makes all rows and none is ever copied. Which rows attend to which:

| `frames` | tokens of a frame attend to | bottleneck tokens attend to | bottleneck rows of the output |
|---|---|---|---|
| `joint` | all tokens of the clip, the bottleneck | the same | C*Z |
| `shared` | their own frame, the bottleneck | all tokens of the clip, the bottleneck | C*Z |
| `mean` | their own frame, the bottleneck | one copy per frame: that frame, the bottleneck | C*T*Z |

With one frame all three are the same. `mean` returns one copy of the bottleneck per frame, in row
C*T*N + (c*T + t)*Z + z. The caller averages them at the end of the layer (in SSW60 frames pass a layer one by one).
If the bottleneck's result is not needed, as in the last layer, `need_bottleneck=False` leaves out its rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastav_kernels.bottleneck_attention.composed import flex, masked, sdpa
from fastav_kernels.bottleneck_attention.op import kernel
from fastav_kernels.bottleneck_attention.plans import architecture_of, read_plans
from fastav_kernels.bottleneck_attention.reference import reference
from fastav_kernels.bottleneck_attention.segments import Frames, Segments

__all__ = ["IMPLEMENTATIONS", "Frames", "Segments", "best", "bottleneck_attention"]

IMPLEMENTATIONS: dict[str, Callable[[Tensor, Segments], Tensor]] = {
    "flex": flex,
    "masked": masked,
    "reference": reference,
    "sdpa": sdpa,
    "triton": kernel,
}


def bottleneck_attention(
    qkv: Tensor,
    *,
    clips: int,
    num_frames: int,
    num_tokens: int,
    num_bottleneck: int,
    frames: Frames,
    need_bottleneck: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Computes softmax(q k^T / sqrt(d)) v over the rows that each row attends to (see the module's table).

    Args:
        qkv: [C*T*N + C*Z, 3, H, d] of any floating dtype: queries, keys and values of H heads, rows packed as above.
        clips: Number of clips C.
        num_frames: Frames per clip T, at least 1.
        num_tokens: Tokens per frame N, at least 1.
        num_bottleneck: Bottleneck tokens per clip Z; 0 for plain attention.
        frames: How frames and bottleneck attend to each other: `mean`, `shared` or `joint`.
        need_bottleneck: Whether to compute the result of the bottleneck rows.
        impl: One of `IMPLEMENTATIONS`, or `auto` for the one that `best` returns.

    Returns:
        [C*T*N + C*Z, H, d] with rows in the same order; with `mean` [C*T*N + C*T*Z, H, d]; without `need_bottleneck`
        [C*T*N, H, d].

    Raises:
        ValueError: `impl` or `frames` is unknown, `qkv` has another shape, or the requested implementation cannot run
            here.

    Example:
        heads = bottleneck_attention(
            qkv, clips=64, num_frames=8, num_tokens=197, num_bottleneck=4, frames="shared"
        )
    """
    segments = Segments(clips, num_frames, num_tokens, num_bottleneck, frames, need_bottleneck)
    segments.check(qkv)
    if impl == "auto":
        impl = best(str(qkv.device), str(qkv.dtype), qkv.shape[3], segments)
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(f'impl "{impl}" is unknown; expected one of: auto, {", ".join(IMPLEMENTATIONS)}')
    if impl == "triton" and (reason := _why_not(str(qkv.device), str(qkv.dtype), qkv.shape[3])):
        raise ValueError(f'impl "triton" cannot run: {reason}')
    return IMPLEMENTATIONS[impl](qkv, segments)


def best(device: str, dtype: str, head_dim: int, segments: Segments) -> str:
    """Returns what `auto` selects: `triton` where it was measured to be faster than `sdpa`, otherwise `sdpa`."""
    s = segments
    if not device.startswith("cuda") or s.alone:
        return "sdpa"
    for frames, num_frames, num_bottleneck, need_bottleneck, least, most in _wins(device, dtype, head_dim):
        same = (frames, num_frames, num_bottleneck, need_bottleneck) == (
            s.frames,
            s.num_frames,
            s.num_bottleneck,
            s.need_bottleneck,
        )
        if same and least <= s.num_tokens <= most:
            return "triton"
    return "sdpa"


@torch.compiler.assume_constant_result
def _wins(device: str, dtype: str, head_dim: int) -> tuple[tuple[str, int, int, bool, int, int], ...]:
    """Returns the shapes for which the kernels were measured to be faster on this device; a constant when compiled."""
    if _why_not(device, dtype, head_dim):
        return ()
    return tuple(
        (win.frames, win.num_frames, win.num_bottleneck, win.need_bottleneck, win.min_tokens, win.max_tokens)
        for win in read_plans(architecture_of(torch.cuda.get_device_capability(device))).wins
        if (win.head_dim, win.dtype) == (head_dim, dtype.removeprefix("torch."))
    )


@torch.compiler.assume_constant_result
def _why_not(device: str, dtype: str, head_dim: int) -> str:
    try:
        from fastav_kernels.bottleneck_attention.launch import why_not
    except ImportError as error:
        return f"the package triton cannot be imported ({error})"
    return why_not(device, dtype, head_dim)
