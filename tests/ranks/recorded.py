"""`fastav train` that writes down which clips each rank takes in which step, and stops where it is told.

FASTAV_RECORD names a folder; FASTAV_STOP_AT a step before which this process sends itself FASTAV_SIGNAL (SIGTERM).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from fastav import train
from fastav.core.command_runner import run

_FOLDER = Path(os.environ["FASTAV_RECORD"])
_STOP_AT = int(os.environ.get("FASTAV_STOP_AT", "-1"))
_RANK = int(os.environ.get("RANK", "0"))


def recording(method):
    """The trainer's step, with the clips that it takes written down."""

    def step(trainer, batches):
        number, ids = trainer.state.step, []
        if number + 1 == _STOP_AT and trainer.state.ranks.world - 1 == _RANK:
            os.kill(os.getpid(), getattr(signal, os.environ.get("FASTAV_SIGNAL", "SIGTERM")))

        def noted():
            for batch in batches:
                ids.extend(batch.ids)
                yield batch

        row = method(trainer, noted())
        with (_FOLDER / f"rank_{_RANK}.jsonl").open("a") as file:
            file.write(json.dumps({"step": number, "ids": ids}) + "\n")
        return row

    return step


if __name__ == "__main__":
    _FOLDER.mkdir(parents=True, exist_ok=True)
    train.Trainer.step = recording(train.Trainer.step)
    sys.exit(run("train", "fastav.train", sys.argv[1:]))
