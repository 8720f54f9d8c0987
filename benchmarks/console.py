"""The console of all suites."""

from __future__ import annotations

import os
import sys

from rich.console import Console

_WIDTH = 140  # for a file or a pipe, where rich assumes 80 columns and truncates tables


def open_console(*, quiet: bool = False) -> Console:
    """Returns a console as wide as the terminal, or without a terminal, wide enough for the suites' tables."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(quiet=quiet, width=None if known else _WIDTH, log_path=False)
