"""Bottleneck attention composed of PyTorch's own attention functions.

The kernels are measured against these; they are used where the kernels are not faster.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastav_kernels.bottleneck_attention.reference import allowed, by_clip, to_rows
from fastav_kernels.bottleneck_attention.segments import Segments


def sdpa(qkv: Tensor, segments: Segments) -> Tensor:
    """Computes `bottleneck_attention` by one SDPA call, or two for `shared`; copies the bottleneck to each frame."""
    T, N, Z = segments.num_frames, segments.num_tokens, segments.num_bottleneck
    if segments.frames == "joint":
        T, N = 1, T * N
    first = segments.token_rows
    tokens = qkv[:first].unflatten(0, (segments.clips, T, N)).permute(3, 0, 1, 4, 2, 5)
    queries = tokens[0].flatten(0, 1)
    if not Z:
        keys, values = tokens[1:].flatten(1, 2)
        return scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(0, 1)
    bottleneck = qkv[first:].unflatten(0, (segments.clips, Z)).permute(2, 0, 3, 1, 4)
    # Each frame with a copy of the bottleneck: [3, C, T, H, N + Z, d]. Queries are concatenated only for a single call.
    copies = bottleneck.unsqueeze(2).expand(-1, -1, T, -1, -1, -1)
    if segments.need_bottleneck and (segments.frames != "shared" or T == 1):
        q, k, v = torch.cat([tokens, copies], dim=4).flatten(1, 2)
        out_tokens, out_bottleneck = scaled_dot_product_attention(q, k, v).split([N, Z], dim=2)
    else:
        keys, values = torch.cat([tokens[1:], copies[1:]], dim=4).flatten(1, 2)
        out_tokens = scaled_dot_product_attention(queries, keys, values)
        if not segments.need_bottleneck:
            return out_tokens.transpose(1, 2).flatten(0, 1)
        # Keys and values of all tokens of the clip, and of the bottleneck: [2, C, H, T*N + Z, d].
        keys, values = torch.cat([tokens[1:].transpose(2, 3).flatten(3, 4), bottleneck[1:]], dim=3)
        out_bottleneck = scaled_dot_product_attention(bottleneck[0], keys, values)
    return torch.cat([out_tokens.transpose(1, 2).flatten(0, 1), out_bottleneck.transpose(1, 2).flatten(0, 1)])


def masked(qkv: Tensor, segments: Segments) -> Tensor:
    """Computes `bottleneck_attention` by one SDPA call of the whole clip with a dense mask."""
    q, k, v = by_clip(qkv, segments)
    return to_rows(scaled_dot_product_attention(q, k, v, attn_mask=allowed(segments, qkv.device)), segments)


def flex(qkv: Tensor, segments: Segments) -> Tensor:
    """Computes `bottleneck_attention` by FlexAttention, compiled on a GPU (uncompiled it materialises all scores)."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = by_clip(qkv, segments)
    attend: Any = _compiled_flex() if qkv.is_cuda else flex_attention
    return to_rows(attend(q, k, v, block_mask=_block_mask(segments, str(qkv.device))), segments)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # once per shape: dynamic shapes are slower


_MASKS: dict[tuple[Segments, str], Any] = {}


def _block_mask(segments: Segments, device: str) -> Any:
    """Returns the block mask of a clip from a cache: creating it costs more than using it.

    The cache is a plain dictionary because a compiled model reads it once, while tracing. A function cached by
    `functools.cache` would be traced through, and create the mask again in every step.
    """
    mask = _MASKS.get((segments, device))
    if mask is None:
        mask = _MASKS[segments, device] = _make_block_mask(segments, device)
    return mask


def _make_block_mask(segments: Segments, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    pairs = allowed(segments, torch.device(device))

    def may_attend(b: Any, h: Any, query: Any, key: Any) -> Any:
        return pairs[query, key]

    queries, keys = pairs.shape
    return create_block_mask(may_attend, None, None, queries, keys, device=device)
