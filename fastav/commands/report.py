"""`fastav report RUN_OR_FOLDER`: one self-contained report.html a run, and a comparison of several runs.

A folder of runs (or several runs) also gets a `results.json` and a table on the terminal: each model's score with its
95 % interval, and what fusion gains over the best single modality on the same clips.
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
    """Adds the verb's options."""
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_FOLDER", help="run folder, or folder of runs")
    parser.add_argument("--out", metavar="FOLDER", help="where the comparison of several runs goes")
    parser.add_argument("--clips", type=int, default=4, metavar="N", help="best and worst clips shown (0: none)")


def main(args: argparse.Namespace) -> int:
    """Writes the reports and prints the table."""
    screen, notes = Screen(), Screen(stderr=True)
    runs, home = find_runs([Path(path) for path in args.paths], Path(args.out) if args.out else None)
    for run in runs:
        target = run.path / "report.html"
        write_text(target, run_page(run, max(args.clips, 0)))
        notes.print(Text(f"written: {target}"))
    if len(runs) > 1:
        compared = compare(runs)
        write_text(home / "report.html", comparison_page(home, runs, compared))
        write_text(home / "results.json", json.dumps(results(home, runs, compared), indent=1))
        screen.print(terminal_table(home, runs, compared))
        notes.print(Text(f"written: {home / 'report.html'}, {home / 'results.json'}"))
    return 0
