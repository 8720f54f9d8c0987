"""Reads the results of several runs from their folders and compares them, as JSON and as a table.

Fusion runs are compared with the best single-modality run. If both have predictions of the same clips, the confidence
interval of the gain is paired, clip by clip.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from fastav.core.errors import UserError, did_you_mean
from fastav.model.fusion import Fusion
from fastav.task.metrics import Evaluation, bootstrap_gain
from fastav.task.predictions import Predictions, join, read_predictions
from fastav.training.run_folder import RunFolder

MARKS = ("recipe.toml", "metrics.json", "metrics.jsonl", "status.json")
SINGLE = ("video", "audio")
ORDER: tuple[str, ...] = tuple(kind.__struct_config__.tag for kind in get_args(Fusion))
"""Fusion kinds in the order of a comparison, from the union that lists them: single modalities come first."""

LABELS = {
    "top1_micro_pct": "Top-1, %", "top5_micro_pct": "Top-5, %", "top1_macro_pct": "Top-1, mean of classes, %",
    "top5_macro_pct": "Top-5, mean of classes, %", "map_macro_pct": "mAP, mean of classes, %",
    "log_loss_macro_nats": "Log-loss, mean of classes, nats", "num_clips": "Clips scored",
    "num_clips_without_video": "Clips without video", "num_clips_without_audio": "Clips without audio",
    "num_clips_without_label": "Clips without a label", "num_clips_broken": "Clips that could not be read",
    "num_classes": "Classes", "num_classes_absent": "Classes without clips in the split",
}  # fmt: skip


@dataclass(frozen=True)
class RunResults:
    """Content of a run folder, read for a report. Files that are missing give empty fields.

    Attributes:
        path: The run folder.
        name: Name of the run in the report.
        table: The recipe as plain tables.
        training: Rows of `metrics.jsonl` with a loss.
        evaluations: Rows of `metrics.jsonl` with an evaluation.
        evaluation: The final evaluation; None if the run has none yet.
        status: Content of `status.json`.
        environment: Content of `env.json`.
        skipped: Rows of `skipped.csv`.
    """

    path: Path
    name: str
    table: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    evaluation: Evaluation | None
    status: dict[str, Any]
    environment: dict[str, Any]
    skipped: list[dict[str, str]]

    @classmethod
    def read(cls, path: Path, name: str) -> RunResults:
        """Reads a run folder.

        Raises:
            UserError: A file of the run is damaged; the message names it.
        """
        folder = RunFolder(path, writer=False)
        rows = list(folder.read_metrics())
        evaluation = None
        if folder.evaluation.exists():
            evaluation = Evaluation.from_json(folder.evaluation.read_bytes(), str(folder.evaluation))
        return cls(
            path=path,
            name=name,
            table=_toml(folder.recipe),
            training=[row for row in rows if "loss" in row],
            evaluations=[row for row in rows if isinstance(row.get("eval"), dict)],
            evaluation=evaluation,
            status=_json(path / "status.json"),
            environment=_json(path / "env.json"),
            skipped=folder.read_skipped(),
        )

    @property
    def kind(self) -> str:
        """Kind of the fusion; `video` and `audio` are the single modalities."""
        return str(self.table.get("model", {}).get("fusion", {}).get("kind", "model"))

    @property
    def colour(self) -> str:
        """Key of the run's colour: `video`, `audio` or `fusion`."""
        return self.kind if self.kind in SINGLE else "fusion"

    @property
    def rank(self) -> tuple[int, str]:
        """Sort key in a comparison: the kinds of `ORDER` first, then unknown kinds; runs of one kind by name."""
        return (ORDER.index(self.kind) if self.kind in ORDER else len(ORDER), self.name)

    @cached_property
    def predictions(self) -> Predictions | None:
        """Predictions on the test split; None if the run has none yet.

        Raises:
            UserError: The file is damaged.
        """
        file = self.path / "predictions.parquet"
        return read_predictions(file) if file.exists() else None


@dataclass(frozen=True)
class Gain:
    """Gain of a run over the best single-modality run.

    Attributes:
        over: Name of the single-modality run.
        points: Difference of the main metric, percentage points.
        low: Lower end of the paired 95 % interval of the difference; None if unknown.
        high: Upper end of the interval; None if unknown.
    """

    over: str
    points: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `unclear` (the interval contains 0), or `no interval`."""
        if self.low is None or self.high is None:
            return "no interval"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "unclear"


def find_runs(paths: Sequence[Path], out: Path | None = None) -> tuple[list[RunResults], Path]:
    """Reads runs and determines the folder for their comparison.

    Args:
        paths: Run folders, or folders that contain run folders.
        out: Folder for the comparison; None for the single path, or the common parent folder of all runs.

    Returns:
        The runs in display order, and the folder of the comparison.

    Raises:
        UserError: A path does not exist, or contains no run.
    """
    folders: list[Path] = []
    for path in paths:
        if not path.is_dir():
            near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
            raise UserError(f"{path}: no such folder{near}")
        inside = [path] if _is_run(path) else sorted(child for child in path.iterdir() if _is_run(child))
        if not inside:
            raise UserError(f"{path}: neither a run (a folder with recipe.toml) nor a folder that contains runs")
        folders += [folder for folder in inside if folder not in folders]
    home = out or (paths[0] if len(paths) == 1 else Path(os.path.commonpath([p.absolute() for p in folders])))
    names = [os.path.relpath(folder.absolute(), home.absolute()) for folder in folders]
    runs = [
        RunResults.read(folder, name if ".." not in name and name != "." else folder.absolute().name)
        for folder, name in zip(folders, names, strict=True)
    ]
    return sorted(runs, key=lambda run: run.rank), home


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / mark).is_file() for mark in MARKS)


def compare(runs: Sequence[RunResults]) -> tuple[RunResults | None, dict[str, Gain], list[str]]:
    """Compares fusion runs with the best single-modality run.

    Returns:
        The best single-modality run, run name -> gain over it, and notes on runs that could not be compared.
    """
    notes = [
        f"{run.name}: not evaluated yet, or no clip has a label"
        for run in runs
        if run.evaluation is None or run.evaluation.value is None
    ]
    scored = [run for run in runs if value_of(run) is not None]
    singles = [run for run in scored if run.kind in SINGLE]
    best = max(singles, key=lambda run: value_of(run) or 0.0, default=None)
    if best is None or best.evaluation is None:
        return None, {}, [*notes, *(["no single-modality run to compare with"] if scored else [])]
    gains: dict[str, Gain] = {}
    for run in scored:
        one, two = run.evaluation, best.evaluation
        assert one is not None
        if run.kind in SINGLE:
            continue
        if (one.split, one.main, one.classes) != (two.split, two.main, two.classes):
            notes.append(f"{run.name}: not compared with {best.name}: different split, task or classes")
            continue
        gains[run.name] = _gain(run, best, notes)
    return best, gains, notes


def _gain(run: RunResults, best: RunResults, notes: list[str]) -> Gain:
    """Returns the gain, with a paired interval if both runs have top-1 predictions of the same clips."""
    one, two = value_of(run), value_of(best)
    assert one is not None
    assert two is not None
    assert run.evaluation is not None
    plain = Gain(best.name, one - two)
    if run.evaluation.main != "top1_micro_pct" or run.predictions is None or best.predictions is None:
        return plain
    try:
        ids, (new, old) = join([run.predictions, best.predictions])
    except UserError as error:
        notes.append(f"{run.name}: {error}")
        return plain
    labelled = new.targets_NK.sum(axis=1) > 0
    right = [_hits(part)[labelled] for part in (new, old)]
    if len(ids) < max(len(run.predictions), len(best.predictions)):
        notes.append(f"{run.name}: the interval of the gain is over the {len(ids)} clips in common with {best.name}")
    better, worse = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    low, high = bootstrap_gain(better, worse, int(labelled.sum()), seed=0) or (None, None)
    return Gain(best.name, one - two, low, high)


def _hits(part: Predictions) -> NDArray[np.bool_]:
    return np.take_along_axis(part.targets_NK, part.probabilities_NK.argmax(axis=1)[:, None], axis=1)[:, 0] > 0


def value_of(run: RunResults) -> float | None:
    """Returns the main metric of a run; None before its first evaluation."""
    return run.evaluation.value if run.evaluation else None


Compared = tuple[RunResults | None, dict[str, Gain], list[str]]


def results(home: Path, runs: Sequence[RunResults], compared: Compared) -> dict[str, Any]:
    """Returns the comparison as a JSON object: metrics, interval, and gain over the best single modality per run."""
    best, gains, notes = compared
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": run.name, "path": os.path.relpath(run.path, home), "kind": run.kind}
        if run.evaluation is not None:
            low, high = run.evaluation.interval or (None, None)
            row |= {
                "split": run.evaluation.split, "main": run.evaluation.main, "value": run.evaluation.value,
                "low": low, "high": high, "metrics": run.evaluation.metrics,
            }  # fmt: skip
        if run.name in gains:
            gain = gains[run.name]
            row["gain_pct"] = {
                "over": gain.over, "value": gain.points, "low": gain.low, "high": gain.high, "verdict": gain.verdict,
            }  # fmt: skip
        rows.append(row)
    return {"best_single": best.name if best else None, "runs": rows, "notes": notes}


def terminal_table(home: Path, runs: Sequence[RunResults], compared: Compared) -> Table:
    """Returns the comparison as a table for a terminal of 80 columns."""
    evaluations = [run.evaluation for run in runs if run.evaluation]
    metric = evaluations[0].main if evaluations else "top1_micro_pct"
    splits = {f"{one.split}, {one.metrics['num_clips']:.0f} clips" for one in evaluations}
    table = Table(title=Text(f"{home}: {'; '.join(sorted(splits)) or 'nothing evaluated'}"), box=box.SIMPLE_HEAD)
    for column in ("run", LABELS.get(metric, metric), "95 % interval", "over best single", "verdict"):
        table.add_column(column, justify="left" if column in ("run", "verdict") else "right")
    for run in runs:
        cells = comparison_row(run, compared[1].get(run.name))
        name = run.name if run.name == run.kind else f"{run.name} ({run.kind})"
        table.add_row(Text(name), *(Text(cells[key]) for key in ("value", "interval", "gain", "verdict")))
    return table


def comparison_row(run: RunResults, gain: Gain | None) -> dict[str, str]:
    """Returns the table cells of one run, as text by column key."""
    one = run.evaluation
    ends = one.interval if one else None
    points = "" if gain is None else f"{gain.points:+.1f}"
    if gain is not None and gain.low is not None:
        points += f" [{gain.low:+.1f}, {gain.high:+.1f}]"
    other = {key: metric_text(key, one.metrics) if one else "" for key in LABELS}
    return {
        "name": run.name,
        "kind": run.kind,
        "colour": run.colour,
        "value": (metric_text(one.main, one.metrics) if one else "") or "none",
        "interval": f"{ends[0]:.1f} to {ends[1]:.1f}" if ends else "",
        "gain": points,
        "verdict": gain.verdict if gain else "",
        "clips": f"{one.metrics['num_clips']:.0f}" if one else "",
        **other,
    }


def metric_text(key: str, metrics: Mapping[str, float]) -> str:
    """Formats a metric by the unit in its key; empty if it is absent."""
    value = metrics.get(key)
    if value is None:
        return ""
    return f"{value:.1f}" if key.endswith("_pct") else f"{value:.3f}" if key.endswith("_nats") else number(value)


def number(value: Any, digits: int = 4) -> str:
    """Formats a number with `digits` significant digits: 97.5, 1,234, 0.00012."""
    if value is None:
        return ""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def read_text(path: Path) -> str:
    """Returns the content of a text file; empty if the file is missing."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; empty if the file is missing or truncated."""
    try:
        found = json.loads(read_text(path) or "{}")
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
