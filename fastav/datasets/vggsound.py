"""VGGSound: ten-second YouTube clips with one of 309 classes each.

ROOT or ROOT/data contains vggsound.csv (no header; columns: YouTube id, start in seconds, "label", train or test), or
train.csv and test.csv (no header; columns: ID_000030.mp4, "label"). The media files may be in any subfolders. They are
named ID_000030 (start in seconds), ID_30000_40000 (milliseconds) or similar, with any video or audio suffix. Clips
whose file is missing are reported and left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from fastav.core.errors import UserError, did_you_mean
from fastav.datasets import youtube
from fastav.datasets.clip_list import ClipList
from fastav.datasets.tables import class_order, find_file, number, read_table
from fastav.datasets.youtube import YoutubeRow

CLIP_S = 10.0
METRIC = "one label a clip: top-1 accuracy on the test split; the paper also gives class-averaged AP, AUC and d-prime"
SPLITS = ("train", "test")

_WHOLE = ("vggsound.csv", "data/vggsound.csv")
_PARTS = {"train": ("train.csv", "data/train.csv"), "test": ("test.csv", "data/test.csv")}
_NAME = re.compile(r"(?P<video>.+)_(?P<start>\d{6})(\.\w+)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    youtube.add_arguments(parser, tables="vggsound.csv, or train.csv and test.csv")


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the clips of the tables that have a media file.

    Raises:
        UserError: A table is missing or malformed, or no clip has a media file.
    """
    rows, notes = _read(args.root)
    found = youtube.find(rows, args.media_root or args.root, args.media)
    metadata = {
        "source": "fastav index vggsound",
        "root": str(args.root),
        "media": args.media,
        "metric": METRIC,
        # The authors' numbers of the classes: https://github.com/hche11/VGGSound, datasets/dataloader.py.
        "class_order": class_order(sorted({label for row in rows for label in row.labels})),
    }
    return found.clip_list(metadata, notes=notes)


def _read(root: Path) -> tuple[list[YoutubeRow], list[str]]:
    parts = {split: path for split, names in _PARTS.items() if (path := youtube.table_in(root, names)) is not None}
    if parts and youtube.table_in(root, _WHOLE) is None:
        rows = [row for split, path in parts.items() for row in _part(path, split)]
        return rows, [f"{root}: no {split}.csv, so there is no {split} split" for split in _PARTS if split not in parts]
    return list(_whole(find_file(root, _WHOLE, "table of VGGSound (vggsound.csv, or train.csv and test.csv)"))), []


def _whole(path: Path) -> Iterator[YoutubeRow]:
    columns = ("youtube_id", "start_seconds", "label", "split")
    for line, row in read_table(path, header=columns, skip_initial_space=True):
        split = row["split"].strip()
        if split not in SPLITS:
            raise UserError(f'{path}, line {line}: unknown split "{split}"{did_you_mean(split, SPLITS)}')
        yield _row(row["youtube_id"].strip(), number(row, "start_seconds", path, line), row["label"], split, path, line)


def _part(path: Path, split: str) -> Iterator[YoutubeRow]:
    for line, row in read_table(path, header=("file", "label"), skip_initial_space=True):
        name = _NAME.fullmatch(row["file"].strip())
        if name is None:
            raise UserError(
                f'{path}, line {line}: file = "{row["file"]}": expected a name such as glLQrEijrKg_000300.mp4'
            )
        yield _row(name["video"], float(name["start"]), row["label"], split, path, line)


def _row(video_id: str, start_s: float, label: str, split: str, path: Path, line: int) -> YoutubeRow:
    if not (label := label.strip()):
        raise UserError(f"{path}, line {line}: label is empty; expected a class name")
    name = f"{video_id}_{round(start_s):06d}"
    return YoutubeRow(name, video_id, start_s, start_s + CLIP_S, (label,), split, path, line)
