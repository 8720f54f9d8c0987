"""`fastav VERB`: the list of verbs and their modules. A module is imported only when its verb is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

from fastav.core.command_runner import run
from fastav.core.errors import did_you_mean

VERBS = {
    "synth": ("fastav.commands.synth", "make a small synthetic data set that only fusion can classify"),
    "index": (
        "fastav.commands.index",
        "probe every file of a data set and write a manifest; list the files with problems",
    ),
    "pack": ("fastav.commands.pack", "transcode a manifest's clips into shards that decode many times faster"),
    "train": ("fastav.train", "train the model of one or more recipes; resumes from the newest checkpoint"),
    "evaluate": ("fastav.commands.evaluate", "evaluate a trained run on its test split or on another manifest"),
    "report": ("fastav.commands.report", "write report.html for a run, and a comparison for several runs"),
    "export": ("fastav.commands.export", "export the model from any checkpoint of a run as safetensors"),
    "convert": ("fastav.commands.convert", "convert an MBT checkpoint of its authors (scenic, flax) to a fastav model"),
    "doctor": ("fastav.commands.doctor", "check this machine; with a manifest, find the bottleneck stage of a run"),
    "preflight": (
        "fastav.commands.preflight",
        "measure the device and network of every rank; name slow and broken ones",
    ),
    "recipe": ("fastav.commands.recipe", "show FILE: print the resolved recipe; explain KEY: describe a key"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb named by the first argument.

    Args:
        argv: Command line without the program name; `sys.argv[1:]` by default.

    Returns:
        The exit code (see `fastav.core.command_runner.run`).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: fastav VERB [options]\n")
        for verb, (_, summary) in VERBS.items():
            print(f"  {verb:<10} {summary}")
        print("\n`fastav VERB --help` lists the options of a verb; add --debug to any command for tracebacks.")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"fastav {version('fastav')}")
        return 0
    if words[0] not in VERBS:
        print(f'fastav: "{words[0]}" is not a verb{did_you_mean(words[0], VERBS)}', file=sys.stderr)
        return 2
    return run(words[0], VERBS[words[0]][0], words[1:])


if __name__ == "__main__":
    sys.exit(main())
