"""Measures how close the frames of a pack are to their source frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure

from fastav.media.shards.format import UnitKind

_PEAK = 255.0


@dataclass(frozen=True, slots=True)
class Quality:
    """Difference in luma between sampled frames after encoding and the same frames, scaled, before encoding.

    Attributes:
        squared_error: Mean squared difference over the frames, levels squared.
        ssim: Mean structural similarity (Wang et al. 2004, equation 13), 0 to 1.
        num_frames: Number of compared frames.
    """

    squared_error: float
    ssim: float
    num_frames: int


def compare(
    kept: Mapping[int, NDArray[Any]], units: Sequence[tuple[bytes, UnitKind]], codec: str, height: int
) -> Quality:
    """Decodes all units of a clip and compares some of its frames.

    Args:
        kept: The frames to compare, by frame number, as given to the encoder: planar 4:2:0, uint8 [H * 3 / 2, W].
        units: All access units of the clip.
        codec: `h264` or `mjpeg`.
        height: Height of the luma plane, pixels.
    """
    context: Any = av.CodecContext.create(codec, "r")
    context.thread_count = 1
    errors, similarities, number = [], [], 0
    for data in (*(unit for unit, _ in units), None):
        for frame in context.decode(None if data is None else av.Packet(data)):
            if number in kept:
                source, packed = (
                    torch.from_numpy(a[:height].astype(np.float32))[None, None]
                    for a in (kept[number], frame.to_ndarray())
                )
                errors.append(float((source - packed).square().mean()))
                similarities.append(float(structural_similarity_index_measure(source, packed, data_range=_PEAK)))
            number += 1
    return Quality(float(np.mean(errors)), float(np.mean(similarities)), len(errors))


def psnr_db(squared_error: float) -> float:
    """Returns the peak signal-to-noise ratio, 10 log10(255^2 / error), dB, at most 100 (equal frames)."""
    return float(min(100.0, 10 * np.log10(_PEAK**2 / max(squared_error, 1e-10))))
