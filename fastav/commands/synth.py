"""Makes a small synthetic data set of mp4 files that only a fusion model can classify.

The clips show birds with four plumage patterns and four calls.
Task `pairs`: eight classes; each pattern and each call is shared by exactly two classes. In the test split every video
stream appears with both of its calls and every audio stream with both of its patterns, so a model of one modality is
right on at most half of the test clips.
Task `modular`: the class is (pattern + call) mod 4. One modality carries no information about the class, nor does any
sum of per-modality scores.

Files are H.264 (high profile, B-frames, GOP 250) with AAC (44.1 kHz stereo), 4 s at 25 frames per second. A few
training clips have no audio, a few fail while they are decoded, and two files cannot be opened. The same seed and
library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import msgspec

from fastav.core.errors import UserError
from fastav.synth.dataset import Synth, make_dataset


def _size(text: str) -> tuple[int, int]:
    """Parses a frame size, `96` or `128x96`, into width and height."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise UserError(f'--size "{text}": expected pixels such as 96, or 128x96 (width x height)')
    return int(match[1]), int(match[2] or match[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastav synth`."""
    default = Synth()
    parser.add_argument("out", metavar="OUT", type=Path, help="output folder")
    parser.add_argument("--task", choices=("pairs", "modular"), default=default.task, help="see above; default pairs")
    parser.add_argument(
        "--train",
        type=int,
        metavar="N",
        default=default.train,
        help=f"number of training clips; default {default.train}",
    )
    parser.add_argument(
        "--test", type=int, metavar="N", default=default.test, help=f"number of test clips; default {default.test}"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=default.seed, help="random seed; default 0")
    parser.add_argument(
        "--size", metavar="PX", default=str(default.width), help="frame size: 96 (default), or width x height as 128x96"
    )
    parser.add_argument("--workers", type=int, metavar="N", default=0, help="processes; default 0: one per core")
    parser.add_argument("--force", action="store_true", help="overwrite the contents of the output folder")


def main(args: argparse.Namespace) -> int:
    """Makes the data set.

    Raises:
        UserError: Wrong options, or an output folder that is not empty (without `--force`).
    """
    width, height = _size(args.size)
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected 0 (one per core) or more")
    options = {"task": args.task, "train": args.train, "test": args.test, "seed": args.seed}
    try:
        settings = msgspec.convert(options | {"width": width, "height": height}, Synth)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`")
        option = f"--{field} {options[field]}" if field in options else f"--size {args.size}"
        raise UserError(f"{option}: {reason.lower()}") from None
    make_dataset(args.out, settings, workers=args.workers, force=args.force)
    return 0
