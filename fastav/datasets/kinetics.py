"""Kinetics-400, -600 and -700: ten-second YouTube clips of one action each; also the Kinetics-Sounds subset.

ROOT, or annotations/ in it, holds train.csv, val.csv (or validate.csv) and test.csv, those that are wanted, with the
columns label, youtube_id, time_start and time_end; names such as kinetics_400_train.csv do as well. Media lie in any
folders, named ID_000030_000040 or alike, with any suffix of video or sound; those that are gone are listed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from fastav.core.errors import UserError, did_you_mean
from fastav.datasets import youtube
from fastav.datasets.listing import Listing
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
"""The 34 classes of Kinetics-Sounds (Arandjelovic and Zisserman, Look, Listen and Learn, 2017), by today's names.

The paper took them from an early version of Kinetics; fingerpicking, patting and typing are not in Kinetics-400.
"""

ALIASES = {
    "blowing out": "blowing out candles",
    "dribbling ball": "dribbling basketball",
    "mowing the lawn by pushing lawnmower": "mowing lawn",
    "stomping": "stomping grapes",
}
"""Names in the list of Kinetics-Sounds -> names of the same classes in the releases of Kinetics."""

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
    """Adds this data set's options."""
    youtube.add_arguments(parser, tables="train.csv, val.csv and test.csv")
    youtube.add_media_argument(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--sounds",
        action="store_true",
        help="only the 34 classes of Kinetics-Sounds, those of them that the tables have (31 in Kinetics-400).\n"
        "Classes of the paper's list that the releases have renamed go by the new name",
    )
    which.add_argument(
        "--classes",
        metavar="FILE",
        type=Path,
        help="only the classes in this file, one a line; empty lines and those that start with # are left out",
    )


def listing(args: argparse.Namespace) -> Listing:
    """Lists the clips of the tables whose media are there.

    Raises:
        UserError: No table, a malformed one, an unknown class in `--classes`, or media of none of the clips.
    """
    rows, notes = _read(args.root)
    classes = {label for row in rows for label in row.labels}
    wanted = classes
    if args.sounds:
        wanted = classes & set(SOUNDS)
        if missing := sorted(set(SOUNDS) - classes):
            names = ", ".join(missing)
            notes.append(f"of the 34 classes of Kinetics-Sounds {len(missing)} are not in the tables: {names}")
        if not wanted:
            raise UserError(f"{args.root}: --sounds: the tables have none of the classes of Kinetics-Sounds")
    elif args.classes is not None:
        wanted = _wanted(args.classes, classes)
    rows = [row for row in rows if row.labels[0] in wanted]
    found = youtube.find(rows, args.media_root or args.root, args.media)
    return Listing(
        found.clips,
        found.problems,
        [*notes, *found.notes],
        published_splits=True,
        metadata={
            "source": "fastav index kinetics",
            "root": str(args.root),
            "media": args.media,
            "classes": "Kinetics-Sounds" if args.sounds else str(args.classes or "all"),
            "metric": METRIC,
        },
    )


def _read(root: Path) -> tuple[list[YoutubeRow], list[str]]:
    tables = {split: youtube.table_in(root, names) for split, names in _TABLES.items()}
    if not any(tables.values()):
        find_file(root, ("train.csv", "annotations/train.csv"), "table of Kinetics (train.csv, val.csv or test.csv)")
    rows, notes = [], []
    for split, path in tables.items():
        if path is None:
            notes.append(f"{root}: no {split}.csv, so no {split} split")
            continue
        unlabelled = 0
        for row in _rows(path, split):
            if row.labels == ("",):
                unlabelled += 1
            else:
                rows.append(row)
        if unlabelled:
            notes.append(f"{path}: {unlabelled} clips have no label and are left out")
    return rows, notes


def _rows(path: Path, split: str) -> Iterator[YoutubeRow]:
    needed = ("youtube_id", "time_start", "time_end") if split == "test" else tuple(_COLUMNS)
    for line, row in read_table(path, required=needed, aliases=_COLUMNS):
        start_s, end_s = (number(row, column, path, line) for column in ("time_start", "time_end"))
        video_id, label = row["youtube_id"].strip(), row.get("label", "").strip()
        name = f"{video_id}_{round(start_s):06d}_{round(end_s):06d}"
        yield YoutubeRow(name, video_id, start_s, end_s, (ALIASES.get(label, label),), split, path, line, names=(name,))


def _wanted(path: Path, classes: set[str]) -> set[str]:
    """The classes that a file names, by today's or older names."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    named = set()
    for line, text in enumerate(lines, 1):
        name = text.strip()
        if not name or name.startswith("#"):
            continue
        # Folders of classes, from which such lists are made, often have underscores for the spaces.
        name = next((n for n in (name, name.replace("_", " ")) if ALIASES.get(n, n) in classes), name)
        if (name := ALIASES.get(name, name)) not in classes:
            near = did_you_mean(name, classes)
            raise UserError(f'--classes {path}, line {line}: the tables have no class "{name}"{near}')
        named.add(name)
    if not named:
        raise UserError(f"--classes {path}: no class in it, expected one a line")
    return named
