"""The Arrow copy of a manifest: memory-mapped, so that ten million rows open in milliseconds.

The copy stores the numbers of a row together in one record, so that reading a row touches one page. It is rebuilt
whenever the Parquet file has changed. If it cannot be written, the rows are kept in memory instead.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastav.core.atomic_files import sha256, written_beside
from fastav.core.errors import FastavError, UserError, did_you_mean
from fastav.data.clip import Clip

SCHEMA_VERSION = 3
"""Version of the Parquet columns and metadata; manifests with a higher version are refused."""

_COPY_VERSION = 3
COPY_ROWS = 1 << 18
"""Rows per record batch of the copy."""
PAGED_BYTES = 1 << 22
"""Copies larger than this, in bytes, are read with pread: pages touched through a mapping stay resident."""
_DENSE = 8  # rows spread over at most this many times their number are read as one contiguous range
PATHS = ("video", "audio", "image", "mel")
TEXTS = ("id", *PATHS, "shard", "video_codec", "audio_codec", "group")
_FLOATS = ("start_s", "duration_s", "fps", "audio_offset_s", "weight", "lat", "lon")
_LONGS = ("start_sample", "num_samples", "media_samples", "shard_at", "shard_size")
_INTS = (
    "start_frame", "num_frames", "width", "height", "rotation", "mirrored",
    "sample_rate", "channels", "num_mel_frames", "media_frames",
)  # fmt: skip
NUMBERS = (*_FLOATS, *_LONGS, *_INTS)

# The numbers of one row of the copy. `label` is the number of the first class, -1 for none. `media_frames` and
# `media_samples` are the lengths of the whole file, 0 if unknown. The others locate the row's labels and texts in its
# record batch.
_PLACES = ("label", "num_labels", "label_at", "text_at", "text_size")
RECORD = np.dtype(
    [(n, "<f8") for n in _FLOATS] + [(n, "<i8") for n in _LONGS] + [(n, "<i4") for n in (*_INTS, *_PLACES)]
)
_DEFAULTS = {f.name: f.default for f in fields(Clip) if f.default is not MISSING} | {
    "media_frames": 0,
    "media_samples": 0,
}

SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*TEXTS, "split")]
    + [("labels", pa.list_(pa.string()))]
    + [(name, pa.float64()) for name in _FLOATS]
    + [(name, pa.int64()) for name in _LONGS]
    + [(name, pa.int32()) for name in _INTS]
)
"""Columns of the Parquet file: all fields of `Clip` but `row`, and the length of the whole file (0: unknown)."""


def _number(name: str) -> Callable[[NDArray[np.void]], NDArray[Any]]:
    wide = np.float64 if name in _FLOATS else np.int64
    return lambda records: records[name].astype(wide)


COLUMNS: dict[str, Callable[[NDArray[np.void]], NDArray[Any]]] = {
    **{name: _number(name) for name in (*NUMBERS, "label")},
    "has_video": lambda records: records["num_frames"] > 0,
    "has_audio": lambda records: (records["num_samples"] > 0) | (records["num_mel_frames"] > 0),
}


class RowStore:
    """The record batches of an Arrow copy, memory-mapped or in memory, with random access to rows.

    Columns of a batch: `record` (`RECORD` as fixed-size binary), `modalities` (uint8 bits), `texts` (a row's `TEXTS`
    joined, separated by NUL), `labels` (lists of class numbers). The schema metadata are those of the Parquet file plus
    the identity of that file.

    Touching a page of a mapping also maps its neighbours: hundreds of MB after a few batches of random rows of a large
    file, and no faster than reading. So rows of a large copy are read with pread instead.
    """

    def __init__(self, path: Path, memory: pa.Buffer | None, source: dict[str, Any], file: BinaryIO | None) -> None:
        self.path, self.source, self._file = path, source, file
        self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file is not None else None
        buffer = memory if memory is not None else pa.py_buffer(self._mapping)
        reader = pa.ipc.open_file(buffer)
        header = ManifestHeader.read(reader.schema.metadata, path)
        self.classes, self.splits, self.metadata = header.classes, header.splits, header.metadata
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        ends = np.cumsum([0, *(batch.num_rows for batch in batches)], dtype=np.int64)
        self._starts, self.num_rows = ends[:-1], int(ends[-1])
        held = [batch.column("record").buffers()[1] for batch in batches]
        self._records = [np.frombuffer(raw, RECORD, b.num_rows) for raw, b in zip(held, batches, strict=True)]
        self._record_places = np.array([raw.address - buffer.address for raw in held], np.int64)
        texts = [batch.column("texts").buffers()[2] for batch in batches]
        self._text_places = [raw.address - buffer.address for raw in texts]
        self._modalities = [batch.column("modalities").to_numpy() for batch in batches]
        lists = [batch.column("labels") for batch in batches]
        self._label_offsets = [labels.offsets.to_numpy() for labels in lists]
        self._label_values = [labels.values.to_numpy() for labels in lists]
        self._view = memoryview(buffer)
        self._paged = self._mapping is not None and len(self._mapping) > PAGED_BYTES

    def records(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Returns the records of the rows, [n]."""
        found = np.empty(len(rows), RECORD)
        which = self._batch_of(rows)
        inside = rows - self._starts[which]
        for batch in np.unique(which):
            here = which == batch
            found[here] = self._gather(int(batch), inside[here])
        return found

    def _gather(self, batch: int, rows: NDArray[np.int64]) -> NDArray[np.void]:
        if not self._paged:
            return self._records[batch][rows]
        size, place = RECORD.itemsize, int(self._record_places[batch])
        first, last = int(rows.min()), int(rows.max())
        if last - first < _DENSE * len(rows):
            run = self._read(place + first * size, (last - first + 1) * size)
            return np.frombuffer(run, RECORD)[rows - first]
        parts = [self._read(place + row * size, size) for row in rows.tolist()]
        return np.frombuffer(b"".join(parts), RECORD)

    def _read(self, place: int, size: int) -> bytes:
        if self._paged and self._file is not None:
            return os.pread(self._file.fileno(), size, place)
        return bytes(self._view[place : place + size])

    def texts(self, rows: NDArray[np.int64], records: NDArray[np.void]) -> list[dict[str, Any]]:
        """Returns the texts of the rows, given their records; an absent path is an empty string."""
        found = []
        at, sizes = records["text_at"].tolist(), records["text_size"].tolist()
        for batch, start, size in zip(self._batch_of(rows).tolist(), at, sizes, strict=True):
            raw = self._read(self._text_places[batch] + start, size)
            found.append(dict(zip(TEXTS, raw.decode().split("\0"), strict=True)))
        return found

    def labels(self, rows: NDArray[np.int64], records: NDArray[np.void]) -> list[NDArray[np.int32]]:
        """Returns the class numbers of the rows, given their records."""
        found = []
        for row, record in zip(rows, records, strict=True):
            if record["num_labels"] > 1:
                batch, at = int(self._batch_of(row)), record["label_at"]
                found.append(self._label_values[batch][at : at + record["num_labels"]])
            else:
                found.append(np.array([record["label"]] * record["num_labels"], np.int32))
        return found

    def scan(self, name: str) -> NDArray[Any]:
        """Returns a whole column, [num_rows]: `modalities` or a numeric field of the record."""
        whole = np.concatenate(
            self._modalities if name == "modalities" else [records[name] for records in self._records]
        )
        self._release()
        return whole

    def strings(self, name: str) -> pa.ChunkedArray:
        """Returns a whole column of texts, read from the Parquet file."""
        absent = pa.chunked_array([pa.nulls(self.num_rows, pa.string())])
        table = pq.read_table(self.path, columns=[name])
        column = table.column(name).cast(pa.string()) if name in table.column_names else absent
        return column if name in PATHS else column.fill_null("")

    def count_labels(self, window: slice | NDArray[np.integer], num_classes: int) -> NDArray[np.int64]:
        """Returns the number of rows of the window with each class, int64 [K]."""
        counts = np.zeros(num_classes, np.int64)
        for start, offsets, values in zip(self._starts, self._label_offsets, self._label_values, strict=True):
            inside = np.zeros(len(offsets) - 1, np.bool_)
            if isinstance(window, slice):
                inside[max(window.start - start, 0) : max(window.stop - start, 0)] = True
            else:
                near = np.searchsorted(window, [start, start + len(inside)])
                inside[window[slice(*near)] - start] = True
            codes = values[offsets[0] : offsets[-1]][np.repeat(inside, np.diff(offsets))]
            counts += np.bincount(codes, minlength=num_classes)
        self._release()
        return counts

    def split_of(self, row: int) -> str:
        """Returns the split of one row."""
        return next(name for name, (start, stop) in self.splits.items() if start <= row < stop)

    def _batch_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _release(self) -> None:
        """Releases the pages of a large mapping after a scan; they stay in the page cache."""
        if self._paged and self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class ManifestHeader:
    """The contents of a manifest's schema metadata."""

    classes: tuple[str, ...]
    splits: dict[str, tuple[int, int]]
    metadata: dict[str, str]

    @classmethod
    def read(cls, raw: Mapping[bytes, bytes] | None, path: Path) -> ManifestHeader:
        """Parses the schema metadata; raises `UserError` unless they are of a manifest that this version can read."""
        if not raw or b"fastav.schema_version" not in raw:
            raise UserError(
                f"{path}: not a fastav manifest (no fastav.schema_version in its schema metadata); "
                "`fastav index` writes one"
            )
        try:
            version = int(raw[b"fastav.schema_version"])
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"{path}: manifest version is {version}, but this fastav reads versions up to {SCHEMA_VERSION}; "
                    "update fastav"
                )
            classes = tuple(str(name) for name in json.loads(raw[b"fastav.classes"]))
            ranges = json.loads(raw[b"fastav.splits"])
            splits = {str(name): (int(start), int(stop)) for name, (start, stop) in ranges.items()}
            notes = json.loads(raw.get(b"fastav.metadata", b"{}"))
            return cls(classes, splits, {str(k): str(v) for k, v in notes.items()})
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: not a fastav manifest (schema metadata: {error})") from None

    def write(self) -> dict[bytes, bytes]:
        """Returns the schema metadata."""
        lines = {
            "fastav.schema_version": str(SCHEMA_VERSION),
            "fastav.classes": json.dumps(self.classes, ensure_ascii=False),
            "fastav.splits": json.dumps(self.splits, ensure_ascii=False),
            "fastav.metadata": json.dumps(self.metadata, ensure_ascii=False),
        }
        return {key.encode(): text.encode() for key, text in lines.items()}


def open_store(path: Path) -> RowStore:
    """Maps the copy if it is up to date; otherwise rebuilds it, in memory if it cannot be written."""
    if path.is_dir() or not path.exists():
        what = "is a folder" if path.is_dir() else "no such file"
        # A pack folder also holds an index, a run folder predictions.
        within = sorted(path.glob("*.parquet"), key=lambda file: ("manifest" not in file.name, file.name))
        within = [file for file in within if file.name not in ("index.parquet", "predictions.parquet")]
        beside = [p.name for p in path.parent.glob("*.parquet")] if path.parent.is_dir() else []
        near = f'; did you mean "{within[0]}"?' if within else did_you_mean(path.name, beside)
        raise UserError(f"manifest {path}: {what}, expected a .parquet file{near}")
    copy = path.with_suffix(".arrow")
    if copy == path:
        raise UserError(f"manifest {path}: this is the Arrow copy; expected {path.with_suffix('.parquet')}")
    store = map_copy(copy, path)
    if store is not None:
        return store
    with path.open("rb") as file:
        parquet, source = open_parquet(path, file), file_identity(file)
        try:
            with written_beside(copy) as made, pa.OSFile(str(made), "wb") as sink:
                write_copy(path, parquet, sink, source)
        except (OSError, pa.ArrowException):  # a read-only folder, or a full disk
            memory = pa.BufferOutputStream()
            try:
                write_copy(path, parquet, memory, source)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path}: the manifest is damaged ({error})") from None
            return RowStore(path, memory.getvalue(), source, None)
    # Another process may have written its copy in the meantime; check it like any other.
    store = map_copy(copy, path)
    if store is None:
        raise FastavError(f"{path}: the manifest is being rewritten; open it again when that is done")
    return store


def map_copy(copy: Path, path: Path) -> RowStore | None:
    """Maps the copy; returns None unless it was made from exactly this Parquet file."""
    try:
        file = copy.open("rb")
    except OSError:
        return None
    store = None
    try:
        source = json.loads(pa.ipc.open_file(file).schema.metadata[b"fastav.copy_of"])
        stat = path.stat()
        fresh = source["version"] == _COPY_VERSION and source["size"] == stat.st_size
        # A copied or unpacked folder has other modification times: then compare the content.
        if fresh and (source["mtime_ns"] == stat.st_mtime_ns or source["sha256"] == sha256(path)):
            store = RowStore(path, None, source, file)
    except UserError:
        raise
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        pass  # half-written, or not a copy written by fastav
    finally:
        if store is None:
            file.close()
    return store


def open_parquet(path: Path, file: BinaryIO) -> pq.ParquetFile:
    """Opens the Parquet file and checks that it is a manifest."""
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a manifest: not a Parquet file ({error})") from None
    header = ManifestHeader.read(parquet.schema_arrow.metadata, path)
    missing = {"id", "split", "labels"} - set(parquet.schema_arrow.names)
    if missing:
        raise UserError(f"{path}: not a fastav manifest (no column {', '.join(sorted(missing))})")
    covered = sorted(header.splits.values())
    ends = [0, *(stop for _, stop in covered)]
    if [start for start, _ in covered] != ends[:-1] or ends[-1] != parquet.metadata.num_rows:
        raise UserError(
            f"{path}: the split ranges {header.splits} do not cover its {parquet.metadata.num_rows} rows; "
            "a tool changed the rows but not the metadata; write the manifest again"
        )
    return parquet


def file_identity(file: BinaryIO) -> dict[str, Any]:
    """Returns version, size, time and digest of the open file, by which its copy is recognised later.

    Takes the open file, as its path may point to another file by now.
    """
    stat = os.fstat(file.fileno())
    file.seek(0)
    digest = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
    return {"version": _COPY_VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}


def write_copy(path: Path, parquet: pq.ParquetFile, sink: Any, source: dict[str, Any]) -> None:
    """Converts the Parquet file to its Arrow copy, batch by batch."""
    header = ManifestHeader.read(parquet.schema_arrow.metadata, path)
    metadata = {**header.write(), b"fastav.copy_of": json.dumps(source).encode()}
    kinds = {"record": pa.binary(RECORD.itemsize), "modalities": pa.uint8(), "texts": pa.binary()}
    schema = pa.schema([*kinds.items(), ("labels", pa.list_(pa.int32()))], metadata)
    names = [name for name in SCHEMA.names if name in parquet.schema_arrow.names]
    classes, start = pa.array(header.classes, pa.string()), 0
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in parquet.iter_batches(batch_size=COPY_ROWS, columns=names):
            for name, (first, last) in header.splits.items():
                here = batch.column("split").slice(max(first - start, 0), max(last - max(first, start), 0))
                if len(here) and not pc.all(pc.equal(here, name)).as_py():
                    raise UserError(
                        f'{path}: not all of the rows {first}..{last} are in split "{name}"; write the manifest again'
                    )
            try:
                writer.write_batch(_copy_batch(batch, classes, schema))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UserError) as error:
                raise UserError(f"{path}: {error}") from None
            start += batch.num_rows


def _copy_batch(batch: pa.RecordBatch, classes: pa.Array, schema: pa.Schema) -> pa.RecordBatch:
    """Converts a batch of the Parquet file to a batch of the copy."""
    records = np.empty(batch.num_rows, RECORD)
    for name in NUMBERS:
        if name in batch.schema.names:
            column = batch.column(name).cast(SCHEMA.field(name).type)
            records[name] = column.fill_null(_DEFAULTS[name]).to_numpy(zero_copy_only=False)
        else:
            records[name] = _DEFAULTS[name]
    absent = pa.nulls(batch.num_rows, pa.string())
    columns = [batch.column(n).cast(pa.string()) if n in batch.schema.names else absent for n in TEXTS]
    texts = pc.binary_join_element_wise(*columns, "\0", null_handling="replace")
    if pc.max(pc.count_substring(texts, "\0")).as_py() >= len(TEXTS):
        raise UserError("an id, a path, a codec or a group contains a NUL character")
    ends = np.cumsum(pc.binary_length(texts).to_numpy())
    labels = batch.column("labels").cast(SCHEMA.field("labels").type).fill_null([])
    names = labels.flatten()
    codes = pc.index_in(names, value_set=classes)
    if codes.null_count:
        name = names[pc.index(codes.is_null(), True).as_py()].as_py()
        raise UserError(f'label "{name}" is not among the classes{did_you_mean(str(name), classes.to_pylist())}')
    counts = labels.value_lengths().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    labelled = counts > 0
    records["label"] = -1
    records["label"][labelled] = codes.to_numpy()[offsets[:-1][labelled]]
    records["num_labels"], records["label_at"] = counts, offsets[:-1]
    records["text_size"] = np.diff(ends, prepend=0)
    records["text_at"] = ends - records["text_size"]
    video, audio = COLUMNS["has_video"](records), COLUMNS["has_audio"](records)
    raw = pa.FixedSizeBinaryArray.from_buffers(pa.binary(RECORD.itemsize), len(records), [None, pa.py_buffer(records)])
    bits = pa.array((video * 1 + audio * 2).astype(np.uint8))
    lists = pa.ListArray.from_arrays(pa.array(offsets), codes.cast(pa.int32()))
    return pa.record_batch([raw, bits, texts.cast(pa.binary()), lists], schema=schema)
