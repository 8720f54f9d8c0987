"""Where shards are read: byte ranges of local files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from fastav.config import Config
from fastav.errors import MediaError

Range = tuple[int, int]
"""Byte offset and size."""


class Store(Protocol):
    """Reads byte ranges of shards; called from many threads at once."""

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Returns the bytes of each range, whole; `MediaError` of stage `shard` otherwise."""
        ...

    def forget(self, name: str) -> None:
        """Drops what is kept of a shard, as it may be wrong."""
        ...


class Reading(Config, frozen=True):
    """How shards are read."""

    def build(self) -> Store:
        """Returns the store."""
        return LocalFiles()


class LocalFiles:
    """Files of this machine."""

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """See `Store.read`."""
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MediaError(name, error.strerror or "cannot be opened", "shard") from error
        try:
            found = [os.pread(descriptor, size, at) for at, size in ranges]
        except OSError as error:
            raise MediaError(name, error.strerror or "cannot be read", "shard") from error
        finally:
            os.close(descriptor)
        for data, (at, size) in zip(found, ranges, strict=True):
            if len(data) != size:
                raise MediaError(name, f"ends {size - len(data)} bytes before byte {at + size}", "shard")
        return found

    def forget(self, name: str) -> None:
        """Keeps nothing."""
