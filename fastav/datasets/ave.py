"""AVE: ten-second clips with one audio-visual event each, of 28 classes; where it is seen and heard is known.

ROOT, or data/ in it, holds Annotations.txt (Category&VideoID&Quality&StartTime&EndTime, with or without that line)
and the splits: trainSet.txt, valSet.txt and testSet.txt of the same kind, or train_order.h5, val_order.h5 and
test_order.h5 with the numbers of its rows, which needs h5py. Media lie in any folders, named by the YouTube id, with
any suffix of video or sound. Some videos have several rows: they are clips of their own, told apart by their row.
"""

from __future__ import annotations

import argparse
import importlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.data.manifest import Problem
from fastav.datasets import youtube
from fastav.datasets.listing import Listing
from fastav.datasets.tables import class_order, find_file, number, read_table
from fastav.datasets.youtube import YoutubeRow

BACKGROUND = "Background"
CLIP_S = 10
METRIC = {
    "clip": "one label a clip: top-1 accuracy over 28 classes on the test split (the published metric is per second)",
    "second": "one label a second: segment accuracy over 29 classes (28 and Background), all seconds of the test split",
}

_ANNOTATIONS = ("Annotations.txt", "data/Annotations.txt")
_SPLITS = ("train", "val", "test")
_TEXTS = {split: (f"{split}Set.txt", f"data/{split}Set.txt") for split in _SPLITS}
_ORDERS = {split: (f"{split}_order.h5", f"data/{split}_order.h5") for split in _SPLITS}
_COLUMNS = ("Category", "VideoID", "Quality", "StartTime", "EndTime")


class AveAnnotation(NamedTuple):
    """What a row says: class, YouTube id, quality, and the seconds of the event within the clip."""

    label: str
    video_id: str
    quality: str
    start_s: float
    end_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this data set's options."""
    youtube.add_arguments(parser, tables="Annotations.txt and the splits")
    parser.add_argument(
        "--unit",
        choices=("clip", "second"),
        default="clip",
        help="clip (default): a row a clip, labelled with its event. second: ten rows a clip, labelled with the\n"
        f"event, or {BACKGROUND} in the seconds outside of it. The media are the published ten-second clips: where\n"
        "those were in their YouTube videos is not published",
    )


def listing(args: argparse.Namespace) -> Listing:
    """Lists the clips of the tables whose media are there.

    Raises:
        UserError: No table or split, a malformed one, h5py is wanted and absent, or media of none of the clips.
    """
    path = find_file(args.root, _ANNOTATIONS, "annotations of AVE")
    annotations = list(_read(path))
    numbers, problems, notes = _splits(args.root, path, annotations)
    rows = [_row(number, *annotations[number], split, path) for split in _SPLITS for number in numbers.get(split, ())]
    found = youtube.find(rows, args.media_root or args.root)
    clips = found.clips
    if args.unit == "second":
        events = dict(annotations)
        pairs = zip(found.rows, clips, strict=True)
        clips = [piece for row, clip in pairs for piece in _seconds(clip, events[row.line])]
    classes = list(dict.fromkeys(annotation.label for _, annotation in annotations))
    return Listing(
        clips,
        [*problems, *found.problems],
        [*notes, *found.notes],
        published_splits=True,
        metadata={
            "source": "fastav index ave",
            "root": str(args.root),
            "unit": args.unit,
            "metric": METRIC[args.unit],
            # Numbered as they come first in Annotations.txt; the background is the last one.
            "class_order": class_order([*classes, BACKGROUND] if args.unit == "second" else classes),
        },
    )


def _read(path: Path) -> Iterator[tuple[int, AveAnnotation]]:
    for line, row in read_table(path, delimiter="&", header=_COLUMNS, quoted=False):
        if row["VideoID"].strip().casefold() == "videoid":  # a header whose other names are spelt differently
            continue
        start_s, end_s = (number(row, column, path, line) for column in ("StartTime", "EndTime"))
        label, video_id, quality = (row[column].strip() for column in _COLUMNS[:3])
        yield line, AveAnnotation(label, video_id, quality, start_s, end_s)


def _row(number: int, line: int, annotation: AveAnnotation, split: str, path: Path) -> YoutubeRow:
    label, video_id, quality, start_s, end_s = annotation
    # Some copies of the videos have their whole line for a name.
    names = (video_id, f"{label}&{video_id}&{quality}&{start_s:g}&{end_s:g}")
    return YoutubeRow(f"{number:04d}-{video_id}", video_id, 0.0, CLIP_S, (label,), split, path, line, names)


def _seconds(clip: Clip, event: AveAnnotation) -> Iterator[Clip]:
    for at in range(CLIP_S):
        inside = event.start_s <= at < event.end_s
        yield youtube.second(clip, at, [event.label if inside else BACKGROUND])


def _splits(
    root: Path, path: Path, annotations: Sequence[tuple[int, AveAnnotation]]
) -> tuple[dict[str, list[int]], list[Problem], list[str]]:
    """The rows of each split, numbered from 0."""
    texts = {split: file for split, names in _TEXTS.items() if (file := youtube.table_in(root, names)) is not None}
    orders = {split: file for split, names in _ORDERS.items() if (file := youtube.table_in(root, names)) is not None}
    problems: list[Problem] = []
    if not texts and not orders:
        find_file(root, (*_TEXTS["train"], *_ORDERS["train"]), "splits of AVE")
    if len(texts) >= len(orders):  # they need no h5py
        found = _from_texts(texts, annotations, problems)
    else:
        found = {split: _from_order(file, len(annotations), path) for split, file in orders.items()}
    notes = [f"{root}: nothing names the {split} split" for split in _SPLITS if split not in found]
    if rest := len(annotations) - len({number for numbers in found.values() for number in numbers}):
        notes.append(f"{rest} rows of {path} are in no split and left out")
    return found, problems, notes


def _from_texts(
    texts: dict[str, Path], annotations: Sequence[tuple[int, AveAnnotation]], problems: list[Problem]
) -> dict[str, list[int]]:
    free: dict[AveAnnotation, list[int]] = defaultdict(list)
    for at, (_, annotation) in enumerate(annotations):
        free[annotation].append(at)
    found: dict[str, list[int]] = {}
    for split, file in texts.items():
        found[split] = []
        for line, annotation in _read(file):
            if numbers := free[annotation]:
                found[split].append(numbers.pop(0))
                continue
            message = f'{file}, line {line}: "{annotation.video_id}" is not (or no longer) in Annotations.txt, left out'
            problems.append(Problem("unknown_row", "", str(file), message, False))
    return found


def _from_order(file: Path, num_rows: int, path: Path) -> list[int]:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        message = "needs h5py (pip install h5py), or trainSet.txt, valSet.txt and testSet.txt beside it"
        raise UserError(f"{file}: {message}") from None
    try:
        with h5py.File(file, "r") as content:
            if not isinstance(content.get("order"), h5py.Dataset):
                held = f"it holds {', '.join(sorted(content)) or 'nothing'}"
                raise UserError(f'{file}: no data set "order", expected one with the numbers of rows; {held}')
            numbers = [int(at) for at in content["order"][:].ravel()]
    except OSError as error:
        raise UserError(f"{file}: cannot be read as HDF5 ({error})") from None
    if outside := [at for at in numbers if not 0 <= at < num_rows]:
        raise UserError(f"{file}: row {outside[0]}, expected 0 to {num_rows - 1}, the rows of {path}")
    return numbers
