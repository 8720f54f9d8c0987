"""LLP (Look, Listen and Parse): ten-second clips with one or more of 25 events, audible, visible or both.

ROOT or ROOT/data contains the tab-separated tables AVVP_train.csv, AVVP_val_pd.csv and AVVP_test_pd.csv (columns:
filename, event_labels). For --unit second it also contains AVVP_eval_audio.csv and AVVP_eval_visual.csv (columns:
filename, onset, offset, event_labels). The media files may be in any subfolders. They are named ID_30_40, as in the
tables, or ID, with any video or audio suffix. Clips whose file is missing are reported and left out.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.datasets import youtube
from fastav.datasets.clip_list import ClipList
from fastav.datasets.tables import class_order, find_file, number, read_table
from fastav.datasets.youtube import YoutubeRow

CLASSES = (
    "Speech", "Car", "Cheering", "Dog", "Cat", "Frying_(food)", "Basketball_bounce", "Fire_alarm", "Chainsaw",
    "Cello", "Banjo", "Singing", "Chicken_rooster", "Violin_fiddle", "Vacuum_cleaner", "Baby_laughter", "Accordion",
    "Lawn_mower", "Motorcycle", "Helicopter", "Acoustic_guitar", "Telephone_bell_ringing", "Baby_cry_infant_cry",
    "Blender", "Clapping",
)  # fmt: skip
"""Class names in the order of their numbers: https://github.com/YapengTian/AVVP-ECCV20, dataloader.py."""

METRIC = (
    "several labels per clip: F-scores for audio, visual and audio-visual events and both averages (Type@AV, "
    "Event@AV), per second and per event (IoU of 0.5), averaged over the videos of the test split"
)

_TABLES = {"train": "AVVP_train.csv", "val": "AVVP_val_pd.csv", "test": "AVVP_test_pd.csv"}
_EVENTS = ("AVVP_eval_audio.csv", "AVVP_eval_visual.csv")
_NAME = re.compile(r"(?P<video>.+)_(?P<start>\d+)_(?P<end>\d+)")
_ID_LENGTH = 11

Spans = dict[str, set[tuple[int, str]]]
"""File name -> pairs of second and event."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    youtube.add_arguments(parser, tables="the AVVP_*.csv tables")
    parser.add_argument(
        "--unit",
        choices=("clip", "second"),
        default="clip",
        help="clip (default): one row per clip, with all of its events. second: one row per second of val and test,\n"
        "with the events of that second, if any; clips of train stay whole, as the times of their events are unknown",
    )
    parser.add_argument(
        "--label",
        choices=("audio", "visual", "both", "either"),
        help="events that label a second, with --unit second: audible ones, visible ones, those that are both in that\n"
        "second, or those that are either (default)",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the clips of the tables that have a media file.

    Raises:
        UserError: A table is missing or malformed, an event is not in `CLASSES`, or no clip has a media file.
    """
    if args.label is not None and args.unit == "clip":
        raise UserError(f"--label {args.label}: applies to --unit second only")
    tables, notes = _tables(args.root)
    rows = [row for split, path in tables.items() for row in _rows(path, split)]
    found = youtube.find(rows, args.media_root or args.root, args.media)
    clips, label = found.clips, args.label or "either"
    if args.unit == "second":
        audio, visual = (_spans(_find(args.root, name)) for name in _EVENTS)
        clips = []
        for row, clip in zip(found.rows, found.clips, strict=True):
            clips += [clip] if row.split == "train" else _seconds(row, clip, _choose(audio, visual, row, label))
        dense = [row for row in rows if row.split != "train"]
        if unknown := [row.id for row in dense if row.names[0] not in audio and row.names[0] not in visual]:
            notes.append(f'{len(unknown)} clips, such as "{unknown[0]}", are neither in {" nor in ".join(_EVENTS)}')
    metadata = {
        "source": "fastav index llp",
        "root": str(args.root),
        "media": args.media,
        "unit": args.unit,
        "label": label if args.unit == "second" else "weak",
        "metric": METRIC,
        "class_order": class_order(CLASSES),
    }
    return found.clip_list(metadata, clips=clips, notes=notes)


def _find(root: Path, name: str) -> Path:
    return find_file(root, (name, f"data/{name}"), "table of LLP")


def _tables(root: Path) -> tuple[dict[str, Path], list[str]]:
    found = {split: youtube.table_in(root, (name, f"data/{name}")) for split, name in _TABLES.items()}
    if not any(found.values()):
        _find(root, _TABLES["train"])
    notes = [
        f"{root}: no {_TABLES[split]}, so there is no {split} split" for split, path in found.items() if path is None
    ]
    return {split: path for split, path in found.items() if path is not None}, notes


def _rows(path: Path, split: str) -> Iterator[YoutubeRow]:
    for line, row in read_table(path, delimiter="\t", required=("filename", "event_labels")):
        name = row["filename"].strip()
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise UserError(f'{path}, line {line}: filename = "{name}": expected a name such as 4YdbENYcIyE_23_33')
        # The authors' files are named by the first 11 characters, even where the id in the table is truncated.
        names = (name, name[:_ID_LENGTH]) if len(parts["video"]) < _ID_LENGTH else (name,)
        labels = _labels(row["event_labels"], path, line)
        start_s, end_s = float(parts["start"]), float(parts["end"])
        yield YoutubeRow(name, parts["video"], start_s, end_s, labels, split, path, line, names)


def _labels(text: str, path: Path, line: int) -> tuple[str, ...]:
    """Returns the events of a comma-separated list, each once."""
    names = dict.fromkeys(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in CLASSES:
            raise UserError(f'{path}, line {line}: unknown event "{name}"{did_you_mean(name, CLASSES)}')
    return tuple(names)


def _spans(path: Path) -> Spans:
    """Reads the seconds that each event covers: from its onset (included) to its offset (excluded)."""
    spans: Spans = defaultdict(set)
    columns = ("filename", "onset", "offset", "event_labels")
    for line, row in read_table(path, delimiter="\t", required=columns):
        onset, offset = (round(number(row, column, path, line)) for column in ("onset", "offset"))
        for label in _labels(row["event_labels"], path, line):
            spans[row["filename"].strip()].update((second, label) for second in range(onset, offset))
    return spans


def _choose(audio: Spans, visual: Spans, row: YoutubeRow, label: str) -> set[tuple[int, str]]:
    name = row.names[0]
    audible, visible = audio.get(name, set()), visual.get(name, set())
    return {"audio": audible, "visual": visible, "both": audible & visible, "either": audible | visible}[label]


def _seconds(row: YoutubeRow, clip: Clip, events: Iterable[tuple[int, str]]) -> Iterator[Clip]:
    by_second: dict[int, list[str]] = defaultdict(list)
    for second, label in events:
        by_second[second].append(label)
    for at in range(round(row.end_s - row.start_s)):
        yield youtube.one_second(clip, at, sorted(by_second[at], key=CLASSES.index))
