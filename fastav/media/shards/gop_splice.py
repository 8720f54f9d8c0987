"""GOP splice: the few groups of pictures, and the few seconds of sound, that a plan needs."""

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
    """A stream that decodes to the wanted frames, and to those between them and their keyframes.

    Attributes:
        codec: `h264` or `mjpeg`.
        units: Access units in decoding order, which is presentation order; every run begins with a keyframe.
        keys: Which of them are keyframes.
        shown: Place among `units` of each wanted frame, ascending.
    """

    codec: str
    units: list[bytes]
    keys: list[bool]
    shown: list[int]

    @property
    def stream(self) -> bytes:
        """The units as one stream."""
        return b"".join(self.units)


@dataclass(frozen=True, slots=True)
class SplicedAudio:
    """FLAC frames that cover the wanted samples.

    Attributes:
        header: `fLaC` and STREAMINFO, of the whole clip.
        frames: FLAC frames, neighbours in the clip.
        start: Number in the clip of the first frame's first sample.
    """

    header: bytes
    frames: list[bytes]
    start: int

    @property
    def stream(self) -> bytes:
        """Header and frames as one stream."""
        return self.header + b"".join(self.frames)


@dataclass(frozen=True, slots=True)
class FetchedClip:
    """What was read of a packed clip; every unit agrees with its CRC.

    Attributes:
        frames: The video's splice; None where none was asked for or the clip is a picture.
        sound: The sound's splice; None where none was asked for or stored.
        picture: A JPEG.
        mel: A `.npy` of float32 [C, M, L].
        num_bytes: Bytes read, the table included.
    """

    frames: SplicedFrames | None = None
    sound: SplicedAudio | None = None
    picture: bytes | None = None
    mel: bytes | None = None
    num_bytes: int = 0


class ShardReader:
    """Reads packed clips; one for a process, for any number of threads.

    Args:
        reading: Where from and through which cache.
    """

    def __init__(self, reading: ShardReading) -> None:
        self.reading = reading
        self._lock = threading.Lock()
        self._opened: ShardStore | None = None

    @property
    def store(self) -> ShardStore:
        """The store behind it, opened when first used."""
        with self._lock:
            if self._opened is None:
                self._opened = self.reading.build()
            return self._opened

    def __reduce__(self) -> tuple[type[ShardReader], tuple[ShardReading]]:
        return ShardReader, (self.reading,)

    def fetch(self, clip: Clip, numbers: Sequence[int] | None, samples: tuple[int, int] | None) -> FetchedClip:
        """Reads what decoding some frames and samples needs, and nothing else but the clip's table.

        Args:
            clip: A packed row.
            numbers: Distinct ascending frame numbers; None for no video. A picture has the number 0.
            samples: First sample and the one after the last, at the packed rate; None for no sound. A stored
                spectrogram comes whole.

        Raises:
            MediaError: The shard cannot be read, or holds other bytes than were packed.
        """
        try:
            return self._fetch(clip, numbers, samples)
        except _Altered as first:
            # A cache may have kept, or a network delivered, something else than there is.
            self.store.forget(clip.shard, (clip.shard_at, clip.shard_size))
            try:
                return self._fetch(clip, numbers, samples)
            except _Altered as again:
                raise MediaError(clip.shard, str(again), "shard") from first

    def units(self, clip: Clip) -> Units:
        """Reads a clip's table; `MediaError` where it cannot be read or is another clip's."""
        return decode_table(clip, self.store.read(clip.shard, [table_place(clip)])[0])

    def _fetch(self, clip: Clip, numbers: Sequence[int] | None, samples: tuple[int, int] | None) -> FetchedClip:
        raw = self.store.read(clip.shard, [table_place(clip)])[0]
        try:
            units = decode_table(clip, raw)
        except MediaError as error:
            raise _Altered(error.reason) from error
        wanted_V = needed_units(units.kind_U[: clip.num_frames], numbers or [])
        wanted_A = clip.num_frames + needed_audio(clip, samples)
        chosen = np.concatenate([wanted_V, wanted_A]).astype(np.int64)
        data = self._read_units(clip, units, chosen)
        seen, heard = data[: len(wanted_V)], data[len(wanted_V) :]
        frames = sound = picture = mel = None
        if seen and clip.video_codec == "jpeg":
            picture = seen[0]
        elif seen:
            keys = (units.kind_U[wanted_V] == UnitKind.KEYFRAME).tolist()
            shown = np.searchsorted(wanted_V, np.asarray(numbers)).tolist()
            frames = SplicedFrames(clip.video_codec, seen, keys, shown)
        if heard and clip.num_samples:
            first = int(wanted_A[1]) - clip.num_frames - 1 if len(wanted_A) > 1 else 0
            sound = SplicedAudio(heard[0], heard[1:], first * FLAC_BLOCK)
        elif heard:
            mel = heard[0]
        return FetchedClip(frames, sound, picture, mel, len(raw) + sum(map(len, data)))

    def _read_units(self, clip: Clip, units: Units, chosen: NDArray[np.int64]) -> list[bytes]:
        """Reads units, one contiguous range a run of neighbours, and checks each."""
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
                raise _Altered(f'unit {number} of clip "{clip.id}" at byte {units.at_U[number]} was altered')
        return data


class _Altered(Exception):
    """The shard's bytes are not those that were packed."""


def needed_units(kind_N: NDArray[np.int64], numbers: Sequence[int]) -> NDArray[np.int64]:
    """Returns the frames to decode, ascending: from the keyframe of each wanted frame up to that frame.

    Args:
        kind_N: `UnitKind` of each frame of the clip.
        numbers: Wanted frames, ascending.

    Raises:
        ValueError: A number outside of the clip.
    """
    if not len(numbers):
        return np.zeros(0, np.int64)
    wanted = np.asarray(numbers, np.int64)
    if wanted[0] < 0 or wanted[-1] >= len(kind_N):
        raise ValueError(f"frames {list(numbers)} wanted of {len(kind_N)}")
    keys_K = np.flatnonzero(kind_N != UnitKind.FRAME)
    if not len(keys_K) or keys_K[0]:
        keys_K = np.concatenate([[0], keys_K])
    needed: list[int] = []
    last = -1
    for begin, end in zip(keys_K[np.searchsorted(keys_K, wanted, side="right") - 1].tolist(), numbers, strict=True):
        needed += range(max(begin, last + 1), end + 1)
        last = end
    return np.array(needed, np.int64)


def needed_audio(clip: Clip, samples: tuple[int, int] | None) -> NDArray[np.int64]:
    """Returns the sound's units that hold the samples: the header and some frames, or the stored spectrogram."""
    if samples is None or not clip.has_audio:
        return np.zeros(0, np.int64)
    if not clip.num_samples:
        return np.zeros(1, np.int64)
    first, last = max(samples[0], 0), min(samples[1], clip.num_samples)
    frames = np.arange(first // FLAC_BLOCK, -(-last // FLAC_BLOCK)) if last > first else np.zeros(0, np.int64)
    return np.concatenate([[0], 1 + frames]).astype(np.int64)
