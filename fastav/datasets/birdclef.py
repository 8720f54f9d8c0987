"""BirdCLEF 2021: short recordings of 397 bird species, and soundscapes labelled every five seconds. Sound only.

ROOT is the unpacked competition data: train_metadata.csv and train_short_audio/CODE/NAME.ogg (the split train), and
train_soundscape_labels.csv and train_soundscapes/ID_SITE_DATE.ogg (the split val, as the hidden test is of their
kind). A short recording is one clip of any length with its primary label first; each row of the soundscapes' table
is a clip of the five seconds that END at its second. Windows called nocall have no label unless --nocall names one.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.data.manifest import Problem
from fastav.datasets.listing import Listing
from fastav.datasets.tables import (
    ClipRows,
    MediaFolders,
    at_line,
    class_order,
    coordinates,
    find_file,
    number,
    read_table,
)

METRIC = (
    "any number of labels a window of five seconds: micro-averaged F1 over the rows, where a window without bird "
    "counts as one label of its own, nocall"
)
WINDOW_S = 5.0

_SHORT, _SOUNDSCAPES = "train_short_audio", "train_soundscapes"
# The published suffix first; the others are what people convert to.
_SUFFIXES = (".ogg", ".wav", ".flac", ".opus", ".mp3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this data set's options."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="the folder with train_metadata.csv")
    parser.add_argument(
        "--part",
        choices=("all", "short", "soundscapes"),
        default="all",
        help="the short recordings, the soundscapes' windows, or all (default)",
    )
    parser.add_argument(
        "--labels",
        choices=("all", "primary"),
        default="all",
        help="of short recordings: the primary label and the secondary ones that are primary elsewhere (default), or\n"
        "the primary one alone",
    )
    parser.add_argument(
        "--nocall",
        metavar="NAME",
        default="",
        help="make nocall a class of that name; by default such windows have no label, and none of the classes is\n"
        "the right answer",
    )


def listing(args: argparse.Namespace) -> Listing:
    """Lists the recordings and windows that are there.

    Raises:
        UserError: No table, a malformed one, or none of its files.
    """
    root = Path(args.root)
    rows, folders, notes = ClipRows(), MediaFolders(), []
    tables = []
    if args.part != "soundscapes":
        table = find_file(root, ("train_metadata.csv",), "table of BirdCLEF's short recordings")
        notes += _short(rows, folders, root, table, args.labels == "all")
        tables.append(table)
    if args.part != "short":
        table = find_file(root, ("train_soundscape_labels.csv",), "table of BirdCLEF's soundscapes")
        _soundscapes(rows, folders, root, table, args.nocall)
        tables.append(table)
    rows.refuse_none(" and ".join(map(str, tables)))
    return Listing(
        rows.clips,
        rows.problems,
        notes,
        published_splits=True,
        metadata={
            "source": "fastav index birdclef",
            "root": str(root),
            "part": args.part,
            "labels": args.labels,
            "nocall": args.nocall,
            "metric": METRIC,
            "class_order": class_order(sorted({label for clip in rows.clips for label in clip.labels})),
        },
    )


def _short(rows: ClipRows, folders: MediaFolders, root: Path, table: Path, secondary: bool) -> list[str]:
    """Adds the short recordings; returns notes."""
    required = ("primary_label", "filename", *(["secondary_labels"] if secondary else []))
    entries = list(read_table(table, required=required))
    primary = {row["primary_label"].strip() for _, row in entries}
    unknown: Counter[str] = Counter()
    for line, row in entries:
        code, stem = row["primary_label"].strip(), _stem(row["filename"].strip())
        if not code or not stem:
            raise UserError(f"{table}, line {line}: no primary_label or no filename, expected both")
        labels = [code]
        for other in label_list(row["secondary_labels"], table, line) if secondary else ():
            if other not in primary:
                unknown[other] += 1
            elif other not in labels:
                labels.append(other)
        name = f"{_SHORT}/{code}/{stem}"
        path = folders.find_media(root / _SHORT / code, stem, _SUFFIXES)
        if path is None:
            rows.lose(name, root / f"{name}.ogg", table, line)
            continue
        lat, lon = coordinates(row.get("latitude"), row.get("longitude"))
        # Xeno-canto's number of the recording is the group: the same sound filed under two species must not be torn.
        rows.add(Clip(name, audio=path, labels=tuple(labels), group=stem, lat=lat, lon=lon), table, line)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(unknown.items()))
    return [f"secondary labels that are no class, left out: {counts}"] if unknown else []


def _stem(filename: str) -> str:
    """Tables of BirdCLEF name the recording with its suffix or without."""
    stem, dot, suffix = filename.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in _SUFFIXES else filename


def label_list(text: str, table: Path, line: int) -> list[str]:
    """Reads a list as Python writes it (`['amecro', 'bkcchi']`), which is never evaluated; nothing for no text.

    Raises:
        UserError: It is no list of texts.
    """
    if not text.strip():
        return []
    try:
        labels = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"""{table}, line {line}: secondary_labels "{text[:80]}", expected such as ['amecro']""")
    return [label.strip() for label in labels if label.strip()]


def _soundscapes(rows: ClipRows, folders: MediaFolders, root: Path, table: Path, nocall: str) -> None:
    """Adds the windows of the soundscapes."""
    recordings = _recordings(root / _SOUNDSCAPES, folders.names(root / _SOUNDSCAPES).values())
    lost: dict[str, int] = defaultdict(int)
    for line, row in read_table(table, required=("row_id", "birds")):
        recording, end_s = _window(row, table, line)
        path = recordings.get(recording)
        if path is None:
            lost[recording] += 1
            continue
        birds = row["birds"].split()
        if not birds:
            raise UserError(f"{table}, line {line}: birds is empty, expected codes of birds or nocall")
        labels = tuple(dict.fromkeys(bird for bird in birds if bird != "nocall")) or ((nocall,) if nocall else ())
        clip = Clip(
            f"{_SOUNDSCAPES}/{row['row_id']}",
            audio=path,
            start_s=end_s - WINDOW_S,
            duration_s=WINDOW_S,
            labels=labels,
            split="val",
            group=recording,
        )
        rows.add(clip, table, line)
    for recording, count in lost.items():
        path = root / _SOUNDSCAPES / f"{recording}_DATE.ogg"
        message = f"{at_line(table)}: {path} is not there ({count} windows)"
        rows.problems.append(Problem("missing_file", f"{_SOUNDSCAPES}/{recording}", str(path), message, False))


def _window(row: dict[str, str], table: Path, line: int) -> tuple[str, int]:
    """ID_SITE of the recording, and the second at which the window ends."""
    row_id = row["row_id"].strip()
    recording, _, end = row_id.rpartition("_")
    if "_" not in recording or not end.isdecimal() or int(end) < WINDOW_S:
        raise UserError(f'{table}, line {line}: row_id "{row_id}", expected such as 7019_COR_5 (the window\'s end)')
    if "seconds" in row and number(row, "seconds", table, line) != int(end):
        raise UserError(f'{table}, line {line}: row_id "{row_id}" and seconds "{row["seconds"]}" differ')
    return recording, int(end)


def _recordings(folder: Path, names: Collection[str]) -> dict[str, Path]:
    """ID_SITE -> the recording ID_SITE_DATE.ogg; `UserError` where two have it."""
    found: dict[str, Path] = {}
    for name in sorted(names):
        stem = _stem(name)
        key, _, date = stem.rpartition("_")
        if stem == name or "_" not in key or not date:
            continue
        other = found.get(key)
        if other is not None and _stem(other.name) != stem:
            raise UserError(f"{folder}: {other.name} and {name} are both recording {key}, expected one")
        if other is None or _rank(name) < _rank(other.name):
            found[key] = folder / name
    return found


def _rank(name: str) -> int:
    return _SUFFIXES.index(f".{name.rpartition('.')[2].lower()}")
