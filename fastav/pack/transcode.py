"""From one manifest row to the members of a packed clip: every frame and sample decoded, checked, brought to size."""

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
from fastav.media.audio import Sound
from fastav.media.demux import read_media
from fastav.media.open_file import open_mel
from fastav.media.pyav import read_image
from fastav.media.shards.format import TABLE_EXTENSION, VIDEO_EXTENSIONS, Member, UnitKind, encode_table
from fastav.pack.encode import MOST_CHANNELS, Unit, VideoEncoder, encode_flac, encode_jpeg
from fastav.pack.quality import Quality, compare
from fastav.pack.settings import PackSettings

_SAMPLED_FRAMES = 4  # of a clip whose quality is looked at

MISSING = "missing"
"""Stage of a clip whose file cannot be opened now, and may be later: the file is gone, or its disk is."""

_LATER = frozenset({errno.ENOENT, errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN, errno.EMFILE, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that went into a clip.

    Attributes:
        path: As the manifest names it, or absolute.
        sha256: Of its content when it was read.
        num_bytes: Its size.
    """

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PackedClip:
    """A clip ready to be written.

    Attributes:
        clip: Its row, but for the place in a shard.
        members: Its files, in the format's order.
        units: All units in storage order, kinds only; the table has the rest.
        sources: What it was made of.
        quality: Of the re-encoded frames; None where it was not sampled or there are none.
    """

    clip: Clip
    members: list[Member]
    units: list[tuple[int, UnitKind]]
    sources: list[SourceFile]
    quality: Quality | None


@dataclass(frozen=True, slots=True)
class PackJob:
    """What is to be packed.

    Attributes:
        clip: The row.
        settings: Of the pack.
        root: Folder that recorded paths are relative to.
        sampled: Whether to compare the result with its source.
    """

    clip: Clip
    settings: PackSettings
    root: Path
    sampled: bool


def pack_clip(order: PackJob) -> PackedClip | tuple[str, str, str]:
    """Packs one clip; returns path, reason and stage where it cannot be read, as errors are not sent to processes."""
    try:
        return pack_readable(order)
    except MediaError as error:
        cause = error.__cause__
        later = isinstance(cause, OSError) and cause.errno in _LATER
        if isinstance(cause, OSError) and cause.errno == errno.EIO:
            later = not _readable(error.path)  # FFmpeg says EIO of damage, too: only the file itself can tell
        return error.path, error.reason, MISSING if later else error.stage
    except Exception as error:  # whatever it is, it is about this clip, and the others must go on
        return order.clip.source, f"{type(error).__name__}: {error}", "pack"


def _readable(path: str) -> bool:
    """Returns whether every byte of a file can be read."""
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
        MediaError: It cannot be read.
    """
    clip, settings = order.clip, order.settings
    if clip.shard:
        raise MediaError(clip.source, f'clip "{clip.id}" is packed already; pack the media it was made of', "pack")
    film = _VideoTranscoder(clip, settings, order.sampled) if clip.video is not None and clip.num_frames else None
    heard = clip.audio is not None and clip.num_samples > 0
    sound = None
    if film is not None or heard:
        sound = read_media(clip, film, heard, mixed=settings.audio == "mono")
    out = replace(
        clip, video=None, audio=None, image=None, mel=None, start_s=0.0, start_frame=0, start_sample=0, rotation=0,
        audio_offset_s=0.0, num_frames=0, num_samples=0, num_mel_frames=0,
    )  # fmt: skip
    seen: list[Unit] = []
    units: list[Unit] = []
    quality = None
    if film is not None:
        out, seen, quality = film.finish(out)
    elif clip.image is not None:
        out, seen = _still(clip, out, settings)
    if sound is not None:
        out, units = _flac(sound, out, settings)
    elif clip.mel is not None:
        out, units = _mel(clip.mel, out)
    sources = [
        SourceFile(_named(path, order.root), *_digest(path))
        for path in dict.fromkeys((clip.video, clip.audio, clip.image, clip.mel))
        if path is not None
    ]
    members = [Member(TABLE_EXTENSION, encode_table([*seen, *units]))]
    if seen:
        members.append(Member(VIDEO_EXTENSIONS[out.video_codec], b"".join(data for data, _ in seen)))
    if units:
        members.append(Member("flac" if sound is not None else "npy", b"".join(data for data, _ in units)))
    members.append(Member("json", _described(clip, out, sources)))
    return PackedClip(out, members, [(len(data), kind) for data, kind in (*seen, *units)], sources, quality)


class _VideoTranscoder:
    """Takes a clip's frames as they are decoded, brings them to a constant rate and a fixed size, and encodes them."""

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
        self._waiting: av.VideoFrame | None = None
        self._first_s: float | None = None
        self._last, self._next = -1, 0
        places = (np.arange(_SAMPLED_FRAMES) + 0.5) / _SAMPLED_FRAMES * self.total
        self._samples = set(places.astype(int).tolist()) if self.sampled else set()

    def take(self, number: int, frame: av.VideoFrame) -> None:
        """Takes the next frame of the clip; frame 0 begins anew."""
        if number <= self._last:
            self._restart()
        if number != self._last + 1:
            raise MediaError(self.clip.source, f"frame {self._last + 1} is missing", "video")
        width, height = (self.clip.width, self.clip.height)[:: -1 if self.clip.rotation % 180 else 1]
        if (frame.width, frame.height) != (width, height):
            size = f"frame {number} is {frame.width}x{frame.height}, its row says {width}x{height}"
            raise MediaError(self.clip.source, size, "video")
        if frame.is_corrupt:
            raise MediaError(self.clip.source, f"frame {number} is damaged", "video")
        self._last = number
        time_s = number / self._own_fps if frame.time is None else float(frame.time)
        self._first_s = time_s if self._first_s is None else self._first_s
        if self._waiting is not None:
            # The frame before is shown until half a tick before this one comes: the nearest frame for every tick.
            self._show(math.ceil((time_s - self._first_s) * self.fps - 0.5))
        self._waiting = frame

    def _show(self, until: int) -> None:
        """Encodes the waiting frame for every tick before `until`."""
        if self._waiting is None or self._next >= min(until, self.total):
            return
        upright = self._upright(self._waiting)
        while self._next < min(until, self.total):
            if self._next in self._samples:
                self._kept[self._next] = upright.to_ndarray()
            self._units += self._encoder.add(upright)
            self._next += 1

    def _upright(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame in the pack's size, orientation, colour matrix and range."""
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
        if not self.clip.rotation:
            return scaled
        planes = scaled.to_ndarray().reshape(-1)
        y, uv = scaled.width * scaled.height, scaled.width * scaled.height // 4
        shapes = [(scaled.height, scaled.width), *[(scaled.height // 2, scaled.width // 2)] * 2]
        parts = np.split(planes, [y, y + uv])
        quarters = -self.clip.rotation // 90
        rotated = [np.rot90(part.reshape(shape), quarters).ravel() for part, shape in zip(parts, shapes, strict=True)]
        whole = np.concatenate(rotated).reshape(height * 3 // 2, width)
        made = av.VideoFrame.from_ndarray(whole, self._encoder.pixel_format)
        made.colorspace, made.color_range = scaled.colorspace, scaled.color_range
        return made

    def finish(self, out: Clip) -> tuple[Clip, list[Unit], Quality | None]:
        """Returns the row with what the video has become, its units, and how near they are to the source."""
        self._show(self.total)
        units = self._units + self._encoder.finish()
        if self._last + 1 != self.clip.num_frames or len(units) != self.total:
            found = f"{self._last + 1} of {self.clip.num_frames} frames were decoded, {len(units)} encoded"
            raise MediaError(self.clip.source, found, "video")
        width, height = self.size
        out = replace(
            out, num_frames=len(units), fps=self.fps, width=width, height=height, video_codec=self.settings.codec
        )
        quality = compare(self._kept, units, self.settings.codec, height) if self._kept else None
        return out, units, quality


def _still(clip: Clip, out: Clip, settings: PackSettings) -> tuple[Clip, list[Unit]]:
    assert clip.image is not None, "the caller looked"
    rgb_HWC = read_image(clip.image)
    size = settings.picture_size(rgb_HWC.shape[1], rgb_HWC.shape[0])
    out = replace(out, num_frames=1, width=size[0], height=size[1], video_codec="jpeg", fps=0.0)
    return out, [(encode_jpeg(rgb_HWC, size), UnitKind.PICTURE)]


def _flac(sound: Sound, out: Clip, settings: PackSettings) -> tuple[Clip, list[Unit]]:
    keep = settings.audio == "keep"
    rate = out.sample_rate if keep else settings.sample_rate
    wave_CS = sound.wave(rate).numpy()
    if len(wave_CS) > MOST_CHANNELS:
        raise MediaError(out.source, f"has {len(wave_CS)} channels, FLAC keeps up to {MOST_CHANNELS}", "audio")
    units = encode_flac(wave_CS, rate, sound.bits)  # of quiet recordings, 16 bits would keep little
    channels, samples = wave_CS.shape
    return replace(out, num_samples=samples, sample_rate=rate, channels=channels, audio_codec="flac"), units


def _mel(path: Path, out: Clip) -> tuple[Clip, list[Unit]]:
    mel_CML = open_mel(path)
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(mel_CML), allow_pickle=False)
    out = replace(out, num_mel_frames=mel_CML.shape[2], channels=mel_CML.shape[0])
    return out, [(data.getvalue(), UnitKind.MEL)]


def _named(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


@functools.lru_cache(maxsize=1024)
def _digest(path: Path) -> tuple[str, int]:
    """Digest and size of a file; pieces of one file share them."""
    return sha256(path), path.stat().st_size


def _described(clip: Clip, out: Clip, sources: list[SourceFile]) -> bytes:
    """The clip's JSON member."""

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    told = {
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
    return json.dumps(told, ensure_ascii=False).encode()
