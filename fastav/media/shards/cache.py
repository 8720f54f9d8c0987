"""A local disk cache of remote shards, shared by all processes of a machine.

Shards are fetched in large blocks, one file per block, so that one request fetches a clip and its neighbours. All
processes of the machine share the folder:

* A block is fetched by the process that holds its lock (`flock`, which the kernel releases when a process dies). The
  other processes wait for the lock and then find the block in the cache.
* A block is written to a temporary file and renamed, so a block file is either complete or absent. Its name identifies
  the shard, as reported by its server, and the position of the block. The size of the file is checked at every use, and
  its content is checked with the checksums of the clips.
* The file `used` contains the total size of the blocks in bytes. One process at a time increases it and writes the
  block, so it is never too low. Whenever it indicates that the cache is full, the blocks are counted again and the
  least recently used blocks are deleted.

If the cache cannot be written (full disk, read-only folder), shards are read without it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from fastav.core.errors import MediaError
from fastav.media.shards.byte_ranges import Range, ReadStats
from fastav.media.shards.remote import Remote

_LOCKS = 1024  # number of lock files, shared by all blocks
_TOUCH_S = 60.0  # minimum time between updates of the last use of a block
_STALE_S = 3600.0  # age at which a temporary file counts as abandoned

log = logging.getLogger("fastav.media.shards")


class Cached:
    """Store for remote shards that caches their blocks in a folder.

    Args:
        remote: Store from which blocks are fetched.
        folder: Folder of the cache.
        most: Maximum total size of the cached blocks, bytes.
        block: Size of a block, bytes.
    """

    def __init__(self, remote: Remote, folder: Path, most: int, block: int) -> None:
        self._remote, self._folder, self._most, self._block = remote, folder / "fastav-blocks-1", most, block
        self._lock = threading.Lock()
        self._identities: dict[str, tuple[int, str]] = {}
        self._block_stats = ReadStats()
        self._warned = False
        self._uncached: set[str] = set()  # shards with wrong blocks that cannot be deleted

    @property
    def read_stats(self) -> ReadStats:
        """Requests and bytes of the network, and hits and misses of the cache."""
        remote, blocks = self._remote.read_stats, self._block_stats
        return ReadStats(remote.requests, remote.num_bytes, blocks.cache_hits, blocks.cache_misses)

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Returns all bytes of each range, as specified by `ShardStore.read`."""
        if name in self._uncached:
            return self._remote.read(name, ranges)
        size, digest = self._identity(name)
        for at, length in ranges:
            if at + length > size:
                with self._lock:
                    self._identities.pop(name, None)  # the shard may have grown or been replaced
                raise MediaError(name, f"ends at byte {size}, expected at least {at + length} bytes", "shard")
        numbers = sorted(
            {n for at, length in ranges for n in range(at // self._block, (at + length - 1) // self._block + 1)}
        )
        blocks: dict[int, bytes | BinaryIO] = {}
        try:
            missing = []
            for number in numbers:
                file = self._open_block(digest, number, self._size_of(number, size))
                if file is None:
                    missing.append(number)
                else:
                    blocks[number] = file
            self._block_stats.cache_hits += len(blocks)
            self._block_stats.cache_misses += len(missing)
            if missing:
                blocks |= self._fill(name, digest, size, missing)
            return [self._assemble(blocks, at, length) for at, length in ranges]
        except OSError as error:  # a failing disk, or a block that another machine deleted
            self._warn(error)
            return self._remote.read(name, ranges)
        finally:
            for block in blocks.values():
                if not isinstance(block, bytes):
                    block.close()

    def forget(self, name: str, part: Range) -> None:
        """Deletes the cached blocks of a part of a shard. The next read requests the identity of the shard again."""
        with self._lock:
            identity = self._identities.pop(name, None)
        if identity is not None:
            try:
                for number in range(part[0] // self._block, sum(part) // self._block + 1):
                    self._path(identity[1], number).unlink(missing_ok=True)
            except OSError as error:
                self._warn(error)
                self._uncached.add(name)

    def _identity(self, name: str) -> tuple[int, str]:
        with self._lock:
            identity = self._identities.get(name)
        if identity is None:
            size, version = self._remote.identity(name)
            text = f"{name}\0{size}\0{version}\0{self._block}"
            identity = (size, hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
            with self._lock:
                self._identities[name] = identity
        return identity

    def _size_of(self, number: int, size: int) -> int:
        return min(self._block, size - number * self._block)

    def _path(self, digest: str, number: int) -> Path:
        return self._folder / digest[:2] / f"{digest}-{number:08d}.block"

    def _open_block(self, digest: str, number: int, size: int) -> BinaryIO | None:
        """Opens a cached block of the given size; None if there is none. The file stays readable if it is deleted."""
        path = self._path(digest, number)
        try:
            file = path.open("rb")
        except OSError:
            return None
        stat = os.fstat(file.fileno())
        if stat.st_size != size:
            file.close()
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        if time.time() - stat.st_mtime > _TOUCH_S:
            with contextlib.suppress(OSError):
                os.utime(path)
        return file

    def _fill(self, name: str, digest: str, size: int, missing: list[int]) -> dict[int, bytes | BinaryIO]:
        """Fetches missing blocks under their locks, except those that another process fetched in the meantime."""
        blocks: dict[int, bytes | BinaryIO] = {}
        try:
            with self._locked(digest, missing):
                still_missing = []
                for number in missing:
                    file = self._open_block(digest, number, self._size_of(number, size))
                    if file is None:
                        still_missing.append(number)
                    else:
                        blocks[number] = file
                fetched = self._fetch(name, size, still_missing)
                blocks |= fetched
                for number, data in fetched.items():
                    self._store_block(self._path(digest, number), data)
        except OSError as error:
            self._warn(error)
            still_missing = [number for number in missing if number not in blocks]
            blocks |= self._fetch(name, size, still_missing)
        return blocks

    def _fetch(self, name: str, size: int, numbers: list[int]) -> dict[int, bytes]:
        if not numbers:
            return {}
        ranges = [(number * self._block, self._size_of(number, size)) for number in numbers]
        return dict(zip(numbers, self._remote.read(name, ranges), strict=True))

    def _store_block(self, path: Path, data: bytes) -> None:
        """Writes a block into the cache, unless it is larger than the whole cache."""
        if len(data) > self._most:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        # Space is freed and the block is written under one lock: a count by another process in between would miss it.
        with self.flocked(self._folder / "used.lock"):
            self._make_room(len(data))
            try:
                beside.write_bytes(data)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Adds `size` to the bytes in `used`. Before that, deletes least recently used blocks if space is needed."""
        used_file = self._folder / "used"
        try:
            used = int(used_file.read_text())
        except (OSError, ValueError):
            used = self._most  # unknown, so count the blocks
        if used + size > self._most:
            used = self._evict(self._most - size)
        beside = used_file.with_name(".used.tmp")
        beside.write_text(str(used + size))
        beside.replace(used_file)

    def _evict(self, most: int) -> int:
        """Counts the blocks and, if they exceed `most` bytes, deletes the least recently used ones.

        To avoid frequent counts, it then frees an additional tenth of the cache.

        Returns:
            The total size of the blocks that are left, bytes.
        """
        found = []
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                if path.suffix == ".block":
                    found.append((stat.st_mtime, stat.st_size, path))
                elif path.suffix == ".tmp" and time.time() - stat.st_mtime > _STALE_S:
                    path.unlink()
        used = sum(size for _, size, _ in found)
        target = most if used <= most else most - self._most // 10
        for _, size, path in sorted(found):
            if used <= target:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    @contextlib.contextmanager
    def _locked(self, digest: str, numbers: list[int]) -> Iterator[None]:
        """Holds the locks of some blocks. All processes acquire them in the same order, which avoids deadlocks."""
        places = sorted({int(digest[:8], 16) + number for number in numbers}, key=lambda place: place % _LOCKS)
        with contextlib.ExitStack() as stack:
            for place in dict.fromkeys(place % _LOCKS for place in places):
                stack.enter_context(self.flocked(self._folder / "locks" / f"{place:04d}.lock"))
            yield

    @contextlib.contextmanager
    def flocked(self, path: Path) -> Iterator[None]:
        """Holds an exclusive lock on a file. A child process that is forked in the meantime does not keep the lock."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:  # close() is not enough: a child forked in the meantime also has the file open
                fcntl.flock(file, fcntl.LOCK_UN)

    def _assemble(self, blocks: dict[int, bytes | BinaryIO], at: int, length: int) -> bytes:
        """Assembles a byte range from blocks."""
        parts = []
        while length:
            number, begin = divmod(at, self._block)
            size = min(length, self._block - begin)
            block = blocks[number]
            if isinstance(block, bytes):
                parts.append(block[begin : begin + size])
            else:
                parts.append(os.pread(block.fileno(), size, begin))
                if len(parts[-1]) < size:
                    raise OSError(errno.EIO, "a cached block is too short")
            at, length = at + size, length - size
        return b"".join(parts)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            full = " (the disk is full)" if error.errno == errno.ENOSPC else ""
            log.warning("%s: cannot use the cache%s, reading shards without it: %s", self._folder, full, error)
