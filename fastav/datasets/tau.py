"""TAU Urban Audio-Visual Scenes 2021, development set (DCASE 2021, task 1B): ten-second clips of ten scenes.

ROOT is the folder TAU-urban-audio-visual-scenes-2021-development. It contains evaluation_setup/fold1_train.csv and
fold1_evaluate.csv (columns separated by tabs: filename_audio, filename_video, scene_label),
audio/SCENE-CITY-LOCATION-SEGMENT.wav and video/SCENE-CITY-LOCATION-SEGMENT.mp4. The tables define the splits train and
test. The group of a clip is CITY-LOCATION; no location is in both splits. The task classifies pieces of one second:
use --piece-s 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.datasets.clip_list import ClipList
from fastav.datasets.splits import cut
from fastav.datasets.tables import ClipRows, MediaFolders, class_order, find_file, read_table

METRIC = (
    "one label per piece of one second (--piece-s 1): multi-class log loss, which decides the ranking, and accuracy, "
    "both averaged over the ten classes; the scores of a ten-second clip are the sums of its pieces' probabilities"
)
CLASSES = (
    "airport", "bus", "metro", "metro_station", "park", "public_square", "shopping_mall", "street_pedestrian",
    "street_traffic", "tram",
)  # fmt: skip

_TABLES = {
    "train": ("evaluation_setup/fold1_train.csv", "fold1_train.csv"),
    "test": ("evaluation_setup/fold1_evaluate.csv", "fold1_evaluate.csv"),
}
# The published suffix first, then those of converted copies.
_SUFFIXES = {"audio": (".wav", ".flac", ".ogg", ".opus"), "video": (".mp4", ".mkv", ".webm", ".mov")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder with evaluation_setup/")
    parser.add_argument(
        "--media",
        choices=("both", "audio", "video"),
        default="both",
        help="files to use. both (default): clips that lack one of the two files are reported and left out; the audio\n"
        "is that of the .wav file, never that of the .mp4 file",
    )
    parser.add_argument(
        "--piece-s",
        type=float,
        metavar="S",
        help="cut each clip into pieces of S seconds; the task uses 1. A remainder of S/2 or more becomes a piece of\n"
        "its own, a shorter one is dropped",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the clips of the first fold that have their media files.

    Raises:
        UserError: A table is missing or malformed, no clip has its files, or the length of pieces is invalid.
    """
    root, piece_s = Path(args.root), args.piece_s
    if piece_s is not None and not (math.isfinite(piece_s) and piece_s > 0):
        raise UserError(f"--piece-s {piece_s}: expected a number of seconds above 0")
    tables = {split: find_file(root, names, f"table of TAU's {split} split") for split, names in _TABLES.items()}
    rows, folders = ClipRows(), MediaFolders()
    wanted = ("audio", "video") if args.media == "both" else (args.media,)
    for split, table in tables.items():
        for line, row in _rows(table):
            names = {kind: PurePosixPath(row[f"filename_{kind}"]) for kind in wanted}
            clip_id = next(iter(names.values())).stem
            found = {kind: folders.find_media(root / n.parent, n.stem, _SUFFIXES[kind]) for kind, n in names.items()}
            if missing := [kind for kind, path in found.items() if path is None]:
                rows.add_missing(clip_id, root / names[missing[0]], table, line)
                continue
            clip = Clip(
                clip_id,
                video=found.get("video"),
                audio=found.get("audio"),
                labels=(row["scene_label"],),
                split=split,
                group=location(clip_id),
            )
            rows.add(clip, table, line)
    metadata = {
        "source": "fastav index tau",
        "root": str(root),
        "media": args.media,
        "piece_s": str(piece_s),
        "metric": METRIC,
        "class_order": class_order(CLASSES),
    }
    return rows.clip_list(tables.values(), metadata, cut=None if piece_s is None else partial(cut, piece_s=piece_s))


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yields line number and row; derives the video names from the audio names if the table has none."""
    for line, row in read_table(
        table, delimiter="\t", required=("filename_audio", "scene_label"), aliases={"filename_audio": ("filename",)}
    ):
        if row["scene_label"] not in CLASSES:
            label = row["scene_label"]
            raise UserError(f'{table}, line {line}: unknown scene_label "{label}"{did_you_mean(label, CLASSES)}')
        stem = PurePosixPath(row["filename_audio"]).stem
        if not stem:
            raise UserError(
                f"{table}, line {line}: filename_audio is empty; expected a path such as audio/bus-lyon-1-2.wav"
            )
        yield line, {"filename_video": f"video/{stem}.mp4", **row}


def location(stem: str) -> str:
    """Returns city and location of a file name: airport-lisbon-1175-44106 -> lisbon-1175.

    A name without these parts is returned unchanged.
    """
    parts = stem.split("-")
    return "-".join(parts[1:-1]) if len(parts) > 3 else stem
