"""The shard format: tar files that any WebDataset reader takes as they are, and a table of units in front of each clip.

A clip is a run of members that share a key (a zero-padded number), in this order, those that it has:

    KEY.idx.npy   uint32 [U, 3]: the clip's units in storage order: size in bytes, kind, CRC-32 begun at the kind
    KEY.h264      the video as access units one after the other (Annex B: delimiter, parameter sets at keyframes);
                  or KEY.mjpeg, JPEG pictures one after the other; or KEY.jpg, a still picture
    KEY.flac      the sound; its first unit is the stream's header, each other one a FLAC frame of `FLAC_BLOCK` samples;
                  or KEY.npy, a stored spectrogram
    KEY.json      what the clip is: id, labels, split, source files with digests, sizes and rates

A manifest row tells the shard, where in it the clip's first member begins, and how many frames and samples there are.
From these follows how long the table is, and from the table where every frame of video and sound is, so one small read
finds any frame of any clip of any number of clips, with no index to load. Headers are plain USTAR: 512 bytes a member.
"""

from __future__ import annotations

import functools
import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastav.core.errors import MediaError
from fastav.data.clip import Clip

FORMAT_VERSION = 2
"""Version of the members and the table; noted in every pack."""

FLAC_BLOCK = 4096
"""Samples per channel of a FLAC frame, the last of a clip apart."""

TAR_BLOCK = 512
VIDEO_EXTENSIONS = {"h264": "h264", "mjpeg": "mjpeg", "jpeg": "jpg"}
TABLE_EXTENSION = "idx.npy"


class UnitKind(IntEnum):
    """What a unit is; the numbers are part of the format."""

    FRAME = 0  # decodes after the frame before it
    KEYFRAME = 1  # decodes alone
    SOUND = 2
    PICTURE = 3
    MEL = 4


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a clip in the tar.

    Attributes:
        extension: Without the leading dot, such as `h264`.
        data: Its bytes.
    """

    extension: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Units:
    """A clip's table: where each unit is in the shard.

    Attributes:
        size_U: Bytes, int64.
        kind_U: `UnitKind`, int64.
        crc_U: `unit_crc`, int64.
        at_U: Byte offset in the shard, int64.
    """

    size_U: NDArray[np.int64]
    kind_U: NDArray[np.int64]
    crc_U: NDArray[np.int64]
    at_U: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.size_U)


def num_sound_units(clip: Clip) -> int:
    """Returns the units of a clip's sound: a header and its FLAC frames, or one stored spectrogram, or none."""
    if clip.num_samples:
        return 1 + -(-clip.num_samples // FLAC_BLOCK)
    return 1 if clip.num_mel_frames else 0


def num_units(clip: Clip) -> int:
    """Returns how many units a packed clip has, from what its row says."""
    return clip.num_frames + num_sound_units(clip)


def table_place(clip: Clip) -> tuple[int, int]:
    """Returns byte offset and size of a clip's table in its shard, the `.npy` header included."""
    count = num_units(clip)
    return clip.shard_at + TAR_BLOCK, len(_npy_header(count)) + 12 * count


def unit_crc(data: bytes, kind: int) -> int:
    """Returns CRC-32 of a unit's bytes, begun at its kind: a kind that was altered is as wrong as a byte."""
    return zlib.crc32(data, kind)


def encode_table(units: Sequence[tuple[bytes, UnitKind]]) -> bytes:
    """Returns the `.npy` of a clip's table."""
    table_U3 = np.array([(len(data), kind, unit_crc(data, kind)) for data, kind in units], dtype="<u4").reshape(-1, 3)
    return _npy_header(len(units)) + table_U3.tobytes()


def decode_table(clip: Clip, raw: bytes) -> Units:
    """Reads a clip's table.

    Args:
        clip: A packed row.
        raw: The bytes at `table_place`.

    Raises:
        MediaError: They are not the table of such a clip.
    """
    count = num_units(clip)
    header = _npy_header(count)
    if not raw.startswith(header) or len(raw) != len(header) + 12 * count:
        raise MediaError(clip.shard, f'no table of {count} units at byte {clip.shard_at} (clip "{clip.id}")', "shard")
    table_3U = np.frombuffer(raw, dtype="<u4", offset=len(header)).reshape(-1, 3).T.astype(np.int64)
    size_U, kind_U, crc_U = table_3U
    seen = clip.num_frames
    at = clip.shard_at + TAR_BLOCK + _padded(len(raw)) + TAR_BLOCK
    at_U = at + np.cumsum(size_U) - size_U
    if 0 < seen < count:  # the sound is a member of its own
        end = int(at_U[seen])
        at_U[seen:] += at + _padded(end - at) + TAR_BLOCK - end
    end = int(at_U[-1] + size_U[-1]) if count else 0
    if end > clip.shard_at + clip.shard_size or not size_U.all():  # zeros agree with their own CRC
        raise MediaError(clip.shard, f'the table of clip "{clip.id}" at byte {clip.shard_at} is damaged', "shard")
    return Units(size_U, kind_U, crc_U, at_U)


class ShardWriter:
    """Writes clips into a tar; the same clips give the same bytes.

    Args:
        file: Open for writing, at its start.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, key: str, members: Sequence[Member]) -> tuple[int, int]:
        """Appends a clip; returns the offset of its first member's header and the bytes it takes."""
        at = self._file.tell()
        for member in members:
            info = tarfile.TarInfo(f"{key}.{member.extension}")
            info.size, info.mode = len(member.data), 0o644
            self._tar.addfile(info, io.BytesIO(member.data))
        return at, self._file.tell() - at

    def close(self) -> None:
        """Ends the archive; the file stays open."""
        self._tar.close()


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


@functools.lru_cache(maxsize=4096)
def _npy_header(count: int) -> bytes:
    """The header of an array of so many units, as NumPy writes it."""
    raw = io.BytesIO()
    np.lib.format.write_array_header_1_0(raw, {"descr": "<u4", "fortran_order": False, "shape": (count, 3)})
    return raw.getvalue()
