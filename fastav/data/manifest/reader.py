"""Reading a manifest: `Manifest` is a window of its rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip, Modality
from fastav.data.manifest.store import COLUMNS, NUMBERS, PATHS, RowStore, open_store

_CLIP_NUMBERS = tuple(name for name in NUMBERS if not name.startswith("media_"))
_MODALITY_BITS = {"video": 1, "audio": 2}


class Manifest:
    """A window of rows of a manifest: all rows, one split, or the rows with given modalities.

    Row numbers always count within the window. Rows are read on demand. A manifest can be pickled to another process,
    which maps the same file again.

    Attributes:
        path: The Parquet file.
        root: Folder that relative media paths start from, with symbolic links resolved.
        shards: Folder or URL that relative shard names start from; empty for `root`.
        classes: Class names in the order of their numbers.
        metadata: Notes of the writer, such as the source of the data.

    Example:
        >>> train = Manifest.open("manifest.parquet", split="train")
        >>> len(train), train.classes[0], train.clip(0).duration_s
    """

    def __init__(
        self,
        store: RowStore,
        start: int = 0,
        stop: int = -1,
        index: NDArray[np.integer] | None = None,
        shards: str = "",
    ) -> None:
        self.path, self.root, self.shards = store.path, store.path.parent.resolve(), shards
        self.classes, self.metadata = store.classes, store.metadata
        self._store, self._start, self._stop = store, start, store.num_rows if stop < 0 else stop
        self._index = index

    @classmethod
    def open(cls, path: str | Path, *, split: str | None = None) -> Manifest:
        """Opens a manifest; builds its Arrow copy if that is missing or outdated.

        Args:
            path: The `.parquet` file.
            split: Split to open; all rows by default.

        Raises:
            UserError: The file does not exist, is not a manifest or was written by a newer version, or the split does
                not exist.
        """
        whole = cls(open_store(Path(path).absolute()))
        return whole if split is None else whole.split(split)

    def __len__(self) -> int:
        return self._stop - self._start if self._index is None else len(self._index)

    def __reduce__(self) -> tuple[Callable[..., Manifest], tuple[Any, ...]]:
        return _reopen, (self.path, self._start, self._stop, self._index, self.shards, self._store.source)

    def __repr__(self) -> str:
        return f"Manifest({str(self.path)!r}, {len(self)} clips, {len(self.classes)} classes, {self.splits})"

    @property
    def splits(self) -> dict[str, int]:
        """Number of rows of this window in each split, in stored order; splits without rows are left out."""
        found = {}
        for name, (start, stop) in self._store.splits.items():
            if self._index is None:
                count = min(stop, self._stop) - max(start, self._start)
            else:
                first, last = np.searchsorted(self._index, [start, stop])
                count = int(last - first)
            if count > 0:
                found[name] = count
        return found

    def split(self, name: str) -> Manifest:
        """Returns the rows of one split without copying; raises `UserError` if there is no such split."""
        if name not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise UserError(f'{self.path}: no split "{name}"; it has: {known}')
        start, stop = self._store.splits[name]
        if self._index is not None:
            inside = self._index[slice(*np.searchsorted(self._index, [start, stop]))]
            return Manifest(self._store, index=inside, shards=self.shards)
        return Manifest(self._store, max(start, self._start), min(stop, self._stop), shards=self.shards)

    def with_shards(self, base: str) -> Manifest:
        """Returns the same rows with their shards in another folder or URL, such as `s3://bucket/pack`."""
        return Manifest(self._store, self._start, self._stop, self._index, base)

    def select(self, modalities: Sequence[Modality], require: Literal["any", "all"] = "any") -> Manifest:
        """Returns the rows that have any (or all) of the modalities; the manifest itself if all rows do.

        Raises:
            UserError: No row has the modalities.
        """
        wanted = sum(_MODALITY_BITS[m] for m in set(modalities))
        usable = self._store.scan("modalities")[self._window()] & wanted
        keep = usable > 0 if require == "any" else usable == wanted
        if keep.all():
            return self
        if not keep.any():
            what = " or ".join(modalities) if require == "any" else " and ".join(modalities)
            raise UserError(f"{self.path}: none of the {len(self)} clips ({', '.join(self.splits)}) has {what}")
        rows = np.flatnonzero(keep)
        kept = rows + self._start if self._index is None else self._index[rows]
        narrow = np.int32 if self._store.num_rows < 1 << 31 else np.int64
        return Manifest(self._store, index=kept.astype(narrow), shards=self.shards)

    def columns(self, rows: NDArray[np.integer], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Returns numeric columns of the given rows; the cost depends on the number of rows requested only.

        Args:
            rows: Row numbers within this window, [n].
            names: Numeric fields of `Clip`; `label`, the number of the first class (-1 without labels); `has_video`
                and `has_audio`.

        Returns:
            Column name -> int64, float64 or bool array, [n].
        """
        for name in names:
            if name not in COLUMNS:
                raise UserError(f'manifest column "{name}" is not numeric{did_you_mean(name, COLUMNS)}')
        records = self._store.records(self._absolute(rows))
        return {name: COLUMNS[name](records) for name in names}

    def clip(self, row: int) -> Clip:
        """Returns one row, with absolute paths; its `row` counts within this window."""
        return self.clips([row])[0]

    def clips(self, rows: Sequence[int] | NDArray[np.integer]) -> list[Clip]:
        """Returns the given rows; see `clip`."""
        where = self._absolute(rows)
        records = self._store.records(where)
        texts, labels = self._store.texts(where, records), self._store.labels(where, records)
        numbers = [records[name].tolist() for name in _CLIP_NUMBERS]
        made = []
        for i, at in enumerate(where.tolist()):
            values = texts[i] | {name: column[i] for name, column in zip(_CLIP_NUMBERS, numbers, strict=True)}
            for name in PATHS:
                values[name] = self._full(values[name])
            values["shard"] = self._place(values["shard"])
            names = tuple(self.classes[k] for k in labels[i])
            made.append(Clip(row=int(rows[i]), labels=names, split=self._store.split_of(at), **values))
        return made

    def _full(self, text: str) -> Path | None:
        if not text:
            return None
        return Path(os.path.normpath(self.root / text)) if ".." in text else self.root / text

    def _place(self, text: str) -> str:
        """Returns the path or URL of a shard."""
        if not text or "://" in text or Path(text).is_absolute():
            return text
        return f"{self.shards.rstrip('/')}/{text}" if self.shards else str(self._full(text))

    def class_map(self, classes: Sequence[str], aliases: Mapping[str, str] | None = None) -> NDArray[np.int64]:
        """Returns the number in `classes` of each of this manifest's classes, by name; -1 if there is no such class.

        Args:
            classes: Other class names, such as those of a model.
            aliases: This manifest's class name -> name in `classes`; tried before the name itself.
        """
        number = {name: k for k, name in enumerate(classes)}
        known = aliases or {}
        return np.array([number.get(known.get(name, name), number.get(name, -1)) for name in self.classes], np.int64)

    def label_matrix(
        self,
        rows: Sequence[int] | NDArray[np.integer],
        classes: Sequence[str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> NDArray[np.float32]:
        """Returns one-hot or multi-hot labels, float32 [B, K]; labels that are not in `classes` are left out.

        Args:
            rows: Row numbers within this window, [B].
            classes: Class names of the columns; this manifest's classes by default.
            aliases: See `class_map`.
        """
        target = self.classes if classes is None else classes
        to_target = self.class_map(target, aliases)
        where = self._absolute(rows)
        matrix_BK = np.zeros((len(where), len(target)), np.float32)
        records = self._store.records(where)
        single = np.flatnonzero(records["num_labels"] == 1)
        mapped = to_target[records["label"][single]]
        matrix_BK[single[mapped >= 0], mapped[mapped >= 0]] = 1
        many = np.flatnonzero(records["num_labels"] > 1)
        for i, codes in zip(many, self._store.labels(where[many], records[many]), strict=True):
            mapped = to_target[codes]
            matrix_BK[i, mapped[mapped >= 0]] = 1
        return matrix_BK

    def label_means(self, rows: NDArray[np.integer], values_K: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the mean of per-class values over each row's labels, float64 [B]; 1 without labels.

        Args:
            rows: Row numbers within this window, [B].
            values_K: One value per class, in the order of `classes`.
        """
        where = self._absolute(rows)
        records = self._store.records(where)
        single = records["num_labels"] == 1
        means_B = np.ones(len(where))
        means_B[single] = values_K[records["label"][single]]
        many = np.flatnonzero(records["num_labels"] > 1)
        for i, codes in zip(many, self._store.labels(where[many], records[many]), strict=True):
            means_B[i] = values_K[codes].mean()
        return means_B

    def class_counts(self) -> NDArray[np.int64]:
        """Returns the number of rows of this window with each class, int64 [K]."""
        return self._store.count_labels(self._window(), len(self.classes))

    def strings(self, name: str) -> pa.ChunkedArray:
        """Returns a whole column of texts of this window; for checks and summaries."""
        whole = self._store.strings(name)
        return whole[self._start : self._stop] if self._index is None else whole.take(pa.array(self._index))

    def whole(self, name: str) -> NDArray[Any]:
        """Returns a whole numeric column of this window, [rows]; for checks and summaries, not for plans."""
        return self._store.scan(name)[self._window()]

    def _window(self) -> slice | NDArray[np.integer]:
        return slice(self._start, self._stop) if self._index is None else self._index

    def _absolute(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        wanted = np.asarray(rows, np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"{self.path}: row {wanted.min()}..{wanted.max()} of a window of {len(self)}")
        return wanted + self._start if self._index is None else self._index[wanted].astype(np.int64)


def _reopen(
    path: Path, start: int, stop: int, index: NDArray[np.integer] | None, shards: str, source: dict[str, Any]
) -> Manifest:
    """Opens the same window in another process; refuses a file that has changed since."""
    store = open_store(path)
    if store.source["size"] != source["size"] or store.num_rows < stop:
        raise UserError(f"{path}: the manifest was rewritten while it was in use; start again")
    return Manifest(store, start, stop, index, shards)
