"""`python -m benchmarks SUITE [options]`: the suites and where they are; each is imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastav.core.errors import FastavError, did_you_mean

SUITES = {
    "data": ("benchmarks.data", "decoding and loading: packed and raw, ours and what people would use instead"),
    "kernels": ("benchmarks.kernels", "bottleneck attention, every implementation (checks only without a GPU)"),
    "model": ("benchmarks.model", "the model on a resident batch: timm's blocks and ours (checks only without a GPU)"),
    "train": ("benchmarks.train", "the real loop: data, model, both; what binds, and the knob to turn"),
    "scale": ("benchmarks.scale", "weak and strong scaling over ranks, held against the model on paper"),
    "nvdec": ("benchmarks.nvdec", "whole files and splices through a GPU's video decoder (checks only without one)"),
    "loader_workers": ("benchmarks.loader_workers", "threads or processes for the loader"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite that the first word names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("python -m benchmarks SUITE ...\n")
        for name, (_, what) in SUITES.items():
            print(f"  {name:<16} {what}")
        return 0 if words else 2
    if words[0] not in SUITES:
        print(f'benchmarks: "{words[0]}" is no suite{did_you_mean(words[0], SUITES)}', file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(SUITES[words[0]][0]).main(words[1:]) or 0)
    except FastavError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
