"""The specification of bottleneck attention: PyTorch's attention on the segments, cut out and joined again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def reference(qkv: Tensor, *, clips: int, num_frames: int, num_tokens: int, num_bottleneck: int, frames: str) -> Tensor:
    """As `bottleneck_attention`; runs on any device and in any floating dtype, float64 included."""
    if frames == "joint":
        num_frames, num_tokens = 1, num_frames * num_tokens
    first = clips * num_frames * num_tokens
    tokens = qkv[:first].unflatten(0, (clips, num_frames, num_tokens)).permute(3, 0, 1, 4, 2, 5)
    bottleneck = qkv[first:].unflatten(0, (clips, num_bottleneck)).permute(2, 0, 3, 1, 4)
    # A copy of the bottleneck beside each frame: [3, C, T, H, N + Z, d].
    copies = bottleneck.unsqueeze(2).expand(-1, -1, num_frames, -1, -1, -1)
    q, k, v = torch.cat([tokens, copies], dim=4).flatten(1, 2)
    if frames == "shared" and num_bottleneck:
        out_tokens = scaled_dot_product_attention(tokens[0].flatten(0, 1), k, v)
        # All tokens of the clip and the bottleneck, once: [3, C, H, T*N + Z, d].
        clip = torch.cat([tokens.transpose(2, 3).flatten(3, 4), bottleneck], dim=3)
        out_bottleneck = scaled_dot_product_attention(bottleneck[0], clip[1], clip[2])
    else:
        out = scaled_dot_product_attention(q, k, v)
        out_tokens, out_bottleneck = out.split([num_tokens, num_bottleneck], dim=2)
    return torch.cat([out_tokens.transpose(1, 2).flatten(0, 1), out_bottleneck.transpose(1, 2).flatten(0, 1)])
