"""What may be wrong with a manifest: files, spans, classes, and clips that leak between splits."""

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

from fastav.data.manifest.store import PATHS
from fastav.data.manifest.window import Manifest

OVERLAP_TOLERANCE_S = 1e-3
"""Spans that share less than this do not overlap: neighbouring pieces are cut at rounded times."""

_ENDS_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a clip, a file, a class or a group.

    Attributes:
        kind: Such as `missing_file`; `check` lists its kinds.
        clip_id: The (first) clip it concerns; empty where none.
        path: The file it concerns; empty where none.
        message: One line that names what is wrong.
        fatal: Whether training or its figures would be wrong; the others are warnings.
    """

    kind: str
    clip_id: str
    path: str
    message: str
    fatal: bool


def check(manifest: Manifest) -> list[Problem]:
    """Looks for everything that would spoil a training run, or make its figures look better than they are.

    Files are asked for their size, and those of equal size for the content of their ends; no media are
    decoded. Spans are held against the extent of their file where the manifest knows it.

    Returns:
        Problems of the kinds
        `duplicate_id`: an id given to several clips;
        `no_media`: a clip with nothing to see or hear;
        `bad_span`: a span of zero length, before the start or beyond the end of its file;
        `missing_file`;
        `empty_class`: a class without a training clip (where there is a split `train`);
        `single_clip_class`: a class with one clip, a warning;
        `split_leak`: a group in two splits;
        `duplicate_media`: a file whose overlapping spans are in two splits, or, a warning, two files with the
        same size and the same first and last 64 KiB.
    """
    rows = _Rows(manifest)
    parts = (_ids, _spans, _missing, _classes, _groups, _shared_spans, _twins)
    return [problem for part in parts for problem in part(rows)]


class _Rows:
    """The columns of a manifest that the checks share."""

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
        """Rows that use a file, in order."""
        return np.unique(self._order[self._bounds[file] : self._bounds[file + 1]] % len(self.ids))

    def _media(self) -> tuple[NDArray[np.int64], list[Path]]:
        """File numbers by modality, [4, rows] with -1 for none, and the files."""
        columns = [self.manifest.strings(name) for name in PATHS]
        coded = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
        dictionary = coded.combine_chunks().dictionary_encode()
        codes = dictionary.indices.fill_null(-1).to_numpy(zero_copy_only=False).reshape(len(PATHS), -1)
        root = self.manifest.root
        return codes, [Path(os.path.normpath(root / text)) for text in dictionary.dictionary.to_pylist()]


def _size(path: Path) -> int:
    """Size in bytes; -1 where there is no file."""
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
    # A first sample before 0 is silence: the sound of some files starts after their picture.
    early = (c["start_s"] < 0) | (c["start_frame"] < 0) | ((c["num_samples"] > 0) & (samples_end <= 0))
    late_frames = (c["media_frames"] > 0) & (frames_end > c["media_frames"])
    late_samples = (c["media_samples"] > 0) & (samples_end > c["media_samples"])
    for row in np.flatnonzero(empty | zero | early | late_frames | late_samples).tolist():
        name, path = rows.id(row), _first_path(rows, row)
        span = f"span {c['start_s'][row]:.3f} s + {c['duration_s'][row]:.3f} s"
        where = f'clip "{name}": {span}'
        if not named[row]:
            yield Problem("no_media", name, "", f'clip "{name}" names no video, audio, image or mel', True)
        elif zero[row]:
            yield Problem("bad_span", name, path, f"{where} of {path} has no length", True)
        elif empty[row]:
            message = f'clip "{name}": no frames and no samples of {path} in its row; was it probed?'
            yield Problem("no_media", name, path, message, True)
        elif early[row]:
            yield Problem("bad_span", name, path, f"{where} starts before {path} does", True)
        else:
            ends, extent = (frames_end, "media_frames") if late_frames[row] else (samples_end, "media_samples")
            what = f"ends at {extent[6:-1]} {ends[row]}, {path} has {c[extent][row]}"
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
    seen: dict[int, int] = {}
    for group, row in zip((pairs // num_splits).tolist(), first.tolist(), strict=True):
        name = groups.dictionary[group].as_py()
        if not name:
            continue
        if group in seen:
            one, two = (f'{rows.split(r)} (clip "{rows.id(r)}")' for r in (seen[group], row))
            message = f'group "{name}" is in two splits: {one} and {two}'
            yield Problem("split_leak", rows.id(row), "", message, True)
        seen.setdefault(group, row)


def _shared_spans(rows: _Rows) -> Iterator[Problem]:
    """Files of which the same seconds are in two splits."""
    starts = rows.column("start_s")
    still = (rows.codes[2:] >= 0).any(axis=0)
    ends = np.where(still, np.inf, starts + rows.column("duration_s"))
    starts = np.where(still, 0.0, starts)
    used, columns = np.nonzero(rows.codes >= 0)
    pairs = np.unique(rows.codes[used, columns] * len(rows.split_names) + rows.splits[columns])
    files, num_splits = np.unique(pairs // len(rows.split_names), return_counts=True)
    for file in files[num_splits > 1].tolist():
        users = rows.users(file)
        latest: dict[int, int] = {}  # the row of each split that ends last so far
        for row in users[np.argsort(starts[users], kind="stable")].tolist():
            mine = int(rows.splits[row])
            others = [r for split, r in latest.items() if split != mine]
            clash = [r for r in others if ends[r] > starts[row] + OVERLAP_TOLERANCE_S and ends[row] > starts[row]]
            if clash:
                one, two = (f'clip "{rows.id(r)}" ({rows.split(r)})' for r in (clash[0], row))
                at = f" from {starts[row]:.3f} s on" if np.isfinite(ends[row]) else ""
                message = f"{one} and {two} are both cut from {rows.files[file]}{at}"
                yield Problem("duplicate_media", rows.id(row), str(rows.files[file]), message, True)
                break
            if mine not in latest or ends[row] > ends[latest[mine]]:
                latest[mine] = row


def _twins(rows: _Rows) -> Iterator[Problem]:
    """Different files with the same content, as far as size and both ends tell."""
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
                f'{rows.files[file]} (clip "{rows.id(two)}", {rows.split(two)}) has the content of '
                f'{rows.files[twin]} (clip "{rows.id(one)}", {rows.split(one)})'
            )
            yield Problem("duplicate_media", rows.id(two), str(rows.files[file]), message, False)


def _ends_digest(path: Path, size: int) -> bytes:
    """Digest of the first and last 64 KiB."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(_ENDS_BYTES))
        file.seek(max(size - _ENDS_BYTES, 0))
        digest.update(file.read(_ENDS_BYTES))
    return digest.digest()
