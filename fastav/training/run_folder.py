"""RunFolder: the files of one run. A kill at any moment loses at most the last line of a file.

recipe.toml env.json metrics.jsonl incidents.jsonl status.json skipped.csv logs/ checkpoints/ model/
predictions.parquet metrics.json
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastav.core.atomic_files import write_text, written_beside
from fastav.core.errors import MediaError, UserError

PACKAGES = (
    "fastav", "torch", "torchvision", "torchaudio", "timm", "accelerate", "triton", "av", "numpy", "pyarrow",
    "nvidia-dali-cuda130", "deepspeed",
)  # fmt: skip
SKIPPED_COLUMNS = ("id", "path", "stage", "reason", "step")


class RunFolder:
    """The folder of one run.

    Args:
        path: Path of the folder; it is created if missing.
        writer: Whether this process writes (rank 0); all other ranks only read.

    Example:
        for row in RunFolder("runs/a", writer=False).read_metrics():
            print(row["step"], row.get("loss"))
    """

    def __init__(self, path: str | Path, *, writer: bool = True) -> None:
        self.path, self.writer = Path(path), writer
        self._skipped: set[str] = set()
        self._unsent: list[dict[str, str]] = []
        if writer:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self.path}: cannot make the run folder: {error.strerror}") from None
            if self.skipped.exists():
                self._skipped = {row["id"] for row in self.read_skipped()}

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        """Training metrics and evaluations, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def incidents(self) -> Path:
        """Faults of steps and ranks (see `guard` in the recipe), one JSON object per line."""
        return self.path / "incidents.jsonl"

    @property
    def logs(self) -> Path:
        """Folder of the logs of each rank."""
        return self.path / "logs"

    @property
    def skipped(self) -> Path:
        """Clips that could not be read, with the reasons."""
        return self.path / "skipped.csv"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model, for `AVModel.from_pretrained`."""
        return self.path / "model"

    @property
    def predictions(self) -> Path:
        """Predictions on the test split."""
        return self.path / "predictions.parquet"

    @property
    def evaluation(self) -> Path:
        """Metrics of the last evaluation on the test split."""
        return self.path / "metrics.json"

    def write_status(self, state: str, **facts: Any) -> None:
        """Replaces `status.json`, which launch scripts read.

        Args:
            state: `running`, `stopped`, `failed` or `done`.
            facts: Further JSON-serialisable entries, such as step and reason.
        """
        if self.writer:
            content = {"state": state, **facts, "pid": os.getpid(), "time": time.time()}
            write_text(self.path / "status.json", json.dumps(content, indent=1))

    def read_status(self) -> dict[str, Any]:
        """Returns the content of `status.json`; empty before the first write."""
        file = self.path / "status.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def write_environment(self, **facts: Any) -> None:
        """Writes `env.json`: command line, versions, machine, git state and further facts."""
        if self.writer:
            write_text(self.path / "env.json", json.dumps({**environment(), **facts}, indent=1))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        if self.writer:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def append_incident(self, row: dict[str, Any]) -> None:
        """Appends one line to `incidents.jsonl`."""
        if self.writer:
            with self.incidents.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "time": time.time()}) + "\n")

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of `metrics.jsonl`. A line truncated by a kill is skipped."""
        if self.metrics.exists():
            yield from _rows(self.metrics)

    def drop_rows_after(self, step: int) -> None:
        """Drops rows of `metrics.jsonl` and `incidents.jsonl` after `step`, which the resumed run writes again."""
        for file in (self.metrics, self.incidents):
            if self.writer and file.exists():
                kept = [row for row in _rows(file) if row.get("step", 0) <= step]
                write_text(file, "".join(json.dumps(row) + "\n" for row in kept))

    def skip(self, clip_id: str, error: MediaError, step: int) -> None:
        """Adds a clip that could not be read to `skipped.csv`, once."""
        if clip_id in self._skipped:
            return
        self._skipped.add(clip_id)
        row = {"id": clip_id, "path": error.path, "stage": error.stage, "reason": error.reason, "step": str(step)}
        if self.writer:
            self._append_skipped([row])
        else:
            self._unsent.append(row)

    def pop_skipped(self) -> list[dict[str, str]]:
        """Returns the clips skipped on a rank that does not write, since the last call; for `add_skipped` of rank 0."""
        rows, self._unsent = self._unsent, []
        return rows

    def add_skipped(self, rows: list[dict[str, str]]) -> None:
        """Adds the skipped clips of other ranks to `skipped.csv`."""
        new_rows = [row for row in rows if row["id"] not in self._skipped]
        self._skipped |= {row["id"] for row in new_rows}
        if self.writer and new_rows:
            self._append_skipped(new_rows)

    def _append_skipped(self, rows: list[dict[str, str]]) -> None:
        new = not self.skipped.exists()
        with self.skipped.open("a", encoding="utf-8", newline="") as file:
            out = csv.DictWriter(file, SKIPPED_COLUMNS)
            if new:
                out.writeheader()
            out.writerows(rows)

    def read_skipped(self) -> list[dict[str, str]]:
        """Returns the rows of `skipped.csv`. A row truncated by a kill is skipped."""
        if not self.skipped.exists():
            return []
        with self.skipped.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]

    def drop_skipped_after(self, step: int) -> None:
        """Drops rows of `skipped.csv` that were added after `step`."""
        if self.writer and self.skipped.exists():
            rows = [row for row in self.read_skipped() if int(row["step"]) <= step]
            with (
                written_beside(self.skipped) as beside,
                beside.open("w", encoding="utf-8", newline="") as file,
            ):
                out = csv.DictWriter(file, SKIPPED_COLUMNS)
                out.writeheader()
                out.writerows(rows)
            self._skipped = {row["id"] for row in rows}


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSON-lines file. A line truncated by a kill is skipped."""
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def environment() -> dict[str, Any]:
    """Returns command line, package versions, machine and git state of this process."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": sys.argv,
        "versions": versions,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "git": _git_state(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_state() -> dict[str, Any] | None:
    """Returns commit and dirty flag of the checkout that the package runs from.

    Outside a checkout the commit is that of the variable FASTAV_REVISION; None if it is not set.
    """
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # the container image has no git, but FASTAV_REVISION
        revision = os.environ.get("FASTAV_REVISION")
        return {"commit": revision, "dirty": None} if revision else None
