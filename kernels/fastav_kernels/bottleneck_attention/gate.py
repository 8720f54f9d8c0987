"""Compiles the kernels of bottleneck attention as their plans say, for machines that are not here."""

from __future__ import annotations

import torch

from fastav_kernels.bottleneck_attention import triton_kernels as kernels
from fastav_kernels.bottleneck_attention.launch import Call
from fastav_kernels.bottleneck_attention.plans import Plan
from fastav_kernels.bottleneck_attention.segments import Segments
from fastav_kernels.compile_only import Usage, compiled

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def usage_of(plan: Plan, architecture: str, segments: Segments, dtype: torch.dtype, heads: int = 12) -> Usage:
    """Returns what a kernel uses when it is cut as a plan says."""
    call = Call(segments, heads, plan.head_dim, dtype)
    types = dict.fromkeys(("qkv", "out", "dout", "dqkv"), _TYPES[dtype])
    types |= dict.fromkeys(("lse", "part_out", "part_lse", "parts"), "*fp32")
    types |= dict.fromkeys(("scale", "unit"), "fp32") | dict.fromkeys(("frames", "first", "num_out", "trips"), "i32")
    kernel = getattr(kernels, plan.kernel)
    return compiled(
        kernel,
        {name: kind for name, kind in types.items() if name in kernel.arg_names},
        call.constants(plan),
        architecture,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
