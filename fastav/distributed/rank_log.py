"""RankLog: one rank's own log in the run folder, and who failed first when a job of many ends."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import time
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from fastav.core.atomic_files import write_text

_LAST_WORDS_S, SHOWN = 3.0, 8


class RankLog:
    """`logs/rank_00003.log`: what this rank did when; on SIGUSR2 also where each of its threads is.

    Args:
        folder: `logs` of the run.
        rank: Number of this process.
        world: How many there are.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self._folder, self._rank, self._world, self._begun = folder, rank, world, time.time()
        folder.mkdir(parents=True, exist_ok=True)
        self._failure(rank).unlink(missing_ok=True)
        self._file = (folder / f"rank_{rank:05d}.log").open("a", encoding="utf-8", buffering=1)
        with contextlib.suppress(AttributeError, ValueError):  # no such signal, or not the main thread
            faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)
        self.record(f"started: rank {rank} of {world}, process {os.getpid()} on {socket.gethostname()}")

    def record(self, text: str) -> None:
        """Adds a line."""
        with contextlib.suppress(OSError, ValueError):  # a full disk must not be what ends a run
            self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def fail(self, error: BaseException) -> None:
        """Leaves this rank's last words: the error in `rank_N.failure.json`, its traceback in the log."""
        self.record("failed:\n" + "".join(traceback.format_exception(error)))
        words = {"rank": self._rank, "host": socket.gethostname(), "time": time.time(), "error": _told(error)}
        with contextlib.suppress(OSError):
            write_text(self._failure(self._rank), json.dumps(words))

    def first_failure(self) -> tuple[str, bool]:
        """Names the rank that failed first; waits a moment for what the others have to say.

        A rank that leaves no last words was killed: by the kernel for memory, by a person, or by its machine.

        Returns:
            Who, empty for a single rank; and whether it is for this rank to tell, the lowest that is left.
        """
        if self._world == 1:
            return "", True
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < deadline and len(found) < self._world:
            for rank in set(range(self._world)) - set(found):
                with contextlib.suppress(OSError, ValueError):
                    words = json.loads(self._failure(rank).read_text(encoding="utf-8"))
                    if words["time"] >= self._begun:
                        found[rank] = words
            time.sleep(0.05)
        silent = sorted(set(range(self._world)) - set(found))
        if silent:
            ranks = ", ".join(map(str, silent[:SHOWN]))
            log = self._folder / f"rank_{silent[0]:05d}.log"
            return f"rank {ranks} left no last words: killed, or out of memory; see {log}", self._rank == min(found)
        first = min(found.values(), key=lambda words: words["time"])
        return f"rank {first['rank']} on {first['host']} failed first: {first['error']}", self._rank == 0

    def close(self) -> None:
        """Ends the log."""
        with contextlib.suppress(AttributeError, ValueError):
            faulthandler.unregister(signal.SIGUSR2)
        self._file.close()

    def _failure(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.failure.json"


def record_flights(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets NCCL keep its last collectives, and write them to `flight_RANK` where one of them times out.

    To be called before the processes join; `torchfrtrace` reads the files of all ranks. What a user has set stays.

    Args:
        folder: `logs` of the run.
        environment: Variables of this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder.resolve() / "flight_"),
    }
    for name, value in wanted.items():
        environment.setdefault(name, value)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
