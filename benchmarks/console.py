"""The console of all suites."""

from __future__ import annotations

import os
import sys

from rich.console import Console

_WIDTH = 140  # of a file or a pipe, where rich takes 80 columns for granted and cuts tables


def open_console(*, quiet: bool = False) -> Console:
    """Returns a console that is as wide as the terminal, or wide enough for the suites' tables where there is none."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(quiet=quiet, width=None if known else _WIDTH, log_path=False)
