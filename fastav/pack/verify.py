"""Verifies a finished pack: checks every byte of its shards, the index and the tables, and decodes every clip."""

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
from fastav.media.packed_clip_decoder import OpenDecoders, decode_audio, decode_mel
from fastav.media.pyav import decode_jpeg
from fastav.media.shards import ShardReader, ShardReading
from fastav.pack.folder import INDEX_FILE, MANIFEST_FILE, PackFolder, no_pack

_CHUNK = 64


@dataclass(frozen=True, slots=True)
class _Check:
    """Consecutive clips to verify, with their index entries."""

    clips: list[Clip]
    entries: list[dict[str, Any]]


def verify(out: Path, workers: int, console: Console) -> tuple[list[str], int]:
    """Verifies a pack.

    Returns:
        The faults, one line each, and the number of clips.

    Raises:
        UserError: The folder does not contain a finished pack.
    """
    folder = PackFolder(Path(out))
    description = folder.description()
    if description is None or not description.get("finished"):
        raise no_pack(out)
    manifest = Manifest.open(folder.path / MANIFEST_FILE)
    faults = list(_check_tars(folder.path, description["shards"]))
    with progress(console, "verifying", len(manifest), "clips") as advance:
        for done in run_jobs(_checks(manifest, folder.path / INDEX_FILE), _verify_clips, max(1, workers)):
            clips = done.job.clips
            crash = f'clips "{clips[0].id}" to "{clips[-1].id}": the decoder crashed or hung on one of them'
            faults += [crash] if done.died else done.result or []
            for _ in clips:
                advance()
    return faults, len(manifest)


def _check_tars(out: Path, expected: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the faults of the tar files: each must exist with the recorded size and SHA-256."""
    shards = sorted((out / "shards").glob("*.tar"))
    names = {Path(name).name for name in expected}
    for stray in sorted({path.name for path in shards} - names):
        yield f"{out / 'shards' / stray}: is not one of the pack's shards"
    for lost in sorted(names - {path.name for path in shards}):
        yield f"{out / 'shards' / lost}: is missing"
    for path in shards:
        entry = expected.get(f"shards/{path.name}")
        if entry is None:
            continue
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                yield f"{path}: expected {entry['bytes']} bytes, got {size}"
            elif sha256(path) != entry["sha256"]:
                yield f"{path}: content has changed since it was packed (SHA-256 differs)"
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror})"


def _checks(manifest: Manifest, index: Path) -> Iterator[_Check]:
    """Yields the clips in chunks, with their index entries."""
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


def _verify_clips(check: _Check) -> list[str]:
    """Decodes whole clips and compares them with their manifest rows and index entries. Returns the faults."""
    shards, decoders = ShardReader(ShardReading()), OpenDecoders()
    faults = []
    for clip, entry in zip(check.clips, check.entries, strict=True):
        try:
            faults += [f'clip "{clip.id}": {fault}' for fault in _faults(clip, entry, shards, decoders)]
        except (FastavError, ValueError, RuntimeError, OSError) as error:
            faults.append(f'clip "{clip.id}": {error}')
    return faults


@dataclass
class _FrameCounter:
    """Counts the frames that have the size given in the manifest."""

    clip: Clip
    numbers: list[int]
    count: int = 0

    def take(self, number: int, frame: Any) -> None:
        if (frame.width, frame.height) == (self.clip.width, self.clip.height):
            self.count += 1


def _faults(clip: Clip, entry: dict[str, Any], shards: ShardReader, decoders: OpenDecoders) -> Iterator[str]:
    numbers = list(range(clip.num_frames))
    packed = shards.fetch(clip, numbers, (0, clip.num_samples))
    if packed.frames is not None:
        counter = _FrameCounter(clip, numbers)
        decoders.decode(packed.frames, counter, clip)
        if counter.count != clip.num_frames:
            size = f"{clip.width}x{clip.height}"
            yield f"only {counter.count} of {clip.num_frames} frames have the size in the manifest, {size}"
    if packed.picture is not None:
        height, width = decode_jpeg(packed.picture).shape[:2]
        if (height, width) != (clip.height, clip.width):
            yield f"picture is {width}x{height}, expected {clip.width}x{clip.height} as in the manifest"
    if packed.audio is not None:
        decode_audio(packed.audio, clip)
    if packed.mel is not None:
        length = decode_mel(packed.mel, clip).shape[2]
        if length != clip.num_mel_frames:
            yield f"spectrogram has {length} frames, expected {clip.num_mel_frames} as in the manifest"
    units = shards.units(clip)
    same = (
        entry.get("unit_offset") == units.at_U.tolist()
        and entry.get("unit_size") == units.size_U.tolist()
        and entry.get("unit_crc32") == units.crc_U.tolist()
    )
    if not same:
        yield f"entry in {INDEX_FILE} differs from the unit table in the shard"
