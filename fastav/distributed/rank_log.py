"""RankLog: the log of one rank in the run folder, and which rank failed first when a job ends."""

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

_RECORDS_WAIT_S = 3.0  # how long to wait for the error records of other ranks
SHOWN = 8  # ranks that a message lists


class RankLog:
    """Log file of one rank, `logs/rank_00003.log`. On SIGUSR2 the stack of each thread is written to it.

    Args:
        folder: Folder `logs` of the run.
        rank: Rank of this process.
        world: World size.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self._folder, self._rank, self._world, self._begun = folder, rank, world, time.time()
        folder.mkdir(parents=True, exist_ok=True)
        self._failure(rank).unlink(missing_ok=True)
        self._file = (folder / f"rank_{rank:05d}.log").open("a", encoding="utf-8", buffering=1)
        with contextlib.suppress(AttributeError, ValueError):  # no such signal on this system, or not the main thread
            faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)
        self.record(f"started: rank {rank} of {world}, process {os.getpid()} on {socket.gethostname()}")

    def record(self, text: str) -> None:
        """Writes a line with the current time."""
        with contextlib.suppress(OSError, ValueError):  # a log on a full disk must not end the run
            self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def fail(self, error: BaseException) -> None:
        """Records the error that ends this rank: in `rank_N.failure.json`, and with its traceback in the log."""
        self.record("failed:\n" + "".join(traceback.format_exception(error)))
        record = {"rank": self._rank, "host": socket.gethostname(), "time": time.time(), "error": _one_line(error)}
        with contextlib.suppress(OSError):
            write_text(self._failure(self._rank), json.dumps(record))

    def first_failure(self) -> tuple[str, bool]:
        """Finds the rank that failed first. Waits up to 3 s for the error records of the other ranks.

        A rank without an error record was killed: by the kernel (out of memory), by a person, or with its machine.

        Returns:
            One line about the rank that failed first, empty for a single rank; and whether this rank should report it,
            which is the lowest one with a record.
        """
        if self._world == 1:
            return "", True
        records: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + _RECORDS_WAIT_S
        while time.monotonic() < deadline and len(records) < self._world:
            for rank in set(range(self._world)) - set(records):
                with contextlib.suppress(OSError, ValueError):
                    record = json.loads(self._failure(rank).read_text(encoding="utf-8"))
                    if record["time"] >= self._begun:
                        records[rank] = record
            time.sleep(0.05)
        missing = sorted(set(range(self._world)) - set(records))
        if missing:
            ranks = ", ".join(map(str, missing[:SHOWN]))
            log = self._folder / f"rank_{missing[0]:05d}.log"
            text = f"rank {ranks} exited without an error record (killed or out of memory); see {log}"
            return text, self._rank == min(records)
        first = min(records.values(), key=lambda record: record["time"])
        return f"rank {first['rank']} on {first['host']} failed first: {first['error']}", self._rank == 0

    def close(self) -> None:
        """Closes the log."""
        with contextlib.suppress(AttributeError, ValueError):
            faulthandler.unregister(signal.SIGUSR2)
        self._file.close()

    def _failure(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.failure.json"


def record_flights(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Enables PyTorch's NCCL flight recorder, which writes the last collectives to `flight_RANK` when one times out.

    Call it before the process group is made. `torchfrtrace` reads the files of all ranks. Variables that are already
    set are not changed.

    Args:
        folder: Folder `logs` of the run.
        environment: Environment variables of this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder.resolve() / "flight_"),
    }
    for name, value in defaults.items():
        environment.setdefault(name, value)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
