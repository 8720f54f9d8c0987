"""Progress and remaining time of a long task: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0
"""Minimum seconds between lines if the output is not a terminal."""


@contextmanager
def progress(console: Console, doing: str, total: int, things: str) -> Iterator[Callable[..., None]]:
    """Yields a function `advance(num=1)` to call after `num` items are done.

    Args:
        console: Output console.
        doing: Name of the task, such as `probing`; plain lines start with it.
        total: Number of items.
        things: Name of the items, such as `files`.

    Example:
        >>> with progress(Console(), "probing", len(files), "files") as advance:
        ...     for file in files:
        ...         probe(file)
        ...         advance()
    """
    if console.is_terminal:
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(things), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(doing, total=total)
            yield lambda num=1: bar.advance(task, num)
        return
    first = printed = time.monotonic()
    first_done = done = 0

    def advance(num: int = 1) -> None:
        nonlocal first_done, done, first, printed
        done += num
        now = time.monotonic()
        if not first_done:
            # The time of the first items includes the start of the worker processes: leave it out of the rate.
            first, first_done = now, done
        if done == total or (done > first_done and now - printed >= PLAIN_EVERY_S):
            left_s = (now - first) / max(done - first_done, 1) * (total - done)
            console.print(f"{doing}: {done}/{total} {things}, {left_s:.0f} s left", highlight=False)
            printed = now

    yield advance
