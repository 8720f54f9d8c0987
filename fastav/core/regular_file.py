"""Refuses named pipes, devices and sockets: opening one can wait forever, and reading a device may never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")
)  # fmt: skip


def check_regular(path: str | Path | int) -> None:
    """Checks that a path (after following links) or an open descriptor is a regular file.

    Args:
        path: Path, or file descriptor.

    Raises:
        OSError: It does not exist, is a folder, or is a special file; `strerror` gives the reason.
    """
    mode = os.fstat(path).st_mode if isinstance(path, int) else Path(path).stat().st_mode
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file", str(path))
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a special file")
    raise OSError(errno.EINVAL, f"is {kind}, expected a regular file", str(path))
