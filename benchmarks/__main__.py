"""`python -m benchmarks SUITE [options]`: the command line. A suite is imported only when it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastav.core.errors import FastavError, did_you_mean

SUITES = {
    "data": ("benchmarks.data", "decoding and loading: packed and raw clips, fastav and other readers"),
    "kernels": ("benchmarks.kernels", "all implementations of bottleneck attention (without a GPU: checks only)"),
    "model": (
        "benchmarks.model",
        "the model on a resident batch: timm's blocks, ours (without a GPU: checks only)",
    ),
    "train": ("benchmarks.train", "the training loop: data, model, both; its bottleneck, and the setting to change"),
    "scale": ("benchmarks.scale", "weak and strong scaling over ranks, compared with an analytical model"),
    "nvdec": (
        "benchmarks.nvdec",
        "whole files and spliced GOPs through NVDEC (without a GPU: checks only)",
    ),
    "loader_workers": ("benchmarks.loader_workers", "threads or processes as workers of the loader"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite that the first argument names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("python -m benchmarks SUITE ...\n")
        for name, (_, what) in SUITES.items():
            print(f"  {name:<16} {what}")
        return 0 if words else 2
    if words[0] not in SUITES:
        print(f'benchmarks: unknown suite "{words[0]}"{did_you_mean(words[0], SUITES)}', file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(SUITES[words[0]][0]).main(words[1:]) or 0)
    except FastavError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
