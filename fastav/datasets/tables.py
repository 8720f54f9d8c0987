"""Reading what data sets publish: tables with or without a header, and the media files that they name."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.data.manifest import Problem

NOWHERE = frozenset(("", "nan", "null", "none", "na", "n/a"))
"""How tables say that a number is not known, in lower case."""


def read_table(
    path: Path,
    *,
    delimiter: str = ",",
    header: Sequence[str] | None = None,
    required: Sequence[str] = (),
    aliases: Mapping[str, Sequence[str]] | None = None,
    comment: str = "",
    skip_initial_space: bool = False,
    quoted: bool = True,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Reads a table of text (UTF-8, with or without a mark) row by row; empty lines are skipped.

    Column names are taken without spaces around them and, where none fits as it is spelt, whatever their case. A
    column without a name (the row numbers that pandas writes) is left out.

    Args:
        path: The file.
        delimiter: One character.
        header: The columns of a file without a header line; a first line that holds these very names is no row.
        required: Columns that must be there.
        aliases: Wanted column -> other spellings of it; it goes by the wanted name in the rows.
        comment: Lines that start with this are left out; none where empty.
        skip_initial_space: Whether spaces after a delimiter are no part of the value.
        quoted: Whether `"a, b"` is one value; where not, quotation marks are characters like others.

    Yields:
        The line (the last one of a row with line breaks in it), from 1, and the row by column.

    Raises:
        UserError: The file cannot be read, lacks a required column, or has a row of another length.
    """
    yield from parse_table(
        _lines(path),
        path,
        delimiter=delimiter,
        header=header,
        required=required,
        aliases=aliases,
        comment=comment,
        skip_initial_space=skip_initial_space,
        quoted=quoted,
    )


def parse_table(
    lines: Iterable[str],
    path: Path,
    *,
    delimiter: str = ",",
    header: Sequence[str] | None = None,
    required: Sequence[str] = (),
    aliases: Mapping[str, Sequence[str]] | None = None,
    comment: str = "",
    skip_initial_space: bool = False,
    quoted: bool = True,
    ragged: bool = False,
) -> Iterator[tuple[int, dict[str, str]]]:
    """As `read_table`, of lines that are read already, with their line ends; `path` is for messages.

    With `ragged` a row may leave its last values out (they are empty then), and end with further empty ones.
    """
    at = 0

    def told() -> Iterator[str]:
        nonlocal at
        for at, line in enumerate(lines, 1):  # noqa: B007  the line reached is wanted outside
            if line.strip() and not (comment and line.startswith(comment)):
                yield line

    reader = csv.reader(
        told(),
        delimiter=delimiter,
        skipinitialspace=skip_initial_space,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,  # a quotation mark that is never closed would swallow the rest of the file
    )
    columns = None if header is None else list(header)
    first = True
    try:
        for fields in reader:
            if columns is None:
                columns = _columns(fields, path, at, required, aliases or {})
            elif first and header is not None and _plain(fields) == _plain(header):
                pass
            elif len(fields) != len(columns) and not (ragged and not any(fields[len(columns) :])):
                named = ", ".join(columns)
                raise UserError(f"{path}, line {at}: {len(fields)} values, expected {len(columns)} ({named})")
            else:
                values = itertools.chain(fields, itertools.repeat(""))
                yield at, {name: value for name, value in zip(columns, values, strict=False) if name}
            first = False
    except csv.Error as error:
        raise UserError(f"{path}, line {at}: {error}, expected values parted by {delimiter!r}") from None
    if columns is None:
        expected = f"expected a header line with {', '.join(required)}" if required else "expected a header line"
        raise UserError(f"{path}: an empty table, {expected}")


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for at, line in enumerate(file, 1):
                if not line.isascii():
                    _refuse_surrogates(line, path, at)
                yield line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _refuse_surrogates(line: str, path: Path, at: int) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}, line {at}: not UTF-8, expected a table of text in UTF-8") from None


def _plain(fields: Sequence[str]) -> list[str]:
    return [field.strip().casefold() for field in fields]


def _columns(
    fields: Sequence[str], path: Path, at: int, required: Sequence[str], aliases: Mapping[str, Sequence[str]]
) -> list[str]:
    """The header line's names, spelt as wanted."""
    names = ["" if name.strip().startswith("Unnamed: ") else name.strip() for name in fields]
    for wanted in dict.fromkeys((*aliases, *required)):
        spellings = (wanted, *aliases.get(wanted, ()))
        near = [spelling.casefold() for spelling in spellings]
        place = next((names.index(s) for s in spellings if s in names), None)
        if place is None:
            place = next((k for k, name in enumerate(names) if name.casefold() in near), None)
        if place is not None:
            names[place] = wanted
        elif wanted in required:
            hint = did_you_mean(wanted, [name for name in names if name and name not in required])
            raise UserError(f'{path}, line {at}: no column "{wanted}"{hint}')
    twice = next((name for k, name in enumerate(names) if name and name in names[:k]), None)
    if twice is not None:
        raise UserError(f'{path}, line {at}: two columns "{twice}", expected one')
    return names


def number(row: Mapping[str, str], column: str, path: Path, line: int) -> float:
    """The finite number in a column of a row; `UserError` where it is none."""
    value = number_or_nan(row, column, path, line)
    if math.isnan(value):
        raise UserError(f'{path}, line {line}: {column} "{row[column]}", expected a number')
    return value


def number_or_nan(row: Mapping[str, str], column: str, path: Path, line: int) -> float:
    """The number in a column of a row, NaN where the table says that it is not known or lacks the column.

    Raises:
        UserError: Neither a finite number nor one of `NOWHERE`.
    """
    text = row.get(column, "").strip()
    if text.lower() in NOWHERE:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise UserError(f'{path}, line {line}: {column} "{text}", expected a number')
    return value


def find_file(root: Path, names: Sequence[str], what: str) -> Path:
    """The first of `names` (paths from `root`) that is a file.

    Raises:
        UserError: None is; says what was expected, where, and the nearest match, also one folder up or down.
    """
    root = Path(root)
    for name in names:
        if (root / name).is_file():
            return root / name
    if not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.glob("*/")]) if root.parent.is_dir() else ""
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}, expected {what}{near}")
    for other in (root.resolve().parent, *sorted(path for path in root.iterdir() if path.is_dir())):
        if any((other / name).is_file() for name in names):
            raise UserError(f'{root}: no {what}, expected {" or ".join(names)} in it; did you mean "{other}"?')
    parents = {(root / name).parent for name in names} | {root}
    files = [p.relative_to(root).as_posix() for parent in parents if parent.is_dir() for p in parent.iterdir()]
    near = next((hint for name in names if (hint := did_you_mean(name, files)).startswith("; did")), "")
    near = near or did_you_mean(names[0], files)
    raise UserError(f"{root}: no {what}, expected {' or '.join(names)} in it{near}")


class MediaFolders:
    """Finds media files by their stem; each folder is listed once, however many files are asked for.

    The case of a suffix does not matter; that of a stem does, as two YouTube ids may differ in nothing else.
    """

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, str]] = {}

    def find_media(self, folder: Path, stem: str, suffixes: Collection[str]) -> Path | None:
        """The file `stem` with the first of the suffixes (lower case, with their dot) that is in `folder`, or None."""
        names = self.names(Path(folder))
        for suffix in suffixes:
            if (name := names.get(stem + suffix)) is not None:
                return Path(folder) / name
        return None

    def find_name(self, folder: Path, name: str) -> Path | None:
        """The file of that name, which may have folders in it, or None."""
        path = Path(folder) / name
        return self.find_media(path.parent, path.stem, (path.suffix.lower(),))

    def names(self, folder: Path) -> Mapping[str, str]:
        """Stem and lower-case suffix of a folder's files -> their names; nothing for a folder that is not there."""
        if (listed := self._listed.get(folder)) is None:
            listed = self._listed[folder] = {}
            try:
                found = sorted(entry.name for entry in os.scandir(folder))
            except OSError:
                return listed
            for name in found:
                stem, suffix = os.path.splitext(name)  # noqa: PTH122  Path.suffix takes "a." and ".mp4" apart otherwise
                key = stem + suffix.lower()
                listed[key] = name if key == name else listed.get(key, name)
        return listed


def coordinates(latitude: object, longitude: object) -> tuple[float, float]:
    """Degrees north and east; NaN for both unless both are numbers that are on Earth."""
    lat, lon = _degrees(latitude), _degrees(longitude)
    return (lat, lon) if abs(lat) <= 90 and abs(lon) <= 180 else (math.nan, math.nan)


def _degrees(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


def class_order(names: Iterable[str]) -> str:
    """Class names in their published order, as a note to keep with a manifest (JSON)."""
    return json.dumps(list(names), ensure_ascii=False)


class ClipRows:
    """Rows of tables that become clips: takes an id once, and refuses a listing without any clip.

    Attributes:
        clips: The clips taken.
        problems: What was left out, and why.
    """

    def __init__(self) -> None:
        self.clips: list[Clip] = []
        self.problems: list[Problem] = []
        self._places: dict[str, str] = {}

    def add(self, clip: Clip, table: Path, line: int | None = None) -> None:
        """Takes a clip, or leaves it out as a problem of kind `duplicate_row` where its id was taken before."""
        where = at_line(table, line)
        if clip.id in self._places:
            message = f'{where}: clip "{clip.id}" is there already ({self._places[clip.id]}), left out'
            self.problems.append(Problem("duplicate_row", clip.id, clip.source, message, False))
        else:
            self._places[clip.id] = where
            self.clips.append(clip)

    def lose(self, clip_id: str, path: Path, table: Path, line: int | None = None) -> None:
        """Notes that the file of a clip is not there."""
        self.problems.append(missing_file(clip_id, path, table, line))

    def refuse_none(self, what: str) -> None:
        """`UserError` unless there is a clip; `what` names the tables."""
        if self.clips:
            return
        lost = next((p for p in self.problems if p.kind == "missing_file"), None)
        if lost is None:
            raise UserError(f"{what}: no clips in it, expected some")
        raise UserError(f"{what}: none of the files it names is there; the first: {lost.message}")


def at_line(table: Path, line: int | None = None) -> str:
    """Where something is, for messages."""
    return f"{table}, line {line}" if line is not None else str(table)


def missing_file(clip_id: str, path: Path, table: Path, line: int | None = None) -> Problem:
    """The problem of a file that a table names and that is not there."""
    return Problem("missing_file", clip_id, str(path), f"{at_line(table, line)}: {path} is not there", False)
