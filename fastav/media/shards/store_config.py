"""How shards are read: settings, and the store that they make: local files, and URLs by way of a cache."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from fastav.core.config import Config, NonNegativeInt, PositiveFloat, PositiveInt
from fastav.core.errors import UserError
from fastav.media.shards.byte_ranges import LocalFiles, Range, ReadStats, ShardStore


class ShardReading(Config, frozen=True):
    """How shards are read.

    Attributes:
        cache: Folder of this machine for blocks of shards at URLs, shared by all its processes; empty for none.
        cache_gib: Most that the cache may hold, GiB.
        fill_mib: Blocks that are fetched at once into the cache, MiB: a few clips' worth.
        concurrency: Requests at a time, of one decoding thread.
        retries: Further tries after a failure that may pass, such as a time-out; they are up to 5 s apart.
        open_files: Local shards that are kept open.
    """

    cache: str = ""
    cache_gib: PositiveFloat = 100.0
    fill_mib: PositiveInt = 4
    concurrency: PositiveInt = 32
    retries: NonNegativeInt = 6
    open_files: PositiveInt = 64

    def build(self) -> ShardStore:
        """Returns a store that takes paths and URLs alike.

        Raises:
            UserError: The cache has no room for a few blocks.
        """
        if self.cache and self.cache_gib * 1024 < 4 * self.fill_mib:
            raise UserError(
                f"loading.shards.cache_gib {self.cache_gib:g} holds less than four blocks of loading.shards.fill_mib "
                f"{self.fill_mib}: raise the one or lower the other"
            )
        return AnyStore(self)


class AnyStore:
    """Local files, and URLs by way of the cache where there is one."""

    def __init__(self, reading: ShardReading) -> None:
        self._reading, self._local = reading, LocalFiles(reading.open_files)
        self._lock = threading.Lock()
        self._far: ShardStore | None = None

    @property
    def read_stats(self) -> ReadStats:
        """Of both together."""
        near, far = self._local.read_stats, self._far.read_stats if self._far else ReadStats()
        return ReadStats(*(getattr(near, f) + getattr(far, f) for f in ReadStats.__slots__))

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """See `ShardStore.read`."""
        return self._of(name).read(name, ranges)

    def forget(self, name: str, part: Range) -> None:
        """See `ShardStore.forget`."""
        self._of(name).forget(name, part)

    def _of(self, name: str) -> ShardStore:
        if "://" not in name:
            return self._local
        with self._lock:
            if self._far is None:
                self._far = self._open_far()
            return self._far

    def _open_far(self) -> ShardStore:
        # Imported here: fsspec takes a tenth of a second, and most runs read local files.
        from fastav.media.shards.cache import Cached
        from fastav.media.shards.remote import Remote

        reading = self._reading
        remote = Remote(reading.concurrency, reading.retries)
        if not reading.cache:
            return remote
        return Cached(remote, Path(reading.cache), round(reading.cache_gib * 2**30), reading.fill_mib * 2**20)
