"""AVE: ten-second clips with one audio-visual event of 28 classes each, and the time of the event.

ROOT or ROOT/data contains Annotations.txt (columns separated by &: Category, VideoID, Quality, StartTime, EndTime; the
header line is optional) and the splits: trainSet.txt, valSet.txt and testSet.txt in the same format, or train_order.h5,
val_order.h5 and test_order.h5 with row numbers of Annotations.txt (these need the package h5py). The media files may be
in any subfolders, named by the YouTube id, with any video or audio suffix. Clips whose file is missing are reported and
left out. Each row is a clip of its own, even if several rows have the same video.
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
from fastav.datasets.clip_list import ClipList
from fastav.datasets.tables import class_order, find_file, number, read_table
from fastav.datasets.youtube import YoutubeRow

BACKGROUND = "Background"
CLIP_S = 10
METRIC = {
    "clip": "one label per clip: top-1 accuracy over 28 classes on the test split (the published metric is per second)",
    "second": "one label per second: segment accuracy over 29 classes (28 and Background) on the test split",
}

_ANNOTATIONS = ("Annotations.txt", "data/Annotations.txt")
_SPLITS = ("train", "val", "test")
_TEXTS = {split: (f"{split}Set.txt", f"data/{split}Set.txt") for split in _SPLITS}
_ORDERS = {split: (f"{split}_order.h5", f"data/{split}_order.h5") for split in _SPLITS}
_COLUMNS = ("Category", "VideoID", "Quality", "StartTime", "EndTime")


class AveAnnotation(NamedTuple):
    """A row of the annotations: class, YouTube id, quality, and the event's start and end in the clip in seconds."""

    label: str
    video_id: str
    quality: str
    start_s: float
    end_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    youtube.add_arguments(parser, tables="Annotations.txt and the splits", media=False)
    parser.add_argument(
        "--unit",
        choices=("clip", "second"),
        default="clip",
        help="clip (default): one row per clip, labelled with its event. second: ten rows per clip, labelled with the\n"
        f"event, or {BACKGROUND} in the seconds outside of it. The media must be the published ten-second clips, as\n"
        "their position in the YouTube videos is not published",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the clips of the tables that have a media file.

    Raises:
        UserError: A table is missing or malformed, h5py is needed but not installed, or no clip has a media file.
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
    metadata = {
        "source": "fastav index ave",
        "root": str(args.root),
        "unit": args.unit,
        "metric": METRIC[args.unit],
        # In the order of their first row in Annotations.txt; the background comes last.
        "class_order": class_order([*classes, BACKGROUND] if args.unit == "second" else classes),
    }
    return found.clip_list(metadata, clips=clips, problems=problems, notes=notes)


def _read(path: Path) -> Iterator[tuple[int, AveAnnotation]]:
    for line, row in read_table(path, delimiter="&", header=_COLUMNS, quoted=False):
        if row["VideoID"].strip().casefold() == "videoid":  # a header with different spellings
            continue
        start_s, end_s = (number(row, column, path, line) for column in ("StartTime", "EndTime"))
        label, video_id, quality = (row[column].strip() for column in _COLUMNS[:3])
        yield line, AveAnnotation(label, video_id, quality, start_s, end_s)


def _row(number: int, line: int, annotation: AveAnnotation, split: str, path: Path) -> YoutubeRow:
    label, video_id, quality, start_s, end_s = annotation
    # In some copies a video is named by its whole line.
    names = (video_id, f"{label}&{video_id}&{quality}&{start_s:g}&{end_s:g}")
    return YoutubeRow(f"{number:04d}-{video_id}", video_id, 0.0, CLIP_S, (label,), split, path, line, names)


def _seconds(clip: Clip, event: AveAnnotation) -> Iterator[Clip]:
    for at in range(CLIP_S):
        inside = event.start_s <= at < event.end_s
        yield youtube.one_second(clip, at, [event.label if inside else BACKGROUND])


def _splits(
    root: Path, path: Path, annotations: Sequence[tuple[int, AveAnnotation]]
) -> tuple[dict[str, list[int]], list[Problem], list[str]]:
    """Returns the row numbers of each split, from 0, with problems and notes."""
    texts = {split: file for split, names in _TEXTS.items() if (file := youtube.table_in(root, names)) is not None}
    orders = {split: file for split, names in _ORDERS.items() if (file := youtube.table_in(root, names)) is not None}
    problems: list[Problem] = []
    if not texts and not orders:
        find_file(root, (*_TEXTS["train"], *_ORDERS["train"]), "splits of AVE")
    if len(texts) >= len(orders):  # text files need no h5py
        found = _from_texts(texts, annotations, problems)
    else:
        found = {split: _from_order(file, len(annotations), path) for split, file in orders.items()}
    notes = [f"{root}: no file lists the {split} split" for split in _SPLITS if split not in found]
    if rest := len(annotations) - len({number for numbers in found.values() for number in numbers}):
        notes.append(f"{rest} rows of {path} are in no split; left out")
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
            where = f"{file}, line {line}"
            message = f'{where}: "{annotation.video_id}" is not in Annotations.txt, or already used; left out'
            problems.append(Problem("unknown_row", "", str(file), message, False))
    return found


def _from_order(file: Path, num_rows: int, path: Path) -> list[int]:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        message = "needs h5py (pip install h5py); or put trainSet.txt, valSet.txt and testSet.txt in the same folder"
        raise UserError(f"{file}: {message}") from None
    try:
        with h5py.File(file, "r") as content:
            if not isinstance(content.get("order"), h5py.Dataset):
                names = ", ".join(sorted(content)) or "nothing"
                raise UserError(f'{file}: no HDF5 data set "order" with row numbers; the file contains {names}')
            numbers = [int(at) for at in content["order"][:].ravel()]
    except OSError as error:
        raise UserError(f"{file}: cannot be read as HDF5 ({error})") from None
    if outside := [at for at in numbers if not 0 <= at < num_rows]:
        raise UserError(f"{file}: row number {outside[0]}: expected 0 to {num_rows - 1}, the rows of {path}")
    return numbers
