"""How near a pack's frames are to the frames they were made of."""

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
    """Luma of sampled frames against the same frames, scaled but not yet encoded.

    Attributes:
        squared_error: Mean of the squared difference over the frames, levels squared.
        ssim: Mean structural similarity (Wang et al. 2004, equation 13), 0 to 1.
        num_frames: How many.
    """

    squared_error: float
    ssim: float
    num_frames: int


def compare(
    kept: Mapping[int, NDArray[Any]], units: Sequence[tuple[bytes, UnitKind]], codec: str, height: int
) -> Quality:
    """Decodes a clip's units and compares some of its frames.

    Args:
        kept: By number, frames as they went into the encoder: planar 4:2:0, uint8 [H * 3 / 2, W].
        units: All access units of the clip.
        codec: `h264` or `mjpeg`.
        height: Rows of the luma plane.
    """
    context: Any = av.CodecContext.create(codec, "r")
    context.thread_count = 1
    errors, likenesses, number = [], [], 0
    for data in (*(unit for unit, _ in units), None):
        for frame in context.decode(None if data is None else av.Packet(data)):
            if number in kept:
                one, two = (
                    torch.from_numpy(a[:height].astype(np.float32))[None, None]
                    for a in (kept[number], frame.to_ndarray())
                )
                errors.append(float((one - two).square().mean()))
                likenesses.append(float(structural_similarity_index_measure(one, two, data_range=_PEAK)))
            number += 1
    return Quality(float(np.mean(errors)), float(np.mean(likenesses)), len(errors))


def psnr_db(squared_error: float) -> float:
    """Returns the peak signal-to-noise ratio, 10 log10(255^2 / error), dB; at most 100 for equal frames."""
    return float(min(100.0, 10 * np.log10(_PEAK**2 / max(squared_error, 1e-10))))
