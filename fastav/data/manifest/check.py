"""Validates a manifest: missing files, bad spans, empty classes, and clips that leak between splits."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastav.data.manifest.reader import Manifest
from fastav.data.manifest.store import PATHS

OVERLAP_TOLERANCE_S = 1e-3
"""Spans that overlap by less than this, in seconds, count as adjacent: pieces are cut at rounded times."""

_ENDS_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with a clip, a file, a class or a group.

    Attributes:
        kind: Kind of problem, such as `missing_file`; `check` lists its kinds.
        clip_id: Id of the (first) affected clip; empty if it affects none.
        path: The affected file; empty if it affects none.
        message: One line that describes the problem.
        fatal: Whether training or its metrics would be wrong; other problems are warnings.
    """

    kind: str
    clip_id: str
    path: str
    message: str
    fatal: bool


def check(manifest: Manifest) -> list[Problem]:
    """Finds problems that would break a training run or make its metrics too optimistic.

    Reads the size of each file and, for files of equal size, their first and last 64 KiB; decodes no media. Spans are
    compared with the length of their file if the manifest knows it.

    Returns:
        Problems of the kinds
        `duplicate_id`: several clips have the same id;
        `no_media`: a clip has neither video nor audio;
        `bad_span`: a span has zero length, starts before its file or ends after it;
        `missing_file`: a media file does not exist;
        `empty_class`: a class has no training clip (if there is a split `train`);
        `single_clip_class`: a class has only one clip (a warning);
        `split_leak`: a group is in two splits;
        `duplicate_media`: overlapping spans of a file are in two splits; or, as a warning, two files have the same
        size and the same first and last 64 KiB.
    """
    rows = _Rows(manifest)
    parts = (_ids, _spans, _missing, _classes, _groups, _shared_spans, _twins)
    return [problem for part in parts for problem in part(rows)]


class _Rows:
    """The columns of a manifest that several checks use."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.ids = manifest.strings("id")
        self.split_names = list(manifest.splits)
        self.splits = np.repeat(np.arange(len(self.split_names)), list(manifest.splits.values()))
        self.codes, self.files = self._media()
        self.sizes = [_size(path) for path in self.files]
        flat = self.codes.ravel()
        self._order = np.argsort(flat, kind="stable")
        self._bounds = np.searchsorted(flat[self._order], np.arange(len(self.files) + 1))

    def column(self, name: str) -> NDArray[Any]:
        return self.manifest.whole(name)

    def id(self, row: int) -> str:
        return str(self.ids[int(row)].as_py())

    def split(self, row: int) -> str:
        return self.split_names[self.splits[row]]

    def users(self, file: int) -> NDArray[np.int64]:
        """Returns the rows that use a file, in order."""
        return np.unique(self._order[self._bounds[file] : self._bounds[file + 1]] % len(self.ids))

    def _media(self) -> tuple[NDArray[np.int64], list[Path]]:
        """Returns file numbers by kind of path, [4, rows] with -1 for none, and the files."""
        columns = [self.manifest.strings(name) for name in PATHS]
        coded = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
        dictionary = coded.combine_chunks().dictionary_encode()
        codes = dictionary.indices.fill_null(-1).to_numpy(zero_copy_only=False).reshape(len(PATHS), -1)
        root = self.manifest.root
        return codes, [Path(os.path.normpath(root / text)) for text in dictionary.dictionary.to_pylist()]


def _size(path: Path) -> int:
    """Returns the size in bytes; -1 if there is no such file."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:
        return -1


def _ids(rows: _Rows) -> Iterator[Problem]:
    counts = pc.value_counts(rows.ids)
    for entry in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist():
        name, count = entry["values"], entry["counts"]
        yield Problem("duplicate_id", name, "", f'{count} clips have the id "{name}"', True)


def _spans(rows: _Rows) -> Iterator[Problem]:
    c = {name: rows.column(name) for name in _SPAN_COLUMNS}
    packed = np.array(pc.not_equal(rows.manifest.strings("shard"), "").to_pylist(), np.bool_)
    named: NDArray[np.bool_] = np.any(rows.codes >= 0, axis=0) | packed
    timed = np.any(rows.codes[:2] >= 0, axis=0)
    empty = (c["num_frames"] <= 0) & (c["num_samples"] <= 0) & (c["num_mel_frames"] <= 0)
    frames_end, samples_end = c["start_frame"] + c["num_frames"], c["start_sample"] + c["num_samples"]
    zero = timed & ~(c["duration_s"] > 0)
    # A negative first sample is silence: in some files the audio starts after the video.
    early = (c["start_s"] < 0) | (c["start_frame"] < 0) | ((c["num_samples"] > 0) & (samples_end <= 0))
    late_frames = (c["media_frames"] > 0) & (frames_end > c["media_frames"])
    late_samples = (c["media_samples"] > 0) & (samples_end > c["media_samples"])
    for row in np.flatnonzero(empty | zero | early | late_frames | late_samples).tolist():
        name, path = rows.id(row), _first_path(rows, row)
        span = f"span {c['start_s'][row]:.3f} s + {c['duration_s'][row]:.3f} s"
        where = f'clip "{name}": {span}'
        if not named[row]:
            yield Problem("no_media", name, "", f'clip "{name}" has no video, audio, image or mel file', True)
        elif zero[row]:
            yield Problem("bad_span", name, path, f"{where} of {path} has zero length", True)
        elif empty[row]:
            message = f'clip "{name}": its row has no frames and no samples of {path}; was the file probed?'
            yield Problem("no_media", name, path, message, True)
        elif early[row]:
            yield Problem("bad_span", name, path, f"{where} starts before the start of {path}", True)
        else:
            ends, extent = (frames_end, "media_frames") if late_frames[row] else (samples_end, "media_samples")
            what = f"ends at {extent[6:-1]} {ends[row]}, but {path} has {c[extent][row]}"
            yield Problem("bad_span", name, path, f"{where} {what}", True)


_SPAN_COLUMNS = (
    "start_s", "duration_s", "start_frame", "num_frames", "media_frames",
    "start_sample", "num_samples", "media_samples", "num_mel_frames",
)  # fmt: skip


def _first_path(rows: _Rows, row: int) -> str:
    codes = rows.codes[:, row]
    return str(rows.files[codes[codes >= 0][0]]) if (codes >= 0).any() else ""


def _missing(rows: _Rows) -> Iterator[Problem]:
    for file, path in enumerate(rows.files):
        if rows.sizes[file] < 0:
            users = rows.users(file)
            more = f" and {len(users) - 1} more" if len(users) > 1 else ""
            name = rows.id(users[0])
            message = f'no such file: {path} (clip "{name}"{more})'
            yield Problem("missing_file", name, str(path), message, True)


def _classes(rows: _Rows) -> Iterator[Problem]:
    manifest = rows.manifest
    counts = {name: manifest.split(name).class_counts() for name in rows.split_names}
    total: NDArray[np.int64] = np.sum(list(counts.values()), axis=0)
    first = rows.column("label")
    for k, name in enumerate(manifest.classes):
        held = ", ".join(f"{count[k]} in {split}" for split, count in counts.items() if count[k])
        if "train" in counts and not counts["train"][k]:
            message = f'class "{name}" has no training clip ({held or "no clip at all"})'
            yield Problem("empty_class", "", "", message, True)
        if total[k] == 1:
            only = np.flatnonzero(first == k)
            clip = rows.id(only[0]) if len(only) else ""
            yield Problem("single_clip_class", clip, "", f'class "{name}" has one clip ({held})', False)


def _groups(rows: _Rows) -> Iterator[Problem]:
    groups = rows.manifest.strings("group").combine_chunks().dictionary_encode()
    codes = groups.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    num_splits = len(rows.split_names)
    pairs, first = np.unique(codes * num_splits + rows.splits, return_index=True)
    first_row: dict[int, int] = {}
    for group, row in zip((pairs // num_splits).tolist(), first.tolist(), strict=True):
        name = groups.dictionary[group].as_py()
        if not name:
            continue
        if group in first_row:
            one, two = (f'{rows.split(r)} (clip "{rows.id(r)}")' for r in (first_row[group], row))
            message = f'group "{name}" is in two splits: {one} and {two}'
            yield Problem("split_leak", rows.id(row), "", message, True)
        first_row.setdefault(group, row)


def _shared_spans(rows: _Rows) -> Iterator[Problem]:
    """Finds files of which the same seconds are in two splits."""
    starts = rows.column("start_s")
    still = (rows.codes[2:] >= 0).any(axis=0)
    ends = np.where(still, np.inf, starts + rows.column("duration_s"))
    starts = np.where(still, 0.0, starts)
    used, columns = np.nonzero(rows.codes >= 0)
    pairs = np.unique(rows.codes[used, columns] * len(rows.split_names) + rows.splits[columns])
    files, num_splits = np.unique(pairs // len(rows.split_names), return_counts=True)
    for file in files[num_splits > 1].tolist():
        users = rows.users(file)
        latest: dict[int, int] = {}  # split -> its row with the latest end so far
        for row in users[np.argsort(starts[users], kind="stable")].tolist():
            own_split = int(rows.splits[row])
            others = [r for split, r in latest.items() if split != own_split]
            clash = [r for r in others if ends[r] > starts[row] + OVERLAP_TOLERANCE_S and ends[row] > starts[row]]
            if clash:
                one, two = (f'clip "{rows.id(r)}" ({rows.split(r)})' for r in (clash[0], row))
                at = f" from {starts[row]:.3f} s on" if np.isfinite(ends[row]) else ""
                message = f"{one} and {two} are both cut from {rows.files[file]}{at}"
                yield Problem("duplicate_media", rows.id(row), str(rows.files[file]), message, True)
                break
            if own_split not in latest or ends[row] > ends[latest[own_split]]:
                latest[own_split] = row


def _twins(rows: _Rows) -> Iterator[Problem]:
    """Finds different files of the same size with the same first and last 64 KiB."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for file, size in enumerate(rows.sizes):
        if size > 0:
            by_size[size].append(file)
    for size, files in by_size.items():
        first: dict[bytes, int] = {}
        for file in files if len(files) > 1 else ():
            digest = _ends_digest(rows.files[file], size)
            twin = first.setdefault(digest, file)
            if twin == file or rows.files[twin].samefile(rows.files[file]):
                continue
            one, two = rows.users(twin)[0], rows.users(file)[0]
            message = (
                f'{rows.files[file]} (clip "{rows.id(two)}", {rows.split(two)}) seems to have the same content as '
                f'{rows.files[twin]} (clip "{rows.id(one)}", {rows.split(one)})'
            )
            yield Problem("duplicate_media", rows.id(two), str(rows.files[file]), message, False)


def _ends_digest(path: Path, size: int) -> bytes:
    """Returns a digest of the first and last 64 KiB."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(_ENDS_BYTES))
        file.seek(max(size - _ENDS_BYTES, 0))
        digest.update(file.read(_ENDS_BYTES))
    return digest.digest()
