"""What a pack is made of: presets, sizes, rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from fastav.core.config import Config, NonNegativeFloat, PositiveInt
from fastav.data.clip import Clip

SIDE_STEP = 16
"""Sides are multiples of a macroblock, so that what is coded is what is shown: DALI's decoder cache and splicing into
decoders of a fixed size depend on it."""

ASPECTS = (1.0, 9 / 8, 5 / 4, 4 / 3, 3 / 2, 13 / 8, 16 / 9, 2.0, 2.2, 2.4)
"""Longer over shorter side of the sizes that pictures are brought to; their mirror images are for upright ones."""

_SMALLEST_SIDE = 48  # NVDEC takes H.264 from 48 x 16 on
_BYTES_PER_S = 90_000  # of video at the default size, to plan shards with; only their number depends on it
_BYTES_PER_SAMPLE = 1.2
_BYTES_PER_PICTURE = 40_000
_BYTES_PER_MEL_FRAME = 512


class Preset(Config, frozen=True):
    """How video is coded.

    Attributes:
        gop: Frames of a group of pictures; 1 is all-intra.
        crf: x264's constant rate factor.
    """

    gop: PositiveInt
    crf: NonNegativeFloat


PRESETS = {
    "small": Preset(gop=8, crf=24.0),
    "balanced": Preset(gop=4, crf=24.0),
    "fast": Preset(gop=1, crf=23.0),
}
"""By name: smaller files with longer groups, or faster decoding with shorter ones."""


class PackSettings(Config, frozen=True):
    """Everything a pack depends on but its manifest.

    Attributes:
        preset: Name in `PRESETS`; for `mjpeg`, which has no groups, only its name counts.
        codec: `h264`, or `mjpeg` for readers without H.264.
        fps: Frame rate, Hz; 0 keeps each clip's own; clips slower than it keep theirs, too.
        short_side: Longest permitted shorter side, pixels; pictures are never enlarged.
        audio: `mono` mixes to one channel at `sample_rate`; `keep` preserves channels and rate.
        sample_rate: Hz, with `mono`: the spectrogram's.
        shard_mib: About how large a shard becomes.
        shuffle: Whether neighbours in the manifest are parted, so that reading in order already mixes classes.
    """

    preset: Literal["small", "balanced", "fast"] = "balanced"
    codec: Literal["h264", "mjpeg"] = "h264"
    fps: NonNegativeFloat = 0.0
    short_side: Annotated[int, Meta(ge=_SMALLEST_SIDE)] = 256
    audio: Literal["mono", "keep"] = "mono"
    sample_rate: PositiveInt = 16_000
    shard_mib: PositiveInt = 256
    shuffle: bool = True

    def video_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns width and height of packed video: of a few sizes, the one of the nearest aspect.

        The picture is stretched to it, by some percent within the range of `ASPECTS`; nothing is cut off or padded.
        """
        short = max(min(self.short_side, min(width, height)) // SIDE_STEP * SIDE_STEP, _SMALLEST_SIDE)
        ratio = max(width, height) / min(width, height)
        aspect = min(ASPECTS, key=lambda a: abs(math.log(a / ratio)))
        long = round(short * aspect / SIDE_STEP) * SIDE_STEP
        return (long, short) if width >= height else (short, long)

    def picture_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns width and height of packed stills: the shorter side at most `short_side`, the aspect kept."""
        scale = min(1.0, self.short_side / min(width, height))
        return max(round(width * scale), 1), max(round(height * scale), 1)

    def frame_rate(self, clip: Clip) -> float:
        """Returns the constant rate a clip's video is brought to, Hz; its own is frames over duration."""
        own = clip.num_frames / clip.duration_s if clip.duration_s > 0 else clip.fps or 25.0
        return self.fps if 0 < self.fps < own else own

    def estimated_bytes(self, column: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Returns about how large clips become, from their rows alone, so that shards can be planned beforehand.

        Args:
            column: Numeric columns of a manifest by name, [N] each.
        """
        still_N = (column["num_frames"] == 1) & (column["fps"] == 0)
        seen_N = (column["num_frames"] > 0) & ~still_N
        samples_N = column["num_samples"] * column["channels"]
        if self.audio == "mono":
            samples_N = column["num_samples"] / np.maximum(column["sample_rate"], 1) * self.sample_rate
        video_N = column["duration_s"] * seen_N * _BYTES_PER_S + still_N * _BYTES_PER_PICTURE
        return video_N + samples_N * _BYTES_PER_SAMPLE + column["num_mel_frames"] * _BYTES_PER_MEL_FRAME
