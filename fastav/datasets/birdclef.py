"""BirdCLEF 2021: short recordings of 397 bird species, and soundscapes labelled every five seconds; audio only.

ROOT is the unpacked competition data: train_metadata.csv and train_short_audio/CODE/NAME.ogg (the split train), and
train_soundscape_labels.csv and train_soundscapes/ID_SITE_DATE.ogg (the split val, as the hidden test set consists of
soundscapes too). Each short recording is one clip of any length, with its primary label first. Each row of the
soundscape table is a clip of the five seconds that end at the given time. Windows labelled nocall have no label unless
--nocall names a class for them.
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
from fastav.datasets.clip_list import ClipList
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
    "zero or more labels per window of five seconds: micro-averaged F1 over the rows, where a window without birds "
    "has the label nocall"
)
WINDOW_S = 5.0

_SHORT, _SOUNDSCAPES = "train_short_audio", "train_soundscapes"
# The published suffix first, then those of converted copies.
_SUFFIXES = (".ogg", ".wav", ".flac", ".opus", ".mp3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder with train_metadata.csv")
    parser.add_argument(
        "--part",
        choices=("all", "short", "soundscapes"),
        default="all",
        help="what to index: short recordings, windows of soundscapes, or all (default)",
    )
    parser.add_argument(
        "--labels",
        choices=("all", "primary"),
        default="all",
        help="labels of short recordings. all (default): the primary label, and those secondary labels that are the\n"
        "primary label of another recording. primary: the primary label alone",
    )
    parser.add_argument(
        "--nocall",
        metavar="NAME",
        default="",
        help="class name for windows labelled nocall; by default they have no label (all classes negative)",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the recordings and windows that have a media file.

    Raises:
        UserError: A table is missing or malformed, or none of the files exists.
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
    metadata = {
        "source": "fastav index birdclef",
        "root": str(root),
        "part": args.part,
        "labels": args.labels,
        "nocall": args.nocall,
        "metric": METRIC,
        "class_order": class_order(sorted({label for clip in rows.clips for label in clip.labels})),
    }
    return rows.clip_list(tables, metadata, notes=notes)


def _short(rows: ClipRows, folders: MediaFolders, root: Path, table: Path, secondary: bool) -> list[str]:
    """Adds the short recordings; returns notes."""
    required = ("primary_label", "filename", *(["secondary_labels"] if secondary else []))
    entries = list(read_table(table, required=required))
    primary = {row["primary_label"].strip() for _, row in entries}
    unknown: Counter[str] = Counter()
    for line, row in entries:
        code, stem = row["primary_label"].strip(), _stem(row["filename"].strip())
        if not code or not stem:
            raise UserError(f"{table}, line {line}: primary_label or filename is empty; expected both")
        labels = [code]
        for other in label_list(row["secondary_labels"], table, line) if secondary else ():
            if other not in primary:
                unknown[other] += 1
            elif other not in labels:
                labels.append(other)
        name = f"{_SHORT}/{code}/{stem}"
        path = folders.find_media(root / _SHORT / code, stem, _SUFFIXES)
        if path is None:
            rows.add_missing(name, root / f"{name}.ogg", table, line)
            continue
        lat, lon = coordinates(row.get("latitude"), row.get("longitude"))
        # The group is Xeno-canto's recording number: a recording filed under two species must stay in one split.
        rows.add(Clip(name, audio=path, labels=tuple(labels), group=stem, lat=lat, lon=lon), table, line)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(unknown.items()))
    return [f"secondary labels that are not a class, left out: {counts}"] if unknown else []


def _stem(filename: str) -> str:
    """Returns the file name without its suffix, which the tables may or may not give."""
    stem, dot, suffix = filename.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in _SUFFIXES else filename


def label_list(text: str, table: Path, line: int) -> list[str]:
    """Parses a Python list of strings (`['amecro', 'bkcchi']`) without evaluating it; an empty text is an empty list.

    Raises:
        UserError: The text is not a list of strings.
    """
    if not text.strip():
        return []
    try:
        labels = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        where = f"{table}, line {line}"
        raise UserError(f"""{where}: secondary_labels = "{text[:80]}": expected a list such as ['amecro']""")
    return [label.strip() for label in labels if label.strip()]


def _soundscapes(rows: ClipRows, folders: MediaFolders, root: Path, table: Path, nocall: str) -> None:
    """Adds the windows of the soundscapes."""
    recordings = _recordings(root / _SOUNDSCAPES, folders.names(root / _SOUNDSCAPES).values())
    missing: dict[str, int] = defaultdict(int)
    for line, row in read_table(table, required=("row_id", "birds")):
        recording, end_s = _window(row, table, line)
        path = recordings.get(recording)
        if path is None:
            missing[recording] += 1
            continue
        birds = row["birds"].split()
        if not birds:
            raise UserError(f"{table}, line {line}: birds is empty; expected bird codes or nocall")
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
    for recording, count in missing.items():
        path = root / _SOUNDSCAPES / f"{recording}_DATE.ogg"
        message = f"{at_line(table)}: no such file: {path} ({count} windows)"
        rows.problems.append(Problem("missing_file", f"{_SOUNDSCAPES}/{recording}", str(path), message, False))


def _window(row: dict[str, str], table: Path, line: int) -> tuple[str, int]:
    """Returns ID_SITE of the recording, and the end of the window in seconds."""
    row_id = row["row_id"].strip()
    recording, _, end = row_id.rpartition("_")
    if "_" not in recording or not end.isdecimal() or int(end) < WINDOW_S:
        raise UserError(f'{table}, line {line}: row_id = "{row_id}": expected ID_SITE_END, such as 7019_COR_5')
    if "seconds" in row and number(row, "seconds", table, line) != int(end):
        raise UserError(
            f'{table}, line {line}: row_id = "{row_id}" and seconds = "{row["seconds"]}" contradict each other'
        )
    return recording, int(end)


def _recordings(folder: Path, names: Collection[str]) -> dict[str, Path]:
    """Returns ID_SITE -> the recording ID_SITE_DATE.ogg; raises `UserError` if two recordings have the same ID_SITE."""
    found: dict[str, Path] = {}
    for name in sorted(names):
        stem = _stem(name)
        key, _, date = stem.rpartition("_")
        if stem == name or "_" not in key or not date:
            continue
        other = found.get(key)
        if other is not None and _stem(other.name) != stem:
            raise UserError(f"{folder}: both {other.name} and {name} are recording {key}; expected one file")
        if other is None or _rank(name) < _rank(other.name):
            found[key] = folder / name
    return found


def _rank(name: str) -> int:
    return _SUFFIXES.index(f".{name.rpartition('.')[2].lower()}")
