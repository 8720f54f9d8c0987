"""HTML pages of a report: the page of a single run, and the comparison of several runs."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from fastav.core.errors import FastavError
from fastav.recipe.parse import load_recipe
from fastav.report import plots
from fastav.report.clips import ClipPictures, Example, best_and_worst, pictures
from fastav.report.plots import Bar, Estimate, Line
from fastav.report.runs import (
    LABELS,
    SINGLE,
    Compared,
    RunResults,
    comparison_row,
    metric_text,
    number,
    read_text,
    value_of,
)
from fastav.task.metrics import ClassScore, Evaluation

SPEEDS = {
    "clips_per_s": "Clips per second", "unique_clips_per_s": "Decoded clips per second", "step_ms": "Step, ms",
    "stall_pct": "Waiting for the loader, %", "mfu_pct": "MFU, % of peak", "peak_mem_gib": "Peak memory, GiB",
    "joules_per_clip": "Energy per clip, J",
}  # fmt: skip
BOUND_BY_LOADER_PCT = 10.0
BARS_A_FIGURE = 32


def run_page(run: RunResults, num_clips: int) -> str:
    """Returns the report of one run as HTML.

    Args:
        run: Results of the run.
        num_clips: Number of best and of worst clips to show; 0 for none.
    """
    one = run.evaluation
    best, worst, shown, note = _examples(run, num_clips)
    context = {
        "title": run.name if run.name == run.kind else f"{run.name} ({run.kind})",
        "run": run,
        "headline": comparison_row(run, None),
        "metric": LABELS.get(one.main, one.main) if one else "",
        "metrics": _metric_rows(one),
        "curves": _curves(run),
        "bars": _own_bars(one),
        "classes": one.per_class if one else [],
        "confusion": _confusion(one),
        "examples": [("Most confident correct predictions", best), ("Worst predictions", worst)],
        "pictures": shown,
        "pictures_note": note,
        "speeds": _speeds(run.training),
        "binds": _what_binds(run.training),
        "environment": list(_flat(run.environment)),
        "recipe": read_text(run.path / "recipe.toml"),
    }
    return _render("run", context)


def comparison_page(home: Path, runs: Sequence[RunResults], compared: Compared) -> str:
    """Returns the comparison of several runs as HTML.

    Args:
        home: Folder of the comparison page; links to the runs are relative to it.
        runs: Results of the runs, in display order.
        compared: Result of `runs.compare`.
    """
    best, gains, notes = compared
    scored = [run for run in runs if value_of(run) is not None]
    main = scored[0].evaluation.main if scored and scored[0].evaluation else "top1_micro_pct"
    unit = LABELS.get(main, main)
    estimates = []
    for run in scored:
        assert run.evaluation is not None
        assert run.evaluation.value is not None
        low, high = run.evaluation.interval or (None, None)
        estimates.append(Estimate(run.name, run.evaluation.value, low, high, run.colour))
    values = ", ".join(f"{e.name} {e.value:.1f}" for e in estimates)
    context = {
        "title": f"Runs of {home.absolute().name}",
        "rows": [
            (comparison_row(run, gains.get(run.name)), os.path.relpath(run.path / "report.html", home)) for run in runs
        ],
        "metric": unit,
        "best": best,
        "gains": gains,
        "notes": notes,
        "intervals": Markup(plots.intervals(estimates, unit=unit, alt=f"{unit} with 95 % intervals: {values}"))
        if estimates
        else "",
        "figure_3": _figure_3(scored),
        "losses": _losses(runs),
    }
    return _render("comparison", context)


def _figure_3(scored: Sequence[RunResults]) -> dict[str, Any]:
    """Makes SSW60's figure 3 from the best video, audio and fusion run; empty if these cannot be compared.

    Returns:
        `runs` (colour -> run), `summary` (a sentence), `scatter`, and `bars` in columns.
    """
    trio: dict[str, RunResults] = {}
    for colour in ("video", "audio", "fusion"):
        candidates = [run for run in scored if run.colour == colour]
        if candidates:
            trio[colour] = max(candidates, key=lambda run: value_of(run) or 0.0)
    found = [run.evaluation for run in trio.values() if run.evaluation]
    if len(found) < 3 or len({(one.split, one.main, tuple(one.classes)) for one in found}) > 1:
        return {}
    video, audio, fused = ({row.name: _class_value(one, row) for row in one.per_class} for one in found)
    points = [(name, video[name], audio[name], fused[name]) for name in found[0].classes]
    known = [(n, v, a, f) for n, v, a, f in points if v is not None and a is not None and f is not None]
    changes = [(n, v, a, f - max(v, a)) for n, v, a, f in known]
    counts = [sum(c[3] > 0 for c in changes), sum(c[3] == 0 for c in changes), sum(c[3] < 0 for c in changes)]
    summary = f"With fusion, {counts[0]} classes improve, {counts[1]} stay the same and {counts[2]} get worse"
    bars = [Bar(n, f, max(v, a), "video" if v >= a else "audio") for n, v, a, f in known]
    bars.sort(key=lambda bar: (-(bar.base or 0.0), bar.name))
    unit = "Top-1, %" if found[0].task == "single_label" else "AP, %"
    return {
        "runs": trio,
        "summary": summary,
        "scatter": Markup(plots.class_scatter(changes, unit=unit, alt=f"Classes by video and audio score. {summary}.")),
        "bars": _bar_columns(bars, unit, f"Better single-modality score of each class, and the change. {summary}"),
    }


def _class_value(one: Evaluation, row: ClassScore) -> float | None:
    return row.top1_pct if one.task == "single_label" else row.ap_pct


def _bar_columns(bars: Sequence[Bar], unit: str, alt: str) -> list[Markup]:
    """Splits bars into figures of about equal length, shown in columns."""
    parts = -(-len(bars) // BARS_A_FIGURE)
    size = -(-len(bars) // max(parts, 1))
    return [
        Markup(plots.class_bars(bars[start : start + size], unit=unit, alt=f"{alt} ({n} of {parts})."))
        for n, start in enumerate(range(0, len(bars), max(size, 1)), 1)
    ]


def _own_bars(one: Evaluation | None) -> list[Markup]:
    """Returns the per-class bars of one run, best class first, classes without clips last."""
    if one is None:
        return []
    bars = [Bar(row.name, _class_value(one, row)) for row in one.per_class]
    bars.sort(key=lambda bar: (bar.value is None, -(bar.value or 0.0), bar.name))
    unit = "Top-1, %" if one.task == "single_label" else "AP, %"
    known = [bar for bar in bars if bar.value is not None]
    extremes = (
        f"best {known[0].name} {known[0].value:.0f}, worst {known[-1].name} {known[-1].value:.0f}" if known else "none"
    )
    return _bar_columns(bars, unit, f"{unit} of {len(bars)} classes: {extremes}")


def _confusion(one: Evaluation | None) -> Markup | str:
    if one is None or not one.confusion:
        return ""
    counts = np.asarray(one.confusion)
    off = counts - np.diag(np.diag(counts))
    row, column = np.unravel_index(int(off.argmax()), off.shape)
    worst = (
        f"the most frequent confusion is {one.classes[row]} predicted as {one.classes[column]}, {off.max()} times"
        if off.any()
        else "no clip is misclassified"
    )
    return Markup(plots.confusion_matrix(one.confusion, one.classes, alt=f"Confusion matrix: {worst}."))


def _curves(run: RunResults) -> list[tuple[str, Markup]]:
    """Returns (caption, figure) of each curve over the steps in `metrics.jsonl`."""
    rows, charts = run.training, []
    for key, caption, floor in (
        ("loss", "Training loss", None), ("lr", "Learning rate", 0.0), ("clips_per_s", "Clips per second", 0.0),
        ("stall_pct", "Waiting for the loader, % of the time", 0.0), ("grad_norm", "Gradient norm, unclipped", 0.0),
    ):  # fmt: skip
        found = [(row["step"], _finite(row[key])) for row in rows if row.get(key) is not None]
        if not found:
            continue
        x, y = zip(*found, strict=True)
        alt = f"{caption}: from {number(y[0])} at step {x[0]} to {number(y[-1])} at step {x[-1]}."
        line = Line(x, y, "fusion" if run.kind not in SINGLE else run.kind, smooth=key != "lr")
        charts.append((caption, Markup(plots.line_chart({key: line}, unit=caption, alt=alt, floor=floor))))
    main = run.evaluation.main if run.evaluation else "top1_micro_pct"
    evaluated = [(row["step"], row["eval"][main]) for row in run.evaluations if row["eval"].get(main) is not None]
    if len(evaluated) > 1:
        x, y = zip(*evaluated, strict=True)
        caption = f"{LABELS.get(main, main)} in evaluation"
        alt = f"{caption}: from {number(y[0])} at step {x[0]} to {number(y[-1])} at step {x[-1]}."
        charts.insert(
            1, (caption, Markup(plots.line_chart({main: Line(x, y, run.colour, marked=True)}, unit=caption, alt=alt)))
        )
    return charts


def _losses(runs: Sequence[RunResults]) -> Markup | str:
    """Returns the figure of all runs' training losses over the epochs; empty if no run has any."""
    lines = {}
    dashes = {colour: itertools.cycle(("-", "--", ":", "-.")) for colour in ("video", "audio", "fusion")}
    for run in runs:
        found = [(row["epoch"], _finite(row["loss"])) for row in run.training if row.get("epoch") is not None]
        if len(found) > 1:
            x, y = zip(*found, strict=True)
            lines[run.name] = Line(x, y, run.colour, next(dashes[run.colour]), smooth=True)
    if not lines:
        return ""
    alt = "Training loss over the epochs of " + ", ".join(lines)
    return Markup(plots.line_chart(lines, unit="Training loss", alt=alt, x_unit="epoch"))


def _examples(run: RunResults, count: int) -> tuple[list[Example], list[Example], dict[str, ClipPictures], str]:
    """Returns best clips, worst clips, their pictures by clip id, and a note if there are no pictures."""
    if run.predictions is None or run.evaluation is None or not count:
        return [], [], {}, ""
    best, worst = best_and_worst(run.predictions, count)
    try:
        settings = load_recipe(run.path / "recipe.toml")
    except FastavError as error:
        return best, worst, {}, f"no pictures: {error}"
    shown, note = pictures(settings, run.path, run.evaluation.split, [one.id for one in [*best, *worst]])
    return best, worst, shown, note


def _metric_rows(one: Evaluation | None) -> list[tuple[str, str]]:
    if one is None:
        return []
    top_k = one.metrics.get("top_k", 5)
    named = {key: label.replace("Top-5", f"Top-{top_k:.0f}") for key, label in LABELS.items()}
    return [(named[key], metric_text(key, one.metrics)) for key in LABELS if key in one.metrics]


def _speeds(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Returns (label, median, 5th, 95th percentile) over the logged intervals, without the first one (warm-up)."""
    table = []
    for key, label in SPEEDS.items():
        found = [float(row[key]) for row in (rows[1:] or rows) if row.get(key) is not None]
        if found:
            low, median, high = np.percentile(found, [5, 50, 95])
            table.append((label, number(median, 3), number(low, 3), number(high, 3)))
    return table


def _what_binds(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a sentence on whether the loader or the model limits the training speed."""
    found = [float(row["stall_pct"]) for row in (rows[1:] or rows) if row.get("stall_pct") is not None]
    if not found:
        return ""
    stall = float(np.median(found))
    if stall > BOUND_BY_LOADER_PCT:
        return f"The loader is the bottleneck: {stall:.0f} % of the time is spent waiting for it."
    return f"The model is the bottleneck: {stall:.0f} % of the time is spent waiting for the loader."


def _render(page: str, context: dict[str, Any]) -> str:
    """Renders the template; every value that is not `Markup` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(page=page, **context)


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flattens nested tables to (dotted key, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((prefix + key, text))
    return rows
