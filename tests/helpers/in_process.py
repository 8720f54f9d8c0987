"""Runs `fastav VERB ...` in this process, and gives the process back as it was: a start of its own costs seconds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fastav.__main__ import main
from fastav.training.process_setup import shutdown

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


def call(words: Sequence[str], folder: Path) -> int:
    """Runs a verb as if it were typed in a folder, with one thread of PyTorch; returns its exit code."""
    with restored():
        os.chdir(folder)
        torch.set_num_threads(1)
        return main(words)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Undoes, at its end, what a command may change of the process: a process of its own would take that along."""
    environment, folder, words = dict(os.environ), Path.cwd(), list(sys.argv)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        shutdown()
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.argv[:] = words
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
