"""Counts the frames and samples of a media file by decoding all of it, because headers are often wrong or incomplete.

A data set is therefore decoded completely once, when it is indexed. Of 18 real videos, the frame count of the header
was missing in five (Matroska, WebM, MPEG-TS) and wrong in one (AVI: 98 instead of 96). The number of packets equals the
number of frames in undamaged files, but it does not give the number of samples: the first packet of AAC, Vorbis and MP3
yields no samples or half of them, and edit lists and skip counts remove more. Counting packets also misses damage: a
file of 30 packets decodes to 26 frames and an error. FFmpeg conceals some damage and only sets a flag on the decoded
frame. Decoding finds all of this and takes as long as one epoch. It cannot find a gap that FFmpeg's Matroska reader
skips without an error.

Times are FFmpeg's presentation times. Second 0 of a file is its first presented frame, or its first sample if it has no
video. `MediaInfo.cut` defines how a span of seconds becomes frames and samples; decoders count in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import av.container
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from numpy.typing import NDArray

from fastav.core.errors import MediaError
from fastav.media.open_file import TIME_TOLERANCE_S, explain_error, first_stream, frame_times_s, open_media, open_mel
from fastav.media.still_picture import open_picture, rgb_of

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MEL_SUFFIXES = frozenset({".npy"})


GAP_TOLERANCE_S = 0.05
LONGEST_GAP_S = 10.0

# Formats whose header gives the original length of the file. For others, FFmpeg estimates it from the remaining data.
_STATES_ITS_LENGTH = frozenset({"matroska,webm", "wav", "w64", "flac", "avi", "aiff"})
_EXIF_ORIENTATION = 0x0112
_ANGLE_TOLERANCE_DEG = 1.0


@dataclass(frozen=True)
class Span:
    """The frames and samples of a span of seconds. The names are those of `fastav.data.clip.Clip`.

    Attributes:
        start_frame: First frame, in presentation order, counted from the first frame of the file.
        num_frames: Number of frames.
        start_sample: First sample, counted from the first sample of the stream; negative if the audio starts later than
            the span, which then begins with silence.
        num_samples: Number of samples, including silence at the start.
    """

    start_frame: int
    num_frames: int
    start_sample: int
    num_samples: int


@dataclass(frozen=True)
class MediaInfo:
    """Contents of a media file.

    Attributes:
        has_video: Whether the file has frames. A still picture counts as one frame; cover art does not count.
        has_audio: Whether the file has samples or is a stored spectrogram.
        num_frames: Number of frames presented when the file is decoded from start to end.
        fps: `num_frames / duration_s`, Hz; 0 for a still picture and for files without video.
        width: Width of the upright picture, pixels as stored (a sample aspect ratio is not applied).
        height: Height of the upright picture, pixels.
        rotation: Clockwise rotation that makes frames upright, degrees: 0, 90, 180 or 270.
        mirrored: 1 if frames must also be mirrored left to right, after the rotation; 0 otherwise.
        video_codec: FFmpeg's codec name, such as `h264`.
        pix_fmt: FFmpeg's pixel format name, such as `yuv420p`.
        duration_s: Time from the first frame to the end of the last one, seconds; without video, length of the audio.
        frame_times_s: Presentation times relative to the first frame, seconds, float64 [num_frames], not descending.
        num_samples: Number of samples per channel at `sample_rate`, including silence that fills gaps of the stream.
        sample_rate: Sample rate of the decoded audio, Hz.
        channels: Number of channels of the decoded audio; C of a stored spectrogram.
        audio_codec: FFmpeg's codec name, such as `aac`.
        audio_offset_s: Time of the first sample minus time of the first frame, seconds; 0 if either is missing.
        mel_bands: Number of mel bands M of a stored spectrogram.
        num_mel_frames: Length L of a stored spectrogram, mel frames.
    """

    has_video: bool = False
    has_audio: bool = False
    num_frames: int = 0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    rotation: int = 0
    mirrored: int = 0
    video_codec: str = ""
    pix_fmt: str = ""
    duration_s: float = 0.0
    frame_times_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    num_samples: int = 0
    sample_rate: int = 0
    channels: int = 0
    audio_codec: str = ""
    audio_offset_s: float = 0.0
    mel_bands: int = 0
    num_mel_frames: int = 0

    def cut(self, start_s: float = 0.0, duration_s: float | None = None) -> Span:
        """Returns the frames and samples with `start_s <= time < start_s + duration_s`.

        A frame belongs to the span that contains its presentation time. So adjacent spans share no frame and lose no
        frame, also if the frame rate varies. Samples are cut at the nearest sample and end with the stream.

        Args:
            start_s: Start of the span, seconds.
            duration_s: Length of the span, seconds; None for the rest of the file.
        """
        end_s = self.duration_s if duration_s is None else start_s + duration_s
        first, last = np.searchsorted(self.frame_times_s, np.array([start_s, end_s]) - TIME_TOLERANCE_S)
        begin = round((start_s - self.audio_offset_s) * self.sample_rate)
        end = min(round((end_s - self.audio_offset_s) * self.sample_rate), self.num_samples)
        samples = end - begin if end > 0 else 0
        return Span(int(first), int(last - first), begin if samples > 0 else 0, max(samples, 0))


def probe(path: Path, streams: Sequence[str] = ("video", "audio"), *, threads: int = 1) -> MediaInfo:
    """Decodes a video or audio file from start to end and returns its contents.

    Args:
        path: The file.
        streams: Streams to decode: "video", "audio" or both. Faults in other streams are not found.
        threads: Number of threads per decoder.

    Raises:
        MediaError: The file cannot be opened, is truncated, has a frame or packet that cannot be decoded without
            errors, changes its picture size, sample rate or number of channels, or has no frames and no samples.
    """
    with open_media(path) as container:
        chosen = [first_stream(container, kind, path) for kind in ("video", "audio") if kind in streams]
        counters: dict[int, _VideoCounter | _AudioCounter] = {}
        for stream in filter(None, chosen):
            stream.codec_context.thread_count = threads
            kind = _VideoCounter if stream.type == "video" else _AudioCounter
            counters[stream.index] = kind(path, stream)
        end_s = _decode_all(path, container, counters)
        _refuse_cut_short(path, container, end_s)
        info = MediaInfo()
        for counter in counters.values():
            info = counter.add_to(info)
        starts = [counter.start_s() for counter in counters.values()]
    if info.has_video and info.has_audio and starts[0] is not None and starts[1] is not None:
        info = replace(info, audio_offset_s=starts[1] - starts[0])
    if not (info.has_video or info.has_audio):
        raise MediaError(path, f"has no {' and no '.join(streams)}", "probe")
    return info


def probe_image(path: Path) -> MediaInfo:
    """Decodes a still picture completely, which finds truncated files. Its size is that after EXIF orientation.

    Raises:
        MediaError: The file is missing, truncated or not a picture.
    """
    with open_picture(path) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        height, width, _ = rgb_of(image).shape
        codec, mode = (image.format or "").lower(), image.mode
    rotation = {3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}.get(orientation, 0)
    times = np.zeros(1)
    return MediaInfo(
        has_video=True, num_frames=1, width=width, height=height, rotation=rotation, video_codec=codec, pix_fmt=mode,
        frame_times_s=times,
    )  # fmt: skip


def probe_mel(path: Path) -> MediaInfo:
    """Reads the header of a stored spectrogram, `.npy` float32 [C, M, L].

    Raises:
        MediaError: The file is missing, truncated or pickled, or its array has another shape or type.
    """
    mel_CML = open_mel(path)
    channels, bands, length = mel_CML.shape
    return MediaInfo(has_audio=True, channels=channels, mel_bands=bands, num_mel_frames=length)


def upright_orientation(frame: av.VideoFrame, path: Path) -> tuple[int, int]:
    """Returns how a frame must be turned to be upright, according to its display matrix.

    The matrix maps the pixel (x, y) to (a x + c y, b x + d y), y downwards (ISO/IEC 14496-12, 8.2.2). Scales are
    ignored, like sample aspect ratios.

    Args:
        frame: The first frame of a stream.
        path: Its file, for errors.

    Returns:
        The clockwise rotation in degrees (0, 90, 180 or 270), and 1 if the picture must then be mirrored left to right,
        otherwise 0.

    Raises:
        MediaError: The matrix turns by another angle than a multiple of 90 degrees, or is not invertible.
    """
    side_data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if side_data is None:
        return 0, 0
    a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].astype(np.float64).tolist()
    if not a * d - b * c:
        raise MediaError(path, "its display matrix is not invertible", "video")
    mirrored = int(a * d - b * c < 0)
    if mirrored:
        a, c = -a, -c
    angle_deg, other_deg = (math.degrees(math.atan2(y, x)) for x, y in ((a, b), (d, -c)))
    rotation = round(angle_deg / 90) * 90
    if max(abs(angle_deg - rotation), abs((other_deg - rotation + 180) % 360 - 180)) > _ANGLE_TOLERANCE_DEG:
        reason = f"its display matrix turns the picture by {angle_deg:.0f} degrees, expected a multiple of 90"
        raise MediaError(path, reason, "video")
    return rotation % 360, mirrored


class SampleClock:
    """Converts timestamps of decoded audio frames into sample numbers. The first sample of the stream has number 0.

    If the timestamp of a frame differs by at most 50 ms from the end of the previous frame, the frames are adjacent
    (Matroska rounds timestamps to 1 ms, and live recordings have jitter). A longer gap of up to 10 s becomes silence,
    as in a player, so that the audio stays in sync with the video. Longer jumps, and jumps backwards, are treated as
    wrong timestamps: the frames are then adjacent, too.

    Args:
        rate: Sample rate, Hz.
        time_base: Unit of the timestamps, seconds.
        start_pts: Timestamp of the first sample of the stream.
        position: Number of the next sample; None to take it from the timestamp of the next frame (after a seek).
    """

    def __init__(self, rate: int, time_base: Fraction, start_pts: int | None, position: int | None = 0) -> None:
        self.rate, self.position = rate, position
        # Samples per unit of a timestamp, as a fraction. Plain integers, because this runs for every packet.
        self._scale, self._divisor = time_base.numerator * rate, time_base.denominator
        self._origin = start_pts
        self._shift = 0
        self._gap, self._longest = GAP_TOLERANCE_S * rate, LONGEST_GAP_S * rate

    def place(self, frame: av.AudioFrame) -> int:
        """Returns the number of the first sample of a frame, and moves the position to the end of the frame."""
        start = self._start(frame)
        self.position = start + frame.samples
        return start

    def _start(self, frame: av.AudioFrame) -> int:
        if frame.pts is None or self._origin is None:
            return self.position or 0
        stated = round((frame.pts - self._origin) * self._scale / self._divisor) + self._shift
        if self.position is None:
            return stated
        gap = stated - self.position
        if self._gap < gap <= self._longest:
            return stated
        if abs(gap) > self._gap:
            self._shift -= gap
        return self.position


class _VideoCounter:
    """Counts the frames of a stream and records their timestamps."""

    def __init__(self, path: Path, stream: Any) -> None:
        self.path, self.stream = path, stream
        self.pts: list[int | None] = []
        self.first: av.VideoFrame | None = None
        self.last_duration = 0

    def add(self, frame: av.VideoFrame) -> None:
        self.pts.append(frame.pts)
        self.last_duration = frame.duration or 0
        if self.first is None:
            self.first = frame
        elif (frame.width, frame.height) != (self.first.width, self.first.height):
            sizes = f"{self.first.width}x{self.first.height} to {frame.width}x{frame.height}"
            raise MediaError(self.path, f"its picture size changes from {sizes} {self.position}", "video")

    @property
    def position(self) -> str:
        return f"after {len(self.pts)} good frames"

    def add_to(self, info: MediaInfo) -> MediaInfo:
        if self.first is None:
            raise MediaError(self.path, "has a video stream without frames", "video")
        times, duration_s = self._times()
        rotation, mirrored = upright_orientation(self.first, self.path)
        width, height = self.first.width, self.first.height
        if rotation % 180:
            width, height = height, width
        return replace(
            info,
            has_video=True,
            num_frames=len(times),
            fps=len(times) / duration_s,
            width=width,
            height=height,
            rotation=rotation,
            mirrored=mirrored,
            video_codec=self.stream.codec_context.codec.canonical_name,
            pix_fmt=self.first.format.name,
            duration_s=duration_s,
            frame_times_s=times,
        )

    def start_s(self) -> float | None:
        """Returns the presentation time of the first frame in the time of the container; None if unknown."""
        return float(self.pts[0] * self.stream.time_base) if self.pts and self.pts[0] is not None else None

    def _times(self) -> tuple[NDArray[np.float64], float]:
        """Returns the times relative to the first frame, and the end of the last frame, seconds.

        If timestamps are missing or descending, frames are placed at equal intervals of the stream's frame rate.
        """
        stream, count = self.stream, len(self.pts)
        known = [pts for pts in self.pts if pts is not None]
        if len(known) == count and all(a <= b for a, b in pairwise(known)):
            length: float = known[-1] - known[0]
            end = length + (self.last_duration or length / max(count - 1, 1))
            if end > 0:
                times = frame_times_s(np.array(known), known[0], stream.time_base)
                return times, end * stream.time_base.numerator / stream.time_base.denominator
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        return np.arange(count) / rate, count / rate


class _AudioCounter:
    """Counts the samples of a stream, including gaps between its timestamps."""

    def __init__(self, path: Path, stream: Any) -> None:
        self.path, self.stream = path, stream
        self.clock: SampleClock | None = None
        self.start_pts: int | None = None
        self.channels = 0

    def add(self, frame: av.AudioFrame) -> None:
        if self.clock is None:
            self.start_pts, self.channels = frame.pts, frame.layout.nb_channels
            self.clock = SampleClock(frame.sample_rate, self.stream.time_base, frame.pts)
        if (frame.sample_rate, frame.layout.nb_channels) != (self.clock.rate, self.channels):
            old = f"{self.clock.rate} Hz, {self.channels} channels"
            new = f"{frame.sample_rate} Hz, {frame.layout.nb_channels} channels"
            raise MediaError(self.path, f"its audio changes from {old} to {new} {self.position}", "audio")
        self.clock.place(frame)

    @property
    def num_samples(self) -> int:
        return 0 if self.clock is None else self.clock.position or 0

    @property
    def position(self) -> str:
        return f"after {self.num_samples} good samples"

    def start_s(self) -> float | None:
        """Returns the presentation time of the first sample in the time of the container; None if unknown."""
        return None if self.start_pts is None else float(self.start_pts * self.stream.time_base)

    def add_to(self, info: MediaInfo) -> MediaInfo:
        if self.clock is None or not self.num_samples:
            return info
        seconds = self.num_samples / self.clock.rate
        return replace(
            info,
            has_audio=True,
            num_samples=self.num_samples,
            sample_rate=self.clock.rate,
            channels=self.channels,
            audio_codec=self.stream.codec_context.codec.canonical_name,
            duration_s=info.duration_s if info.has_video else seconds,
        )


def _decode_all(path: Path, container: Any, counters: dict[int, _VideoCounter | _AudioCounter]) -> float:
    """Decodes the streams and counts their frames. Returns the end time of the last packet of all streams, seconds."""
    end_s, stage = 0.0, "probe"
    counter: _VideoCounter | _AudioCounter | None = None
    try:
        for packet in container.demux():
            stream = packet.stream
            if packet.size and packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * stream.time_base))
            counter = counters.get(stream.index)
            if counter is None:
                continue
            stage = stream.type
            if packet.is_corrupt and not _is_streamed_wave(path):
                raise MediaError(path, f"has a damaged or truncated packet {counter.position}", stage)
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise MediaError(path, f"has damaged data {counter.position}", stage)
                counter.add(frame)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        position = "" if counter is None else counter.position
        raise MediaError(path, f"{explain_error(error, path)} {position}", stage) from error
    return end_s


def _is_streamed_wave(path: Path) -> bool:
    """Returns True for a WAV file whose header gives no length, as written to a pipe; it always looks truncated."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    at = head.find(b"data", 12)
    if head[:4] != b"RIFF" or at < 0:
        return False
    size = int.from_bytes(head[at + 4 : at + 8], "little")
    return size == 0 or size >= 0x7FFFF000


def _refuse_cut_short(path: Path, container: Any, end_s: float) -> None:
    """Raises an error if the length in the header exceeds that of the packets by far, as after an aborted download.

    MP4 needs no such check, because FFmpeg reports the missing bytes. MPEG-TS, MP3 and Ogg give no length.
    """
    if container.format.name not in _STATES_ITS_LENGTH or not container.duration:
        return
    stated_s = container.duration / av.time_base
    if stated_s - end_s > max(0.5, 0.05 * stated_s):
        reason = f"is truncated: its header gives {stated_s:.1f} s, its data ends at {end_s:.1f} s"
        raise MediaError(path, reason, "probe")
