"""Signals that stop a run after its next checkpoint."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 set `name` instead of killing; a second SIGINT kills."""

    def __init__(self) -> None:
        self.name = ""

    def __enter__(self) -> StopSignals:
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
