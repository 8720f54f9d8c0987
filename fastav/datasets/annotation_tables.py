"""Annotated recordings: Raven selection tables and Audacity label files; clips are annotations or fixed windows.

ROOT contains tables (.txt or .tsv, also in subfolders). A Raven table has a header line with Begin Time (s),
End Time (s) and a label column. An Audacity file has lines of start, end and label, separated by tabs. The recording of
NAME.txt, NAME.selections.txt, NAME.Table.1.selections.txt and similar is NAME with any audio or video suffix. If a
Raven table has the column Begin Path or Begin File, that file is the recording, and times count from the start of that
file (from the column File Offset (s), if it exists). All tables of a recording are merged; repeated annotations, such
as those of two views, are used once. Text that is neither UTF-8 nor UTF-16 is read as Windows-1252.

Without --window-s each annotation becomes a clip with its label (with --min-overlap also the labels of annotations that
overlap it). With --window-s the recordings are cut into windows of equal length, the last of which ends at the end of
the recording. Overlap rule: a window gets the label of each annotation of which at least the fraction --min-overlap is
inside the window, or which covers at least that fraction of the window. An annotation of zero length belongs to the
window that contains it. With --min-overlap of 0.5 or less every annotation labels some window, except those shorter
than 0.2 s at the very end of a recording, where a remainder of up to 0.1 s gets no window. Windows that overlap
annotations but get no label are left out; so are windows without annotations, unless --background is given.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from fastav.core.errors import UserError, did_you_mean
from fastav.core.regular_file import check_regular
from fastav.data.clip import Clip
from fastav.data.manifest import Problem
from fastav.datasets.clip_list import ClipList
from fastav.datasets.splits import HoldOut
from fastav.datasets.suffixes import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from fastav.datasets.tables import read_table

METRIC = "none published: top-1 accuracy with one label per clip, mAP with several"
LABEL_COLUMNS = ("Species", "Annotation", "Label", "Common Name", "Species Code", "Class")
"""Common label columns of Raven tables; the first one that a table has is used."""

TABLE_SUFFIXES = (".txt", ".tsv")
DEFAULT_MIN_OVERLAP = 0.5
LONGEST_REMAINDER_S = 0.1
"""Longest remainder of a recording that gets no window of its own, in seconds; shorter than annotated calls."""

_TIMES = ("Begin Time (s)", "End Time (s)")
_ENDINGS = re.compile(r"(\.(table(\.\d+)?|selections?|birdnet|results|labels?|annotations?))+$", re.IGNORECASE)
_ROUNDING_S = 1e-6


@dataclass(frozen=True, slots=True)
class Annotation:
    """A labelled span of a recording, in seconds from its start; may have zero length or an empty label."""

    begin_s: float
    end_s: float
    label: str
    table: Path
    line: int


@dataclass(frozen=True, slots=True)
class Windows:
    """How recordings are cut: windows of `window_s` seconds every `hop_s` seconds.

    Attributes:
        window_s: Length of a window in seconds.
        hop_s: Distance between the starts of windows in seconds.
        share: Fraction of the overlap rule; see the module.
        background: Class of windows without annotations; empty to leave them out.
    """

    window_s: float
    hop_s: float
    share: float
    background: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this kind."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder with the tables, or a single table")
    parser.add_argument(
        "--media-root",
        metavar="FOLDER",
        type=Path,
        help="folder with the recordings, searched with its subfolders; ROOT by default",
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        default="",
        help=f"label column of Raven tables; by default the first existing one of\n{', '.join(LABEL_COLUMNS)}",
    )
    parser.add_argument(
        "--label", metavar="NAME", default="", help="label of annotations without a label, and of tables without labels"
    )
    parser.add_argument("--window-s", type=float, metavar="S", help="cut recordings into windows of S seconds")
    parser.add_argument(
        "--hop-s",
        type=float,
        metavar="S",
        help="start a window every S seconds; by default end to end, without overlap",
    )
    parser.add_argument(
        "--min-overlap",
        type=float,
        metavar="F",
        help=f"fraction of the overlap rule, above 0 and at most 1; {DEFAULT_MIN_OVERLAP} by default with --window-s",
    )
    parser.add_argument(
        "--background",
        metavar="NAME",
        default="",
        help="class of windows without annotations; by default they are left out",
    )
    parser.add_argument(
        "--hold-out",
        default="none",
        metavar="RULE",
        help="which recordings go to the test split: none (default), or fraction:F: that fraction of the recordings,\n"
        "chosen by a hash of the name; each class keeps at least one in train",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the annotations as clips, or with `--window-s` the recordings to cut into windows.

    Raises:
        UserError: A table is missing or malformed, no recording exists, or the options contradict each other.
    """
    rule, share, held_out = _options(args)
    root = Path(args.root)
    tables = _tables(root)
    folder = root if root.is_dir() else root.parent
    media_root = Path(args.media_root or folder)
    found = _Annotations(_Recordings(folder, media_root))
    for table in tables:
        found.read(table, args.label_column, args.label)
    found.report_unannotated(tables)
    if rule is None:
        clips = found.clips(share)
    else:
        clips = found.whole_recordings(with_empty=bool(rule.background))
    if not clips:
        first = f"; the first problem: {found.problems[0].message}" if found.problems else ""
        raise UserError(f"{root}: no annotations that could become clips in {len(tables)} tables{first}")
    if held_out:
        hold_out(clips, fraction=held_out)  # checks the rule now rather than after probing
    rule_text = _describe(rule, share)
    return ClipList(
        clips,
        found.problems,
        [*found.notes, rule_text],
        cut=None if rule is None else partial(_cut, annotations=found.by_id(), rule=rule),
        split=partial(hold_out, fraction=held_out) if held_out else None,
        metadata={
            "source": "fastav index annotations",
            "root": str(root),
            "media_root": str(media_root),
            "label_column": args.label_column,
            "label": args.label,
            "hold_out": args.hold_out,
            "rule": rule_text,
            "metric": METRIC,
        },
    )


def _options(args: argparse.Namespace) -> tuple[Windows | None, float | None, float]:
    """Returns the windows (None: no cutting), the fraction of the overlap rule and the fraction to hold out."""
    for name, value in (("--window-s", args.window_s), ("--hop-s", args.hop_s), ("--min-overlap", args.min_overlap)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} {value}: expected a number above 0")
    if args.min_overlap is not None and args.min_overlap > 1:
        raise UserError(f"--min-overlap {args.min_overlap}: expected a fraction of at most 1")
    held_out = HoldOut.parse(args.hold_out)
    if held_out.kind == "every":
        raise UserError(
            f'--hold-out "{args.hold_out}": would put parts of a recording in both splits; use none or fraction:F'
        )
    if args.window_s is None:
        for name, value in (("--hop-s", args.hop_s), ("--background", args.background)):
            if value:
                raise UserError(f"{name} {value}: needs --window-s")
        return None, args.min_overlap, held_out.number
    hop_s = args.window_s if args.hop_s is None else args.hop_s
    if hop_s > args.window_s:
        raise UserError(f"--hop-s {hop_s}: leaves gaps between windows; expected at most --window-s {args.window_s}")
    share = DEFAULT_MIN_OVERLAP if args.min_overlap is None else args.min_overlap
    return Windows(args.window_s, hop_s, share, args.background), share, held_out.number


def _describe(rule: Windows | None, share: float | None) -> str:
    """Describes the clips and how they get their labels, for the notes and the metadata."""
    if rule is None:
        other = "" if share is None else f", and the labels of all {_describe_overlap(share, 'clip')}"
        return f"each annotation is a clip with its label{other}"
    empty = f'are of class "{rule.background}"' if rule.background else "are left out"
    return (
        f"windows of {rule.window_s:g} s every {rule.hop_s:g} s with the labels of all "
        f"{_describe_overlap(rule.share, 'window')}; windows without annotations {empty}"
    )


def _describe_overlap(share: float, what: str) -> str:
    return f"annotations with at least {share:g} of their length in the {what}, or that cover at least {share:g} of it"


def _tables(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.glob("*")]) if root.parent.is_dir() else ""
        raise UserError(f"{root}: no such file or folder{near}")
    found = [path for path in _walk(root) if path.suffix.lower() in TABLE_SUFFIXES]
    if not found:
        raise UserError(
            f"{root}: no tables in this folder or its subfolders; expected Raven or Audacity files "
            f"({', '.join(TABLE_SUFFIXES)})"
        )
    return found


def _walk(root: Path) -> list[Path]:
    """Returns the files of a folder and its subfolders, sorted, without hidden ones; visits linked folders once."""
    found, visited = [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        below[:] = [] if real in visited else sorted(name for name in below if not name.startswith("."))
        found += [Path(folder) / name for name in names if not name.startswith(".") and real not in visited]
        visited.add(real)
    return sorted(found)


def read_text(path: Path) -> tuple[str, bool]:
    """Reads text in UTF-8, in UTF-16 or else in Windows-1252; returns it and whether it had to assume the last.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        check_regular(path)
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return data.decode("utf-16" if wide else "utf-8-sig"), False
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace"), True


def _lines(text: str) -> list[str]:
    return list(io.StringIO(text, newline=None))


def table_kind(text: str) -> str:
    """Returns `raven`, `audacity`, `empty` for an empty text, or an empty string for any other text."""
    first = next((line for line in _lines(text) if line.strip()), "")
    fields = [value.strip().casefold() for value in first.split("\t")]
    if not first:
        return "empty"
    if {"begin time (s)", "end time (s)"} & set(fields) or {"selection", "view"} <= set(fields):
        return "raven"
    return "audacity" if len(fields) > 1 and all(_seconds(value) is not None for value in fields[:2]) else ""


def _seconds(text: str) -> float | None:
    """Parses a finite number, also with a decimal comma; returns None for anything else."""
    try:
        value = float(text.strip() if "." in text else text.strip().replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_raven(text: str, path: Path, label_column: str = "", label: str = "") -> Iterator[tuple[str, Annotation]]:
    """Reads a Raven selection table.

    Args:
        text: Content of the table.
        path: File of the table, for messages.
        label_column: Label column; by default the first existing one of `LABEL_COLUMNS`.
        label: Label to use if the label is empty or the column does not exist.

    Yields:
        The name of the recording in the table (empty if the table has none), and the annotation.

    Raises:
        UserError: A column is missing, or a time is not a number.
    """
    lines = _lines(text)
    header = next(line for line in lines if line.strip()).rstrip("\r\n").split("\t")
    column = label_column or _label_column(header)
    if not column and not label:
        named = ", ".join(name.strip() for name in header if name.strip())
        raise UserError(f"{path}: no label column; use --label-column with one of {named}, or --label NAME")
    required = [*_TIMES, *([column] if column else [])]
    for at, row in read_table(path, lines=lines, delimiter="\t", required=required, quoted=False, ragged=True):
        name = row.get("Begin Path", "").strip() or row.get("Begin File", "").strip()
        begin_s, end_s = (_time(row[key], key, path, at) for key in _TIMES)
        if name and (offset := row.get("File Offset (s)", "").strip()):
            offset_s = _time(offset, "File Offset (s)", path, at)
            begin_s, end_s = offset_s, offset_s + end_s - begin_s
        yield name, Annotation(begin_s, end_s, row.get(column, "").strip() or label, path, at)


def _label_column(header: Sequence[str]) -> str:
    names = {name.strip().casefold() for name in header}
    return next((column for column in LABEL_COLUMNS if column.casefold() in names), "")


def _time(text: str, column: str, path: Path, line: int) -> float:
    value = _seconds(text)
    if value is None:
        raise UserError(f'{path}, line {line}: {column} = "{text.strip()}": expected seconds')
    return value


def read_audacity(text: str, path: Path, label: str = "") -> Iterator[Annotation]:
    """Reads an Audacity label file; skips lines with the frequencies of a label (they start with a backslash).

    Raises:
        UserError: A line is not start, end and label.
    """
    for at, line in enumerate(_lines(text), 1):
        if not line.strip() or line.startswith("\\"):
            continue
        fields = line.rstrip("\r\n").split("\t")
        times = [_seconds(value) for value in fields[:2]]
        if len(times) < 2 or times[0] is None or times[1] is None:
            where = f"{path}, line {at}"
            raise UserError(f'{where}: "{line.strip()[:80]}": expected start, end and label, separated by tabs')
        yield Annotation(times[0], times[1], " ".join(fields[2:]).strip() or label, path, at)


class _Recordings:
    """Finds the recording of a table among the media files of a folder."""

    def __init__(self, root: Path, media_root: Path) -> None:
        if not media_root.is_dir():
            known = [p.name for p in media_root.parent.glob("*/")] if media_root.parent.is_dir() else []
            raise UserError(f"--media-root {media_root}: no such folder{did_you_mean(media_root.name, known)}")
        self.root, self.media_root = root, media_root
        self.files = [path for path in _walk(media_root) if path.suffix.lower() in AUDIO_SUFFIXES | VIDEO_SUFFIXES]
        self._named: dict[str, list[Path]] = defaultdict(list)
        for path in self.files:
            self._named[path.name.casefold()].append(path)
            self._named[path.stem.casefold()].append(path)

    def id(self, path: Path) -> str:
        return path.relative_to(self.media_root).as_posix()

    def find(self, table: Path, name: str = "") -> Path | Problem:
        """Returns the file that the name (of Begin Path or Begin File) or the table refers to, or a problem."""
        if name:
            parts = PureWindowsPath(name).parts  # accepts both kinds of slashes
            wanted = [parts[-1], PurePosixPath(parts[-1]).stem] if parts else []
        else:
            stem = table.stem
            parts, wanted = (), list(dict.fromkeys((stem, _ENDINGS.sub("", stem))))
        for one in wanted:
            if paths := self._named.get(one.casefold()):
                paths = self._narrowed(paths, one, parts, table)
                if len(paths) == 1:
                    return paths[0]
                files = " or ".join(map(str, paths[:3]))
                return Problem(
                    "ambiguous_recording", "", str(table), f"{table}: its recording could be {files}; left out", False
                )
        expected = self.media_root / (wanted[0] if name and wanted else f"{wanted[-1] if wanted else name}.*")
        message = f"{table}: no recording {expected.name} in {self.media_root} or its subfolders"
        return Problem("missing_file", "", str(expected), message, False)

    def _narrowed(self, paths: list[Path], name: str, parts: Sequence[str], table: Path) -> list[Path]:
        """Narrows files of one name down by case of the name, by path, and by the table's folder."""
        paths = [p for p in paths if name in (p.name, p.stem)] or paths
        if len(parts) > 1:
            depth = {p: _shared_end(p.parts, parts) for p in paths}
            paths = [p for p in paths if depth[p] == max(depth.values())]
        inner = table.parent.relative_to(self.root)
        return [p for p in paths if p.parent in (self.media_root / inner, table.parent)] or paths


def _shared_end(one: Sequence[str], two: Sequence[str]) -> int:
    """Returns the number of equal parts at the end of two paths."""
    pairs = zip(reversed(one), reversed(two), strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a.casefold() != b.casefold()), min(len(one), len(two)))


@dataclass
class _Annotations:
    """Collects the annotations of each recording from all tables."""

    recordings: _Recordings
    annotations: dict[Path, dict[tuple[float, float, str], Annotation]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_repeated: int = 0

    def read(self, table: Path, label_column: str, label: str) -> None:
        """Adds the annotations of one table."""
        text, guessed = read_text(table)
        kind = table_kind(text)
        if kind in ("", "empty") and (not kind or isinstance(self.recordings.find(table), Problem)):
            message = f"{table}: neither a Raven nor an Audacity table; left out"
            self.problems.append(Problem("not_annotations", "", str(table), message, False))
            return
        if guessed:
            self.notes.append(f"{table}: neither UTF-8 nor UTF-16; read as Windows-1252")
        found = read_raven(text, table, label_column, label) if kind == "raven" else (
            ("", annotation) for annotation in read_audacity(text, table, label)
        )  # fmt: skip
        by_name: dict[str, list[Annotation]] = defaultdict(list)
        for name, annotation in found:
            by_name[name].append(annotation)
        for name, named in by_name.items() or [("", [])]:
            path = self.recordings.find(table, name)
            if isinstance(path, Problem):
                self.problems.append(replace(path, message=f"{path.message} ({len(named)} annotations)"))
                continue
            known = self.annotations.setdefault(path, {})
            for annotation in named:
                self._add(annotation, known, path)

    def _add(self, one: Annotation, known: dict[tuple[float, float, str], Annotation], path: Path) -> None:
        where, span = f"{one.table}, line {one.line}", f"{one.begin_s:g} s to {one.end_s:g} s"
        clip_id = self.recordings.id(path)
        if not 0 <= one.begin_s <= one.end_s:
            message = f"{where}: {span} is not a valid span; left out"
            self.problems.append(Problem("bad_span", clip_id, str(path), message, False))
            return
        # A table with two views, or two channels, lists each annotation twice.
        key = (round(one.begin_s, 6), round(one.end_s, 6), one.label)
        self.num_repeated += key in known
        if key not in known and not one.label:
            message = f"{where}: {span} has no label; give it one, or use --label NAME"
            self.problems.append(Problem("no_label", clip_id, str(path), message, False))
        known.setdefault(key, one)

    def report_unannotated(self, tables: Collection[Path]) -> None:
        """Adds a problem for each recording without a table, and notes."""
        for path in self.recordings.files:
            if path not in self.annotations:
                message = f"{path}: none of the {len(tables)} tables annotates this recording; left out"
                self.problems.append(Problem("no_table", self.recordings.id(path), str(path), message, False))
        if self.num_repeated:
            self.notes.append(f"{self.num_repeated} repeated annotations, each used once")

    def in_order(self, path: Path) -> list[Annotation]:
        """Returns the annotations of a recording in order of time."""
        return sorted(self.annotations[path].values(), key=lambda one: (one.begin_s, one.end_s, one.label))

    def by_id(self) -> dict[str, list[Annotation]]:
        """Returns clip id of a whole recording -> its annotations."""
        return {self.recordings.id(path): self.in_order(path) for path in self.annotations}

    def whole_recordings(self, *, with_empty: bool) -> list[Clip]:
        """Returns whole recordings to cut, with all their labels; with `with_empty` also those without labels."""
        clips = []
        for path in sorted(self.annotations):
            labels = tuple(dict.fromkeys(one.label for one in self.in_order(path) if one.label))
            if labels or with_empty:
                clips.append(self._clip(path, labels))
        return clips

    def clips(self, share: float | None) -> list[Clip]:
        """Returns a clip for each annotation with a label and a length."""
        clips = []
        for path in sorted(self.annotations):
            every = self.in_order(path)
            for number, one in enumerate(every):
                whole = self._clip(path, (one.label,))
                if one.end_s == one.begin_s:
                    where = f"{one.table}, line {one.line}"
                    message = f"{where}: the annotation at {one.begin_s:g} s has zero length; use --window-s"
                    self.problems.append(Problem("bad_span", whole.id, str(path), message, False))
                elif one.label:
                    others = [] if share is None else _labels(every, one.begin_s, one.end_s, share)
                    labels = tuple(dict.fromkeys((one.label, *others)))
                    clips.append(_part(whole, f"#{number}", one.begin_s, one.end_s, labels))
        return clips

    def _clip(self, path: Path, labels: tuple[str, ...]) -> Clip:
        name = self.recordings.id(path)
        video = path if path.suffix.lower() in VIDEO_SUFFIXES else None
        group = PurePosixPath(name).with_suffix("").as_posix()
        return Clip(name, video=video, audio=path, labels=labels, group=group)


def _part(clip: Clip, name: str, begin_s: float, end_s: float, labels: Sequence[str]) -> Clip:
    """Returns a span of a clip as a clip; times are in seconds from the clip's start."""
    return replace(
        clip,
        id=f"{clip.id}{name}",
        start_s=clip.start_s + begin_s,
        duration_s=end_s - begin_s,
        labels=tuple(labels),
    )


def _labels(annotations: Sequence[Annotation], begin_s: float, end_s: float, share: float) -> list[str]:
    """Returns the labels of a span by the overlap rule, each once, in order of time."""
    labels = [one.label for one in annotations if one.label and _overlaps(one, begin_s, end_s, share)]
    return list(dict.fromkeys(labels))


def _overlaps(one: Annotation, begin_s: float, end_s: float, share: float) -> bool:
    """Applies the overlap rule: `share` of the annotation is in the span, or `share` of the span in the annotation."""
    if one.end_s == one.begin_s:
        return begin_s <= one.begin_s < end_s
    shorter_s = min(one.end_s - one.begin_s, end_s - begin_s)
    return _shared_s(one, begin_s, end_s) >= share * shorter_s - _ROUNDING_S


def _shared_s(one: Annotation, begin_s: float, end_s: float) -> float:
    return min(one.end_s, end_s) - max(one.begin_s, begin_s)


def window_starts(duration_s: float, window_s: float, hop_s: float) -> list[float]:
    """Returns the starts of the windows of a recording in seconds; the last window ends at the end of the recording.

    A recording shorter than a window gets one window at 0. A remainder of `LONGEST_REMAINDER_S` or less gets no window
    of its own, as file formats round the length of a recording up.
    """
    if duration_s <= window_s + LONGEST_REMAINDER_S:
        return [0.0]
    num = math.floor((duration_s - window_s) / hop_s + _ROUNDING_S) + 1
    found = [k * hop_s for k in range(num)]
    if duration_s - (found[-1] + window_s) > LONGEST_REMAINDER_S:
        found.append(duration_s - window_s)
    return found


def _cut(clip: Clip, *, annotations: Mapping[str, Sequence[Annotation]], rule: Windows) -> list[Clip]:
    return cut(clip, annotations[clip.id], rule)


def cut(clip: Clip, annotations: Sequence[Annotation], rule: Windows) -> list[Clip]:
    """Cuts a probed recording into labelled windows, whose ids end with their numbers from 0; see the module.

    The annotations must be in order of time. An annotation that starts after the end of the recording becomes a clip
    of its own span, which `fastav index` then reports as outside the file.
    """
    made = []
    begins = [one.begin_s for one in annotations]
    longest_s = max((one.end_s - one.begin_s for one in annotations), default=0.0)
    for number, start_s in enumerate(window_starts(clip.duration_s, rule.window_s, rule.hop_s)):
        end_s = min(start_s + rule.window_s, clip.duration_s)
        near = annotations[bisect_left(begins, start_s - longest_s) : bisect_left(begins, end_s)]
        touched = any(
            _shared_s(one, start_s, end_s) > _ROUNDING_S or _overlaps(one, start_s, end_s, 1.0) for one in near
        )
        labels = _labels(near, start_s, end_s, rule.share)
        if not touched and rule.background:
            labels = [rule.background]
        if labels:
            made.append(_part(clip, f"#{number}", start_s, end_s, labels))
    for one in annotations[bisect_left(begins, clip.duration_s) :]:
        end_s = max(one.end_s, one.begin_s + _ROUNDING_S)
        made.append(_part(clip, f", {one.table.name} line {one.line}", one.begin_s, end_s, [one.label]))
    return made


def hold_out(clips: Sequence[Clip], *, fraction: float) -> list[Clip]:
    """Moves a fraction of the recordings (rounded, at least one) to the test split; see `--hold-out`.

    Recordings are chosen in the order of a hash of their names. A recording that is the last one in train of one of
    its classes stays there, so fewer recordings may be moved.

    Raises:
        UserError: No recording can be moved.
    """
    classes: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        classes[clip.group].update(clip.labels)
    left = Counter(name for names in classes.values() for name in names)
    wanted = max(1, math.floor(fraction * len(classes) + 0.5))
    taken: set[str] = set()
    for group in sorted(classes, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()):
        if len(taken) < min(wanted, len(classes) - 1) and all(left[name] > 1 for name in classes[group]):
            taken.add(group)
            left.subtract(classes[group])
    if not taken:
        raise UserError(
            f"--hold-out fraction:{fraction:g}: each of the {len(classes)} recordings is the only one of some class; "
            "expected several recordings per class, or --hold-out none"
        )
    return [replace(clip, split="test") if clip.group in taken else clip for clip in clips]
