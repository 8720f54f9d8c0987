"""Kinetics-400, -600 and -700: ten-second YouTube clips of one action each; also the Kinetics-Sounds subset.

ROOT or ROOT/annotations contains one or more of train.csv, val.csv (or validate.csv) and test.csv, with the columns
label, youtube_id, time_start and time_end. Names such as kinetics_400_train.csv work too. The media files may be in any
subfolders, named ID_000030_000040 or similar, with any video or audio suffix. Clips whose file is missing are reported
and left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from fastav.core.errors import UserError, did_you_mean
from fastav.datasets import youtube
from fastav.datasets.clip_list import ClipList
from fastav.datasets.tables import find_file, number, read_table
from fastav.datasets.youtube import YoutubeRow

METRIC = "one label a clip: top-1 and top-5 accuracy on the validation split"
SOUNDS = (
    "blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "fingerpicking",
    "laughing", "mowing lawn", "patting", "playing accordion", "playing bagpipes", "playing bass guitar",
    "playing clarinet", "playing drums", "playing guitar", "playing harmonica", "playing keyboard", "playing organ",
    "playing piano", "playing saxophone", "playing trombone", "playing trumpet", "playing violin",
    "playing xylophone", "ripping paper", "shoveling snow", "shuffling cards", "singing", "stomping grapes",
    "tap dancing", "tapping guitar", "tapping pen", "tickling", "typing",
)  # fmt: skip
"""The 34 classes of Kinetics-Sounds (Arandjelovic and Zisserman, Look, Listen and Learn, 2017), by their current names.

The paper took them from an early version of Kinetics; fingerpicking, patting and typing are not in Kinetics-400.
"""

ALIASES = {
    "blowing out": "blowing out candles",
    "dribbling ball": "dribbling basketball",
    "mowing the lawn by pushing lawnmower": "mowing lawn",
    "stomping": "stomping grapes",
}
"""Class name in the paper on Kinetics-Sounds -> name of the same class in the releases of Kinetics."""

_FILES = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}
_FOLDERS = ("", "annotations/")
_PREFIXES = ("", "kinetics_", "kinetics_400_", "kinetics-400_", "kinetics400_", "kinetics_600_", "kinetics_700_")
_TABLES = {
    split: tuple(f"{folder}{prefix}{word}.csv" for folder in _FOLDERS for prefix in _PREFIXES for word in words)
    for split, words in _FILES.items()
}
_COLUMNS = {
    "label": ("class", "category"), "youtube_id": ("video_id", "ytid"),
    "time_start": ("start_time",), "time_end": ("end_time",),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    youtube.add_arguments(parser, tables="train.csv, val.csv and test.csv")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--sounds",
        action="store_true",
        help="use only the 34 classes of Kinetics-Sounds, as far as the tables have them (31 in Kinetics-400);\n"
        "classes renamed since the paper have their current names",
    )
    which.add_argument(
        "--classes",
        metavar="FILE",
        type=Path,
        help="use only the classes in FILE, one per line; empty lines and lines that start with # are ignored",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the clips of the tables that have a media file.

    Raises:
        UserError: A table is missing or malformed, `--classes` has an unknown class, or no clip has a media file.
    """
    rows, notes = _read(args.root)
    classes = {label for row in rows for label in row.labels}
    wanted = classes
    if args.sounds:
        wanted = classes & set(SOUNDS)
        if missing := sorted(set(SOUNDS) - classes):
            names = ", ".join(missing)
            notes.append(f"{len(missing)} of the 34 classes of Kinetics-Sounds are not in the tables: {names}")
        if not wanted:
            raise UserError(f"{args.root}: --sounds: the tables have none of the classes of Kinetics-Sounds")
    elif args.classes is not None:
        wanted = _wanted(args.classes, classes)
    rows = [row for row in rows if row.labels[0] in wanted]
    found = youtube.find(rows, args.media_root or args.root, args.media)
    metadata = {
        "source": "fastav index kinetics",
        "root": str(args.root),
        "media": args.media,
        "classes": "Kinetics-Sounds" if args.sounds else str(args.classes or "all"),
        "metric": METRIC,
    }
    return found.clip_list(metadata, notes=notes)


def _read(root: Path) -> tuple[list[YoutubeRow], list[str]]:
    tables = {split: youtube.table_in(root, names) for split, names in _TABLES.items()}
    if not any(tables.values()):
        find_file(root, ("train.csv", "annotations/train.csv"), "table of Kinetics (train.csv, val.csv or test.csv)")
    rows, notes = [], []
    for split, path in tables.items():
        if path is None:
            notes.append(f"{root}: no {split}.csv, so there is no {split} split")
            continue
        unlabelled = 0
        for row in _rows(path, split):
            if row.labels == ("",):
                unlabelled += 1
            else:
                rows.append(row)
        if unlabelled:
            notes.append(f"{path}: {unlabelled} clips without a label are left out")
    return rows, notes


def _rows(path: Path, split: str) -> Iterator[YoutubeRow]:
    needed = ("youtube_id", "time_start", "time_end") if split == "test" else tuple(_COLUMNS)
    for line, row in read_table(path, required=needed, aliases=_COLUMNS):
        start_s, end_s = (number(row, column, path, line) for column in ("time_start", "time_end"))
        video_id, label = row["youtube_id"].strip(), row.get("label", "").strip()
        name = f"{video_id}_{round(start_s):06d}_{round(end_s):06d}"
        yield YoutubeRow(name, video_id, start_s, end_s, (ALIASES.get(label, label),), split, path, line, names=(name,))


def _wanted(path: Path, classes: set[str]) -> set[str]:
    """Returns the classes in a file, given by their current or older names."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    named = set()
    for line, text in enumerate(lines, 1):
        name = text.strip()
        if not name or name.startswith("#"):
            continue
        # Such lists are often made from class folders, which have underscores instead of spaces.
        name = next((n for n in (name, name.replace("_", " ")) if ALIASES.get(n, n) in classes), name)
        if (name := ALIASES.get(name, name)) not in classes:
            near = did_you_mean(name, classes)
            raise UserError(f'--classes {path}, line {line}: the tables have no class "{name}"{near}')
        named.add(name)
    if not named:
        raise UserError(f"--classes {path}: contains no class; expected one per line")
    return named
