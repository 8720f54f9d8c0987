"""TAU Urban Audio-Visual Scenes 2021, development set (DCASE 2021, task 1B): one of ten scenes a clip.

ROOT is TAU-urban-audio-visual-scenes-2021-development: evaluation_setup/fold1_train.csv and fold1_evaluate.csv
(columns parted by tabs: filename_audio, filename_video, scene_label), audio/SCENE-CITY-LOCATION-SEGMENT.wav and
video/SCENE-CITY-LOCATION-SEGMENT.mp4, ten seconds each. The fold is the split (train, test); CITY-LOCATION is the
group, which no split tears. The task is to tell the scene within one second: --piece-s 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.datasets.folder import cut
from fastav.datasets.listing import Listing
from fastav.datasets.tables import ClipRows, MediaFolders, class_order, find_file, read_table

METRIC = (
    "one label a piece of one second (--piece-s 1): multi-class log loss, which ranks, and accuracy, both averaged "
    "over the ten classes; a ten-second clip is what its pieces' probabilities sum up to"
)
CLASSES = (
    "airport", "bus", "metro", "metro_station", "park", "public_square", "shopping_mall", "street_pedestrian",
    "street_traffic", "tram",
)  # fmt: skip

_TABLES = {
    "train": ("evaluation_setup/fold1_train.csv", "fold1_train.csv"),
    "test": ("evaluation_setup/fold1_evaluate.csv", "fold1_evaluate.csv"),
}
# The published suffix first; the others are what people convert to.
_SUFFIXES = {"audio": (".wav", ".flac", ".ogg", ".opus"), "video": (".mp4", ".mkv", ".webm", ".mov")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this data set's options."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="the folder with evaluation_setup/")
    parser.add_argument(
        "--media",
        choices=("both", "audio", "video"),
        default="both",
        help="which files to take. both (default): clips with only one of their two files are left out and listed;\n"
        "the sound is that of the .wav, never that of the .mp4",
    )
    parser.add_argument(
        "--piece-s",
        type=float,
        metavar="S",
        help="cut each clip into pieces of S seconds; 1 is the task's. A rest of S/2 or more is a piece of its own",
    )


def listing(args: argparse.Namespace) -> Listing:
    """Lists the clips of the first fold that are there.

    Raises:
        UserError: No table, a malformed one, none of its files, or a length of pieces that is none.
    """
    root, piece_s = Path(args.root), args.piece_s
    if piece_s is not None and not (math.isfinite(piece_s) and piece_s > 0):
        raise UserError(f"--piece-s {piece_s}: expected seconds, more than 0")
    tables = {split: find_file(root, names, f"table of TAU's {split} split") for split, names in _TABLES.items()}
    rows, folders = ClipRows(), MediaFolders()
    wanted = ("audio", "video") if args.media == "both" else (args.media,)
    for split, table in tables.items():
        for line, row in _rows(table):
            names = {kind: PurePosixPath(row[f"filename_{kind}"]) for kind in wanted}
            clip_id = next(iter(names.values())).stem
            found = {kind: folders.find_media(root / n.parent, n.stem, _SUFFIXES[kind]) for kind, n in names.items()}
            if lost := [kind for kind, path in found.items() if path is None]:
                rows.lose(clip_id, root / names[lost[0]], table, line)
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
    rows.refuse_none(" and ".join(map(str, tables.values())))
    return Listing(
        rows.clips,
        rows.problems,
        cut=None if piece_s is None else partial(cut, piece_s=piece_s),
        published_splits=True,
        metadata={
            "source": "fastav index tau",
            "root": str(root),
            "media": args.media,
            "piece_s": str(piece_s),
            "metric": METRIC,
            "class_order": class_order(CLASSES),
        },
    )


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Line and row; a table without the videos' names gets those that the sounds' names suggest."""
    for line, row in read_table(
        table, delimiter="\t", required=("filename_audio", "scene_label"), aliases={"filename_audio": ("filename",)}
    ):
        if row["scene_label"] not in CLASSES:
            label = row["scene_label"]
            raise UserError(f'{table}, line {line}: scene_label "{label}"{did_you_mean(label, CLASSES)}')
        stem = PurePosixPath(row["filename_audio"]).stem
        if not stem:
            raise UserError(f"{table}, line {line}: filename_audio is empty, expected such as audio/bus-lyon-1-2.wav")
        yield line, {"filename_video": f"video/{stem}.mp4", **row}


def location(stem: str) -> str:
    """What lies between the scene and the number of the segment: airport-lisbon-1175-44106 -> lisbon-1175.

    A name without these parts is a location of its own.
    """
    parts = stem.split("-")
    return "-".join(parts[1:-1]) if len(parts) > 3 else stem
