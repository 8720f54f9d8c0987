"""Compiles the kernels of bottleneck attention with their plans, for any architecture, and checks resource limits."""

from __future__ import annotations

import torch

from fastav_kernels.bottleneck_attention import triton_kernels as kernels
from fastav_kernels.bottleneck_attention.launch import BLOCK_Z, Call
from fastav_kernels.bottleneck_attention.plans import LaunchPlan
from fastav_kernels.bottleneck_attention.segments import Segments
from fastav_kernels.compile_only import Usage, compile_kernel

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def faults(plan: LaunchPlan, architecture: str, used: Usage, dtype: torch.dtype) -> list[str]:
    """Returns the limits that a compiled kernel exceeds. Plans with faults are neither shipped nor chosen by tuning.

    Args:
        plan: Tiles of the kernel.
        architecture: Architecture, such as `sm_90`.
        used: Resources of the compiled kernel.
        dtype: Type of queries, keys and values.
    """
    found = []
    if not 16 < used.registers <= 255:
        found.append(f"{used.registers} registers")
    if dtype == torch.float32:
        return found  # float32 is not used for training
    if used.stack > 256:
        found.append(f"{used.stack} bytes of stack")
    if plan.kernel == "forward" and plan.head_dim == 64 and (used.registers > 128 or used.stack):
        found.append(f"{used.registers} registers and {used.stack} bytes of stack; expected at most 128 and 0")
    if architecture == "sm_90" and (not used.count("HGMMA") or used.count("HMMA")):
        found.append("matrix products that do not use warp groups (HGMMA)")
    return found


def usage_of(plan: LaunchPlan, architecture: str, segments: Segments, dtype: torch.dtype, heads: int = 12) -> Usage:
    """Compiles a kernel with the tiles of a plan and returns the resources that it uses."""
    call = Call(segments, heads, plan.head_dim, dtype)
    types = dict.fromkeys(("qkv", "out", "dout", "dqkv"), _TYPES[dtype])
    types |= dict.fromkeys(("lse", "part_out", "part_lse", "parts"), "*fp32")
    types |= dict.fromkeys(("scale", "unit"), "fp32") | dict.fromkeys(("frames", "first", "num_out", "trips"), "i32")
    kernel = getattr(kernels, plan.kernel)
    return compile_kernel(
        kernel,
        {name: kind for name, kind in types.items() if name in kernel.arg_names},
        call.constants(plan),
        architecture,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


def reduction_usage(
    kernel: str, architecture: str, segments: Segments, dtype: torch.dtype, heads: int, dim: int
) -> Usage:
    """Compiles a kernel that adds up partial results of frames, `merge_parts` or `sum_parts`; returns its resources."""
    call = Call(segments, heads, dim, dtype)
    types = dict.fromkeys(("out", "dqkv"), _TYPES[dtype])
    types |= dict.fromkeys(("part_out", "part_lse", "lse", "parts"), "*fp32")
    types |= dict.fromkeys(("first", "num_out"), "i32")
    function = getattr(kernels, kernel)
    constants = {"H": heads, "D": dim, "Z": call.bottleneck, "FRAMES": call.frames, "BLOCK_Z": BLOCK_Z}
    constants |= {"QUERIES": call.queries} if kernel == "sum_parts" else {}
    argument_types = {name: kind for name, kind in types.items() if name in function.arg_names}
    return compile_kernel(function, argument_types, constants, architecture, num_warps=1, num_stages=1)
