"""One picture of a result: clips per CPU-second of each reader, with intervals, by what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

_COLOURS = {"ours": "#d1495b", "torchcodec exact": "#30638e", "torchcodec approximate": "#6a9bc3", "SPDL": "#edae49"}


def plot(found: dict[str, Any], path: Path) -> Path:
    """Draws the single-thread comparison and returns its file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in found["summary"] if row["metric"] == "clips_per_cpu_s"]
    figure, axes = pyplot.subplots(figsize=(9, 0.26 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        low, high = row["ci95"]
        reader = row["variant"].split(" through ")[-1]
        error = [[max(row["median"] - low, 0)], [max(high - row["median"], 0)]]
        axes.barh(place, row["median"], xerr=error, color=_COLOURS.get(reader, "#9aa5b1"), ecolor="#333333")
        axes.text(high, place, f"  {row['median']:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel("clips per CPU-second (8 frames, cropped and resized to 224 x 224), median and 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
