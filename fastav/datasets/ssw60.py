"""SSW60: videos, audio recordings and pictures of 60 bird species, in four parts.

ROOT is the unpacked ssw60.tar.gz. It contains taxa.csv and, for each part, a table and a folder of media files:
video_ml.csv and video_ml/ID.mp4, audio_ml.csv and audio_ml/ID.wav, images_inat.csv and images_inat/ID.jpg,
images_nabirds.csv and images_nabirds/ID.jpg. The tables define the splits. Videos without an audio stream become clips
without audio. One call indexes one part; the manifests of all parts have the same classes and can be merged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.datasets.clip_list import ClipList
from fastav.datasets.tables import ClipRows, MediaFolders, class_order, find_file, read_table

METRIC = "one label per clip: top-1 accuracy on the test split (of the videos: 1,938 clips)"
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
NAMES = {"common": "common_name", "scientific": "scientific_name", "code": "species_code"}
"""Name on the command line -> column of taxa.csv."""


class Part(NamedTuple):
    """One of the four parts: its table is `folder`.csv, its media files are `folder`/ID with one of the suffixes."""

    folder: str
    suffixes: tuple[str, ...]


# The published suffix first, then those of converted copies.
PARTS = {
    "video": Part("video_ml", (".mp4", ".mkv", ".webm", ".mov")),
    "audio": Part("audio_ml", (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")),
    "inat": Part("images_inat", (".jpg", ".jpeg", ".png", ".webp")),
    "nabirds": Part("images_nabirds", (".jpg", ".jpeg", ".png", ".webp")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder with taxa.csv")
    parser.add_argument("--part", choices=PARTS, default="video", help="part to index; video by default")
    parser.add_argument(
        "--names",
        choices=NAMES,
        default="common",
        help="class names: common names (default), scientific names or eBird codes",
    )
    parser.add_argument(
        "--sound",
        choices=("all", "reliable", "none"),
        default="all",
        help="videos whose audio is used: all (default), those marked reliable (column reliable_audio), or none",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the rows of a part's table that have a media file.

    Raises:
        UserError: A table is missing or malformed, or no row has a media file.
    """
    if args.sound != "all" and args.part != "video":
        raise UserError(f"--sound {args.sound}: applies to --part video only; the part {args.part} has no videos")
    root, part = Path(args.root), PARTS[args.part]
    taxa = _taxa(root, NAMES[args.names])
    table = find_file(root, (f"{part.folder}.csv",), f"table of SSW60's part {args.part}")
    rows, folders = ClipRows(), MediaFolders()
    for line, row in read_table(
        table,
        required=("asset_id", "label", "split"),
        # The README of the data set misspells this column.
        aliases={"original_video_start_second": ("orginal_video_start_second",)},
    ):
        name = f"{part.folder}/{row['asset_id']}"
        label, split = row["label"].strip(), row["split"].strip()
        if label not in taxa:
            raise UserError(
                f'{table}, line {line}: label = "{label}": expected one of the {len(taxa)} labels in taxa.csv'
            )
        if split not in SPLITS:
            raise UserError(f'{table}, line {line}: unknown split "{split}"{did_you_mean(split, SPLITS)}')
        path = folders.find_media(root / part.folder, row["asset_id"], part.suffixes)
        if path is None:
            rows.add_missing(name, root / f"{name}{part.suffixes[0]}", table, line)
            continue
        muted = args.sound == "none" or (args.sound == "reliable" and row.get("reliable_audio", "1").strip() == "0")
        media = _media(args.part, path, muted)
        rows.add(Clip(name, labels=(taxa[label],), split=SPLITS[split], group=name, **media), table, line)
    num_muted = sum(clip.video is not None and clip.audio is None for clip in rows.clips)
    notes = [f"--sound {args.sound}: {num_muted} videos are used without audio"] if num_muted else []
    metadata = {
        "source": "fastav index ssw60",
        "root": str(root),
        "part": args.part,
        "names": args.names,
        "sound": args.sound,
        "metric": METRIC,
        "class_order": class_order(taxa.values()),
    }
    return rows.clip_list([table], metadata, notes=notes)


def _taxa(root: Path, column: str) -> dict[str, str]:
    """Returns label in the tables -> class name, in the order of the numbers."""
    path = find_file(root, ("taxa.csv",), "table of SSW60's classes")
    names: dict[str, str] = {}
    for line, row in read_table(path, required=("label", column)):
        label, name = row["label"].strip(), row[column].strip()
        if not label.isdecimal() or not name:
            raise UserError(
                f'{path}, line {line}: label = "{label}", {column} = "{name}": expected a number and a name'
            )
        if label in names or name in names.values():
            raise UserError(f'{path}, line {line}: label {label} or "{name}" is repeated; expected each once')
        names[label] = name
    return dict(sorted(names.items(), key=lambda item: int(item[0])))


def _media(part: str, path: Path, muted: bool) -> dict[str, Any]:
    """Returns the path fields of `Clip` for a file of a part."""
    if part == "video":
        return {"video": path, "audio": None if muted else path}
    return {"audio": path} if part == "audio" else {"image": path}
