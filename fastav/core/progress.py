"""How far a long piece of work has come, and how long it still takes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0
"""Seconds between lines where the output is no terminal."""


@contextmanager
def progress(console: Console, doing: str, total: int, things: str) -> Iterator[Callable[..., None]]:
    """Yields what to call after a thing is done, or with how many.

    Args:
        console: Where to show it.
        doing: What is being done, such as `probing`; plain lines begin with it.
        total: How many things there are.
        things: What they are, such as `files`.
    """
    if console.is_terminal:
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(things), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(doing, total=total)
            yield lambda num=1: bar.advance(task, num)
        return
    first = said = time.monotonic()
    begun = done = 0

    def advance(num: int = 1) -> None:
        nonlocal begun, done, first, said
        done += num
        now = time.monotonic()
        if done == num:
            # The start of the processes is in the time of the first ones, and would spoil the guess.
            first, begun = now, done
        if done == total or (done > begun and now - said >= PLAIN_EVERY_S):
            left_s = (now - first) / max(done - begun, 1) * (total - done)
            console.print(f"{doing}: {done}/{total} {things}, {left_s:.0f} s left", highlight=False)
            said = now

    yield advance
