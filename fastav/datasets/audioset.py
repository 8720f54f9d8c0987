"""AudioSet: ten-second YouTube clips with one or more of 527 sound classes.

ROOT contains class_labels_indices.csv (columns: index, mid, display_name), eval_segments.csv and one or both of
balanced_train_segments.csv and unbalanced_train_segments.csv (lines with # are comments; columns: YTID, start, end,
"mid,mid"). For --labels strong, ROOT or ROOT/strong contains audioset_train_strong.tsv, audioset_eval_strong.tsv
(columns: segment_id, start_time_seconds, end_time_seconds, label) and mid_to_display_name.tsv.

The media files may be in any subfolders. They are named ID, ID_30, ID_30000, ID_30.000_40.000 or similar, also with the
prefix Y, with any video or audio suffix. Clips whose file is missing are reported and left out.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.datasets import youtube
from fastav.datasets.clip_list import ClipList
from fastav.datasets.tables import class_order, find_file, number, read_table
from fastav.datasets.youtube import YoutubeRow

CLIP_S = 10
METRIC = "several labels per clip: average precision, averaged over the classes (mAP), on the eval clips (split test)"

_BALANCED, _UNBALANCED, _EVAL = "balanced_train_segments.csv", "unbalanced_train_segments.csv", "eval_segments.csv"
_TRAIN = {
    "balanced": (_BALANCED,),
    "unbalanced": (_UNBALANCED,),
    "full": (_BALANCED, _UNBALANCED),
    "none": (),
}
_STRONG = {"train": "audioset_train_strong.tsv", "test": "audioset_eval_strong.tsv"}
_INDICES = "class_labels_indices.csv"
_NAMES = "mid_to_display_name.tsv"
_SEGMENT = re.compile(r"(?P<video>.+)_(?P<start_ms>\d+)")

Event = tuple[float, float, str]
"""Start and end within the clip in seconds, and the class."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    youtube.add_arguments(parser, tables="class_labels_indices.csv and the segment tables")
    parser.add_argument(
        "--labels",
        choices=("weak", "strong"),
        default="weak",
        help="weak (default): labels of whole clips. strong: labels with start and end times, which only\n"
        "some clips have",
    )
    parser.add_argument(
        "--train",
        choices=tuple(_TRAIN),
        help="training clips, with weak labels only: balanced (default; 22,176 clips), unbalanced (2,042,985), full\n"
        "(both) or none",
    )
    parser.add_argument(
        "--unit",
        choices=("clip", "second"),
        default="clip",
        help="clip (default): one row per clip, with all of its classes. second (with strong labels only): one row\n"
        "per second, with the classes of all events that overlap it, if any",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the clips of the tables that have a media file.

    Raises:
        UserError: A table is missing or malformed, the options contradict each other, or no clip has a media file.
    """
    strong = args.labels == "strong"
    if strong and args.train is not None:
        raise UserError(f"--train {args.train}: applies to --labels weak only")
    if args.unit == "second" and not strong:
        raise UserError("--unit second: needs the times of events; use --labels strong")
    classes = _Classes(args.root, strong=strong)
    events: dict[str, list[Event]] = {}
    rows, notes = _strong(args.root, classes, events) if strong else _weak(args.root, classes, args.train or "balanced")
    notes += classes.notes()
    found = youtube.find(rows, args.media_root or args.root, args.media)
    clips = found.clips
    if args.unit == "second":
        pairs = zip(found.rows, clips, strict=True)
        clips = [piece for row, clip in pairs for piece in _seconds(clip, events[_name(row)])]
    options = {"media": args.media, "labels": args.labels, "train": args.train or "balanced", "unit": args.unit}
    metadata = {
        "source": "fastav index audioset",
        "root": str(args.root),
        **{key: value for key, value in options.items() if key != "train" or not strong},
        "metric": METRIC,
        **({"class_order": class_order(classes.names.values())} if not strong else {}),
    }
    return found.clip_list(metadata, clips=clips, notes=notes)


class _Classes:
    """Class names by their machine id (mid), in the order of the file that defines them."""

    def __init__(self, root: Path, *, strong: bool) -> None:
        table = youtube.table_in(root, (_NAMES, f"strong/{_NAMES}")) if strong else None
        if table is not None:  # this file has more than the 527 classes
            found = {
                row["mid"].strip(): row["name"].strip()
                for _, row in read_table(table, delimiter="\t", header=("mid", "name"), quoted=False)
            }
        else:
            table = find_file(root, (_INDICES,), "class names of AudioSet")
            columns = ("index", "mid", "display_name")
            numbered = [
                (number(row, "index", table, line), row["mid"].strip(), row["display_name"].strip())
                for line, row in read_table(table, required=columns)
            ]
            found = {mid: name for _, mid, name in sorted(numbered)}
        times = Counter(found.values())
        self.names = {mid: name if times[name] == 1 else f"{name} ({mid})" for mid, name in found.items()}
        self._table, self._unknown = table, Counter[str]()

    def of(self, mids: str) -> tuple[str, ...]:
        """Returns the class names of a comma-separated list of ids, each once; an id without a name is its own name."""
        wanted = dict.fromkeys(mid.strip() for mid in mids.split(",") if mid.strip())
        self._unknown.update(mid for mid in wanted if mid not in self.names)
        return tuple(self.names.get(mid, mid) for mid in wanted)

    def notes(self) -> list[str]:
        """Returns a note on the ids without a name."""
        if not self._unknown:
            return []
        shown = ", ".join(sorted(self._unknown)[:5])
        return [f"{self._table}: has no name for {len(self._unknown)} classes; they are named by their ids: {shown}"]


def _weak(root: Path, classes: _Classes, train: str) -> tuple[list[YoutubeRow], list[str]]:
    rows = []
    for name in _TRAIN[train]:
        path = find_file(root, (name,), f"table of AudioSet for --train {train}")
        rows += list(_segments(path, "train", classes))
    if (table := youtube.table_in(root, (_EVAL,))) is not None:
        return [*rows, *_segments(table, "test", classes)], []
    if train == "none":
        find_file(root, (_EVAL,), "table of AudioSet")
    return rows, [f"{root}: no {_EVAL}, so there is no test split"]


def _segments(path: Path, split: str, classes: _Classes) -> Iterator[YoutubeRow]:
    columns = ("YTID", "start_seconds", "end_seconds", "positive_labels")
    for line, row in read_table(path, header=columns, comment="#", skip_initial_space=True):
        start_s, end_s = (number(row, column, path, line) for column in columns[1:3])
        video_id = row["YTID"].strip()
        name = f"{video_id}_{round(start_s * 1000)}"
        yield YoutubeRow(name, video_id, start_s, end_s, classes.of(row["positive_labels"]), split, path, line)


def _strong(root: Path, classes: _Classes, events: dict[str, list[Event]]) -> tuple[list[YoutubeRow], list[str]]:
    """Returns the segments in the order of their first event, and notes; adds their events to `events`."""
    tables = {split: youtube.table_in(root, (name, f"strong/{name}")) for split, name in _STRONG.items()}
    if not any(tables.values()):
        find_file(root, (_STRONG["train"], f"strong/{_STRONG['train']}"), "strong labels of AudioSet")
    rows, notes = [], []
    for split, table in tables.items():
        if table is not None:
            rows += _strong_rows(table, split, classes, events)
        else:
            notes.append(f"{root}: no {_STRONG[split]}, so there is no {split} split")
    return rows, notes


def _strong_rows(path: Path, split: str, classes: _Classes, events: dict[str, list[Event]]) -> list[YoutubeRow]:
    columns = ("segment_id", "start_time_seconds", "end_time_seconds", "label")
    aliases = {columns[1]: ("start_time", "start"), columns[2]: ("end_time", "end")}
    first: dict[str, int] = {}
    for line, row in read_table(path, delimiter="\t", required=columns, aliases=aliases, quoted=False):
        start_s, end_s = (number(row, column, path, line) for column in columns[1:3])
        name = row["segment_id"].strip()
        if _SEGMENT.fullmatch(name) is None:
            raise UserError(f'{path}, line {line}: segment_id = "{name}": expected a name such as s9d-2nhuJCQ_30000')
        first.setdefault(name, line)
        events.setdefault(name, []).extend((start_s, end_s, label) for label in classes.of(row["label"]))
    return [_strong_row(name, line, events[name], split, path) for name, line in first.items()]


def _strong_row(name: str, line: int, events: list[Event], split: str, path: Path) -> YoutubeRow:
    video_id, _, start_ms = name.rpartition("_")
    start_s = int(start_ms) / 1000
    labels = tuple(dict.fromkeys(label for _, _, label in events))
    return YoutubeRow(name, video_id, start_s, start_s + CLIP_S, labels, split, path, line)


def _name(row: YoutubeRow) -> str:
    return f"{row.video_id}_{round(row.start_s * 1000)}"


def _seconds(clip: Clip, events: list[Event]) -> Iterator[Clip]:
    labels: dict[int, dict[str, None]] = defaultdict(dict)
    for start_s, end_s, label in events:
        first = math.floor(start_s)
        for at in range(first, max(math.ceil(end_s), first + 1)):
            labels[at][label] = None
    for at in range(CLIP_S):
        yield youtube.one_second(clip, at, labels[at])
