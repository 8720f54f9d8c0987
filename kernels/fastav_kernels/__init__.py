"""Operations of audiovisual transformers: each with a reference in plain PyTorch that is its specification.

Nothing of `fastav` is imported here; the package can be used on its own.
"""

from __future__ import annotations

from fastav_kernels.bottleneck_attention import bottleneck_attention as bottleneck_attention

__all__ = ["bottleneck_attention"]
