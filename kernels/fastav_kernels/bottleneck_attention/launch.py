"""Launches the kernels: selects them, and sets grid, tiles and buffers."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from fastav_kernels.bottleneck_attention import triton_kernels as kernels
from fastav_kernels.bottleneck_attention.plans import HEAD_DIMS, Chip, LaunchPlan, architecture_of, plan_for
from fastav_kernels.bottleneck_attention.segments import Segments

BLOCK_Z = 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(device: str, dtype: str, head_dim: int) -> str:
    """Returns why the kernels cannot run with this device, dtype and head width; empty if they can."""
    if dtype not in map(str, _DTYPES):
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, HEAD_DIMS))} channels, not {head_dim}"
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"it needs compute capability 8.0 or newer, which {torch.cuda.get_device_name(device)} does not have"
    elif not triton.knobs.runtime.interpret:
        return f"it needs an NVIDIA GPU, but the tensors are on {device}"
    return ""


def run_forward(qkv: Tensor, segments: Segments, chip: Chip | None = None) -> tuple[Tensor, Tensor]:
    """Returns the output [out rows, H, d] and its log-sum-exp, base 2, float32 [H, out rows].

    Args:
        qkv: Contiguous packed matrix that passes `Segments.check`.
        segments: Sizes of the packed matrix.
        chip: Chip whose plans are used; None for that of the device.
    """
    H, D = qkv.shape[2:]
    call, chip = Call(segments, H, D, qkv.dtype), chip or chip_of(qkv.device)
    out = qkv.new_empty(segments.out_rows, H, D)
    lse = qkv.new_empty(H, segments.out_rows, dtype=torch.float32)
    parts = (call.sequences, call.bottleneck, H, D) if call.merges else (0, 0, 0, 0)
    part_out = qkv.new_empty(parts, dtype=torch.float32)
    part_lse = qkv.new_empty(parts[:3], dtype=torch.float32)
    plan = call.require_plan("forward", chip)
    kernels.forward[(call.sequences * H * call.tiles(plan),)](
        qkv, out, lse, part_out, part_lse, call.scale, call.frames, segments.token_rows, segments.out_rows,
        call.tokens // plan.block_n, **call.constants(plan), **_options(plan),
    )  # fmt: skip
    if call.merges:
        grid = segments.clips * H * triton.cdiv(call.bottleneck, BLOCK_Z)
        kernels.merge_parts[(grid,)](
            part_out, part_lse, out, lse, segments.token_rows, segments.out_rows,
            H=H, D=D, Z=call.bottleneck, FRAMES=call.frames, BLOCK_Z=BLOCK_Z, num_warps=1,
        )  # fmt: skip
    return out, lse


def run_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, segments: Segments, chip: Chip | None = None
) -> Tensor:
    """Returns the gradient of the packed matrix, in its dtype.

    Args:
        dout: Contiguous gradient of the output.
        qkv: Input of the forward pass.
        out: Output of the forward pass.
        lse: Log-sum-exp of the forward pass.
        segments: Sizes of the packed matrix.
        chip: Chip whose plans are used; None for that of the device.
    """
    H, D = qkv.shape[2:]
    call, chip = Call(segments, H, D, qkv.dtype), chip or chip_of(qkv.device)
    dqkv = torch.empty_like(qkv)
    if call.bottleneck and not call.split and not call.queries:
        dqkv[segments.token_rows :, 0].zero_()
    parts = (call.sequences, call.bottleneck, 3, H, D) if call.split else (0,)
    sums = qkv.new_empty(parts, dtype=torch.float32)
    whole = call.plan("backward_whole", chip)
    plans = [whole] if whole else [call.require_plan(name, chip) for name in ("backward_keys", "backward_queries")]
    for plan in plans:
        getattr(kernels, plan.kernel)[(call.sequences * H * call.tiles(plan),)](
            qkv, out, dout, lse, dqkv, sums, call.scale, call.unit, call.frames, segments.token_rows,
            segments.out_rows, **call.constants(plan), **_options(plan),
        )  # fmt: skip
    if call.split:
        grid = segments.clips * 3 * H * triton.cdiv(call.bottleneck, BLOCK_Z)
        kernels.sum_parts[(grid,)](
            sums, dqkv, segments.token_rows, H=H, D=D, Z=call.bottleneck, FRAMES=call.frames, QUERIES=call.queries,
            BLOCK_Z=BLOCK_Z, num_warps=1,
        )  # fmt: skip
    return dqkv


class Call:
    """Sizes and compile-time constants of the kernels for one call.

    A clip that is a single sequence counts as one frame with all its tokens.

    Args:
        segments: Sizes of the packed matrix.
        heads: Number of heads H.
        dim: Head width d.
        dtype: Type of the packed matrix.
    """

    def __init__(self, segments: Segments, heads: int, dim: int, dtype: torch.dtype) -> None:
        self.segments, self.heads, self.dim, self.dtype = segments, heads, dim, dtype
        self.frames = 1 if segments.alone else segments.num_frames
        self.tokens = segments.num_tokens * segments.num_frames // self.frames
        self.sequences = segments.clips * self.frames
        self.bottleneck = segments.num_bottleneck
        self.queries = self.bottleneck if segments.need_bottleneck else 0
        self.keys = self.tokens + self.bottleneck
        self.split = self.bottleneck > 0 and self.frames > 1
        self.scale, self.unit = math.log2(math.e) / math.sqrt(dim), 1 / math.sqrt(dim)
        self.kind = kernels.ALONE.value
        if not segments.alone:
            self.kind = (kernels.COPIES if segments.frames == "mean" else kernels.PARTS).value
        self.merges = self.kind == kernels.PARTS.value and self.queries > 0

    def tiles(self, plan: LaunchPlan) -> int:
        """Returns the number of programs for one head of a sequence."""
        if plan.kernel == "backward_whole":
            return 1
        if plan.kernel == "backward_keys":
            return triton.cdiv(self.keys, plan.block_n)
        return triton.cdiv(self.tokens + self.queries, plan.block_m)

    def constants(self, plan: LaunchPlan) -> dict[str, Any]:
        """Returns the compile-time constants of a kernel."""
        constants: dict[str, Any] = {
            "H": self.heads, "D": self.dim, "N": self.tokens, "Z": self.bottleneck, "QUERIES": self.queries,
            "KIND": self.kind, "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32", "BLOCK_M": plan.block_m,
        }  # fmt: skip
        if plan.kernel == "forward":
            left = self.keys - self.tokens // plan.block_n * plan.block_n
            tail = min(plan.block_n, max(16, triton.next_power_of_2(left)))  # 16: the fewest columns of a tensor core
            constants |= {"TAIL": tail, "TRIPS": not triton.knobs.runtime.interpret}
        else:
            constants |= {"SPLIT": self.split}
        if plan.kernel == "backward_whole":
            return constants | {"KEYS": plan.block_n}
        return constants | {"BLOCK_N": plan.block_n, "TILES": self.tiles(plan)}

    def plan(self, kernel: str, chip: Chip) -> LaunchPlan | None:
        """Returns the plan of a kernel; None if there is none."""
        return plan_for(kernel, chip, self.dim, self.dtype.itemsize, self.keys)

    def require_plan(self, kernel: str, chip: Chip) -> LaunchPlan:
        """Returns the plan of a kernel for which every file has plans for any sequence length."""
        plan = self.plan(kernel, chip)
        assert plan is not None, f"no plan of {kernel} for heads of {self.dim} in {self.dtype} on {chip}"
        return plan


def chip_of(device: torch.device) -> Chip:
    """Returns the chip of a device; the interpreter uses the plans of sm_90."""
    if device.type != "cuda":
        return Chip("sm_90")
    properties: Any = torch.cuda.get_device_properties(device)
    return Chip(architecture_of((properties.major, properties.minor)), properties.shared_memory_per_block_optin)


def _options(plan: LaunchPlan) -> dict[str, int]:
    return {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
