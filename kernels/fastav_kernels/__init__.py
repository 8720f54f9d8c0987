"""Operations for audiovisual transformers, each with a plain PyTorch reference that is its specification.

The package does not import `fastav` and can be used on its own.
"""

from __future__ import annotations

from fastav_kernels.bottleneck_attention import bottleneck_attention as bottleneck_attention

__all__ = ["bottleneck_attention"]
