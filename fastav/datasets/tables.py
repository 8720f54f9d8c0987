"""Reads the published tables of data sets, with or without a header, and finds the media files that they name."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fastav.core.errors import UserError, did_you_mean
from fastav.core.regular_file import check_regular
from fastav.data.clip import Clip
from fastav.data.manifest import Problem
from fastav.datasets.clip_list import ClipList

MISSING_VALUES = frozenset(("", "nan", "null", "none", "na", "n/a"))
"""Texts that stand for an unknown number in tables, in lower case."""


def read_table(
    path: Path,
    *,
    lines: Iterable[str] | None = None,
    delimiter: str = ",",
    header: Sequence[str] | None = None,
    required: Sequence[str] = (),
    aliases: Mapping[str, Sequence[str]] | None = None,
    comment: str = "",
    skip_initial_space: bool = False,
    quoted: bool = True,
    ragged: bool = False,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Reads a text table (UTF-8, with or without a byte order mark) row by row; skips empty lines.

    Spaces around column names are ignored. Column names match by case first, then regardless of case. Columns without
    a name (such as the row numbers that pandas writes) are left out.

    Args:
        path: The file.
        lines: Lines of the file with their line ends, if they are already read; `path` is then for messages only.
        delimiter: Character between values.
        header: Column names of a file without a header line. A first line with exactly these names is skipped.
        required: Columns that must exist.
        aliases: Column name to use in the rows -> other spellings of it in the file.
        comment: Prefix of lines to skip; empty for none.
        skip_initial_space: Whether to strip spaces after a delimiter.
        quoted: Whether `"a, b"` is one value; if not, quotation marks are ordinary characters.
        ragged: Whether a row may lack its last values (they become empty) and may end with extra empty values.

    Yields:
        The line number, from 1 (the last line of a row that has line breaks), and the row by column name.

    Raises:
        UserError: The file cannot be read, lacks a required column, or has a row with a wrong number of values.
    """
    at = 0

    def content() -> Iterator[str]:
        nonlocal at
        for at, line in enumerate(_lines(path) if lines is None else lines, 1):  # noqa: B007  used outside
            if line.strip() and not (comment and line.startswith(comment)):
                yield line

    reader = csv.reader(
        content(),
        delimiter=delimiter,
        skipinitialspace=skip_initial_space,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,  # otherwise an unclosed quotation mark would swallow the rest of the file
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
                raise UserError(f"{path}, line {at}: found {len(fields)} values, expected {len(columns)} ({named})")
            else:
                values = itertools.chain(fields, itertools.repeat(""))
                yield at, {name: value for name, value in zip(columns, values, strict=False) if name}
            first = False
    except csv.Error as error:
        raise UserError(f"{path}, line {at}: {error}; expected values separated by {delimiter!r}") from None
    if columns is None:
        expected = f"expected a header line with {', '.join(required)}" if required else "expected a header line"
        raise UserError(f"{path}: the table is empty; {expected}")


def _lines(path: Path) -> Iterator[str]:
    try:
        check_regular(path)
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
        raise UserError(f"{path}, line {at}: not UTF-8; expected a text table in UTF-8") from None


def _plain(fields: Sequence[str]) -> list[str]:
    return [field.strip().casefold() for field in fields]


def _columns(
    fields: Sequence[str], path: Path, at: int, required: Sequence[str], aliases: Mapping[str, Sequence[str]]
) -> list[str]:
    """Returns the names of the header line, with aliases replaced."""
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
        raise UserError(f'{path}, line {at}: column "{twice}" occurs twice, expected once')
    return names


def number(row: Mapping[str, str], column: str, path: Path, line: int) -> float:
    """Returns the finite number in a column of a row; raises `UserError` for anything else."""
    value = number_or_nan(row, column, path, line)
    if math.isnan(value):
        raise UserError(f'{path}, line {line}: {column} = "{row[column]}": expected a number')
    return value


def number_or_nan(row: Mapping[str, str], column: str, path: Path, line: int) -> float:
    """Returns the number in a column of a row; NaN if the value is unknown or the column does not exist.

    Raises:
        UserError: The value is neither a finite number nor one of `MISSING_VALUES`.
    """
    text = row.get(column, "").strip()
    if text.lower() in MISSING_VALUES:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise UserError(f'{path}, line {line}: {column} = "{text}": expected a number')
    return value


def find_file(root: Path, names: Sequence[str], what: str) -> Path:
    """Returns the first of `names` (paths relative to `root`) that is a file.

    Raises:
        UserError: None is a file; the message names the nearest match, also one folder up or down.
    """
    root = Path(root)
    for name in names:
        if (root / name).is_file():
            return root / name
    if not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.glob("*/")]) if root.parent.is_dir() else ""
        reason = "not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {reason}; expected a folder with the {what}{near}")
    for other in (root.resolve().parent, *sorted(path for path in root.iterdir() if path.is_dir())):
        if any((other / name).is_file() for name in names):
            raise UserError(f'{root}: no {what}; expected {" or ".join(names)} in this folder; did you mean "{other}"?')
    parents = {(root / name).parent for name in names} | {root}
    files = [p.relative_to(root).as_posix() for parent in parents if parent.is_dir() for p in parent.iterdir()]
    near = next((hint for name in names if (hint := did_you_mean(name, files)).startswith("; did")), "")
    near = near or did_you_mean(names[0], files)
    raise UserError(f"{root}: no {what}; expected {' or '.join(names)} in this folder{near}")


class MediaFolders:
    """Finds media files by their stem; lists each folder only once.

    The case of a suffix does not matter. The case of a stem does, as two YouTube ids may differ in case only.
    """

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, str]] = {}

    def find_media(self, folder: Path, stem: str, suffixes: Collection[str]) -> Path | None:
        """Returns the file `stem` with the first existing one of the suffixes (lower case, with dot), or None."""
        names = self.names(Path(folder))
        for suffix in suffixes:
            if (name := names.get(stem + suffix)) is not None:
                return Path(folder) / name
        return None

    def names(self, folder: Path) -> Mapping[str, str]:
        """Returns stem + lower-case suffix -> file name for the files of a folder; empty if it does not exist."""
        if (listed := self._listed.get(folder)) is None:
            listed = self._listed[folder] = {}
            try:
                found = sorted(entry.name for entry in os.scandir(folder))
            except OSError:
                return listed
            for name in found:
                stem, suffix = os.path.splitext(name)  # noqa: PTH122  Path.suffix splits "a." and ".mp4" differently
                key = stem + suffix.lower()
                listed[key] = name if key == name else listed.get(key, name)
        return listed


def coordinates(latitude: object, longitude: object) -> tuple[float, float]:
    """Returns degrees north and east; NaN for both unless both are valid coordinates."""
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
    """Returns class names in their published order as JSON, to store in the manifest's metadata."""
    return json.dumps(list(names), ensure_ascii=False)


class ClipRows:
    """Collects the clips of a data set's tables: keeps the first clip of each id and reports the others.

    Attributes:
        clips: The collected clips.
        problems: Rows that were left out, and why.
    """

    def __init__(self) -> None:
        self.clips: list[Clip] = []
        self.problems: list[Problem] = []
        self._places: dict[str, str] = {}

    def add(self, clip: Clip, table: Path, line: int | None = None) -> None:
        """Adds a clip; if its id exists already, adds a problem of kind `duplicate_row` instead."""
        where = at_line(table, line)
        if clip.id in self._places:
            message = f'{where}: clip "{clip.id}" is already listed ({self._places[clip.id]}); left out'
            self.problems.append(Problem("duplicate_row", clip.id, clip.source, message, False))
        else:
            self._places[clip.id] = where
            self.clips.append(clip)

    def add_missing(self, clip_id: str, path: Path, table: Path, line: int | None = None) -> None:
        """Adds a problem: the file of a clip does not exist."""
        self.problems.append(missing_file(clip_id, path, table, line))

    def clip_list(
        self,
        tables: Iterable[Path],
        metadata: dict[str, str],
        *,
        notes: Sequence[str] = (),
        cut: Callable[[Clip], list[Clip]] | None = None,
    ) -> ClipList:
        """Returns the clips as the clip list of a data set with published splits.

        Args:
            tables: The tables that were read, for messages.
            metadata: See `ClipList`.
            notes: See `ClipList`.
            cut: See `ClipList`.

        Raises:
            UserError: There are no clips.
        """
        if not self.clips:
            names = " and ".join(map(str, tables))
            missing = next((p for p in self.problems if p.kind == "missing_file"), None)
            if missing is None:
                raise UserError(f"{names}: contains no clips; expected at least one")
            raise UserError(f"{names}: none of the listed files exists; the first: {missing.message}")
        return ClipList(self.clips, self.problems, notes, cut=cut, published_splits=True, metadata=metadata)


def at_line(table: Path, line: int | None = None) -> str:
    """Returns the place in a table, for messages."""
    return f"{table}, line {line}" if line is not None else str(table)


def missing_file(clip_id: str, path: Path, table: Path, line: int | None = None) -> Problem:
    """Returns the problem that a file named by a table does not exist."""
    return Problem("missing_file", clip_id, str(path), f"{at_line(table, line)}: no such file: {path}", False)
