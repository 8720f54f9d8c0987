"""GOP splice: reads only the groups of pictures (GOPs) and the audio frames of a packed clip that a plan needs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.media.shards.byte_ranges import ShardStore
from fastav.media.shards.format import FLAC_BLOCK, UnitKind, Units, decode_table, table_place, unit_crc
from fastav.media.shards.store_config import ShardReading


@dataclass(frozen=True, slots=True)
class SplicedFrames:
    """A video stream that decodes to the requested frames, and to the frames between each of them and its keyframe.

    Attributes:
        codec: `h264` or `mjpeg`.
        units: Access units in decoding order, which is presentation order. Each run of consecutive frames begins with
            a keyframe.
        keys: For each unit, True if it is a keyframe.
        shown: Index in `units` of each requested frame, ascending.
    """

    codec: str
    units: list[bytes]
    keys: list[bool]
    shown: list[int]

    @property
    def stream(self) -> bytes:
        """All units as one byte stream."""
        return b"".join(self.units)


@dataclass(frozen=True, slots=True)
class SplicedAudio:
    """FLAC frames that contain the requested samples.

    Attributes:
        header: `fLaC` and STREAMINFO of the whole clip.
        frames: Consecutive FLAC frames of the clip.
        start: Index in the clip of the first sample of `frames`.
    """

    header: bytes
    frames: list[bytes]
    start: int

    @property
    def stream(self) -> bytes:
        """Header and frames as one byte stream."""
        return self.header + b"".join(self.frames)


@dataclass(frozen=True, slots=True)
class FetchedClip:
    """Data read from a packed clip. The CRC of every unit has been checked.

    Attributes:
        frames: Splice of the video; None if no video was requested or the clip is a picture.
        audio: Splice of the audio; None if no audio was requested or stored.
        picture: Content of a JPEG file; None if the clip is not a picture or no frame was requested.
        mel: Content of a `.npy` file, float32 [C, M, L]; None if no spectrogram was requested or stored.
        num_bytes: Number of bytes read, including the table.
    """

    frames: SplicedFrames | None = None
    audio: SplicedAudio | None = None
    picture: bytes | None = None
    mel: bytes | None = None
    num_bytes: int = 0


class ShardReader:
    """Reads packed clips. Each process needs one reader for all its threads.

    Args:
        reading: Settings for reading shards, including the cache.
    """

    def __init__(self, reading: ShardReading) -> None:
        self.reading = reading
        self._lock = threading.Lock()
        self._opened: ShardStore | None = None

    @property
    def store(self) -> ShardStore:
        """Store of the shards, opened at first use."""
        with self._lock:
            if self._opened is None:
                self._opened = self.reading.build()
            return self._opened

    def __reduce__(self) -> tuple[type[ShardReader], tuple[ShardReading]]:
        return ShardReader, (self.reading,)

    def fetch(self, clip: Clip, numbers: Sequence[int] | None, samples: tuple[int, int] | None) -> FetchedClip:
        """Reads the clip's table and the units needed to decode some frames and samples.

        Args:
            clip: Manifest row of a packed clip.
            numbers: Distinct frame numbers, ascending; None for no video. A picture has frame number 0.
            samples: First sample and end (exclusive), at the packed sample rate; None for no audio. A stored
                spectrogram is read completely.

        Raises:
            MediaError: The shard cannot be read, or its content has changed since it was packed.
        """
        try:
            return self._fetch(clip, numbers, samples)
        except _Altered as first:
            # The cache or the network may have delivered wrong bytes, so discard them and read again.
            self.store.forget(clip.shard, (clip.shard_at, clip.shard_size))
            try:
                return self._fetch(clip, numbers, samples)
            except _Altered as again:
                raise MediaError(clip.shard, str(again), "shard") from first

    def units(self, clip: Clip) -> Units:
        """Reads the table of a clip.

        Raises:
            MediaError: The table cannot be read or does not match the clip.
        """
        return decode_table(clip, self.store.read(clip.shard, [table_place(clip)])[0])

    def _fetch(self, clip: Clip, numbers: Sequence[int] | None, samples: tuple[int, int] | None) -> FetchedClip:
        raw = self.store.read(clip.shard, [table_place(clip)])[0]
        try:
            units = decode_table(clip, raw)
        except MediaError as error:
            raise _Altered(error.reason) from error
        needed_V = needed_units(units.kind_U[: clip.num_frames], numbers or [])
        needed_A = clip.num_frames + needed_audio(clip, samples)
        chosen = np.concatenate([needed_V, needed_A]).astype(np.int64)
        data = self._read_units(clip, units, chosen)
        video, audio = data[: len(needed_V)], data[len(needed_V) :]
        frames = spliced_audio = picture = mel = None
        if video and clip.video_codec == "jpeg":
            picture = video[0]
        elif video:
            keys = (units.kind_U[needed_V] == UnitKind.KEYFRAME).tolist()
            shown = np.searchsorted(needed_V, np.asarray(numbers)).tolist()
            frames = SplicedFrames(clip.video_codec, video, keys, shown)
        if audio and clip.num_samples:
            first = int(needed_A[1]) - clip.num_frames - 1 if len(needed_A) > 1 else 0
            spliced_audio = SplicedAudio(audio[0], audio[1:], first * FLAC_BLOCK)
        elif audio:
            mel = audio[0]
        return FetchedClip(frames, spliced_audio, picture, mel, len(raw) + sum(map(len, data)))

    def _read_units(self, clip: Clip, units: Units, chosen: NDArray[np.int64]) -> list[bytes]:
        """Reads units, with one byte range per contiguous run, and checks the CRC of each."""
        if not len(chosen):
            return []
        at, size = units.at_U[chosen], units.size_U[chosen]
        starts = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1] + size[:-1]]))
        bounds = [*starts.tolist(), len(chosen)]
        ranges = [(int(at[a]), int(at[b - 1] + size[b - 1] - at[a])) for a, b in pairwise(bounds)]
        runs = self.store.read(clip.shard, ranges)
        data: list[bytes] = []
        for run, (first, last) in zip(runs, pairwise(bounds), strict=True):
            begin = 0
            for length in size[first:last].tolist():
                data.append(run[begin : begin + length])
                begin += length
        kinds, crcs = units.kind_U[chosen].tolist(), units.crc_U[chosen].tolist()
        for number, unit, kind, crc in zip(chosen.tolist(), data, kinds, crcs, strict=True):
            if unit_crc(unit, kind) != crc:
                raise _Altered(f'unit {number} of clip "{clip.id}" at byte {units.at_U[number]} is damaged')
        return data


class _Altered(Exception):
    """The bytes of the shard differ from the bytes that were packed."""


def needed_units(kind_N: NDArray[np.int64], numbers: Sequence[int]) -> NDArray[np.int64]:
    """Returns the frames to decode, ascending: for each requested frame, its keyframe and all frames up to itself.

    Args:
        kind_N: `UnitKind` of each frame of the clip.
        numbers: Requested frames, ascending.

    Raises:
        ValueError: A number is outside the clip.
    """
    if not len(numbers):
        return np.zeros(0, np.int64)
    requested = np.asarray(numbers, np.int64)
    if requested[0] < 0 or requested[-1] >= len(kind_N):
        raise ValueError(f"frames must be 0 to {len(kind_N) - 1}, got {list(numbers)}")
    keys_K = np.flatnonzero(kind_N != UnitKind.FRAME)
    if not len(keys_K) or keys_K[0]:
        keys_K = np.concatenate([[0], keys_K])
    needed: list[int] = []
    last = -1
    for begin, end in zip(keys_K[np.searchsorted(keys_K, requested, side="right") - 1].tolist(), numbers, strict=True):
        needed += range(max(begin, last + 1), end + 1)
        last = end
    return np.array(needed, np.int64)


def needed_audio(clip: Clip, samples: tuple[int, int] | None) -> NDArray[np.int64]:
    """Returns which audio units contain the samples, counted from 0: header and FLAC frames, or the spectrogram."""
    if samples is None or not clip.has_audio:
        return np.zeros(0, np.int64)
    if not clip.num_samples:
        return np.zeros(1, np.int64)
    first, last = max(samples[0], 0), min(samples[1], clip.num_samples)
    frames = np.arange(first // FLAC_BLOCK, -(-last // FLAC_BLOCK)) if last > first else np.zeros(0, np.int64)
    return np.concatenate([[0], 1 + frames]).astype(np.int64)
