"""Attention of frames that meet in bottleneck tokens, on one packed matrix of query, key and value rows.

Rows of the packed input, C clips of T frames of N tokens and Z bottleneck tokens each:

    0 ... C*T*N           token (clip c, frame t, token n) is row (c*T + t)*N + n
    C*T*N ... + C*Z       bottleneck (clip c, token z) is row C*T*N + c*Z + z

so that a projection that makes it is a single matrix product and no row is ever moved. What attends what:

| `frames` | tokens of a frame see | bottleneck tokens see | bottleneck rows of the output |
|---|---|---|---|
| `joint` | all tokens of the clip, the bottleneck | the same | C*Z |
| `shared` | their own frame, the bottleneck | all tokens of the clip, the bottleneck | C*Z |
| `mean` | their own frame, the bottleneck | one copy per frame: that frame, the bottleneck | C*T*Z |

With one frame all three are the same. `mean` returns the copies, row C*T*N + (c*T + t)*Z + z of each: they are
averaged by the caller, after whatever else the layer does to them (SSW60's frames, which pass a layer one by one).
Where nobody reads the bottleneck's result, as in the last layer, it need not be asked for: no such rows come out.
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
    """Computes softmax(q k^T / sqrt(d)) v over the segments that each row may see (table at the top).

    Args:
        qkv: [C*T*N + C*Z, 3, H, d] of any floating dtype: queries, keys and values of H heads, packed as
            above.
        clips: C.
        num_frames: T, at least 1.
        num_tokens: N tokens of a frame, at least 1.
        num_bottleneck: Z, 0 for plain attention.
        frames: Which segments there are.
        need_bottleneck: Whether the bottleneck's own result is wanted.
        impl: One of `IMPLEMENTATIONS`, or `auto` for the best one here (`best`).

    Returns:
        [C*T*N + C*Z, H, d] in the same order of rows; with `mean` [C*T*N + C*T*Z, H, d]; without the
        bottleneck's result [C*T*N, H, d].

    Raises:
        ValueError: where `impl` or `frames` is unknown, `qkv` does not have the rows that it should, or a forced
            implementation cannot run, with the reason.
    """
    segments = Segments(clips, num_frames, num_tokens, num_bottleneck, frames, need_bottleneck)
    segments.check(qkv)
    if impl == "auto":
        impl = best(str(qkv.device), str(qkv.dtype), qkv.shape[3], segments)
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(f'impl "{impl}" is unknown; there is: auto, {", ".join(IMPLEMENTATIONS)}')
    if impl == "triton" and (reason := _why_not(str(qkv.device), str(qkv.dtype), qkv.shape[3])):
        raise ValueError(f'impl "triton" cannot run: {reason}')
    return IMPLEMENTATIONS[impl](qkv, segments)


def best(device: str, dtype: str, head_dim: int, segments: Segments) -> str:
    """Returns what `auto` stands for: `triton` where it was measured to be faster than `sdpa`, which it is else."""
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
    """What was measured for such numbers on such a device, where the kernels can run; constant to a compiler."""
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
