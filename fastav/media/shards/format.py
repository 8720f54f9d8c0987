"""The shard format: tar files that any WebDataset reader can read, with a table of units at the start of each clip.

A clip is a run of members that share a key, a zero-padded number. The members come in this order; a clip contains only
the members that apply to it:

    KEY.idx.npy   uint32 [U, 3]: size in bytes, kind and CRC-32 (initialized with the kind) of each unit, in order
    KEY.h264      the video as consecutive access units (Annex B: each has a delimiter, keyframes have parameter sets);
                  or KEY.mjpeg, consecutive JPEG pictures; or KEY.jpg, a still picture
    KEY.flac      the audio; the first unit is the stream header, each other unit a FLAC frame of `FLAC_BLOCK` samples;
                  or KEY.npy, a stored spectrogram
    KEY.json      description of the clip: id, labels, split, source files with digests, sizes and rates

A manifest row gives the shard, the offset of the clip's first member, and the number of frames and samples. These
numbers determine the length of the table, and the table gives the position of every frame of video and audio. One small
read therefore locates any frame of any clip, for any number of clips, without an index in memory. Headers are plain
USTAR, 512 bytes per member.
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
"""Version of the members and the table; recorded in every pack."""

FLAC_BLOCK = 4096
"""Samples per channel in a FLAC frame. The last frame of a clip may be shorter."""

TAR_BLOCK = 512
VIDEO_EXTENSIONS = {"h264": "h264", "mjpeg": "mjpeg", "jpeg": "jpg"}
TABLE_EXTENSION = "idx.npy"


class UnitKind(IntEnum):
    """Kind of a unit. The numbers are part of the format."""

    FRAME = 0  # needs the previous frame to decode
    KEYFRAME = 1  # decodes without other frames
    AUDIO = 2
    PICTURE = 3
    MEL = 4


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a clip in the tar.

    Attributes:
        extension: File name extension without the leading dot, such as `h264`.
        data: Content of the file.
    """

    extension: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a clip in storage order, from its table.

    Attributes:
        size_U: Size of each unit in bytes, int64.
        kind_U: `UnitKind` of each unit, int64.
        crc_U: `unit_crc` of each unit, int64.
        at_U: Byte offset of each unit in the shard, int64.
    """

    size_U: NDArray[np.int64]
    kind_U: NDArray[np.int64]
    crc_U: NDArray[np.int64]
    at_U: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.size_U)


def num_audio_units(clip: Clip) -> int:
    """Returns the number of audio units of a clip: header and FLAC frames, or one for a stored spectrogram, or 0."""
    if clip.num_samples:
        return 1 + -(-clip.num_samples // FLAC_BLOCK)
    return 1 if clip.num_mel_frames else 0


def num_units(clip: Clip) -> int:
    """Returns the number of units of a packed clip, computed from its manifest row."""
    return clip.num_frames + num_audio_units(clip)


def table_place(clip: Clip) -> tuple[int, int]:
    """Returns byte offset and size of a clip's table in its shard, including the `.npy` header."""
    count = num_units(clip)
    return clip.shard_at + TAR_BLOCK, len(_npy_header(count)) + 12 * count


def unit_crc(data: bytes, kind: int) -> int:
    """Returns the CRC-32 of a unit's bytes, initialized with its kind so that a changed kind is detected, too."""
    return zlib.crc32(data, kind)


def encode_table(units: Sequence[tuple[bytes, UnitKind]]) -> bytes:
    """Returns a clip's table as the content of a `.npy` file."""
    table_U3 = np.array([(len(data), kind, unit_crc(data, kind)) for data, kind in units], dtype="<u4").reshape(-1, 3)
    return _npy_header(len(units)) + table_U3.tobytes()


def decode_table(clip: Clip, raw: bytes) -> Units:
    """Decodes a clip's table.

    Args:
        clip: Manifest row of a packed clip.
        raw: The bytes at `table_place`.

    Raises:
        MediaError: The bytes are not a valid table for this clip.
    """
    count = num_units(clip)
    header = _npy_header(count)
    if not raw.startswith(header) or len(raw) != len(header) + 12 * count:
        raise MediaError(clip.shard, f'clip "{clip.id}" has no table of {count} units at byte {clip.shard_at}', "shard")
    table_3U = np.frombuffer(raw, dtype="<u4", offset=len(header)).reshape(-1, 3).T.astype(np.int64)
    size_U, kind_U, crc_U = table_3U
    frames = clip.num_frames
    at = clip.shard_at + TAR_BLOCK + _padded(len(raw)) + TAR_BLOCK
    at_U = at + np.cumsum(size_U) - size_U
    if 0 < frames < count:  # the audio is a separate member
        end = int(at_U[frames])
        at_U[frames:] += at + _padded(end - at) + TAR_BLOCK - end
    end = int(at_U[-1] + size_U[-1]) if count else 0
    # Zero sizes are checked because a table of zeros matches its checksums: the CRC-32 of no bytes is 0.
    if end > clip.shard_at + clip.shard_size or not size_U.all():
        raise MediaError(clip.shard, f'the table of clip "{clip.id}" at byte {clip.shard_at} is damaged', "shard")
    return Units(size_U, kind_U, crc_U, at_U)


class ShardWriter:
    """Writes clips into a tar file. The same clips give the same bytes.

    Args:
        file: File opened for writing, positioned at its start.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, key: str, members: Sequence[Member]) -> tuple[int, int]:
        """Appends a clip. Returns the offset of its first member's header and the number of bytes written."""
        at = self._file.tell()
        for member in members:
            info = tarfile.TarInfo(f"{key}.{member.extension}")
            info.size, info.mode = len(member.data), 0o644
            self._tar.addfile(info, io.BytesIO(member.data))
        return at, self._file.tell() - at

    def close(self) -> None:
        """Writes the end of the archive. The file stays open."""
        self._tar.close()


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


@functools.lru_cache(maxsize=4096)
def _npy_header(count: int) -> bytes:
    """Returns the `.npy` header of a table of `count` units, as NumPy writes it."""
    raw = io.BytesIO()
    np.lib.format.write_array_header_1_0(raw, {"descr": "<u4", "fortran_order": False, "shape": (count, 3)})
    return raw.getvalue()
