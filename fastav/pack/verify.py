"""Checks a finished pack: every byte of the shards, index, tables, and that all decodes to what the rows say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from fastav.core.atomic_files import sha256
from fastav.core.errors import FastavError
from fastav.core.process_pool import run_jobs
from fastav.core.progress import progress
from fastav.data.clip import Clip
from fastav.data.manifest import Manifest
from fastav.media.packed_clip_decoder import KeptDecoders, decode_mel, decode_sound
from fastav.media.pyav import decode_jpeg
from fastav.media.shards import ShardReader, ShardReading
from fastav.pack.folder import INDEX_FILE, MANIFEST_FILE, PackFolder, no_pack

_CHUNK = 64


@dataclass(frozen=True, slots=True)
class _Check:
    """Clips of one shard to look at, with their index entries."""

    clips: list[Clip]
    entries: list[dict[str, Any]]


def verify(out: Path, workers: int, console: Console) -> tuple[list[str], int]:
    """Reads a whole pack again.

    Returns:
        What is wrong, one line each, and the number of clips.

    Raises:
        UserError: There is no finished pack.
    """
    folder = PackFolder(Path(out))
    told = folder.description()
    if told is None or not told.get("finished"):
        raise no_pack(out)
    manifest = Manifest.open(folder.path / MANIFEST_FILE)
    faults = list(_tars(folder.path, told["shards"]))
    with progress(console, "verifying", len(manifest), "clips") as advance:
        for done in run_jobs(_checks(manifest, folder.path / INDEX_FILE), _look, max(1, workers)):
            clips = done.job.clips
            faults += [f"{clips[0].shard}: the decoder crashed on one of its clips"] if done.died else done.result or []
            for _ in clips:
                advance()
    return faults, len(manifest)


def _tars(out: Path, told: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Faults of the archives as such, for any reader of tars: each must be what was written, to the byte."""
    shards = sorted((out / "shards").glob("*.tar"))
    names = {Path(name).name for name in told}
    for stray in sorted({path.name for path in shards} - names):
        yield f"{out / 'shards' / stray}: is not one of the pack's shards"
    for lost in sorted(names - {path.name for path in shards}):
        yield f"{out / 'shards' / lost}: missing"
    for path in shards:
        entry = told.get(f"shards/{path.name}")
        if entry is None:
            continue
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                yield f"{path}: has {size} bytes, was packed with {entry['bytes']}"
            elif sha256(path) != entry["sha256"]:
                yield f"{path}: its content was altered since it was packed (SHA-256)"
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror})"


def _checks(manifest: Manifest, index: Path) -> Iterator[_Check]:
    """The clips in pieces, run_jobs with what the index says of it."""
    rows = 0
    by_id: dict[str, dict[str, Any]] = {}
    for batch in pq.ParquetFile(index).iter_batches(batch_size=1024):
        by_id |= {entry["id"]: entry for entry in batch.to_pylist()}
        while rows < len(manifest):
            clips = manifest.clips(range(rows, min(rows + _CHUNK, len(manifest))))
            if not all(clip.id in by_id for clip in clips):
                break
            rows += len(clips)
            yield _Check(clips, [by_id.pop(clip.id) for clip in clips])
    if rows < len(manifest):
        clips = manifest.clips(range(rows, len(manifest)))
        yield _Check(clips, [by_id.get(clip.id, {}) for clip in clips])


def _look(check: _Check) -> list[str]:
    """Decodes clips whole and holds them against their index entries."""
    shards, decoders = ShardReader(ShardReading()), KeptDecoders()
    faults = []
    for clip, entry in zip(check.clips, check.entries, strict=True):
        try:
            faults += [f'clip "{clip.id}": {fault}' for fault in _faults(clip, entry, shards, decoders)]
        except (FastavError, ValueError, RuntimeError, OSError) as error:
            faults.append(f'clip "{clip.id}": {error}')
    return faults


@dataclass
class _Counter:
    """Counts frames and looks at their size."""

    clip: Clip
    numbers: list[int]
    seen: int = 0

    def take(self, number: int, frame: Any) -> None:
        if (frame.width, frame.height) == (self.clip.width, self.clip.height):
            self.seen += 1


def _faults(clip: Clip, entry: dict[str, Any], shards: ShardReader, decoders: KeptDecoders) -> Iterator[str]:
    numbers = list(range(clip.num_frames))
    packed = shards.fetch(clip, numbers, (0, clip.num_samples))
    if packed.frames is not None:
        counter = _Counter(clip, numbers)
        decoders.watch(packed.frames, counter, clip)
        if counter.seen != clip.num_frames:
            yield f"{counter.seen} of {clip.num_frames} frames have the size of its row"
    if packed.picture is not None and decode_jpeg(packed.picture).shape[:2] != (clip.height, clip.width):
        yield "its picture has not the size of its row"
    if packed.sound is not None:
        decode_sound(packed.sound, clip)
    if packed.mel is not None and decode_mel(packed.mel, clip).shape[2] != clip.num_mel_frames:
        yield "its spectrogram has not the length of its row"
    units = shards.units(clip)
    same = (
        entry.get("unit_offset") == units.at_U.tolist()
        and entry.get("unit_size") == units.size_U.tolist()
        and entry.get("unit_crc32") == units.crc_U.tolist()
    )
    if not same:
        yield f"the index ({INDEX_FILE}) says otherwise than its table"
