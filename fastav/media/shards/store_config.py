"""Settings for reading shards, and the store that they create for local files and URLs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from fastav.core.config import Config, NonNegativeInt, PositiveFloat, PositiveInt
from fastav.core.errors import UserError
from fastav.media.shards.byte_ranges import LocalFiles, Range, ReadStats, ShardStore


class ShardReading(Config, frozen=True):
    """Settings for reading shards.

    Attributes:
        cache: Local folder in which blocks of remote shards are cached for all processes of the machine. If "", remote
            shards are not cached.
        cache_gib: Maximum size of the cache of remote shards, GiB.
        fill_mib: Size of the blocks in which remote shards are fetched into the cache, MiB. A block contains a few
            clips.
        concurrency: Maximum number of parallel requests to remote shards, per decoding thread.
        retries: Number of retries if reading a remote shard fails for a temporary reason, such as a time-out. Retries
            are up to 5 s apart.
        open_files: Maximum number of local shards that a process keeps open.
    """

    cache: str = ""
    cache_gib: PositiveFloat = 100.0
    fill_mib: PositiveInt = 4
    concurrency: PositiveInt = 32
    retries: NonNegativeInt = 6
    open_files: PositiveInt = 64

    def build(self) -> ShardStore:
        """Returns a store that reads both paths and URLs.

        Raises:
            UserError: The cache is smaller than four blocks.
        """
        if self.cache and self.cache_gib * 1024 < 4 * self.fill_mib:
            raise UserError(
                f"loading.shards.cache_gib: expected at least {4 * self.fill_mib / 1024:g} (four blocks of "
                f"loading.shards.fill_mib {self.fill_mib}), got {self.cache_gib:g}"
            )
        return AnyStore(self)


class AnyStore:
    """Store for local files and URLs. URLs are read through the cache if there is one."""

    def __init__(self, reading: ShardReading) -> None:
        self._reading, self._local = reading, LocalFiles(reading.open_files)
        self._lock = threading.Lock()
        self._remote: ShardStore | None = None

    @property
    def read_stats(self) -> ReadStats:
        """Sum of the statistics for local files and for URLs."""
        local, remote = self._local.read_stats, self._remote.read_stats if self._remote else ReadStats()
        return ReadStats(*(getattr(local, f) + getattr(remote, f) for f in ReadStats.__slots__))

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Returns all bytes of each range, as specified by `ShardStore.read`."""
        return self._store(name).read(name, ranges)

    def forget(self, name: str, part: Range) -> None:
        """Discards cached data of a part of a shard, as specified by `ShardStore.forget`."""
        self._store(name).forget(name, part)

    def _store(self, name: str) -> ShardStore:
        if "://" not in name:
            return self._local
        with self._lock:
            if self._remote is None:
                self._remote = self._open_remote()
            return self._remote

    def _open_remote(self) -> ShardStore:
        # Imported here because importing fsspec takes a tenth of a second, and most runs read only local files.
        from fastav.media.shards.cache import Cached
        from fastav.media.shards.remote import Remote

        reading = self._reading
        remote = Remote(reading.concurrency, reading.retries)
        if not reading.cache:
            return remote
        return Cached(remote, Path(reading.cache), round(reading.cache_gib * 2**30), reading.fill_mib * 2**20)
