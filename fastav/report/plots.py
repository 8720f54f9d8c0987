"""Figures of a report: inline SVG drawn by matplotlib, and images as data URIs.

Colours are CSS variables of the page (`var(--video)`), so that a figure works in light and dark mode. Text stays text.
pyplot and matplotlib's global state are not used.
"""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

# Placeholder colours that matplotlib draws with; `_svg` replaces them by CSS variables.
COLOURS: dict[str, str] = {
    "ink": "#0a0001",
    "muted": "#0a0002",
    "grid": "#0a0003",
    "video": "#0a0004",
    "audio": "#0a0005",
    "fusion": "#0a0006",
    "gain": "#0a0007",
    "loss": "#0a0008",
}
WIDTH_IN = 4.8  # at 72 points per inch, the width of a phone's page: text keeps its size there
_MAX_COUNTED_CELLS = 15
_MAX_VECTOR_CELLS = 30


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        x: Numbers, ascending.
        y: One number per x; NaN leaves a gap.
        colour: A key of `COLOURS`.
        dash: Line style of matplotlib.
        smooth: Whether to draw the points faintly, and their running mean over them.
        marked: Whether to mark every point.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: str = "ink"
    dash: str = "-"
    smooth: bool = False
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """Bar of one class: the score of the better single model, and the change by fusion, percent.

    Attributes:
        name: Class name.
        value: Score of the (fusion) model; None if the split has no clips of the class.
        base: Score of the better single model; None in the report of one run.
        colour: Colour of the base: `video`, `audio`, or `fusion`.
    """

    name: str
    value: float | None
    base: float | None = None
    colour: str = "fusion"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A named value with its interval, percent."""

    name: str
    value: float
    low: float | None
    high: float | None
    colour: str = "fusion"


@contextmanager
def _style() -> Iterator[None]:
    ink, muted = COLOURS["ink"], COLOURS["muted"]
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "fastav", "text.parse_math": False, "font.family": "sans-serif",
        "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        "text.color": ink, "axes.labelcolor": muted, "xtick.labelcolor": muted, "ytick.labelcolor": muted,
        "xtick.color": COLOURS["grid"], "ytick.color": COLOURS["grid"], "axes.edgecolor": COLOURS["grid"],
        "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
        "figure.facecolor": "none", "savefig.facecolor": "none", "axes.grid": False, "grid.color": COLOURS["grid"],
        "grid.linewidth": 0.6, "lines.linewidth": 1.6, "xtick.major.size": 0, "ytick.major.size": 0,
        "axes.formatter.useoffset": False,
    }  # fmt: skip
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has these fonts
        yield


def _figure(height_in: float, width_in: float = WIDTH_IN) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, alt: str) -> str:
    """Returns the figure as an `<svg>` element that scales with the page, with `alt` for screen readers."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|PathCollection|Quad\w+|legend)_\d+"',
        "",
        text,
    )
    text = re.sub(r"(font: (?:\w+ )*[\d.]+px)[^;\"]*", r"\1 system-ui, sans-serif", text)
    for name, stand_in in COLOURS.items():
        text = text.replace(stand_in, f"var(--{name})")
    opening, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    assert view is not None
    label = html.escape(alt, quote=True)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg role="img" aria-label="{label}" {view[0]} {names}>{rest.strip()}'


def line_chart(
    lines: Mapping[str, Line], *, unit: str, alt: str, x_unit: str = "step", floor: float | None = None
) -> str:
    """Draws lines over steps.

    Args:
        lines: Label -> line; with several lines, labels are drawn at their ends.
        unit: Title of the y axis.
        alt: Alternative text for screen readers.
        x_unit: Label of the x axis.
        floor: Lowest value of the y axis; None: from the data.
    """
    with _style():
        figure, axes = _figure(2.4)
        ends: list[tuple[float, float, str, str]] = []
        for name, line in lines.items():
            colour = COLOURS[line.colour]
            x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
            if line.smooth and len(x) > 20:
                if len(lines) == 1:
                    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
                y = _smooth(y)
            axes.plot(
                x,
                y,
                color=colour,
                linestyle=line.dash,
                marker="o" if line.marked or len(x) < 3 else None,
                markersize=3.5,
            )
            known = np.flatnonzero(np.isfinite(y))
            if len(known):
                ends.append((float(y[known[-1]]), float(x[known[-1]]), name, colour))
        axes.set_xlabel(x_unit)
        axes.set_title(unit, loc="left", color=COLOURS["muted"])
        axes.grid(axis="y")
        axes.margins(x=0.01, y=0.08)
        if floor is not None:
            axes.set_ylim(bottom=floor)
        axes.locator_params(nbins=6)
        if len(lines) > 1:
            _label_ends(axes, ends)
        return _svg(figure, alt)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each line's name at the right edge, at the height of its end, without overlaps."""
    low, high = axes.get_ylim()
    line_height = 0.085 * (high - low)
    right = axes.get_xlim()[1]
    at = low - line_height
    for y, _, name, colour in sorted(ends):
        at = max(y, at + line_height)
        axes.annotate(
            _short(name, 16), (right, at), (5, 0), textcoords="offset points", color=colour, va="center", size=8.5,
            annotation_clip=False,
        )  # fmt: skip


def class_bars(bars: Sequence[Bar], *, unit: str, alt: str) -> str:
    """Draws one horizontal bar per class, in the given order, from the top.

    With a base (SSW60, figure 3), the bar of the base is extended by the gain of fusion, or its end shows the loss.
    """
    with _style():
        figure, axes = _figure(0.7 + 0.2 * len(bars))
        for y, bar in enumerate(bars):
            if bar.value is None:
                axes.annotate("no clips", (1, y), va="center", size=7.5, color=COLOURS["muted"])
                continue
            base = bar.value if bar.base is None else bar.base
            kept = min(base, bar.value)
            axes.barh(y, kept, height=0.72, color=COLOURS[bar.colour], alpha=0.75)
            if bar.value > base:
                axes.barh(y, bar.value - base, left=base, height=0.72, color=COLOURS["gain"])
            elif bar.value < base:
                axes.barh(y, base - kept, left=kept, height=0.72, color=COLOURS["loss"], alpha=0.8)
            end = max(base, bar.value)
            axes.annotate(f"{bar.value:.0f}", (end, y), (3, 0), textcoords="offset points", va="center", size=7.5)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 106)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_yticks(range(len(bars)), [_short(bar.name) for bar in bars], color=COLOURS["ink"])
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines[["left", "bottom", "top"]].set_visible(False)
        return _svg(figure, alt)


def class_scatter(points: Sequence[tuple[str, float, float, float]], *, unit: str, alt: str) -> str:
    """Draws each class at (video score, audio score); area and colour of a dot show the gain or loss by fusion.

    Args:
        points: Class, video score, audio score, and change from the better of them to fusion; percent.
        unit: Unit of both axes.
        alt: Alternative text for screen readers.
    """
    with _style():
        figure, axes = _figure(4.4)
        axes.plot([0, 100], [0, 100], color=COLOURS["grid"], linewidth=0.8)
        spread = _spread(points)
        for _, video, audio, change in sorted(spread, key=lambda point: -abs(point[3])):
            colour = COLOURS["gain" if change > 0 else "loss" if change < 0 else "muted"]
            axes.scatter(video, audio, s=12 + 3 * abs(change), color=colour, alpha=0.55, linewidth=0)
        changed = sorted((point for point in spread if point[3]), key=lambda point: point[3])
        placed: list[tuple[float, float]] = []
        for name, video, audio, change in [*changed[:3], *changed[:-4:-1]]:
            if any(abs(video - x) < 45 and abs(audio - y) < 5 for x, y in placed):
                continue  # would overlap a label
            placed.append((video, audio))
            left = video > 60
            axes.annotate(
                f"{_short(name, 20)} {change:+.0f}", (video, audio), (-9 if left else 9, 0), textcoords="offset points",
                va="center", ha="right" if left else "left", size=8,
            )  # fmt: skip
        axes.set_xlim(-4, 104)
        axes.set_ylim(-4, 104)
        axes.set_aspect("equal")
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_xlabel(f"video {unit}")
        axes.set_ylabel(f"audio {unit}")
        return _svg(figure, alt)


def _spread(points: Sequence[tuple[str, float, float, float]]) -> list[tuple[str, float, float, float]]:
    """Spreads points of equal scores in a sunflower spiral around their position."""
    counts: dict[tuple[float, float], int] = {}
    moved = []
    for name, video, audio, change in points:
        number = counts.get((video, audio), 0)
        counts[video, audio] = number + 1
        radius, angle = 1.8 * np.sqrt(number), 2.39996 * number  # the golden angle
        moved.append((name, video + radius * np.cos(angle), audio + radius * np.sin(angle), change))
    return moved


def intervals(estimates: Sequence[Estimate], *, unit: str, alt: str) -> str:
    """Draws one row per estimate: its value as a dot, its interval as a line."""
    with _style():
        figure, axes = _figure(0.6 + 0.3 * len(estimates))
        for y, one in enumerate(estimates):
            colour = COLOURS[one.colour]
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [y, y], color=colour, linewidth=2.5, solid_capstyle="round", alpha=0.55)
            axes.plot([one.value], [y], "o", color=colour, markersize=7)
            axes.annotate(f"{one.value:.1f}", (one.value, y), (0, 6), textcoords="offset points", ha="center", size=8.5)
        axes.set_ylim(len(estimates) - 0.4, -0.8)
        axes.set_xlim(-2, 104)
        axes.set_yticks(range(len(estimates)), [_short(one.name) for one in estimates], color=COLOURS["ink"])
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        return _svg(figure, alt)


def confusion_matrix(counts: Sequence[Sequence[int]], classes: Sequence[str], *, alt: str) -> str:
    """Draws a confusion matrix of clip counts, rows true, columns predicted; darker: a larger share of the row."""
    counts_KK = np.asarray(counts, dtype=float)
    share_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    num_classes = len(classes)
    named = num_classes <= _MAX_VECTOR_CELLS
    with _style():
        figure, axes = _figure(min(4.8, 2.0 + 0.3 * num_classes))
        if named:
            for row, column in np.argwhere(counts_KK > 0):
                right = row == column
                colour = COLOURS["fusion" if right else "loss"]
                share = share_KK[row, column]
                axes.add_patch(
                    Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=0.12 + 0.78 * share, linewidth=0)
                )
                if num_classes <= _MAX_COUNTED_CELLS:
                    axes.annotate(f"{counts_KK[row, column]:.0f}", (column, row), ha="center", va="center", size=8)
        else:
            axes.imshow(_ramp(share_KK), interpolation="nearest", aspect="equal")
        axes.set_xlim(-0.5, num_classes - 0.5)
        axes.set_ylim(num_classes - 0.5, -0.5)
        axes.set_aspect("equal")
        ticks = range(num_classes) if named else []
        size = 8.5 if num_classes <= _MAX_COUNTED_CELLS else 6
        names = [_short(name, 16) for name in classes] if named else []
        axes.set_xticks(ticks, names, rotation=90, size=size, color=COLOURS["ink"])
        axes.set_yticks(ticks, names, size=size, color=COLOURS["ink"])
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.spines[:].set_visible(True)
        return _svg(figure, alt)


def frame_uri(frame_CHW: NDArray[np.uint8]) -> str:
    """Returns an RGB image as a JPEG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame_CHW.transpose(1, 2, 0))).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def spectrogram_uri(mel_ML: NDArray[np.float32], range_db: float = 70.0) -> str:
    """Returns a log-mel spectrogram as a JPEG data URI: low bands at the bottom, the loudest `range_db` dB shown."""
    top = float(mel_ML.max(initial=-200.0))
    low = max(top - range_db, float(mel_ML.min(initial=top)))
    level_ML = np.clip((mel_ML[::-1] - low) / max(top - low, 1e-6), 0, 1)
    pixels = (mpl.colormaps["magma"](level_ML)[:, :, :3] * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _ramp(share_KK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns RGBA of a large confusion matrix, in a colour for light and dark pages; larger shares are more opaque."""
    rgba = np.zeros((*share_KK.shape, 4))
    rgba[:] = (0.75, 0.31, 0.28, 0)
    diagonal = np.arange(len(share_KK))
    rgba[diagonal, diagonal, :3] = (0.26, 0.55, 0.55)
    rgba[:, :, 3] = np.where(share_KK > 0, 0.15 + 0.85 * share_KK, 0)
    return rgba


def _smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the centred running mean over about 5 % of the points, over fewer at both ends; ignores gaps."""
    half = max(1, len(y) // 40)
    known = np.isfinite(y)
    total = np.r_[0, np.cumsum(np.where(known, y, 0))]
    count = np.r_[0, np.cumsum(known)]
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    counted = count[high] - count[low]
    return np.where(counted > 0, (total[high] - total[low]) / np.maximum(counted, 1), np.nan)


def _short(name: str, length: int = 24) -> str:
    """Shortens a name to one line of at most `length` characters."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"
