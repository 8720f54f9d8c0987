"""Makes a small data set of real mp4 files on which only fusion can win.

Birds with four plumage patterns and four calls. Task `pairs`: each pattern and each call is shared by exactly
two of the eight classes, and every test video stream stands with both its calls, every test audio stream with
both its patterns: by construction, seeing alone or hearing alone is right in half the test clips at most.
Task `modular`: the class is (pattern + call) mod 4: one modality says nothing, nor does any sum of what each
says.

Files are H.264 (high profile, B-frames, GOP 250) and AAC (44.1 kHz stereo), 4 s at 25 frames a second. A few
training clips have no sound, a few break while they are decoded, and two files cannot be opened at all.
The same seed and library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import msgspec

from fastav.core.errors import UserError
from fastav.synth.dataset import Synth, make_dataset


def _size(text: str) -> tuple[int, int]:
    """Parses `96` or `128x96`."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise UserError(f'--size "{text}": expected pixels such as 96, or 128x96 (width x height)')
    return int(match[1]), int(match[2] or match[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    default = Synth()
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write into")
    parser.add_argument("--task", choices=("pairs", "modular"), default=default.task)
    parser.add_argument("--train", type=int, default=default.train, help=f"training clips ({default.train})")
    parser.add_argument("--test", type=int, default=default.test, help=f"test clips ({default.test})")
    parser.add_argument("--seed", type=int, default=default.seed, help="another seed, other data (0)")
    parser.add_argument("--size", default=str(default.width), help="pixels: 96 (the default), or 128x96")
    parser.add_argument("--workers", type=int, default=0, help="processes (one a core)")
    parser.add_argument("--force", action="store_true", help="overwrite what is in the folder")


def main(args: argparse.Namespace) -> int:
    """Makes the data set; returns the exit code."""
    width, height = _size(args.size)
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected 0 (one a core) or more")
    wanted = {"task": args.task, "train": args.train, "test": args.test, "seed": args.seed}
    try:
        settings = msgspec.convert(wanted | {"width": width, "height": height}, Synth)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`")
        given = f"--{field} {wanted[field]}" if field in wanted else f"--size {args.size}"
        raise UserError(f"{given}: {reason.lower()}") from None
    make_dataset(args.out, settings, workers=args.workers, force=args.force)
    return 0
