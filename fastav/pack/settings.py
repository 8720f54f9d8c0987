"""Settings of a pack: presets, picture sizes and rates."""

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
"""Width and height of packed video are multiples of this, the size of a macroblock, so that the coded size equals the
displayed size. DALI's decoder cache, and splicing into decoders of a fixed size, depend on it."""

ASPECTS = (1.0, 9 / 8, 5 / 4, 4 / 3, 3 / 2, 13 / 8, 16 / 9, 2.0, 2.2, 2.4)
"""Aspect ratios of packed video, longer over shorter side. Portrait video uses the same ratios, height over width."""

_SMALLEST_SIDE = 48  # NVDEC decodes H.264 of 48 x 16 pixels or more
_BYTES_PER_S = 90_000  # of video at the default size; used to plan shards, so it affects only their number
_BYTES_PER_SAMPLE = 1.2
_BYTES_PER_PICTURE = 40_000
_BYTES_PER_MEL_FRAME = 512


class Preset(Config, frozen=True):
    """Settings of the video encoder.

    Attributes:
        gop: Number of frames per group of pictures (GOP); 1 makes every frame a keyframe.
        crf: Constant rate factor of x264.
    """

    gop: PositiveInt
    crf: NonNegativeFloat


PRESETS = {
    "small": Preset(gop=8, crf=24.0),
    "balanced": Preset(gop=4, crf=24.0),
    "fast": Preset(gop=1, crf=23.0),
}
"""Presets by name. Longer GOPs give smaller files; shorter GOPs decode faster."""


class PackSettings(Config, frozen=True):
    """All settings that determine the content of a pack, apart from the manifest.

    Attributes:
        preset: Name of an entry of `PRESETS`. It has no effect on `mjpeg` video, which has no GOPs, but packs with
            different presets still count as different packs.
        codec: Video codec: `h264`, or `mjpeg` for readers that cannot decode H.264.
        fps: Maximum frame rate, Hz; clips with a lower frame rate keep theirs. 0 keeps the frame rate of every clip.
        short_side: Maximum length of the shorter side, pixels. Smaller pictures are not enlarged, except that video
            has at least 48 pixels.
        audio: `mono` mixes the audio to one channel at `sample_rate`; `keep` keeps its channels and sample rate.
        sample_rate: Sample rate of packed audio if `audio` is `mono`, Hz: that of the spectrogram.
        shard_mib: Approximate size of a shard, MiB.
        shuffle: If True, clips are shuffled within their split, so that reading in order already mixes classes.
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
        """Returns width and height of packed video: the size in `ASPECTS` with the nearest aspect ratio.

        The picture is stretched to this size, without cropping or padding. For ratios within the range of `ASPECTS`,
        the stretch is a few percent.
        """
        short = max(min(self.short_side, min(width, height)) // SIDE_STEP * SIDE_STEP, _SMALLEST_SIDE)
        ratio = max(width, height) / min(width, height)
        aspect = min(ASPECTS, key=lambda a: abs(math.log(a / ratio)))
        long = round(short * aspect / SIDE_STEP) * SIDE_STEP
        return (long, short) if width >= height else (short, long)

    def picture_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns width and height of a packed still picture: shorter side at most `short_side`, same aspect ratio."""
        scale = min(1.0, self.short_side / min(width, height))
        return max(round(width * scale), 1), max(round(height * scale), 1)

    def frame_rate(self, clip: Clip) -> float:
        """Returns the constant frame rate of a clip's packed video, Hz.

        The clip's own frame rate is its number of frames divided by its duration.
        """
        own = clip.num_frames / clip.duration_s if clip.duration_s > 0 else clip.fps or 25.0
        return self.fps if 0 < self.fps < own else own

    def estimated_bytes(self, column: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Returns the approximate packed size of clips, bytes, from manifest columns alone, for planning shards.

        Args:
            column: Numeric columns of a manifest by name, [N] each.
        """
        still_N = (column["num_frames"] == 1) & (column["fps"] == 0)
        video_N = (column["num_frames"] > 0) & ~still_N
        samples_N = column["num_samples"] * column["channels"]
        if self.audio == "mono":
            samples_N = column["num_samples"] / np.maximum(column["sample_rate"], 1) * self.sample_rate
        picture_bytes_N = column["duration_s"] * video_N * _BYTES_PER_S + still_N * _BYTES_PER_PICTURE
        return picture_bytes_N + samples_N * _BYTES_PER_SAMPLE + column["num_mel_frames"] * _BYTES_PER_MEL_FRAME
