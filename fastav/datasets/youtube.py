"""What the data sets made of YouTube clips share: how the file of a clip may be named, and clips from rows of a table.

Media come from other hands than the tables, so their names follow several conventions (see `file_names`), they lie in
any folder, and part of them is always gone.
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
from fastav.datasets.folder import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from fastav.datasets.tables import at_line, missing_file

Media = Literal["trimmed", "whole"]

_VIDEO, _AUDIO = 0, 1


@dataclass(frozen=True, slots=True)
class YoutubeRow:
    """A row of a table, before anyone has looked for its file.

    Attributes:
        id: The clip's id.
        video_id: The YouTube id.
        start_s: Where the clip starts in the YouTube video, seconds.
        end_s: Where it ends.
        labels: Its classes.
        split: Its official split.
        table: Where the row is.
        line: Its line there.
        names: Names without suffix that the data set itself uses for trimmed clips; tried before the general ones.
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
    """Rows whose files are there.

    Attributes:
        rows: These rows.
        clips: Their clips, one each: the whole file where it is trimmed, else the span of the clip in it.
        problems: The rows that were left out, and why.
        notes: Lines for the report.
    """

    rows: list[YoutubeRow]
    clips: list[Clip]
    problems: list[Problem]
    notes: list[str]


def add_arguments(parser: argparse.ArgumentParser, *, tables: str) -> None:
    """Adds the options that these data sets share; `tables` says what lies in ROOT."""
    parser.add_argument("root", metavar="ROOT", type=Path, help=f"the folder with {tables}")
    parser.add_argument(
        "--media-root",
        metavar="FOLDER",
        type=Path,
        help="where the media lie, in whatever folders below it; ROOT by default",
    )


def add_media_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--media`, for data sets that know where a clip is in its YouTube video."""
    parser.add_argument(
        "--media",
        choices=("trimmed", "whole"),
        default="trimmed",
        help="what a media file holds. trimmed (default): the clip alone, so the clip is all of its file. whole: the\n"
        "YouTube video (ID.mp4), so the clip is the seconds of it that the table names",
    )


def table_in(root: Path, names: Sequence[str]) -> Path | None:
    """The first of these files in ROOT, None where there is none of them."""
    return next((root / name for name in names if (root / name).is_file()), None)


def file_names(row: YoutubeRow, media: Media, *, alone: bool) -> list[str]:
    """The names without suffix that the file of a row may have, the likeliest first.

    A trimmed clip of the seconds 30 to 40 of a video ID: ID_000030, ID_000030_000040, ID_30000_40000 (milliseconds),
    ID_30_40, ID_30.000_40.000, ID_30.0_40.0, ID_30000, ID_30, ID_30.000, ID_30.0, and ID if it is the video's only
    clip. AudioSet's audio often has a Y before it all.

    Args:
        row: The row.
        media: What the file holds.
        alone: Whether the table has no other clip of this video, so that its id says which it is.
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
    """Finds the files of rows anywhere below a folder, whatever the case of their suffix, and makes clips of them.

    A sound file of the same name as a video is its sound. The clip's group is the YouTube id, so that `check` tells
    of a video in two splits. A row that is there twice is taken once; rows of one id that differ get ids of their own.

    Raises:
        UserError: No such folder, or it holds the file of none of the rows.
    """
    if not folder.is_dir():
        near = did_you_mean(folder.name, [p.name for p in folder.parent.glob("*/")]) if folder.parent.is_dir() else ""
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}, expected media{near}")
    rows, problems = _distinct(rows)
    times = Counter(row.video_id for row in rows)
    files, doubles = _media_files(folder, problems)
    found = FoundRows([], [], problems, [])
    lost = by_id = 0
    for row in rows:
        names = file_names(row, media, alone=times[row.video_id] == 1)
        name = next((name for name in names if name in files), None)
        if name is not None:
            video, audio = files[name]
            found.rows.append(row)
            found.clips.append(_clip(row, video, audio or video, media))
            by_id += media == "trimmed" and name in (row.video_id, f"Y{row.video_id}") and name not in row.names
            problems += [
                Problem("several_files", row.id, str(other), f"{other}: left out, {taken} has the same name", False)
                for taken, other in doubles.pop(name, ())
            ]
            continue
        lost += 1
        if row.video_id in files:
            message = f"{files[row.video_id][_VIDEO] or files[row.video_id][_AUDIO]}: may be any of the "
            message += f"{times[row.video_id]} clips of this video, expected such as {names[0]}"
            problems.append(Problem("missing_file", row.id, str(folder / names[0]), message, False))
        else:
            problems.append(missing_file(row.id, folder / f"{names[0]}.*", row.table, row.line))
    if not found.rows:
        raise UserError(_nothing_found(rows, folder, media, files))
    if lost:
        found.notes.append(f"{lost} of {len(rows)} clips have no file in {folder}")
    if by_id:
        found.notes.append(
            f"{by_id} files are named by the YouTube id alone and taken for trimmed clips; if they are whole videos, "
            "say --media whole"
        )
    return found


def _nothing_found(rows: Sequence[YoutubeRow], folder: Path, media: Media, files: Collection[str]) -> str:
    if not rows:
        return f"{folder}: no rows to find media for, expected a table with some"
    names = ", ".join(file_names(rows[0], media, alone=True)[:4])
    first = min(files, default="").encode("utf-8", "backslashreplace").decode()
    held = f'it holds {len(files)} media files, such as "{first}"' if files else "it holds no media files"
    other = "; for untrimmed videos say --media whole" if any(row.video_id in files for row in rows) else ""
    what = f'the file of none of the {len(rows)} clips, expected such as {names} for "{rows[0].id}"'
    return f"{folder}: {what}; {held}{other}"


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


def second(clip: Clip, number: int, labels: Iterable[str]) -> Clip:
    """One second of a clip, counted from 0, as a row of its own."""
    return replace(clip, id=f"{clip.id}@{number}", start_s=clip.start_s + number, duration_s=1.0, labels=tuple(labels))


def _distinct(rows: Iterable[YoutubeRow]) -> tuple[list[YoutubeRow], list[Problem]]:
    """Takes rows that are the same once, and tells others of the same id apart."""
    kept: list[YoutubeRow] = []
    problems = []
    seen: dict[str, set[tuple[tuple[str, ...], str]]] = {}
    for row in rows:
        known = seen.setdefault(row.id, set())
        content = (row.labels, row.split)
        if content in known:
            message = f'{at_line(row.table, row.line)}: clip "{row.id}" is there already, left out'
            problems.append(Problem("duplicate_row", row.id, str(row.table), message, False))
            continue
        kept.append(replace(row, id=f"{row.id}#{len(known)}") if known else row)
        known.add(content)
    return kept, problems


Pair = tuple[Path | None, Path | None]


def _media_files(folder: Path, problems: list[Problem]) -> tuple[dict[str, Pair], dict[str, list[tuple[Path, Path]]]]:
    """Name without suffix -> video file and sound file below a folder; and what else there is of the same name.

    A folder whose name is not UTF-8 cannot be kept in a manifest; it is left out and added to `problems`.
    """
    files: dict[str, Pair] = {}
    doubles: dict[str, list[tuple[Path, Path]]] = {}
    seen = set()
    for at, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        if (shown := at.encode("utf-8", "backslashreplace").decode()) != at:
            problems.append(Problem("bad_name", "", shown, f"{shown}: the name is not UTF-8, rename it", False))
            below.clear()
            continue
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122  a Path for each of a million names is slow
            kind = _VIDEO if suffix.lower() in VIDEO_SUFFIXES else _AUDIO
            if name.startswith(".") or (kind == _AUDIO and suffix.lower() not in AUDIO_SUFFIXES):
                continue
            path, held = Path(at, name), files.get(stem, (None, None))
            if (taken := held[kind]) is not None:
                doubles.setdefault(stem, []).append((taken, path))
            else:
                files[stem] = (path, held[_AUDIO]) if kind == _VIDEO else (held[_VIDEO], path)
    return files, doubles
