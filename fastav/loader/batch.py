"""Batch: what the loader hands to the model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """B clips as tensors; what is absent of a clip is filled and marked in `has_video_B` / `has_audio_B`.

    Attributes:
        frames_BTCHW: uint8; None in a run without video.
        mel_BWCML: float32 log-mel in dB; None in a run without audio.
        window_BW: bool, which windows are real; None without audio.
        targets_BK: float32 one-hot or multi-hot, before label smoothing and mixup.
        weight_B: float32 loss weight: 0 for placeholders and padding.
        has_video_B: bool.
        has_audio_B: bool.
        flip_B: bool, already applied; kept for reports.
        band_B2: int64 first masked mel band and count.
        mix_B: float32 mixup weight of the clip itself; 1 for none, also where the partner is a placeholder.
        partner_B: int64 row of the mixup partner.
        ids: Clip ids, of the planned clip also where a placeholder stands in.
        row_B: int64 manifest rows.
        sample: Global number of the first sample.
        num_broken: Clips of this batch that could not be read.
        num_unique: Distinct decoded clips (less than B with `repeat`).
    """

    frames_BTCHW: Tensor | None
    mel_BWCML: Tensor | None
    window_BW: Tensor | None
    targets_BK: Tensor
    weight_B: Tensor
    has_video_B: Tensor
    has_audio_B: Tensor
    flip_B: Tensor
    band_B2: Tensor
    mix_B: Tensor
    partner_B: Tensor
    row_B: Tensor
    ids: list[str] = field(default_factory=list)
    sample: int = 0
    num_broken: int = 0
    num_unique: int = 0

    def __len__(self) -> int:
        return len(self.weight_B)

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with every tensor on `device` (asynchronously from pinned memory)."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)
