"""Store for remote shards (s3://, gs://, http://, ...), read with fsspec: parallel range requests, with retries."""

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
"""Ranges with gaps up to this size are read in one request: at 100 MB/s, 64 KiB take less than a millisecond."""

FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
"""Pause before the first retry of a request, and its maximum. The pause doubles with every retry."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
             "az": "adlfs", "abfs": "adlfs"}  # fmt: skip

_VERSION_KEYS = ("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created",
                 "md5Hash", "Content-MD5", "Digest")  # fmt: skip
_STALLED_S = 30.0  # time-out without a received byte; other processes wait for the block meanwhile

log = logging.getLogger("fastav.media.shards")


class Remote:
    """Store for shards at URLs.

    Args:
        concurrency: Maximum number of parallel requests.
        retries: Number of retries after an error that may be temporary.
    """

    def __init__(self, concurrency: int, retries: int) -> None:
        self.read_stats = ReadStats()
        self._concurrency, self._retries = concurrency, retries
        self._lock = threading.Lock()
        self._systems: dict[tuple[str, int], Any] = {}

    def read(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Returns all bytes of each range, as specified by `ShardStore.read`."""
        found: list[bytes] = [b""] * len(ranges)
        runs = merge_ranges(ranges, _GAP_BYTES)
        for (begin, _, members), data in zip(runs, self._fetch(name, [run[:2] for run in runs]), strict=True):
            for i in members:
                at, size = ranges[i]
                found[i] = data[at - begin : at - begin + size]
        return found

    def forget(self, name: str, part: Range) -> None:
        """Does nothing, because nothing is cached."""

    def identity(self, name: str) -> tuple[int, str]:
        """Returns the size of a shard in bytes, and a version string.

        The version changes with the content of the shard if the server reports an ETag, a time or a digest.

        Raises:
            MediaError: The shard or its size cannot be found.
        """
        for attempt in range(self._retries + 1):
            try:
                info = self._system(name).info(name)
                self.read_stats.requests += 1
                break
            except Exception as error:
                self._pause_or_raise(name, _http_cause(name, error), attempt)
        if not info.get("size"):
            raise MediaError(name, "the server does not report the size of the shard", "shard")
        versions = [str(info.get(key, "")) for key in _VERSION_KEYS]
        return int(info["size"]), "|".join(versions)

    def _fetch(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Fetches ranges, and retries the ranges that fail."""
        found: list[bytes | None] = [None] * len(ranges)
        for attempt in range(self._retries + 1):
            missing = [i for i, data in enumerate(found) if data is None]
            starts, ends = [ranges[i][0] for i in missing], [sum(ranges[i]) for i in missing]
            system = self._system(name)
            try:
                options = {"batch_size": self._concurrency} if system.async_impl else {}
                answers = system.cat_ranges([name] * len(missing), starts, ends, on_error="return", **options)
            except Exception as error:  # an error of the whole connection
                answers = [error] * len(missing)
            self.read_stats.requests += len(missing)
            failure: BaseException | None = None
            for i, answer in zip(missing, answers, strict=True):
                if isinstance(answer, BaseException):
                    failure = answer
                elif len(answer) == ranges[i][1]:
                    found[i] = answer
                    self.read_stats.num_bytes += len(answer)
                else:
                    failure = _wrong_length(name, len(answer), ranges[i])
            if failure is None:
                break
            self._pause_or_raise(name, failure, attempt)
        return [data for data in found if data is not None]

    def _pause_or_raise(self, name: str, error: BaseException, attempt: int) -> None:
        """Waits before the next attempt, or raises the error if it is permanent or no attempt is left."""
        if not isinstance(error, Exception):
            raise error
        if isinstance(error, UserError):
            raise error
        reason = _reason(error)
        if attempt >= self._retries or not _is_temporary(error):
            attempts = f" ({attempt + 1} attempts)" if attempt else ""
            raise MediaError(name, f"{reason}{attempts}", "shard") from error
        log.info("%s: %s; retrying", name, reason)
        time.sleep(min(FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S))

    def _system(self, name: str) -> Any:
        """Returns the file system of a URL. A forked process opens its own, because it does not inherit threads."""
        protocol = name.split("://")[0]
        with self._lock:
            key = (protocol, os.getpid())
            if key not in self._systems:
                try:
                    self._systems[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **_options(protocol))
                except ImportError as error:
                    package = _PACKAGES.get(protocol, f"PACKAGE, the fsspec driver for {protocol}://")
                    raise UserError(f"{name}: reading {protocol}:// needs a package: pip install {package}") from error
                except ValueError as error:
                    raise UserError(f"{name}: fsspec does not support {protocol}:// ({error})") from error
            return self._systems[key]


class _NoRanges(UserError):
    """Error of a server that sends whole files instead of the requested ranges."""


def _wrong_length(name: str, got: int, requested: Range) -> Exception:
    at, size = requested
    if got > size:
        return _NoRanges(f"{name}: requested {size} bytes, got {got}; the server does not support range requests")
    return ConnectionError(f"requested {size} bytes at byte {at}, got {got}")


def _options(protocol: str) -> dict[str, Any]:
    """Returns options that set a shorter time-out for stalled connections than the five minutes of aiohttp."""
    if protocol not in ("http", "https"):
        return {}
    try:
        import aiohttp
    except ImportError:  # fsspec reports the missing package
        return {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALLED_S, sock_read=_STALLED_S)
    return {"client_kwargs": {"timeout": timeout}}


def _http_cause(name: str, error: Exception) -> Exception:
    """Returns the real error of an HTTP request: fsspec reports every failure of `info` as a missing file."""
    cause = error.__cause__
    if name.startswith("http") and isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return error if getattr(cause, "status", 0) in (404, 410) else cause
    return error


def _is_temporary(error: Exception) -> bool:
    """Returns True if a retry may succeed: not for missing or forbidden files, or invalid requests."""
    if isinstance(error, FileNotFoundError | PermissionError | NotImplementedError | ValueError):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such shard"
    if isinstance(error, PermissionError):
        return "no permission to read the shard"
    status = getattr(error, "status", None)
    text = str(getattr(error, "message", "") or error or type(error).__name__)
    return f"status {status}: {text}" if status else f"{type(error).__name__}: {text}" if str(error) else text
