"""The specification of bottleneck attention: for each query, one softmax over all keys that it attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from fastav_kernels.bottleneck_attention.segments import Segments


def reference(qkv: Tensor, segments: Segments) -> Tensor:
    """Computes `bottleneck_attention` on any device in any floating dtype; memory grows with the square of the rows."""
    q, k, v = by_clip(qkv, segments)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    weights = scores.masked_fill(~allowed(segments, qkv.device), float("-inf")).softmax(-1)
    return to_rows(weights @ v, segments)


def allowed(segments: Segments, device: torch.device) -> Tensor:
    """Returns which query of a clip attends to which key, bool [queries, keys], tokens first."""
    T, N, Z = segments.num_frames, segments.num_tokens, segments.num_bottleneck
    everything = -1  # belongs to no single frame
    frames_T = torch.arange(T, device=device)
    token_frames = frames_T.repeat_interleave(N)
    keys = torch.cat([token_frames, token_frames.new_full((Z,), everything)])
    queries = token_frames
    if segments.need_bottleneck and segments.frames == "mean":
        queries = torch.cat([token_frames, frames_T.repeat_interleave(Z)])
    elif segments.need_bottleneck:
        queries = keys
    if segments.frames == "joint":
        queries = torch.full_like(queries, everything)
    return (queries[:, None] == keys) | (queries[:, None] == everything) | (keys == everything)


def by_clip(qkv: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v as [C, H, rows of a clip, d], tokens first; with `mean`, q has one row per bottleneck copy."""
    s = segments
    tokens = qkv[: s.token_rows].unflatten(0, (s.clips, s.num_frames * s.num_tokens))
    bottleneck = qkv[s.token_rows :].unflatten(0, (s.clips, s.num_bottleneck))
    q, k, v = torch.cat([tokens, bottleneck], dim=1).permute(2, 0, 3, 1, 4)
    if not s.need_bottleneck:
        q = q[:, :, : tokens.shape[1]]
    elif s.frames == "mean":
        q = torch.cat([q, *[q[:, :, tokens.shape[1] :]] * (s.num_frames - 1)], dim=2)
    return q, k, v


def to_rows(out: Tensor, segments: Segments) -> Tensor:
    """Converts results [C, H, queries of a clip, d] to rows of the output."""
    tokens = segments.num_frames * segments.num_tokens
    rows = out.transpose(1, 2)
    return torch.cat([rows[:, :tokens].flatten(0, 1), rows[:, tokens:].flatten(0, 1)])
