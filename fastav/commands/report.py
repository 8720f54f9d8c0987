"""Writes a self-contained report.html for each run, and a comparison for several runs.

Example: `fastav report runs/quickstart`

The comparison has a report.html, a results.json and a table on the terminal: the score of each model with its 95 %
interval, and the gain of fusion over the best single modality on the same clips.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console as Screen
from rich.text import Text

from fastav.core.atomic_files import write_text
from fastav.report.page import comparison_page, run_page
from fastav.report.runs import compare, find_runs, results, terminal_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastav report`."""
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_FOLDER", help="run folder, or a folder that contains runs")
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder for the comparison; default: the common folder of the runs"
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=4,
        metavar="N",
        help="number of best and of worst clips to show; default 4, 0 for none",
    )


def main(args: argparse.Namespace) -> int:
    """Writes the reports and prints the comparison."""
    screen, notes = Screen(), Screen(stderr=True)
    runs, folder = find_runs([Path(path) for path in args.paths], Path(args.out) if args.out else None)
    for run in runs:
        target = run.path / "report.html"
        write_text(target, run_page(run, max(args.clips, 0)))
        notes.print(Text(f"written: {target}"))
    if len(runs) > 1:
        compared = compare(runs)
        write_text(folder / "report.html", comparison_page(folder, runs, compared))
        write_text(folder / "results.json", json.dumps(results(folder, runs, compared), indent=1))
        screen.print(terminal_table(folder, runs, compared))
        notes.print(Text(f"written: {folder / 'report.html'}, {folder / 'results.json'}"))
    return 0
