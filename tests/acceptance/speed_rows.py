"""Rows of the suites that measure the loop and its scaling: the figures that do not depend on the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.acceptance.rows import Result, call, fresh

_OFF = 0.35  # by which the model on paper may miss the measurement on cores that others use, too


def scaling(work: Path) -> Result:
    """1, 2 and 4 CPU ranks, weak and strong: the model on paper from 1 rank and the links of 2, within 35 %."""
    fresh(work)
    out = work / "scale.json"
    words = ["--ranks", "1,2,4", "--rounds", "4", "--steps", "3", "--turns", "3", "--folder", str(work)]
    call(sys.executable, "-m", "benchmarks", "scale", *words, "--out", str(out), timeout=7200)
    found = json.loads(out.read_text())
    measured = {row["variant"]: row for row in found["summary"] if row["metric"] == "efficiency"}
    paper = {run["variant"]: run["paper_efficiency"] for run in found["runs"] if "paper_efficiency" in run}
    figures = {}
    for variant, row in measured.items():
        off = paper[variant] / row["median"] - 1
        figures[variant] = {"measured": row["median"], "ci95": row["ci95"], "paper": round(paper[variant], 3),
                            "off": round(off, 3)}  # fmt: skip
    return figures | {"inputs": found["paper"]}, all(abs(row["off"]) <= _OFF for row in figures.values())


SPEED_ROWS = {"scaling": scaling}
