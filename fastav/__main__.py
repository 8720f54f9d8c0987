"""`fastav VERB`: the verbs and where they are; each is imported only when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

from fastav.core.cli import run
from fastav.core.errors import did_you_mean

VERBS = {
    "synth": ("fastav.commands.synth", "make a small data set of real mp4 files on which only fusion can win"),
    "index": (
        "fastav.commands.index",
        "turn a folder of media into a manifest, and name what is wrong with which file",
    ),
    "pack": ("fastav.commands.pack", "transcode a manifest's clips once into shards that decode many times faster"),
    "train": ("fastav.train", "train the model of one or more recipes; goes on where it was stopped"),
    "evaluate": ("fastav.commands.evaluate", "evaluate a run on its test split, or on another manifest"),
    "report": ("fastav.commands.report", "write report.html for a run or a folder of runs"),
    "export": ("fastav.commands.export", "write the model of any checkpoint of a run as safetensors"),
    "convert": ("fastav.commands.convert", "turn a checkpoint of MBT's authors into a model"),
    "doctor": ("fastav.commands.doctor", "look over this machine, and measure which stage will hold a run up"),
    "preflight": (
        "fastav.commands.preflight",
        "measure every rank's device and network, and name what is slow or broken",
    ),
    "recipe": ("fastav.commands.recipe", "recipe show FILE: the resolved recipe; recipe explain KEY: what a key means"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb that the words name; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("fastav VERB ...\n")
        for verb, (_, what) in VERBS.items():
            print(f"  {verb:<10} {what}")
        print("\n`fastav VERB --help` shows a verb's options; --debug shows tracebacks.")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"fastav {version('fastav')}")
        return 0
    if words[0] not in VERBS:
        print(f'fastav: "{words[0]}" is no verb{did_you_mean(words[0], VERBS)}', file=sys.stderr)
        return 2
    return run(words[0], VERBS[words[0]][0], words[1:])


if __name__ == "__main__":
    sys.exit(main())
