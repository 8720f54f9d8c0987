"""Preflight: a short matrix product, copy and all-reduce on every rank, to name slow and broken ones in time.

fastav preflight                             this machine's first device
torchrun ... -m fastav preflight             the ranks that it starts; accelerate launch works as well
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from fastav.core.atomic_files import write_text
from fastav.core.console import Console
from fastav.core.errors import UserError
from fastav.diagnostics.rank_check import SECONDS, Preflight, serious_faults
from fastav.diagnostics.rank_verdicts import find_faults, summary, table
from fastav.optim.loss_guard import GuardConfig
from fastav.recipe.schema import Training
from fastav.training.ranks import Ranks, shutdown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each measurement ({SECONDS:g})")
    parser.add_argument("--slow", type=float, default=GuardConfig().slow_device,
                        help="a rank is slow with less than this share of the median (%(default)s)")  # fmt: skip
    parser.add_argument("--patience", type=float, default=GuardConfig().preflight_patience_s,
                        help="seconds within which a measurement must end (%(default)s)")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write everything to this file")


def main(args: argparse.Namespace) -> int:
    """Measures, prints a line for each rank and each fault; 1 where a rank is broken, or slow other than on a CPU."""
    for name in ("seconds", "patience"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name):g}: expected more than 0")
    if not 0 <= args.slow <= 1:
        raise UserError(f"--slow {args.slow:g}: expected a share from 0 to 1")
    # A launcher's config that names a precision is as good as any: nothing is trained.
    bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    try:
        ranks = Ranks(Training(precision="bf16" if bf16 else "fp32"))
        found = Preflight(ranks.host_group, ranks.device, args.seconds, args.patience).run()
        faults, console = find_faults(found, args.slow), Console(sys.stdout, quiet=not ranks.main)
        for one in found:
            console.log(one.describe())
        for fault in faults:
            console.log(f"slow: {fault.text}" if fault.kind == "slow" else fault.text)
        console.log(summary(found, faults, args.slow))
        if args.json and ranks.main:
            write_text(args.json, json.dumps(table(found, faults), indent=1))
    finally:
        with contextlib.suppress(RuntimeError):  # of a broken device, which has been reported
            shutdown()
    return int(bool(serious_faults(faults, found)))
