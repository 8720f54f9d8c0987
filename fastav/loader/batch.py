"""Batch: B clips as tensors, from the loader to the model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """A batch of B clips as tensors.

    A missing modality of a clip is filled (black frames, silence) and marked in `has_video_B` or `has_audio_B`.

    Attributes:
        frames_BTCHW: uint8 frames; None in a run without video.
        mel_BWCML: float32 log-mel spectrogram windows in dB; None in a run without audio.
        window_BW: bool, True for real windows, False for padding windows; None in a run without audio.
        targets_BK: float32 one-hot or multi-hot labels, before label smoothing and mixup.
        weight_B: float32 loss weight; 0 for placeholders and padding rows.
        has_video_B: bool, whether the clip has video.
        has_audio_B: bool, whether the clip has audio.
        flip_B: bool, whether the frames were flipped; already applied, kept for reports.
        band_B2: int64, first masked mel band and number of masked bands.
        mix_B: float32 mixup weight of the clip itself; 1 means no mixup, also where the partner is a placeholder.
        partner_B: int64, batch row of the mixup partner.
        ids: Ids of the planned clips; a placeholder keeps the id of the clip that it replaces.
        row_B: int64, manifest row of each clip.
        sample: Global index of the first sample.
        num_broken: Clips of this batch that could not be read.
        num_unique: Distinct decoded clips; less than B with `sampling.repeat` above 1.
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
        """Returns the batch with every tensor on `device`; the copy is asynchronous from pinned memory."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)
