"""Shared code of the data sets made of YouTube clips: finds the media files of table rows and makes clips of them.

The media are not published with the tables. So their names follow several conventions (see `file_names`), they may be
in any folder, and some of them are always missing.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.data.manifest import Problem
from fastav.datasets.clip_list import ClipList
from fastav.datasets.suffixes import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from fastav.datasets.tables import at_line, missing_file

Media = Literal["trimmed", "whole"]

_VIDEO, _AUDIO = 0, 1


@dataclass(frozen=True, slots=True)
class YoutubeRow:
    """A row of a table, before its media file is searched.

    Attributes:
        id: Id of the clip.
        video_id: YouTube id of the video.
        start_s: Start of the clip in the YouTube video, seconds.
        end_s: End of the clip in the YouTube video, seconds.
        labels: Class names.
        split: Published split.
        table: File that has the row.
        line: Line number in that file.
        names: File names without suffix that the data set itself uses for trimmed clips; tried before the general ones.
    """

    id: str
    video_id: str
    start_s: float
    end_s: float
    labels: tuple[str, ...]
    split: str
    table: Path
    line: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundRows:
    """Rows whose media files exist.

    Attributes:
        rows: The rows.
        clips: One clip per row: the whole file if it is a trimmed clip, otherwise the clip's span of the file.
        problems: Rows that were left out, and why.
        notes: Lines to print after indexing.
    """

    rows: list[YoutubeRow]
    clips: list[Clip]
    problems: list[Problem]
    notes: list[str]

    def clip_list(
        self,
        metadata: dict[str, str],
        *,
        clips: Sequence[Clip] | None = None,
        problems: Sequence[Problem] = (),
        notes: Sequence[str] = (),
    ) -> ClipList:
        """Returns the clip list of a data set with published splits.

        Args:
            metadata: See `ClipList`.
            clips: Clips to list instead of the found ones, such as their seconds.
            problems: Earlier problems, listed first.
            notes: Earlier notes, listed first.
        """
        return ClipList(
            self.clips if clips is None else clips,
            [*problems, *self.problems],
            [*notes, *self.notes],
            published_splits=True,
            metadata=metadata,
        )


def add_arguments(parser: argparse.ArgumentParser, *, tables: str, media: bool = True) -> None:
    """Adds the shared options of these data sets.

    Args:
        parser: Parser of the data set's options.
        tables: The files in ROOT, for the help text.
        media: Whether to add `--media`, for data sets whose tables have the span of a clip in its YouTube video.
    """
    parser.add_argument("root", metavar="ROOT", type=Path, help=f"folder with {tables}")
    parser.add_argument(
        "--media-root",
        metavar="FOLDER",
        type=Path,
        help="folder with the media files, searched with its subfolders; ROOT by default",
    )
    if media:
        parser.add_argument(
            "--media",
            choices=("trimmed", "whole"),
            default="trimmed",
            help="content of a media file. trimmed (default): the clip only. whole: the whole YouTube video (ID.mp4),\n"
            "of which the clip is the seconds given in the table",
        )


def table_in(root: Path, names: Sequence[str]) -> Path | None:
    """Returns the first of `names` that is a file in ROOT, or None."""
    return next((root / name for name in names if (root / name).is_file()), None)


def file_names(row: YoutubeRow, media: Media, *, alone: bool) -> list[str]:
    """Returns the names without suffix that the media file of a row may have, the most likely first.

    A trimmed clip of the seconds 30 to 40 of the video ID may be named: ID_000030, ID_000030_000040, ID_30000_40000
    (milliseconds), ID_30_40, ID_30.000_40.000, ID_30.0_40.0, ID_30000, ID_30, ID_30.000, ID_30.0, and ID if it is the
    only clip of the video. AudioSet's audio files often have the prefix Y.

    Args:
        row: The row.
        media: Content of a media file: a trimmed clip, or a whole YouTube video.
        alone: Whether the table has no other clip of this video, so that its id identifies the clip.
    """
    if media == "whole":
        return [row.video_id, f"Y{row.video_id}"]
    start_s, end_s = row.start_s, row.end_s
    start_ms, end_ms = round(start_s * 1000), round(end_s * 1000)
    tails = [f"{start_ms}_{end_ms}", f"{start_s:.3f}_{end_s:.3f}", f"{start_s}_{end_s}"]
    tails += [f"{start_ms}", f"{start_s:.3f}", f"{start_s}"]
    if start_ms % 1000 == 0 and end_ms % 1000 == 0:
        start, end = start_ms // 1000, end_ms // 1000
        tails = [f"{start:06d}", f"{start:06d}_{end:06d}", *tails, f"{start}_{end}", f"{start}"]
    plain = [f"{row.video_id}_{tail}" for tail in tails] + ([row.video_id] if alone else [])
    return list(dict.fromkeys([*row.names, *plain, *(f"Y{name}" for name in plain)]))


def find(rows: Sequence[YoutubeRow], folder: Path, media: Media = "trimmed") -> FoundRows:
    """Finds the media files of rows in a folder and its subfolders, and makes clips of them.

    The case of suffixes does not matter. An audio file with the same name as a video is used as the clip's audio. The
    group of a clip is its YouTube id, so that `check` reports videos in two splits. Of equal rows the first is kept;
    different rows with the same id get different ids.

    Args:
        rows: Rows of the tables.
        folder: Folder to search.
        media: Content of a media file: a trimmed clip, or a whole YouTube video.

    Raises:
        UserError: The folder does not exist, or has no media file of any row.
    """
    if not folder.is_dir():
        near = did_you_mean(folder.name, [p.name for p in folder.parent.glob("*/")]) if folder.parent.is_dir() else ""
        reason = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {reason}; expected a folder with media files{near}")
    rows, problems = _distinct(rows)
    times = Counter(row.video_id for row in rows)
    files, extra_files = _media_files(folder, problems)
    found = FoundRows([], [], problems, [])
    num_missing = num_by_id = 0
    for row in rows:
        names = file_names(row, media, alone=times[row.video_id] == 1)
        name = next((name for name in names if name in files), None)
        if name is not None:
            video, audio = files[name]
            found.rows.append(row)
            found.clips.append(_clip(row, video, audio or video, media))
            num_by_id += media == "trimmed" and name in (row.video_id, f"Y{row.video_id}") and name not in row.names
            problems += [
                Problem("several_files", row.id, str(other), f"{other}: left out, as {taken} has the same name", False)
                for taken, other in extra_files.pop(name, ())
            ]
            continue
        num_missing += 1
        if row.video_id in files:
            message = f"{files[row.video_id][_VIDEO] or files[row.video_id][_AUDIO]}: could be any of the "
            message += f"{times[row.video_id]} clips of this video; expected a name such as {names[0]}"
            problems.append(Problem("missing_file", row.id, str(folder / names[0]), message, False))
        else:
            problems.append(missing_file(row.id, folder / f"{names[0]}.*", row.table, row.line))
    if not found.rows:
        raise UserError(_nothing_found(rows, folder, media, files))
    if num_missing:
        found.notes.append(f"{num_missing} of {len(rows)} clips have no file in {folder}")
    if num_by_id:
        found.notes.append(
            f"{num_by_id} files are named by the YouTube id alone and treated as trimmed clips; if they are whole "
            "videos, use --media whole"
        )
    return found


def _nothing_found(rows: Sequence[YoutubeRow], folder: Path, media: Media, files: Collection[str]) -> str:
    if not rows:
        return f"{folder}: the tables list no clips; expected at least one"
    names = ", ".join(file_names(rows[0], media, alone=True)[:4])
    first = min(files, default="").encode("utf-8", "backslashreplace").decode()
    content = f'it has {len(files)} media files, such as "{first}"' if files else "it has no media files"
    hint = "; for untrimmed videos use --media whole" if any(row.video_id in files for row in rows) else ""
    what = f'no media file of any of the {len(rows)} clips; expected names such as {names} for "{rows[0].id}"'
    return f"{folder}: {what}; {content}{hint}"


def _clip(row: YoutubeRow, video: Path | None, audio: Path | None, media: Media) -> Clip:
    span = (row.start_s, row.end_s - row.start_s) if media == "whole" else (0.0, 0.0)
    return Clip(
        id=row.id,
        video=video,
        audio=audio,
        start_s=span[0],
        duration_s=span[1],
        labels=row.labels,
        split=row.split,
        group=row.video_id,
    )


def one_second(clip: Clip, number: int, labels: Iterable[str]) -> Clip:
    """Returns second `number` of a clip, counted from 0, as a row of its own."""
    return replace(clip, id=f"{clip.id}@{number}", start_s=clip.start_s + number, duration_s=1.0, labels=tuple(labels))


def _distinct(rows: Iterable[YoutubeRow]) -> tuple[list[YoutubeRow], list[Problem]]:
    """Drops repeated rows, and gives different rows with the same id different ids."""
    kept: list[YoutubeRow] = []
    problems = []
    by_id: dict[str, set[tuple[tuple[str, ...], str]]] = {}
    for row in rows:
        known = by_id.setdefault(row.id, set())
        content = (row.labels, row.split)
        if content in known:
            message = f'{at_line(row.table, row.line)}: clip "{row.id}" is already listed; left out'
            problems.append(Problem("duplicate_row", row.id, str(row.table), message, False))
            continue
        kept.append(replace(row, id=f"{row.id}#{len(known)}") if known else row)
        known.add(content)
    return kept, problems


Pair = tuple[Path | None, Path | None]


def _media_files(folder: Path, problems: list[Problem]) -> tuple[dict[str, Pair], dict[str, list[tuple[Path, Path]]]]:
    """Returns name without suffix -> video and audio file of a folder, and the extra files of the same name.

    A folder whose name is not UTF-8 cannot be stored in a manifest; it is left out and added to `problems`.
    """
    files: dict[str, Pair] = {}
    extra_files: dict[str, list[tuple[Path, Path]]] = {}
    visited = set()
    for at, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        below[:] = [] if real in visited else sorted(name for name in below if not name.startswith("."))
        if real in visited:
            continue
        visited.add(real)
        if (shown := at.encode("utf-8", "backslashreplace").decode()) != at:
            problems.append(Problem("bad_name", "", shown, f"{shown}: the name is not UTF-8; rename it", False))
            below.clear()
            continue
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122  building a Path for each of a million names is slow
            kind = _VIDEO if suffix.lower() in VIDEO_SUFFIXES else _AUDIO
            if name.startswith(".") or (kind == _AUDIO and suffix.lower() not in AUDIO_SUFFIXES):
                continue
            path, pair = Path(at, name), files.get(stem, (None, None))
            if (taken := pair[kind]) is not None:
                extra_files.setdefault(stem, []).append((taken, path))
            else:
                files[stem] = (path, pair[_AUDIO]) if kind == _VIDEO else (pair[_VIDEO], path)
    return files, extra_files
