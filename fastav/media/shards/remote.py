"""Shards at URLs (s3://, gs://, http://, ...) by way of fsspec: many ranges at once, and again where that may help."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import fsspec

from fastav.core.errors import MediaError, UserError
from fastav.media.shards.byte_ranges import Range, ReadStats, merge_ranges

_GAP_BYTES = 1 << 16
"""Ranges no further apart than this are one request: at 100 MB/s 64 KiB take less than a millisecond."""

FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
"""Before a request is tried again; it doubles up to the longest."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
             "az": "adlfs", "abfs": "adlfs"}  # fmt: skip

_MARKS = ("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created", "md5Hash",
          "Content-MD5", "Digest")  # fmt: skip
_STALLED_S = 30.0  # without a byte; others wait for the block meanwhile

log = logging.getLogger("fastav.media.shards")


class Remote:
    """Byte ranges of URLs.

    Args:
        concurrency: Requests at a time.
        retries: Further tries of what fails for a reason that may pass.
    """

    def __init__(self, concurrency: int, retries: int) -> None:
        self.read_stats = ReadStats()
        self._concurrency, self._retries = concurrency, retries
        self._lock = threading.Lock()
        self._systems: dict[tuple[str, int], Any] = {}

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """See `Store.read`."""
        found: list[bytes] = [b""] * len(ranges)
        runs = merge_ranges(ranges, _GAP_BYTES)
        for (begin, _, members), data in zip(runs, self._fetch(name, [run[:2] for run in runs]), strict=True):
            for i in members:
                at, size = ranges[i]
                found[i] = data[at - begin : at - begin + size]
        return found

    def forget(self, name: str, part: Range) -> None:
        """Keeps nothing."""

    def identity(self, name: str) -> tuple[int, str]:
        """Returns the size of a shard in bytes, and what changes when its content does, as far as its server tells.

        Raises:
            MediaError: There is no such shard.
        """
        for attempt in range(self._retries + 1):
            try:
                told = self._system(name).info(name)
                self.read_stats.requests += 1
                break
            except Exception as error:
                self._judge(name, _told_by_http(name, error), attempt)
        if not told.get("size"):
            raise MediaError(name, "its server does not tell its size", "shard")
        marks = [str(told.get(key, "")) for key in _MARKS]
        return int(told["size"]), "|".join(marks)

    def _fetch(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Gets whole ranges, again and again those that fail."""
        found: list[bytes | None] = [None] * len(ranges)
        for attempt in range(self._retries + 1):
            left = [i for i, data in enumerate(found) if data is None]
            starts, ends = [ranges[i][0] for i in left], [sum(ranges[i]) for i in left]
            system = self._system(name)
            try:
                options = {"batch_size": self._concurrency} if system.async_impl else {}
                answers = system.cat_ranges([name] * len(left), starts, ends, on_error="return", **options)
            except Exception as error:  # of the connection as a whole
                answers = [error] * len(left)
            self.read_stats.requests += len(left)
            worst: BaseException | None = None
            for i, answer in zip(left, answers, strict=True):
                if isinstance(answer, BaseException):
                    worst = answer
                elif len(answer) == ranges[i][1]:
                    found[i] = answer
                    self.read_stats.num_bytes += len(answer)
                else:
                    worst = _wrong_length(name, len(answer), ranges[i])
            if worst is None:
                break
            self._judge(name, worst, attempt)
        return [data for data in found if data is not None]

    def _judge(self, name: str, error: BaseException, attempt: int) -> None:
        """Waits before another try, or raises what went wrong for good."""
        if not isinstance(error, Exception):
            raise error
        if isinstance(error, UserError):
            raise error
        reason = _reason(error)
        if attempt >= self._retries or not _may_pass(error):
            tries = f" ({attempt + 1} tries)" if attempt else ""
            raise MediaError(name, f"{reason}{tries}", "shard") from error
        log.info("%s: %s; trying again", name, reason)
        time.sleep(min(FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S))

    def _system(self, name: str) -> Any:
        """The file system of a URL; another one after a fork, as the old one's thread is in the parent."""
        protocol = name.split("://")[0]
        with self._lock:
            key = (protocol, os.getpid())
            if key not in self._systems:
                try:
                    self._systems[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **_options(protocol))
                except ImportError as error:
                    package = _PACKAGES.get(protocol, f"fsspec's driver of {protocol}://")
                    raise UserError(f"{name}: reading {protocol}:// needs a package: pip install {package}") from error
                except ValueError as error:
                    raise UserError(f"{name}: {protocol}:// is no protocol that fsspec knows ({error})") from error
            return self._systems[key]


class _NoRanges(UserError):
    """A server that sends whole files, whatever is asked for."""


def _wrong_length(name: str, got: int, wanted: Range) -> Exception:
    at, size = wanted
    if got > size:
        return _NoRanges(f"{name}: {got} bytes came for a range of {size}: its server does not support ranges")
    return ConnectionError(f"{got} bytes came for a range of {size} at byte {at}")


def _options(protocol: str) -> dict[str, Any]:
    """Gives up a stalled connection much sooner than aiohttp's five minutes."""
    if protocol not in ("http", "https"):
        return {}
    try:
        import aiohttp
    except ImportError:  # fsspec tells
        return {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALLED_S, sock_read=_STALLED_S)
    return {"client_kwargs": {"timeout": timeout}}


def _told_by_http(name: str, error: Exception) -> Exception:
    """Returns what went wrong: fsspec calls every failure of an HTTP server's `info` a missing file."""
    cause = error.__cause__
    if name.startswith("http") and isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return error if getattr(cause, "status", 0) in (404, 410) else cause
    return error


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed: not for what is missing, forbidden or asked wrongly."""
    if isinstance(error, FileNotFoundError | PermissionError | NotImplementedError | ValueError):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such shard"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    status = getattr(error, "status", None)
    text = str(getattr(error, "message", "") or error or type(error).__name__)
    return f"status {status}: {text}" if status else f"{type(error).__name__}: {text}" if str(error) else text
