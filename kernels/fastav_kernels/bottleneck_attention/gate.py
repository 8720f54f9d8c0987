"""Compiles the kernels of bottleneck attention as their plans say, for machines that are not here."""

from __future__ import annotations

import torch

from fastav_kernels.bottleneck_attention import triton_kernels as kernels
from fastav_kernels.bottleneck_attention.launch import BLOCK_Z, Call
from fastav_kernels.bottleneck_attention.plans import LaunchPlan
from fastav_kernels.bottleneck_attention.segments import Segments
from fastav_kernels.compile_only import Usage, compiled

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def faults(plan: LaunchPlan, architecture: str, used: Usage, dtype: torch.dtype) -> list[str]:
    """Returns what is wrong with what a kernel uses; no plan that has a fault is shipped or tuned to.

    Args:
        plan: Its tiles.
        architecture: Such as `sm_90`.
        used: As compiled.
        dtype: For which.
    """
    found = []
    if not 16 < used.registers <= 255:
        found.append(f"{used.registers} registers")
    if dtype == torch.float32:
        return found  # in float32 nobody trains by it
    if used.stack > 256:
        found.append(f"{used.stack} bytes of stack")
    if plan.kernel == "forward" and plan.head_dim == 64 and (used.registers > 128 or used.stack):
        found.append(f"{used.registers} registers and {used.stack} bytes of stack, 128 and 0 allowed")
    if architecture == "sm_90" and (not used.count("HGMMA") or used.count("HMMA")):
        found.append("products that are not those of warp groups (HGMMA)")
    return found


def usage_of(plan: LaunchPlan, architecture: str, segments: Segments, dtype: torch.dtype, heads: int = 12) -> Usage:
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


def reduction_usage(
    kernel: str, architecture: str, segments: Segments, dtype: torch.dtype, heads: int, dim: int
) -> Usage:
    """Returns what a kernel uses that adds up the parts of frames: `merge_parts` or `sum_parts`."""
    call = Call(segments, heads, dim, dtype)
    types = dict.fromkeys(("out", "dqkv"), _TYPES[dtype])
    types |= dict.fromkeys(("part_out", "part_lse", "lse", "parts"), "*fp32")
    types |= dict.fromkeys(("first", "num_out"), "i32")
    function = getattr(kernels, kernel)
    constants = {"H": heads, "D": dim, "Z": call.bottleneck, "FRAMES": call.frames, "BLOCK_Z": BLOCK_Z}
    constants |= {"QUERIES": call.queries} if kernel == "sum_parts" else {}
    told = {name: kind for name, kind in types.items() if name in function.arg_names}
    return compiled(function, told, constants, architecture, num_warps=1, num_stages=1)
