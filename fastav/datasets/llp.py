"""LLP (Look, Listen and Parse): ten-second clips with any of 25 events, heard, seen or both.

ROOT, or data/ in it, holds the tables AVVP_train.csv, AVVP_val_pd.csv and AVVP_test_pd.csv (filename, event_labels;
parted by tabs) and, for --unit second, AVVP_eval_audio.csv and AVVP_eval_visual.csv (filename, onset, offset,
event_labels). Media lie in any folders, named ID_30_40, as in the tables, or ID, with any suffix of video or sound.
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
from fastav.datasets.listing import Listing
from fastav.datasets.tables import class_order, find_file, number, read_table
from fastav.datasets.youtube import YoutubeRow

CLASSES = (
    "Speech", "Car", "Cheering", "Dog", "Cat", "Frying_(food)", "Basketball_bounce", "Fire_alarm", "Chainsaw",
    "Cello", "Banjo", "Singing", "Chicken_rooster", "Violin_fiddle", "Vacuum_cleaner", "Baby_laughter", "Accordion",
    "Lawn_mower", "Motorcycle", "Helicopter", "Acoustic_guitar", "Telephone_bell_ringing", "Baby_cry_infant_cry",
    "Blender", "Clapping",
)  # fmt: skip
"""In the order of their numbers: https://github.com/YapengTian/AVVP-ECCV20, dataloader.py."""

METRIC = (
    "several labels: F-scores for audio, visual and audio-visual events and both averages (Type@AV, Event@AV), per "
    "second and per event (IoU of 0.5), averaged over the videos of the test split"
)

_TABLES = {"train": "AVVP_train.csv", "val": "AVVP_val_pd.csv", "test": "AVVP_test_pd.csv"}
_EVENTS = ("AVVP_eval_audio.csv", "AVVP_eval_visual.csv")
_NAME = re.compile(r"(?P<video>.+)_(?P<start>\d+)_(?P<end>\d+)")
_ID_LENGTH = 11

Spans = dict[str, set[tuple[int, str]]]
"""File name -> seconds and the events in them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this data set's options."""
    youtube.add_arguments(parser, tables="the AVVP_*.csv tables")
    youtube.add_media_argument(parser)
    parser.add_argument(
        "--unit",
        choices=("clip", "second"),
        default="clip",
        help="clip (default): a row a clip, with all of its events. second: the clips of val and test as a row a\n"
        "second, with the events of that second, if any; those of train stay whole, as only their events are known",
    )
    parser.add_argument(
        "--label",
        choices=("audio", "visual", "both", "either"),
        help="with --unit second, the events that count: those heard, those seen, those heard and seen in that\n"
        "second, or those heard or seen (default)",
    )


def listing(args: argparse.Namespace) -> Listing:
    """Lists the clips of the tables whose media are there.

    Raises:
        UserError: No table, a malformed one, an event that is none of `CLASSES`, or media of none of the clips.
    """
    if args.label is not None and args.unit == "clip":
        raise UserError(f"--label {args.label}: is for the events of a second, expected --unit second with it")
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
            notes.append(f'{len(unknown)} clips are in none of {" and ".join(_EVENTS)}, such as "{unknown[0]}"')
    return Listing(
        clips,
        found.problems,
        [*notes, *found.notes],
        published_splits=True,
        metadata={
            "source": "fastav index llp",
            "root": str(args.root),
            "media": args.media,
            "unit": args.unit,
            "label": label if args.unit == "second" else "weak",
            "metric": METRIC,
            "class_order": class_order(CLASSES),
        },
    )


def _find(root: Path, name: str) -> Path:
    return find_file(root, (name, f"data/{name}"), "table of LLP")


def _tables(root: Path) -> tuple[dict[str, Path], list[str]]:
    found = {split: youtube.table_in(root, (name, f"data/{name}")) for split, name in _TABLES.items()}
    if not any(found.values()):
        _find(root, _TABLES["train"])
    notes = [f"{root}: no {_TABLES[split]}, so no {split} split" for split, path in found.items() if path is None]
    return {split: path for split, path in found.items() if path is not None}, notes


def _rows(path: Path, split: str) -> Iterator[YoutubeRow]:
    for line, row in read_table(path, delimiter="\t", required=("filename", "event_labels")):
        name = row["filename"].strip()
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise UserError(f'{path}, line {line}: filename "{name}", expected such as 4YdbENYcIyE_23_33')
        # The authors' own files are named by the first 11 characters, also where an id has lost some of its own.
        names = (name, name[:_ID_LENGTH]) if len(parts["video"]) < _ID_LENGTH else (name,)
        labels = _labels(row["event_labels"], path, line)
        start_s, end_s = float(parts["start"]), float(parts["end"])
        yield YoutubeRow(name, parts["video"], start_s, end_s, labels, split, path, line, names)


def _labels(text: str, path: Path, line: int) -> tuple[str, ...]:
    """The events of a comma list, each once."""
    names = dict.fromkeys(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in CLASSES:
            raise UserError(f'{path}, line {line}: event "{name}", expected one of LLP{did_you_mean(name, CLASSES)}')
    return tuple(names)


def _spans(path: Path) -> Spans:
    """The seconds that each event covers: from its onset up to, but not with, its offset."""
    spans: Spans = defaultdict(set)
    columns = ("filename", "onset", "offset", "event_labels")
    for line, row in read_table(path, delimiter="\t", required=columns):
        onset, offset = (round(number(row, column, path, line)) for column in ("onset", "offset"))
        for label in _labels(row["event_labels"], path, line):
            spans[row["filename"].strip()].update((second, label) for second in range(onset, offset))
    return spans


def _choose(audio: Spans, visual: Spans, row: YoutubeRow, label: str) -> set[tuple[int, str]]:
    name = row.names[0]
    heard, seen = audio.get(name, set()), visual.get(name, set())
    return {"audio": heard, "visual": seen, "both": heard & seen, "either": heard | seen}[label]


def _seconds(row: YoutubeRow, clip: Clip, events: Iterable[tuple[int, str]]) -> Iterator[Clip]:
    by_second: dict[int, list[str]] = defaultdict(list)
    for second, label in events:
        by_second[second].append(label)
    for at in range(round(row.end_s - row.start_s)):
        yield youtube.second(clip, at, sorted(by_second[at], key=CLASSES.index))
