"""A cache of this machine between shards at URLs and the processes that read them.

Shards are fetched in coarse blocks, one file a block, so that a clip and its neighbours come with one request. All
processes of the machine share the folder:

* A block is fetched by the process that holds its lock (`flock`, which the kernel lets go of when a process dies); the
  others wait for it and find it there.
* A block is written beside and renamed, so a block file is whole or not there. Its name tells the shard, as its server
  identified it, and its place; its size is checked at every use, its content by the clips' checksums.
* `used` says how many bytes the blocks take. It is raised, and the block written, by one process at a time, so it is
  never too low; it is counted anew whenever it says that the cache is full; then the blocks that were used longest ago
  go first.

Where the cache cannot be written (a full disk, a folder that may only be read), shards are read through it.
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

_LOCKS = 1024  # lock files; blocks share them
_TOUCH_S = 60.0  # a block's time of use is noted no more often
_STALE_S = 3600.0  # what was being written that long ago never will be

log = logging.getLogger("fastav.media.shards")


class Cached:
    """Blocks of shards, kept in a folder.

    Args:
        remote: Where they come from.
        folder: Of the cache.
        most: Bytes that the blocks may take.
        block: Bytes of a block.
    """

    def __init__(self, remote: Remote, folder: Path, most: int, block: int) -> None:
        self._remote, self._folder, self._most, self._block = remote, folder / "fastav-blocks-1", most, block
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, str]] = {}
        self._own = ReadStats()
        self._warned = False
        self._passed: set[str] = set()  # shards whose wrong blocks cannot be deleted

    @property
    def read_stats(self) -> ReadStats:
        """Requests and bytes of the network, hits and misses of the cache."""
        far = self._remote.read_stats
        return ReadStats(far.requests, far.num_bytes, self._own.cache_hits, self._own.cache_misses)

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """See `Store.read`."""
        if name in self._passed:
            return self._remote.read(name, ranges)
        size, digest = self._identity(name)
        for at, length in ranges:
            if at + length > size:
                with self._lock:
                    self._known.pop(name, None)  # it may be growing, or another one by now
                raise MediaError(name, f"ends at byte {size}, its clips go on to {at + length}", "shard")
        numbers = sorted(
            {n for at, length in ranges for n in range(at // self._block, (at + length - 1) // self._block + 1)}
        )
        blocks: dict[int, bytes | BinaryIO] = {}
        try:
            missing = []
            for number in numbers:
                file = self._opened(digest, number, self._size_of(number, size))
                if file is None:
                    missing.append(number)
                else:
                    blocks[number] = file
            self._own.cache_hits += len(blocks)
            self._own.cache_misses += len(missing)
            if missing:
                blocks |= self._filled(name, digest, size, missing)
            return [self._cut(blocks, at, length) for at, length in ranges]
        except OSError as error:  # a failing disk, or a block that another machine deleted
            self._warn(error)
            return self._remote.read(name, ranges)
        finally:
            for block in blocks.values():
                if not isinstance(block, bytes):
                    block.close()

    def forget(self, name: str, part: Range) -> None:
        """Deletes the blocks of a part of a shard, and asks its server again for its identity."""
        with self._lock:
            known = self._known.pop(name, None)
        if known is not None:
            try:
                for number in range(part[0] // self._block, sum(part) // self._block + 1):
                    self._path(known[1], number).unlink(missing_ok=True)
            except OSError as error:
                self._warn(error)
                self._passed.add(name)

    def _identity(self, name: str) -> tuple[int, str]:
        with self._lock:
            known = self._known.get(name)
        if known is None:
            size, mark = self._remote.identity(name)
            text = f"{name}\0{size}\0{mark}\0{self._block}"
            known = (size, hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
            with self._lock:
                self._known[name] = known
        return known

    def _size_of(self, number: int, size: int) -> int:
        return min(self._block, size - number * self._block)

    def _path(self, digest: str, number: int) -> Path:
        return self._folder / digest[:2] / f"{digest}-{number:08d}.block"

    def _opened(self, digest: str, number: int, size: int) -> BinaryIO | None:
        """An open block of the right size; None where there is none. It stays readable when it is deleted."""
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

    def _filled(self, name: str, digest: str, size: int, missing: list[int]) -> dict[int, bytes | BinaryIO]:
        """Fetches blocks, those at least that no other process has fetched by the time of our turn."""
        blocks: dict[int, bytes | BinaryIO] = {}
        try:
            with self._locked(digest, missing):
                left = []
                for number in missing:
                    file = self._opened(digest, number, self._size_of(number, size))
                    if file is None:
                        left.append(number)
                    else:
                        blocks[number] = file
                fetched = self._fetched(name, size, left)
                blocks |= fetched
                for number, data in fetched.items():
                    self._keep(self._path(digest, number), data)
        except OSError as error:
            self._warn(error)
            left = [number for number in missing if number not in blocks]
            blocks |= self._fetched(name, size, left)
        return blocks

    def _fetched(self, name: str, size: int, numbers: list[int]) -> dict[int, bytes]:
        if not numbers:
            return {}
        ranges = [(number * self._block, self._size_of(number, size)) for number in numbers]
        return dict(zip(numbers, self._remote.read(name, ranges), strict=True))

    def _keep(self, path: Path, data: bytes) -> None:
        """Writes a block where there is room for it."""
        if len(data) > self._most:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        # Room is made and taken under one lock: a count by another process in between would miss this block.
        with self.flocked(self._folder / "used.lock"):
            self._make_room(len(data))
            try:
                beside.write_bytes(data)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Counts bytes as used, after deleting the blocks that were used longest ago until they fit."""
        used_file = self._folder / "used"
        try:
            used = int(used_file.read_text())
        except (OSError, ValueError):
            used = self._most  # not known: count
        if used + size > self._most:
            used = self._evict(self._most - size)
        beside = used_file.with_name(".used.tmp")
        beside.write_text(str(used + size))
        beside.replace(used_file)

    def _evict(self, most: int) -> int:
        """Deletes the oldest blocks, a tenth more than is needed, until `most` bytes are left; returns what is left."""
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
        """Holds the locks of some blocks, always taken in the same order."""
        places = sorted({int(digest[:8], 16) + number for number in numbers}, key=lambda place: place % _LOCKS)
        with contextlib.ExitStack() as stack:
            for place in dict.fromkeys(place % _LOCKS for place in places):
                stack.enter_context(self.flocked(self._folder / "locks" / f"{place:04d}.lock"))
            yield

    @contextlib.contextmanager
    def flocked(self, path: Path) -> Iterator[None]:
        """Holds a lock file against all processes of the node; a child that is forked meanwhile keeps nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:  # not left to close(): a child forked meanwhile has the file open, too
                fcntl.flock(file, fcntl.LOCK_UN)

    def _cut(self, blocks: dict[int, bytes | BinaryIO], at: int, length: int) -> bytes:
        """Puts a range together out of blocks."""
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
                    raise OSError(errno.EIO, "a block ends early")
            at, length = at + size, length - size
        return b"".join(parts)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            full = " (the disk is full)" if error.errno == errno.ENOSPC else ""
            log.warning("%s: the cache cannot be used%s, shards are read through: %s", self._folder, full, error)
