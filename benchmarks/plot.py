"""Plots of a result: one panel per metric, one bar per variant, with its interval; and lines over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

_COLOURS = ("#d1495b", "#30638e", "#6a9bc3", "#edae49", "#66a182", "#8d96a3")
_OURS, _OTHER = "#d1495b", "#9aa5b1"


def bars(
    found: Mapping[str, Any], metrics: Mapping[str, str], path: Path, colours: Mapping[str, str] | None = None
) -> Path:
    """Draws the summary of a result as bars.

    Args:
        found: The result. A metric that its summary does not have is drawn from its runs, without intervals.
        metrics: Name of the metric -> label below its panel, with the unit.
        path: The PNG file.
        colours: Colours by the part of a variant's name after ` through `; others are grey, fastav's red.

    Returns:
        The path.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {metric: rows for metric in metrics if (rows := _rows(found, metric))}
    heights = [0.26 * len(rows) + 0.9 for rows in panels.values()] or [1.0]
    figure, grid = pyplot.subplots(
        len(heights), figsize=(9, sum(heights) + 0.3), layout="constrained", squeeze=False, height_ratios=heights
    )
    for axes, (metric, rows) in zip(grid[:, 0], panels.items(), strict=False):
        for place, (name, middle, low, high) in enumerate(rows):
            error = [[max(middle - low, 0)], [max(high - middle, 0)]]
            colour = (colours or {}).get(name.split(" through ")[-1], _OURS if "ours" in name else _OTHER)
            axes.barh(place, middle, xerr=error, color=colour, ecolor="#333333")
            axes.text(max(high, 0), place, f"  {middle:.3g}", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.01)
        axes.set_xlabel(metrics[metric], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    if not panels:
        grid[0, 0].set_axis_off()
        grid[0, 0].text(0, 0.5, "nothing was timed: " + "; ".join(found["notes"])[:150], fontsize=8)
    figure.suptitle(_title(found), fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def lines(
    found: Mapping[str, Any], series: Mapping[str, Sequence[tuple[float, float, float, float]]], path: Path,
    labels: tuple[str, str], dashed: Mapping[str, Sequence[tuple[float, float]]],
) -> Path:  # fmt: skip
    """Draws measured and predicted values over the number of ranks.

    Args:
        found: The result, for the title.
        series: Name -> (x, median, low, high) of each measured point.
        path: The PNG file.
        labels: Labels of the two axes.
        dashed: Name -> (x, y) of each predicted point.

    Returns:
        The path.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for colour, (name, points) in zip(_COLOURS, series.items(), strict=False):
        x, middle, low, high = zip(*points, strict=True)
        below = [max(m - a, 0) for m, a in zip(middle, low, strict=True)]
        above = [max(b - m, 0) for m, b in zip(middle, high, strict=True)]
        axes.errorbar(x, middle, [below, above], marker="o", capsize=3, color=colour, label=name)
        if name in dashed:
            axes.plot(*zip(*dashed[name], strict=True), "--", color=colour, label=f"{name}, predicted")
    ticks = sorted({point[0] for points in [*series.values(), *dashed.values()] for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.suptitle(_title(found), fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _title(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    where = machine["gpu"] or f"{machine['cores']} CPU cores"
    return f"{found['suite']}: {where}, torch {found['versions']['torch']}, {found['created'][:10]}; 95 % intervals"


def _rows(found: Mapping[str, Any], metric: str) -> list[tuple[str, float, float, float]]:
    """Returns variant, median, low and high of a metric."""
    rows = [(row["variant"], row["median"], *row["ci95"]) for row in found["summary"] if row["metric"] == metric]
    plain = [(run["variant"], run[metric], run[metric], run[metric]) for run in found["runs"] if metric in run]
    return rows or [row for row in plain if row[1] is not None]
