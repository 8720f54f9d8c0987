"""Cases of bottleneck attention: packed inputs, and the float64 reference's output and gradient."""

from __future__ import annotations

import torch

from fastav_kernels.bottleneck_attention import Segments
from fastav_kernels.bottleneck_attention.reference import reference

KINDS = ("mean", "shared", "joint")


def packed(segments, heads=2, dim=4, dtype=torch.float64):
    s = segments
    generator = torch.Generator().manual_seed(
        s.clips + 10 * s.num_frames + 100 * s.num_tokens + 1000 * s.num_bottleneck
    )
    return torch.randn(s.in_rows, 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype)


def exact(qkv, segments):
    """Output and gradient in float64, and the gradient that went in."""
    qkv = qkv.double().requires_grad_()
    out = reference(qkv, segments)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(dout)
    return out.detach(), qkv.grad, dout


def words(segments):
    """The arguments of `bottleneck_attention` for some segments."""
    s = segments
    return {
        "clips": s.clips, "num_frames": s.num_frames, "num_tokens": s.num_tokens,
        "num_bottleneck": s.num_bottleneck, "frames": s.frames, "need_bottleneck": s.need_bottleneck,
    }  # fmt: skip


def error(found, expected):
    """Relative error in the norm; 0 where there is nothing."""
    if not expected.numel():
        return 0.0
    return float((found.double() - expected).norm() / expected.norm())


def small(kinds=KINDS):
    """Sizes at the edges: one token, no bottleneck, a bottleneck larger than a frame, more than one tile."""
    shapes = [(2, 3, 5, 4), (1, 1, 1, 1), (3, 1, 7, 2), (2, 4, 1, 3), (2, 3, 5, 0), (1, 2, 21, 20), (1, 3, 65, 5)]
    return [
        Segments(*shape, kind, need_bottleneck)
        for shape in shapes
        for kind in kinds
        for need_bottleneck in (True, False)
    ]
