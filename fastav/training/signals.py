"""StopSignals: signals that stop a run after its next checkpoint."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType


class StopSignals:
    """Context manager that records SIGTERM, SIGINT and SIGUSR1 instead of dying of them; a second SIGINT interrupts.

    Attributes:
        name: Name of the signal that arrived, such as `SIGTERM`; empty before.
    """

    def __init__(self) -> None:
        self.name = ""

    def __enter__(self) -> StopSignals:
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self._before[number] = signal.signal(number, self._record)
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
