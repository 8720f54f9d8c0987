"""The kernels as PyTorch operators, with fake tensors for tracing and with gradients, so that graphs do not break."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastav_kernels.bottleneck_attention.segments import Frames, Segments


@torch.library.custom_op("fastav::bottleneck_attention", mutates_args=())
def forward(
    qkv: Tensor, clips: int, num_frames: int, num_tokens: int, num_bottleneck: int, frames: str, need_bottleneck: bool
) -> tuple[Tensor, Tensor]:
    """Returns output and log-sum-exp, see `launch.run_forward`."""
    from fastav_kernels.bottleneck_attention.launch import run_forward

    segments = Segments(clips, num_frames, num_tokens, num_bottleneck, cast(Frames, frames), need_bottleneck)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        return run_forward(qkv.contiguous(), segments)


@forward.register_fake
def _(
    qkv: Tensor, clips: int, num_frames: int, num_tokens: int, num_bottleneck: int, frames: str, need_bottleneck: bool
) -> tuple[Tensor, Tensor]:
    rows = Segments(clips, num_frames, num_tokens, num_bottleneck, cast(Frames, frames), need_bottleneck).out_rows
    out = qkv.new_empty(rows, qkv.shape[2], qkv.shape[3])
    return out, qkv.new_empty(qkv.shape[2], rows, dtype=torch.float32)


@torch.library.custom_op("fastav::bottleneck_attention_backward", mutates_args=())
def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor,
    clips: int, num_frames: int, num_tokens: int, num_bottleneck: int, frames: str, need_bottleneck: bool,
) -> Tensor:  # fmt: skip
    """Returns the gradient of qkv, see `launch.run_backward`."""
    from fastav_kernels.bottleneck_attention.launch import run_backward

    segments = Segments(clips, num_frames, num_tokens, num_bottleneck, cast(Frames, frames), need_bottleneck)
    with torch.cuda.device_of(qkv):
        return run_backward(dout.contiguous(), qkv.contiguous(), out, lse, segments)


@backward.register_fake
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor,
    clips: int, num_frames: int, num_tokens: int, num_bottleneck: int, frames: str, need_bottleneck: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *ctx.sizes = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 7
    qkv, out, lse = ctx.saved_tensors
    return backward(dout, qkv, out, lse, *ctx.sizes), *[None] * 6


torch.library.register_autograd("fastav::bottleneck_attention", _backward, setup_context=_keep)


def kernel(qkv: Tensor, segments: Segments) -> Tensor:
    """Computes `bottleneck_attention` by the Triton kernels."""
    s = segments
    out, _ = forward(qkv, s.clips, s.num_frames, s.num_tokens, s.num_bottleneck, s.frames, s.need_bottleneck)
    return cast(Tensor, out)
