"""Writes and merges manifests: to temporary files that then replace the old ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastav.core.atomic_files import written_beside
from fastav.core.errors import FastavError, UserError
from fastav.data.clip import Clip
from fastav.data.manifest.reader import Manifest
from fastav.data.manifest.store import PATHS, SCHEMA, ManifestHeader, file_identity, open_parquet, write_copy

Extent = tuple[int, int]
"""Number of frames and of audio samples of a whole media file, 0 if it has none."""

_SPLIT_ORDER = ("train", "val", "test")


def write_manifest(
    path: str | Path,
    clips: Iterable[Clip],
    classes: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    extents: Mapping[Path, Extent] | None = None,
) -> Manifest:
    """Writes a manifest and its Arrow copy, and opens it.

    Rows are sorted by split (train, val, test, then others by name) and keep their order within each. Media paths are
    stored relative to the manifest's folder, unless the two have no common folder. Both files are written under
    temporary names and then replace the old ones.

    Args:
        path: The `.parquet` file.
        clips: The rows; `row` is ignored.
        classes: Class names in the order of their numbers; by default the sorted labels of the clips.
        metadata: Notes to store in the manifest.
        extents: Frames and samples of whole media files, so that `check` can find spans outside their file.

    Raises:
        UserError: There are no clips, or a label is not in `classes`.
        FastavError: The files cannot be written.

    Example:
        >>> clip = Clip("a", audio=Path("a.wav"), duration_s=3.0, num_samples=66_150, labels=("owl",))
        >>> write_manifest("manifest.parquet", [clip]).classes
        ('owl',)
    """
    path = Path(path).absolute()
    table = clips_table(clips, path.parent, extents)
    if not table.num_rows:
        raise UserError(f"{path}: the manifest would have no clips; expected at least one")
    return write_table(path, table, classes, metadata)


def clips_table(clips: Iterable[Clip], folder: Path, extents: Mapping[Path, Extent] | None = None) -> pa.Table:
    """Returns clips as a table with the columns of `SCHEMA` and paths relative to `folder`; see `write_manifest`."""
    rest = iter(clips)
    stored, known = _Stored(folder), {str(Path(k).absolute()): v for k, v in (extents or {}).items()}
    batches = []
    while chunk := list(itertools.islice(rest, 1 << 16)):
        columns: dict[str, list[Any]] = {
            name: [getattr(clip, name) for clip in chunk] for name in SCHEMA.names if name in Clip.__slots__
        }
        for number, name in enumerate(("video", "audio")):
            files = [None if file is None else str(file.absolute()) for file in columns[name]]
            measure = ("media_frames", "media_samples")[number]
            columns[measure] = [known.get(file, (0, 0))[number] if file else 0 for file in files]
        columns |= {name: [stored(file) for file in columns[name]] for name in PATHS}
        columns["shard"] = [stored.shard(name) for name in columns["shard"]]
        batches.append(pa.record_batch([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA)


def write_table(
    path: str | Path,
    table: pa.Table,
    classes: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Manifest:
    """Writes a table with columns of `SCHEMA` (absent columns get their defaults); see `write_manifest`.

    Media paths are stored unchanged: absolute, or relative to the manifest's folder.
    """
    path = Path(path).absolute()
    if path.suffix != ".parquet":
        raise UserError(f'manifest {path}: expected a name that ends in ".parquet"')
    split = table.column("split")
    names = sorted(
        pc.unique(split).to_pylist(),
        key=lambda name: (_SPLIT_ORDER.index(name) if name in _SPLIT_ORDER else len(_SPLIT_ORDER), name),
    )
    ranges, parts, start = {}, [], 0
    for name in names:
        parts.append(table.filter(pc.equal(split, name)))
        ranges[name] = (start, start + parts[-1].num_rows)
        start += parts[-1].num_rows
    if classes is None:
        found = {label for part in parts for label in _unique_labels(part)}
        classes = sorted(found)
    if len(set(classes)) < len(classes):
        raise UserError(f"{path}: a class name is repeated in {sorted(classes)}; expected each once")
    header = ManifestHeader(tuple(classes), ranges, dict(metadata or {}))
    whole = pa.concat_tables(parts).replace_schema_metadata(header.write())
    try:
        with written_beside(path) as beside, written_beside(path.with_suffix(".arrow")) as copy:
            pq.write_table(whole, beside, row_group_size=1 << 17, compression="zstd")
            with beside.open("rb") as file, pa.OSFile(str(copy), "wb") as sink:
                write_copy(path, open_parquet(path, file), sink, file_identity(file))
    except OSError as error:
        raise FastavError(f"cannot write {path}: {error.strerror or error}") from error
    return Manifest.open(path)


def _unique_labels(table: pa.Table) -> list[str]:
    unique = [pc.unique(chunk.flatten()) for chunk in table.column("labels").chunks]
    return pc.unique(pa.chunked_array(unique, pa.string())).to_pylist()


class _Stored:
    """Converts a media path to the text to store: relative to `folder` if the two have a common folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._real = Path(os.path.normpath(folder.absolute())), folder.resolve()
        self._known: dict[Path, str] = {}

    def __call__(self, path: Path | None) -> str | None:
        if path is None:
            return None
        if path not in self._known:
            self._known[path] = self._text(Path(os.path.normpath(path.absolute())))
        return self._known[path]

    def shard(self, name: str) -> str:
        """Converts the path of a shard; a URL stays unchanged."""
        return name if not name or "://" in name else self(Path(name)) or ""

    def _text(self, file: Path) -> str:
        if file.is_relative_to(self._folder):
            return file.relative_to(self._folder).as_posix()
        # Readers start from the real folder, so ".." must count from there, not along symbolic links.
        real = file.parent.resolve() / file.name
        shared = Path(os.path.commonpath([real, self._real]))
        return str(file) if shared == shared.parent else Path(os.path.relpath(real, self._real)).as_posix()


def _moved(text: str, root: Path, stored: _Stored) -> str | None:
    """Converts a stored path of another manifest to one of this manifest; URLs and empty paths stay unchanged."""
    return text if not text or "://" in text else stored(Path(os.path.normpath(root / text)))


def merge(paths: Sequence[str | Path], out: str | Path) -> Manifest:
    """Writes one manifest with the rows of several; classes of the same name are merged.

    Raises:
        UserError: Two clips have the same id.
    """
    out, tables, notes = Path(out).absolute(), [], []
    classes: dict[str, None] = {}
    for path in paths:
        part = Manifest.open(path)
        table = pq.read_table(part.path)
        stored = _Stored(out.parent)
        for name in (*PATHS, "shard"):
            if name in table.column_names:
                old = pc.unique(table.column(name).drop_null())
                new = [_moved(text, part.root, stored) for text in old.to_pylist()]
                moved = pa.array(new, pa.string()).take(pc.index_in(table.column(name), value_set=old))
                table = table.set_column(table.column_names.index(name), name, moved)
        tables.append(table.select([n for n in SCHEMA.names if n in table.column_names]))
        classes |= dict.fromkeys(part.classes)
        notes.append(part.metadata)
    whole = pa.concat_tables([t.replace_schema_metadata(None) for t in tables], promote_options="permissive")
    counts = pc.value_counts(whole.column("id"))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        name, count = twice[0].as_py().values()
        raise UserError(f'{out}: {count} clips of the {len(paths)} manifests have the id "{name}"; expected unique ids')
    shared = {k: v for k, v in notes[0].items() if all(n.get(k) == v for n in notes)}
    return write_table(out, whole, list(classes), shared)
