"""VGGSound: ten-second YouTube clips, each of one of 309 classes.

ROOT, or data/ in it, holds vggsound.csv (no header: YouTube id, start in seconds, "label", train or test), or
train.csv and test.csv (no header: ID_000030.mp4,"label"). Media lie in any folders, named ID_000030 (the start in
seconds), ID_30000_40000 (milliseconds) or alike, with any suffix of video or sound; those that are gone are listed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from fastav.core.errors import UserError, did_you_mean
from fastav.datasets import youtube
from fastav.datasets.listing import Listing
from fastav.datasets.tables import class_order, find_file, number, read_table
from fastav.datasets.youtube import YoutubeRow

CLIP_S = 10.0
METRIC = "one label a clip: top-1 accuracy on the test split; the paper also gives class-averaged AP, AUC and d-prime"
SPLITS = ("train", "test")

_WHOLE = ("vggsound.csv", "data/vggsound.csv")
_PARTS = {"train": ("train.csv", "data/train.csv"), "test": ("test.csv", "data/test.csv")}
_NAME = re.compile(r"(?P<video>.+)_(?P<start>\d{6})(\.\w+)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this data set's options."""
    youtube.add_arguments(parser, tables="vggsound.csv, or train.csv and test.csv")
    youtube.add_media_argument(parser)


def listing(args: argparse.Namespace) -> Listing:
    """Lists the clips of the tables whose media are there.

    Raises:
        UserError: No table, a malformed one, or media of none of its clips.
    """
    rows, notes = _read(args.root)
    found = youtube.find(rows, args.media_root or args.root, args.media)
    return Listing(
        found.clips,
        found.problems,
        [*notes, *found.notes],
        published_splits=True,
        metadata={
            "source": "fastav index vggsound",
            "root": str(args.root),
            "media": args.media,
            "metric": METRIC,
            # The numbers that others give the classes: https://github.com/hche11/VGGSound, datasets/dataloader.py.
            "class_order": class_order(sorted({label for row in rows for label in row.labels})),
        },
    )


def _read(root: Path) -> tuple[list[YoutubeRow], list[str]]:
    parts = {split: path for split, names in _PARTS.items() if (path := youtube.table_in(root, names)) is not None}
    if parts and youtube.table_in(root, _WHOLE) is None:
        rows = [row for split, path in parts.items() for row in _part(path, split)]
        return rows, [f"{root}: no {split}.csv, so no {split} split" for split in _PARTS if split not in parts]
    return list(_whole(find_file(root, _WHOLE, "table of VGGSound (vggsound.csv, or train.csv and test.csv)"))), []


def _whole(path: Path) -> Iterator[YoutubeRow]:
    columns = ("youtube_id", "start_seconds", "label", "split")
    for line, row in read_table(path, header=columns, skip_initial_space=True):
        split = row["split"].strip()
        if split not in SPLITS:
            raise UserError(f'{path}, line {line}: split "{split}"{did_you_mean(split, SPLITS)}')
        yield _row(row["youtube_id"].strip(), number(row, "start_seconds", path, line), row["label"], split, path, line)


def _part(path: Path, split: str) -> Iterator[YoutubeRow]:
    for line, row in read_table(path, header=("file", "label"), skip_initial_space=True):
        name = _NAME.fullmatch(row["file"].strip())
        if name is None:
            raise UserError(f'{path}, line {line}: file "{row["file"]}", expected such as glLQrEijrKg_000300.mp4')
        yield _row(name["video"], float(name["start"]), row["label"], split, path, line)


def _row(video_id: str, start_s: float, label: str, split: str, path: Path, line: int) -> YoutubeRow:
    if not (label := label.strip()):
        raise UserError(f"{path}, line {line}: no label, expected one")
    name = f"{video_id}_{round(start_s):06d}"
    return YoutubeRow(name, video_id, start_s, start_s + CLIP_S, (label,), split, path, line)
