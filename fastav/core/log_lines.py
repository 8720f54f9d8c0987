"""Log lines and a progress line, on a terminal or in a file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console as Screen
from rich.table import Table


class Console:
    """Prints log lines and a progress line; on a terminal the progress line is rewritten in place.

    Args:
        stream: Output stream; stderr by default, which keeps stdout free for results.
        quiet: Print nothing (for ranks other than 0).
        plain_every_s: Minimum seconds between progress lines on a stream that is not a terminal.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, plain_every_s: float = 10.0) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet, self._plain_every_s = quiet, plain_every_s
        self._terminal = self._stream.isatty()
        self._last, self._open = -plain_every_s, False

    def log(self, text: str) -> None:
        """Prints a log line."""
        if not self._quiet:
            self._end_line()
            print(text, file=self._stream, flush=True)

    def progress(self, text: str, *, last: bool = False) -> None:
        """Shows the progress line; without a terminal, one every `plain_every_s` seconds and the last one."""
        if self._quiet:
            return
        if self._terminal:
            print(f"\r\x1b[2K{text}", end="\n" if last else "", file=self._stream, flush=True)
            self._open = not last
        elif last or time.monotonic() - self._last >= self._plain_every_s:
            self._last = time.monotonic()
            print(text, file=self._stream, flush=True)

    def show(self, table: Table) -> None:
        """Prints a table."""
        if not self._quiet:
            self._end_line()
            Screen(file=self._stream).print(table)

    def _end_line(self) -> None:
        if self._open:
            print(file=self._stream)
            self._open = False


def clock_time(seconds: float) -> str:
    """Formats a duration as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
