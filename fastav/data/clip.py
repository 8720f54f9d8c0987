"""The shared data types: `Clip` (a manifest row) and `ClipPlan` (what to read from it and how to augment it).

Shape letters, used as suffixes in tensor code (`frames_BTCHW`):

    B clips in a batch      T frames of a clip      C channels      H, W height, width (W after B: audio windows)
    S audio samples         M mel bands             L mel frames    K classes
    N tokens                D width of a token      Z bottleneck tokens
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Modality = Literal["video", "audio"]


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of a manifest: a span of a media file, its probed properties and its labels.

    Attributes:
        id: Unique within the manifest.
        row: Row number in the manifest it was read from.
        video: File with the video stream; None without video.
        audio: File with the audio stream (the same container as `video` for most clips); None without audio.
        image: A still picture, treated as a video of one frame; excludes `video`.
        mel: A stored spectrogram, `.npy` float32 [C, M, L]; excludes `audio`.
        shard: Absolute path or URL of the tar shard that holds a packed clip; empty for other clips. A packed clip
            has no other path.
        shard_at: Byte offset in the shard of the tar header of the clip's first member.
        shard_size: Size in bytes of all members of the clip in the shard, headers and padding included.
        start_s: Start of the span in the file, in seconds from the first presented frame (without video: from the
            first sample).
        duration_s: Length of the span in seconds.
        start_frame: First frame of the span, counted in presentation order from the file's first frame.
        num_frames: Number of frames in the span; 1 for an image; 0 without video.
        fps: Mean frame rate of the stream, Hz; 0 without video.
        width: Width of the upright picture (after `rotation`), pixels.
        height: Height of the upright picture (after `rotation`), pixels.
        rotation: Clockwise rotation in degrees that makes decoded frames upright: 0, 90, 180 or 270.
        mirrored: 1 if the frames must also be mirrored left to right, after the rotation; 0 otherwise.
        video_codec: FFmpeg's name of the video codec, such as `h264`.
        start_sample: First audio sample of the span, counted at `sample_rate` from the stream's first sample.
        num_samples: Audio samples per channel in the span at `sample_rate`; 0 without audio.
        sample_rate: Sample rate of the stored audio, Hz; 0 without audio.
        channels: Number of channels of the stored audio.
        audio_codec: FFmpeg's name of the audio codec, such as `aac`.
        audio_offset_s: Time of the first audio sample minus time of the first frame in the file, seconds.
        num_mel_frames: Length L of a stored spectrogram in mel frames; 0 otherwise.
        labels: Class names; exactly one for single-label tasks.
        split: Name of the split, such as `train` or `test`.
        group: Name of a unit that must stay within one split (a recorder, a recording); empty for none.
        weight: Sample weight that the data set gives the clip.
        lat: Latitude in degrees; NaN if unknown.
        lon: Longitude in degrees; NaN if unknown.
    """

    id: str
    row: int = 0
    video: Path | None = None
    audio: Path | None = None
    image: Path | None = None
    mel: Path | None = None
    shard: str = ""
    shard_at: int = 0
    shard_size: int = 0
    start_s: float = 0.0
    duration_s: float = 0.0
    start_frame: int = 0
    num_frames: int = 0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    rotation: int = 0
    mirrored: int = 0
    video_codec: str = ""
    start_sample: int = 0
    num_samples: int = 0
    sample_rate: int = 0
    channels: int = 0
    audio_codec: str = ""
    audio_offset_s: float = 0.0
    num_mel_frames: int = 0
    labels: tuple[str, ...] = ()
    split: str = "train"
    group: str = ""
    weight: float = 1.0
    lat: float = float("nan")
    lon: float = float("nan")

    @property
    def has_video(self) -> bool:
        """Whether the clip has a video stream or an image."""
        return self.num_frames > 0

    @property
    def has_audio(self) -> bool:
        """Whether the clip has an audio stream or a stored spectrogram."""
        return self.num_samples > 0 or self.num_mel_frames > 0

    @property
    def source(self) -> str:
        """The file to name in messages about the clip."""
        return str(self.video or self.image or self.audio or self.mel or self.shard or self.id)


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """What to read from one clip and how to crop, flip, window, mask and mix it: one row of a `PlanBatch`.

    Attributes:
        sample: Global number of the sample since the start of training; -1 for a padding row of an evaluation batch.
        source: Number of the manifest among the mixed ones; 0 with a single manifest.
        row: Row in that manifest.
        replica: Number of the augmentation among the `repeat` ones that share one decode.
        frames_T: Frame numbers within the clip's span, ascending in presentation order, int32; repeats are allowed.
        crop: x, y, width, height in upright pixels (float).
        flip: Whether to flip horizontally after the crop.
        windows_W: First mel frame of each audio window, int32; -1 marks a window that does not fit (masked).
        band: First masked mel band and number of masked bands; (0, 0) for none.
        mix: Weight of the clip itself in mixup; 1 without mixup. The partner has weight 1 - mix.
        partner: Row of the mixup partner within the same batch.
        weight: Weight of the sample in the loss; 0 for padding.
    """

    sample: int
    source: int
    row: int
    replica: int
    frames_T: NDArray[np.int32]
    crop: tuple[float, float, float, float]
    flip: bool
    windows_W: NDArray[np.int32]
    band: tuple[int, int]
    mix: float
    partner: int
    weight: float


@dataclass(frozen=True, slots=True)
class PlanBatch:
    """The plans of B consecutive samples as arrays, with the fields of `ClipPlan`; indexing gives one `ClipPlan`."""

    sample_B: NDArray[np.int64]
    source_B: NDArray[np.int64]
    row_B: NDArray[np.int64]
    replica_B: NDArray[np.int64]
    frames_BT: NDArray[np.int32]
    crop_B4: NDArray[np.float32]
    flip_B: NDArray[np.bool_]
    windows_BW: NDArray[np.int32]
    band_B2: NDArray[np.int32]
    mix_B: NDArray[np.float32]
    partner_B: NDArray[np.int64]
    weight_B: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.sample_B)

    def __getitem__(self, i: int) -> ClipPlan:
        x, y, w, h = (float(v) for v in self.crop_B4[i])
        return ClipPlan(
            sample=int(self.sample_B[i]),
            source=int(self.source_B[i]),
            row=int(self.row_B[i]),
            replica=int(self.replica_B[i]),
            frames_T=self.frames_BT[i],
            crop=(x, y, w, h),
            flip=bool(self.flip_B[i]),
            windows_W=self.windows_BW[i],
            band=(int(self.band_B2[i, 0]), int(self.band_B2[i, 1])),
            mix=float(self.mix_B[i]),
            partner=int(self.partner_B[i]),
            weight=float(self.weight_B[i]),
        )

    def __iter__(self) -> Iterator[ClipPlan]:
        return (self[i] for i in range(len(self)))
