"""Packs one manifest row: decodes and checks every frame and sample, and encodes them at the pack's size and rate."""

from __future__ import annotations

import errno
import functools
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from fastav.core.atomic_files import sha256
from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.media.audio import AudioReader
from fastav.media.demux import read_media
from fastav.media.open_file import open_mel
from fastav.media.pyav import read_image
from fastav.media.shards.format import TABLE_EXTENSION, VIDEO_EXTENSIONS, Member, UnitKind, encode_table
from fastav.pack.encode import MOST_CHANNELS, Unit, VideoEncoder, encode_flac, encode_jpeg
from fastav.pack.quality import Quality, compare
from fastav.pack.settings import PackSettings

_SAMPLED_FRAMES = 4  # number of compared frames of a clip whose quality is measured

MISSING = "missing"
"""Stage of a skipped clip whose file cannot be read now but may be readable later: the file or its disk is missing."""

_RETRY = frozenset({errno.ENOENT, errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN, errno.EMFILE, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A source file of a clip.

    Attributes:
        path: Path relative to the root of the manifest, or absolute for a file outside it.
        sha256: SHA-256 of the file when the clip was packed.
        num_bytes: Size of the file, bytes.
    """

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PackedClip:
    """A clip ready to be written.

    Attributes:
        clip: Manifest row of the packed clip, without its position in a shard.
        members: Files of the clip, in the order of the shard format.
        units: Size in bytes and kind of all units, in storage order.
        sources: Source files of the clip.
        quality: Quality of the re-encoded frames; None if it was not measured or the clip has no video.
    """

    clip: Clip
    members: list[Member]
    units: list[tuple[int, UnitKind]]
    sources: list[SourceFile]
    quality: Quality | None


@dataclass(frozen=True, slots=True)
class PackJob:
    """A clip to pack.

    Attributes:
        clip: Manifest row of the source clip.
        settings: Settings of the pack.
        root: Root of the manifest; recorded paths are relative to it.
        sampled: Whether to measure the quality of the re-encoded frames.
    """

    clip: Clip
    settings: PackSettings
    root: Path
    sampled: bool


def pack_clip(order: PackJob) -> PackedClip | tuple[str, str, str]:
    """Packs one clip. On an error, returns path, reason and stage: an exception would end the whole run."""
    try:
        return pack_readable(order)
    except MediaError as error:
        cause = error.__cause__
        temporary = isinstance(cause, OSError) and cause.errno in _RETRY
        if isinstance(cause, OSError) and cause.errno == errno.EIO:
            # FFmpeg also reports EIO for a damaged file, so check the file itself.
            temporary = not _readable(error.path)
        return error.path, error.reason, MISSING if temporary else error.stage
    except Exception as error:  # an error in one clip must not stop the others
        return order.clip.source, f"{type(error).__name__}: {error}", "pack"


def _readable(path: str) -> bool:
    """Returns True if every byte of a file can be read."""
    try:
        with Path(path).open("rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def pack_readable(order: PackJob) -> PackedClip:
    """Packs one clip.

    Raises:
        MediaError: The clip cannot be read.
    """
    clip, settings = order.clip, order.settings
    if clip.shard:
        raise MediaError(clip.source, f'clip "{clip.id}" is already packed; pack the original media instead', "pack")
    video = _VideoTranscoder(clip, settings, order.sampled) if clip.video is not None and clip.num_frames else None
    with_audio = clip.audio is not None and clip.num_samples > 0
    audio = None
    if video is not None or with_audio:
        audio = read_media(clip, video, with_audio, mono=settings.audio == "mono")
    out = replace(
        clip, video=None, audio=None, image=None, mel=None, start_s=0.0, start_frame=0, start_sample=0, rotation=0,
        mirrored=0, audio_offset_s=0.0, num_frames=0, num_samples=0, num_mel_frames=0,
    )  # fmt: skip
    video_units: list[Unit] = []
    audio_units: list[Unit] = []
    quality = None
    if video is not None:
        out, video_units, quality = video.finish(out)
    elif clip.image is not None:
        out, video_units = _still(clip, out, settings)
    if audio is not None:
        out, audio_units = _flac(audio, out, settings)
    elif clip.mel is not None:
        out, audio_units = _mel(clip.mel, out)
    sources = [
        SourceFile(_recorded_path(path, order.root), *_digest(path))
        for path in dict.fromkeys((clip.video, clip.audio, clip.image, clip.mel))
        if path is not None
    ]
    units = [*video_units, *audio_units]
    members = [Member(TABLE_EXTENSION, encode_table(units))]
    if video_units:
        members.append(Member(VIDEO_EXTENSIONS[out.video_codec], b"".join(data for data, _ in video_units)))
    if audio_units:
        members.append(Member("flac" if audio is not None else "npy", b"".join(data for data, _ in audio_units)))
    members.append(Member("json", _clip_json(clip, out, sources)))
    return PackedClip(out, members, [(len(data), kind) for data, kind in units], sources, quality)


class _VideoTranscoder:
    """Converts the decoded frames of a clip to a constant frame rate and a fixed size, and encodes them."""

    def __init__(self, clip: Clip, settings: PackSettings, sampled: bool) -> None:
        self.clip, self.settings, self.sampled = clip, settings, sampled
        self.numbers = list(range(clip.num_frames))
        self.fps = settings.frame_rate(clip)
        own = clip.num_frames / clip.duration_s if clip.duration_s > 0 else self.fps
        self.total = clip.num_frames if self.fps == own else max(1, round(clip.duration_s * self.fps))
        self.size = settings.video_size(clip.width, clip.height)
        self._own_fps, self._reformatter = own, VideoReformatter()
        self._restart()

    def _restart(self) -> None:
        self._encoder = VideoEncoder(self.settings, *self.size, self.fps)
        self._units: list[Unit] = []
        self._kept: dict[int, Any] = {}
        self._pending: av.VideoFrame | None = None
        self._first_s: float | None = None
        self._last, self._next = -1, 0
        ticks = (np.arange(_SAMPLED_FRAMES) + 0.5) / _SAMPLED_FRAMES * self.total
        self._compared = set(ticks.astype(int).tolist()) if self.sampled else set()

    def take(self, number: int, frame: av.VideoFrame) -> None:
        """Accepts the next frame of the clip. Frame 0 restarts the clip."""
        if number <= self._last:
            self._restart()
        if number != self._last + 1:
            raise MediaError(self.clip.source, f"frame {self._last + 1} is missing", "video")
        width, height = (self.clip.width, self.clip.height)[:: -1 if self.clip.rotation % 180 else 1]
        if (frame.width, frame.height) != (width, height):
            size = f"frame {number} is {frame.width}x{frame.height}, expected {width}x{height} as in the manifest"
            raise MediaError(self.clip.source, size, "video")
        if frame.is_corrupt:
            raise MediaError(self.clip.source, f"frame {number} is damaged", "video")
        self._last = number
        time_s = number / self._own_fps if frame.time is None else float(frame.time)
        self._first_s = time_s if self._first_s is None else self._first_s
        if self._pending is not None:
            # The previous frame fills all ticks up to half a tick before this one, so each tick gets the nearest frame.
            self._encode_until(math.ceil((time_s - self._first_s) * self.fps - 0.5))
        self._pending = frame

    def _encode_until(self, until: int) -> None:
        """Encodes the pending frame for every tick before `until`."""
        if self._pending is None or self._next >= min(until, self.total):
            return
        upright = self._upright(self._pending)
        while self._next < min(until, self.total):
            if self._next in self._compared:
                self._kept[self._next] = upright.to_ndarray()
            self._units += self._encoder.add(upright)
            self._next += 1

    def _upright(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Returns the frame upright, in the size, colour matrix and colour range of the pack."""
        width, height = self.size
        turned = self.clip.rotation % 180
        full = self._encoder.pixel_format == "yuvj420p"
        scaled = self._reformatter.reformat(
            frame,
            *((height, width) if turned else (width, height)),
            format=self._encoder.pixel_format,
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )
        if not self.clip.rotation and not self.clip.mirrored:
            return scaled
        planes = scaled.to_ndarray().reshape(-1)
        y, uv = scaled.width * scaled.height, scaled.width * scaled.height // 4
        shapes = [(scaled.height, scaled.width), *[(scaled.height // 2, scaled.width // 2)] * 2]
        parts = np.split(planes, [y, y + uv])
        quarters = -self.clip.rotation // 90
        rotated = [np.rot90(part.reshape(shape), quarters) for part, shape in zip(parts, shapes, strict=True)]
        if self.clip.mirrored:
            rotated = [part[:, ::-1] for part in rotated]
        whole = np.concatenate([part.ravel() for part in rotated]).reshape(height * 3 // 2, width)
        upright = av.VideoFrame.from_ndarray(whole, self._encoder.pixel_format)
        upright.colorspace, upright.color_range = scaled.colorspace, scaled.color_range
        return upright

    def finish(self, out: Clip) -> tuple[Clip, list[Unit], Quality | None]:
        """Returns the row updated with the packed video, its units, and their quality if it was measured."""
        self._encode_until(self.total)
        units = self._units + self._encoder.finish()
        if self._last + 1 != self.clip.num_frames or len(units) != self.total:
            found = f"decoded {self._last + 1} of {self.clip.num_frames} frames, encoded {len(units)} of {self.total}"
            raise MediaError(self.clip.source, found, "video")
        width, height = self.size
        out = replace(
            out, num_frames=len(units), fps=self.fps, width=width, height=height, video_codec=self.settings.codec
        )
        quality = compare(self._kept, units, self.settings.codec, height) if self._kept else None
        return out, units, quality


def _still(clip: Clip, out: Clip, settings: PackSettings) -> tuple[Clip, list[Unit]]:
    assert clip.image is not None, "checked by the caller"
    rgb_HWC = read_image(clip.image)
    size = settings.picture_size(rgb_HWC.shape[1], rgb_HWC.shape[0])
    out = replace(out, num_frames=1, width=size[0], height=size[1], video_codec="jpeg", fps=0.0)
    return out, [(encode_jpeg(rgb_HWC, size), UnitKind.PICTURE)]


def _flac(audio: AudioReader, out: Clip, settings: PackSettings) -> tuple[Clip, list[Unit]]:
    keep = settings.audio == "keep"
    rate = out.sample_rate if keep else settings.sample_rate
    wave_CS = audio.waveform(rate).numpy()
    if len(wave_CS) > MOST_CHANNELS:
        raise MediaError(out.source, f"has {len(wave_CS)} channels, FLAC supports at most {MOST_CHANNELS}", "audio")
    # `bits` is 24 for sources with more than 16 bits, because 16 bits keep little of a quiet recording.
    units = encode_flac(wave_CS, rate, audio.bits)
    channels, samples = wave_CS.shape
    return replace(out, num_samples=samples, sample_rate=rate, channels=channels, audio_codec="flac"), units


def _mel(path: Path, out: Clip) -> tuple[Clip, list[Unit]]:
    mel_CML = open_mel(path)
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(mel_CML), allow_pickle=False)
    out = replace(out, num_mel_frames=mel_CML.shape[2], channels=mel_CML.shape[0])
    return out, [(data.getvalue(), UnitKind.MEL)]


def _recorded_path(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


@functools.lru_cache(maxsize=1024)
def _digest(path: Path) -> tuple[str, int]:
    """Returns SHA-256 and size of a file. Cached, because many clips may be pieces of one file."""
    return sha256(path), path.stat().st_size


def _clip_json(clip: Clip, out: Clip, sources: list[SourceFile]) -> bytes:
    """Returns the content of the clip's JSON member."""

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    description = {
        "id": out.id,
        "labels": list(out.labels),
        "split": out.split,
        "group": out.group,
        "weight": out.weight,
        "lat": known(out.lat),
        "lon": known(out.lon),
        "duration_s": out.duration_s,
        "num_frames": out.num_frames,
        "fps": out.fps,
        "width": out.width,
        "height": out.height,
        "num_samples": out.num_samples,
        "sample_rate": out.sample_rate,
        "channels": out.channels,
        "source": {
            "start_s": clip.start_s,
            "width": clip.width,
            "height": clip.height,
            "fps": clip.fps,
            "video_codec": clip.video_codec,
            "audio_codec": clip.audio_codec,
            "sample_rate": clip.sample_rate,
            "files": [{"path": s.path, "sha256": s.sha256, "bytes": s.num_bytes} for s in sources],
        },
    }
    return json.dumps(description, ensure_ascii=False).encode()
