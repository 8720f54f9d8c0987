"""SSW60: videos, recordings and pictures of 60 bird species, one data set for each of the four.

ROOT is the unpacked ssw60.tar.gz: taxa.csv, and for the part that is wanted its table and the folder of its media:
video_ml.csv and video_ml/ID.mp4, audio_ml.csv and audio_ml/ID.wav, images_inat.csv and images_inat/ID.jpg,
images_nabirds.csv and images_nabirds/ID.jpg. The splits are those of the tables. Not every video has sound; one
without it becomes a clip without sound. Manifests of several parts have the same classes and can be merged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.datasets.listing import Listing
from fastav.datasets.tables import ClipRows, MediaFolders, class_order, find_file, read_table

METRIC = "one label a clip: top-1 accuracy on the test split (of the videos: 1,938 clips)"
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
NAMES = {"common": "common_name", "scientific": "scientific_name", "code": "species_code"}
"""Word on the command line -> column of taxa.csv."""


class Part(NamedTuple):
    """One of the four data sets: its table is `folder`.csv, its media are `folder`/ID with one of the suffixes."""

    folder: str
    suffixes: tuple[str, ...]


# The published suffix first; the others are what people convert to.
PARTS = {
    "video": Part("video_ml", (".mp4", ".mkv", ".webm", ".mov")),
    "audio": Part("audio_ml", (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")),
    "inat": Part("images_inat", (".jpg", ".jpeg", ".png", ".webp")),
    "nabirds": Part("images_nabirds", (".jpg", ".jpeg", ".png", ".webp")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this data set's options."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="the folder with taxa.csv")
    parser.add_argument("--part", choices=PARTS, default="video", help="which of the four; video by default")
    parser.add_argument(
        "--names",
        choices=NAMES,
        default="common",
        help="what the classes are called: common names (default), scientific names, or eBird's codes",
    )
    parser.add_argument(
        "--sound",
        choices=("all", "reliable", "none"),
        default="all",
        help="which videos keep their sound: all that have one (default), those whose sound the data set calls\n"
        "reliable (column reliable_audio), or none",
    )


def listing(args: argparse.Namespace) -> Listing:
    """Lists the media of a part's table that are there.

    Raises:
        UserError: No table, a malformed one, or media of none of its rows.
    """
    if args.sound != "all" and args.part != "video":
        raise UserError(f"--sound {args.sound}: is for --part video, the part {args.part} has no videos")
    root, part = Path(args.root), PARTS[args.part]
    taxa = _taxa(root, NAMES[args.names])
    table = find_file(root, (f"{part.folder}.csv",), f"table of SSW60's part {args.part}")
    rows, folders = ClipRows(), MediaFolders()
    for line, row in read_table(
        table,
        required=("asset_id", "label", "split"),
        # The README spells the first of the two columns with a letter missing.
        aliases={"original_video_start_second": ("orginal_video_start_second",)},
    ):
        name = f"{part.folder}/{row['asset_id']}"
        label, split = row["label"].strip(), row["split"].strip()
        if label not in taxa:
            raise UserError(f'{table}, line {line}: label "{label}", expected one of the {len(taxa)} of taxa.csv')
        if split not in SPLITS:
            raise UserError(f'{table}, line {line}: split "{split}"{did_you_mean(split, SPLITS)}')
        path = folders.find_media(root / part.folder, row["asset_id"], part.suffixes)
        if path is None:
            rows.lose(name, root / f"{name}{part.suffixes[0]}", table, line)
            continue
        muted = args.sound == "none" or (args.sound == "reliable" and row.get("reliable_audio", "1").strip() == "0")
        media = _media(args.part, path, muted)
        rows.add(Clip(name, labels=(taxa[label],), split=SPLITS[split], group=name, **media), table, line)
    rows.refuse_none(str(table))
    num_muted = sum(clip.video is not None and clip.audio is None for clip in rows.clips)
    notes = [f"--sound {args.sound}: {num_muted} videos are taken without their sound"] if num_muted else []
    return Listing(
        rows.clips,
        rows.problems,
        notes,
        published_splits=True,
        metadata={
            "source": "fastav index ssw60",
            "root": str(root),
            "part": args.part,
            "names": args.names,
            "sound": args.sound,
            "metric": METRIC,
            "class_order": class_order(taxa.values()),
        },
    )


def _taxa(root: Path, column: str) -> dict[str, str]:
    """Label as the tables write it -> class name, by number."""
    path = find_file(root, ("taxa.csv",), "table of SSW60's classes")
    names: dict[str, str] = {}
    for line, row in read_table(path, required=("label", column)):
        label, name = row["label"].strip(), row[column].strip()
        if not label.isdecimal() or not name:
            raise UserError(f'{path}, line {line}: label "{label}", {column} "{name}", expected a number and a name')
        if label in names or name in names.values():
            raise UserError(f'{path}, line {line}: label {label} or "{name}" is there already, expected each once')
        names[label] = name
    return dict(sorted(names.items(), key=lambda item: int(item[0])))


def _media(part: str, path: Path, muted: bool) -> dict[str, Any]:
    """The fields of `Clip` that hold a file of a part."""
    if part == "video":
        return {"video": path, "audio": None if muted else path}
    return {"audio": path} if part == "audio" else {"image": path}
