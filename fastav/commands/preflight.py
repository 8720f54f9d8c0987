"""Measures matrix product, copies and all-reduce on every rank for a few seconds, and names slow and broken ranks.

fastav preflight                             the first device of this machine
torchrun ... -m fastav preflight             all ranks that torchrun starts; accelerate launch works as well
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from fastav.core.atomic_files import write_text
from fastav.core.errors import UserError
from fastav.core.log_lines import Console
from fastav.diagnostics.rank_check import SECONDS, Preflight, serious_faults
from fastav.diagnostics.rank_verdicts import find_faults, summary, table
from fastav.optim.loss_guard import GuardConfig
from fastav.recipe.schema import Training
from fastav.training.process_setup import Ranks, shutdown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastav preflight`."""
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"duration of each measurement; default {SECONDS:g}"
    )
    parser.add_argument("--slow", type=float, default=GuardConfig().slow_device,
                        metavar="SHARE",
                        help="a rank is slow below this share of the median rate; default %(default)s")  # fmt: skip
    parser.add_argument("--patience", type=float, default=GuardConfig().preflight_patience_s,
                        metavar="S",
                        help="timeout of each measurement in seconds; default %(default)s")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to this file")


def main(args: argparse.Namespace) -> int:
    """Runs the preflight and prints one line per rank and per fault.

    Returns:
        1 if a rank is broken, or slow on a device other than a CPU; else 0.
    """
    for name in ("seconds", "patience"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name):g}: expected more than 0")
    if not 0 <= args.slow <= 1:
        raise UserError(f"--slow {args.slow:g}: expected a share from 0 to 1")
    # Accept the precision of the launcher's config: nothing is trained.
    bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    try:
        ranks = Ranks(Training(precision="bf16" if bf16 else "fp32"))
        found = Preflight(ranks.gloo_group, ranks.device, args.seconds, args.patience).run()
        faults, console = find_faults(found, args.slow), Console(sys.stdout, quiet=not ranks.main)
        for measurement in found:
            console.log(measurement.describe())
        for fault in faults:
            console.log(f"slow: {fault.text}" if fault.kind == "slow" else fault.text)
        console.log(summary(found, faults, args.slow))
        if args.json and ranks.main:
            write_text(args.json, json.dumps(table(found, faults), indent=1))
    finally:
        with contextlib.suppress(RuntimeError):  # raised by a broken device, which has been reported
            shutdown()
    return int(bool(serious_faults(faults, found)))
