"""The measured shapes, and the comparison of each implementation with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastav_kernels.bottleneck_attention import IMPLEMENTATIONS, Segments
from fastav_kernels.bottleneck_attention.reference import reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}
"""Largest relative error against float64, where it is not derived from SDPA's own error."""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of attention in a model.

    Attributes:
        name: Name of the case.
        segments: Sizes.
        heads: Number of heads H.
        dim: Head width d.
        against: Other implementations to compare with; the dense mask is left out where it would take too long.
    """

    name: str
    segments: Segments
    heads: int = 12
    dim: int = 64
    against: tuple[str, ...] = ("sdpa", "masked", "flex")

    def small(self) -> Case:
        """Returns a small version with one or two clips and two heads, for checks on any machine."""
        clips = 1 if self.segments.num_frames * self.segments.num_tokens > 1000 else 2
        return replace(self, segments=replace(self.segments, clips=clips), heads=2)

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
        """Returns random queries, keys and values that require a gradient."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.segments.in_rows, 3, self.heads, self.dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype).requires_grad_()

    @property
    def flops(self) -> float:
        """Useful operations of the forward pass; the backward pass has 2.5 times as many."""
        return 4.0 * self.dim * self.heads * self.segments.pairs

    def bytes(self, itemsize: int) -> tuple[float, float]:
        """Returns the least traffic of forward and backward pass, bytes: inputs read once, outputs written once."""
        row = self.heads * self.dim * itemsize
        qkv, out = 3 * self.segments.in_rows * row, self.segments.out_rows * row
        return qkv + out, 2 * qkv + 2 * out


CASES = (
    Case("8 frames of 197, bottleneck 4, shared", Segments(64, 8, 197, 4, "shared")),
    Case("the same in the last layer", Segments(64, 8, 197, 4, "shared", need_bottleneck=False)),
    Case("8 frames of 197, bottleneck 4, mean", Segments(64, 8, 197, 4, "mean")),
    Case("spectrogram of 201, bottleneck 4", Segments(64, 1, 201, 4, "joint"), against=("sdpa",)),
    Case("8 frames of 197, no bottleneck", Segments(64, 8, 197, 0, "shared"), against=("sdpa",)),
    Case("8 frames of 196 joint, bottleneck 4", Segments(64, 8, 196, 4, "joint"), against=("sdpa",)),
    Case("8 frames of 65, bottleneck 4, shared", Segments(64, 8, 65, 4, "shared")),
    Case("8 frames of 197, bottleneck 4, shared, heads of 32", Segments(64, 8, 197, 4, "shared"), heads=24, dim=32),
    Case("8 frames of 197, bottleneck 4, shared, heads of 128", Segments(64, 8, 197, 4, "shared"), heads=6, dim=128),
)


def implementations(case: Case, device: str) -> list[str]:
    """Returns the implementations to measure; the kernel and FlexAttention's gradient need a GPU."""
    if not device.startswith("cuda"):
        return [name for name in case.against if name != "flex"]
    return ["triton", *case.against, *(BACKENDS if case.segments.alone or not case.segments.num_bottleneck else ())]


BACKENDS = {
    "sdpa by cuDNN": SDPBackend.CUDNN_ATTENTION,
    "sdpa by FlashAttention": SDPBackend.FLASH_ATTENTION,
    "sdpa by CUTLASS": SDPBackend.EFFICIENT_ATTENTION,
}
"""Backends of SDPA, measured one by one where SDPA is a single call, to find out which one it selects."""


def implementation(name: str) -> Callable[[Tensor, Segments], Tensor]:
    """Returns an implementation by its name; those of `BACKENDS` raise an error for an unsupported shape."""
    if name not in BACKENDS:
        return IMPLEMENTATIONS[name]

    def forced(qkv: Tensor, segments: Segments) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return IMPLEMENTATIONS["sdpa"](qkv, segments)

    return forced


@dataclass(frozen=True, slots=True)
class CaseResult:
    """Errors of an implementation against float64, relative to the norm.

    Attributes:
        case: Name of the case.
        impl: Name of the implementation.
        dtype: Type, such as `bfloat16`.
        forward: Error of the output.
        backward: Error of the gradient.
        allowed: Largest error allowed for either.
        repeats: Whether two runs gave the same bits.
    """

    case: str
    impl: str
    dtype: str
    forward: float
    backward: float
    allowed: float
    repeats: bool

    @property
    def good(self) -> bool:
        """Whether both errors are allowed, and the kernel is deterministic (others need not be)."""
        return max(self.forward, self.backward) <= self.allowed and (self.repeats or self.impl != "triton")


def check(case: Case, dtype: torch.dtype, device: str) -> Iterator[CaseResult]:
    """Holds each implementation of a case, in small, against float64.

    On a GPU in half precision at most twice SDPA's own error is allowed, the rule of FlashAttention's tests.
    """
    small = case.small()
    qkv = small.inputs(dtype, device)
    exact = qkv.detach().double().requires_grad_()
    out = reference(exact, small.segments)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(device, dtype)
    (grad,) = torch.autograd.grad(out, exact, dout.double())
    errors: dict[str, tuple[float, float, bool]] = {}
    for impl in sorted(implementations(small, device), key=lambda name: name != "sdpa"):
        try:
            attend = implementation(impl)
            runs = []
            for _ in range(2):
                made = attend(qkv, small.segments)
                runs.append((made.detach(), torch.autograd.grad(made, qkv, dout)[0]))
            repeats = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
            errors[impl] = (_apart(runs[0][0], out.detach()), _apart(runs[0][1], grad), repeats)
        except Exception:  # compilers and backends raise many types; this one counts as wrong, the others continue
            errors[impl] = (float("inf"), float("inf"), False)
        allowed = TOLERANCE[dtype]
        if device.startswith("cuda") and dtype != torch.float32:
            allowed = 2 * max(errors["sdpa"][:2])
        yield CaseResult(
            case.name, impl, str(dtype).removeprefix("torch."), *errors[impl][:2], allowed, repeats=errors[impl][2]
        )


def _apart(found: Tensor, expected: Tensor) -> float:
    """Returns the relative error; infinite if a value is not finite (outputs are poisoned with NaN)."""
    if not found.isfinite().all():
        return float("inf")
    return float((found.double() - expected).norm() / expected.norm())
