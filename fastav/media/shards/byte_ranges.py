"""Where shards are read: byte ranges of local files, of any URL, and of a cache between the two."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastav.core.errors import MediaError

Range = tuple[int, int]
"""Byte offset and size."""

_GAP_BYTES = 4096
"""Ranges of a local file that are no further apart than this are read at once: a page costs less than a call."""


@dataclass(slots=True)
class ReadStats:
    """What a store did so far; counted without a lock, for statistics.

    Attributes:
        requests: Reads of a file, or requests over the network.
        num_bytes: Bytes that came of them.
        cache_hits: Blocks that were there already.
        cache_misses: Blocks that had to be fetched.
    """

    requests: int = 0
    num_bytes: int = 0
    cache_hits: int = 0
    cache_misses: int = 0


class ShardStore(Protocol):
    """Reads byte ranges of shards; called from many threads at once."""

    @property
    def read_stats(self) -> ReadStats:
        """What it did so far."""
        ...

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Returns the bytes of each range, whole.

        Raises:
            MediaError: They cannot be had; stage `shard`.
        """
        ...

    def forget(self, name: str, part: Range) -> None:
        """Drops what is kept of a part of a shard, as it may be wrong."""
        ...


@dataclass(eq=False)
class _Open:
    """A descriptor and how many readers it has; it is closed by the last one after it was let go."""

    descriptor: int
    readers: int = 0
    dropped: bool = False


@dataclass
class LocalFiles:
    """Files of this machine; some are kept open.

    Args:
        most: How many.
    """

    most: int = 64
    read_stats: ReadStats = field(default_factory=ReadStats)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()

    def __del__(self) -> None:
        for file in self._open.values():  # without readers: they would hold us
            os.close(file.descriptor)

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """See `ShardStore.read`."""
        try:
            try:
                return self._read(name, ranges)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                self.forget(name, (0, 0))  # a network file system has replaced it
                return self._read(name, ranges)
        except OSError as error:
            raise MediaError(name, (error.strerror or "cannot be read").lower(), "shard") from error

    def _read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        file = self._take(name)
        try:
            return self._ranges(name, file.descriptor, ranges)
        finally:
            self._give_back(file)

    def _ranges(self, name: str, descriptor: int, ranges: Sequence[Range]) -> list[bytes]:
        found: list[bytes] = [b""] * len(ranges)
        for begin, size, members in merge_ranges(ranges, _GAP_BYTES):
            data = os.pread(descriptor, size, begin)
            while len(data) < size and (more := os.pread(descriptor, size - len(data), begin + len(data))):
                data += more
            self.read_stats.requests += 1
            self.read_stats.num_bytes += len(data)
            if len(data) < size:
                raise MediaError(name, f"ends at byte {begin + len(data)}, its clips go on to {begin + size}", "shard")
            for i in members:
                at, length = ranges[i]
                found[i] = data if length == size else data[at - begin : at - begin + length]
        return found

    def forget(self, name: str, part: Range) -> None:
        """Opens the file anew at the next read: it may have been replaced."""
        with self._lock:
            self._drop(self._open.pop(name, None))

    def _take(self, name: str) -> _Open:
        with self._lock:
            file = self._open.get(name)
            if file is None:
                file = self._open[name] = _Open(os.open(name, os.O_RDONLY | os.O_CLOEXEC))
                if len(self._open) > self.most:
                    self._drop(self._open.popitem(last=False)[1])
            self._open.move_to_end(name)
            file.readers += 1
            return file

    def _give_back(self, file: _Open) -> None:
        with self._lock:
            file.readers -= 1
            if file.dropped and not file.readers:
                os.close(file.descriptor)

    def _drop(self, file: _Open | None) -> None:
        """Closes a file, or has its last reader do it."""
        if file is not None:
            file.dropped = True
            if not file.readers:
                os.close(file.descriptor)


def merge_ranges(ranges: Sequence[Range], gap: int) -> list[tuple[int, int, list[int]]]:
    """Returns runs of ranges that touch or nearly do: begin, size, and which ranges are in it."""
    runs: list[tuple[int, int, list[int]]] = []
    for i in sorted(range(len(ranges)), key=lambda i: ranges[i][0]):
        at, size = ranges[i]
        if runs and at <= runs[-1][0] + runs[-1][1] + gap:
            begin, length, members = runs[-1]
            runs[-1] = (begin, max(length, at + size - begin), [*members, i])
        else:
            runs.append((at, size, [i]))
    return runs
