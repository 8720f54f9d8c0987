"""Byte ranges of shards: the protocol of shard stores, and the store for local files."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastav.core.errors import MediaError
from fastav.core.regular_file import check_regular

Range = tuple[int, int]
"""Byte offset and size."""

_GAP_BYTES = 4096
"""Ranges of a local file with gaps up to this size are read in one call: reading a page costs less than a call."""


@dataclass(slots=True)
class ReadStats:
    """Statistics of a store since it was opened. Counted without a lock, so threads may lose counts.

    Attributes:
        requests: Number of file reads, or of network requests.
        num_bytes: Number of bytes read.
        cache_hits: Number of blocks found in the cache.
        cache_misses: Number of blocks that had to be fetched.
    """

    requests: int = 0
    num_bytes: int = 0
    cache_hits: int = 0
    cache_misses: int = 0


class ShardStore(Protocol):
    """Reads byte ranges of shards. Must be thread-safe."""

    @property
    def read_stats(self) -> ReadStats:
        """Statistics since the store was opened."""
        ...

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Returns all bytes of each range.

        Raises:
            MediaError: A range cannot be read; the stage is `shard`.
        """
        ...

    def forget(self, name: str, part: Range) -> None:
        """Discards cached data of a part of a shard, because it may be wrong."""
        ...


@dataclass(eq=False)
class _OpenFile:
    """An open file and its number of readers. Once `dropped` is set, the last reader closes the file."""

    descriptor: int
    readers: int = 0
    dropped: bool = False


@dataclass
class LocalFiles:
    """Store for local files. Recently read files are kept open.

    Args:
        most: Maximum number of files kept open.
        read_stats: Statistics, updated by every read.
    """

    most: int = 64
    read_stats: ReadStats = field(default_factory=ReadStats)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    def __del__(self) -> None:
        for file in self._open.values():  # no readers are left: each holds a reference to self
            os.close(file.descriptor)

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Returns all bytes of each range, as specified by `ShardStore.read`."""
        try:
            try:
                return self._read(name, ranges)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                self.forget(name, (0, 0))  # the file was replaced on a network file system
                return self._read(name, ranges)
        except OSError as error:
            raise MediaError(name, (error.strerror or "cannot be read").lower(), "shard") from error

    def _read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        file = self._acquire(name)
        try:
            return self._ranges(name, file.descriptor, ranges)
        finally:
            self._release(file)

    def _ranges(self, name: str, descriptor: int, ranges: Sequence[Range]) -> list[bytes]:
        found: list[bytes] = [b""] * len(ranges)
        for begin, size, members in merge_ranges(ranges, _GAP_BYTES):
            data = os.pread(descriptor, size, begin)
            while len(data) < size and (more := os.pread(descriptor, size - len(data), begin + len(data))):
                data += more
            self.read_stats.requests += 1
            self.read_stats.num_bytes += len(data)
            if len(data) < size:
                end = begin + len(data)
                raise MediaError(name, f"ends at byte {end}, expected at least {begin + size} bytes", "shard")
            for i in members:
                at, length = ranges[i]
                found[i] = data if length == size else data[at - begin : at - begin + length]
        return found

    def forget(self, name: str, part: Range) -> None:
        """Makes the next read open the file again, because it may have been replaced."""
        with self._lock:
            self._drop(self._open.pop(name, None))

    def _acquire(self, name: str) -> _OpenFile:
        with self._lock:
            file = self._open.get(name)
            if file is None:
                file = self._open[name] = _OpenFile(_open_regular(name))
                if len(self._open) > self.most:
                    self._drop(self._open.popitem(last=False)[1])
            self._open.move_to_end(name)
            file.readers += 1
            return file

    def _release(self, file: _OpenFile) -> None:
        with self._lock:
            file.readers -= 1
            if file.dropped and not file.readers:
                os.close(file.descriptor)

    def _drop(self, file: _OpenFile | None) -> None:
        """Closes a file now if it has no readers; otherwise its last reader closes it."""
        if file is not None:
            file.dropped = True
            if not file.readers:
                os.close(file.descriptor)


def _open_regular(name: str) -> int:
    """Opens a regular file; without O_NONBLOCK, opening a named pipe would wait for a writer."""
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        check_regular(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def merge_ranges(ranges: Sequence[Range], gap: int) -> list[tuple[int, int, list[int]]]:
    """Merges ranges with gaps up to `gap` bytes. Returns offset, size and range indices of each merged range."""
    runs: list[tuple[int, int, list[int]]] = []
    for i in sorted(range(len(ranges)), key=lambda i: ranges[i][0]):
        at, size = ranges[i]
        if runs and at <= runs[-1][0] + runs[-1][1] + gap:
            begin, length, members = runs[-1]
            runs[-1] = (begin, max(length, at + size - begin), [*members, i])
        else:
            runs.append((at, size, [i]))
    return runs
