"""Builds a pack: transcodes the clips of a manifest in worker processes, shard by shard. A killed run can resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fastav.core.errors import UserError
from fastav.core.machine import num_cores
from fastav.core.process_pool import PATIENCE_S, run_jobs
from fastav.core.progress import progress
from fastav.data.manifest import Manifest
from fastav.pack.folder import PackFolder, Shard, ShardBuild, plan_shards
from fastav.pack.settings import PackSettings
from fastav.pack.transcode import MISSING, PackedClip, PackJob, pack_clip

_SAMPLED_CLIPS = 64  # number of clips whose quality is measured, at most twice as many
_SLOWEST_FRAME_S = 0.5  # upper bound on the time to decode, resize and encode one frame
_AHEAD = 32  # packed clips per worker that may wait to be written in order


def build_pack(
    manifest: Manifest,
    out: Path,
    settings: PackSettings,
    *,
    workers: int = 0,
    skip_missing: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Packs all clips of a manifest, or resumes an interrupted run. Returns the manifest of the pack.

    Args:
        manifest: Manifest of the original media.
        out: Folder of the pack: new, empty, or containing the same pack from an earlier run.
        settings: Settings of the pack.
        workers: Number of worker processes; 0 starts one per core.
        skip_missing: If True, clips whose files cannot be opened are skipped like broken clips.
        console: Console for messages and progress; standard output by default.

    Raises:
        UserError: The folder contains something else, no clip can be read, or files cannot be opened.
    """
    if len(manifest) and all(clip.shard for clip in manifest.clips(range(min(len(manifest), 16)))):
        raise UserError(f"{manifest.path}: is the manifest of a pack; pack the manifest of the original media instead")
    console, folder = console or Console(), PackFolder(Path(out))
    with folder.locked():
        if folder.begin(manifest, settings):
            console.print(f"{escape(str(out))} is already packed", highlight=False, soft_wrap=True)
            return Manifest.open(folder.path / "manifest.parquet")
        shards = plan_shards(manifest, settings)
        remaining = [shard for shard in shards if not folder.has(shard)]
        num_finished = len(shards) - len(remaining)
        if num_finished:
            console.print(f"{num_finished} of {len(shards)} shards were already packed", highlight=False)
        total = sum(len(shard.rows) for shard in remaining)
        with progress(console, "packing", total, "clips") as advance:
            for shard in remaining:
                shard.rows.setflags(write=False)
            missing = _pack_shards(manifest, folder, remaining, settings, workers or num_cores(), advance, skip_missing)
        if missing:
            raise UserError(
                f"{manifest.path}: media files cannot be opened (first: {missing[0]}, affected clips: {len(missing)}). "
                "The shards of these clips are not finished. Restore the files and run the same command again, or skip "
                "the clips with --skip-missing"
            )
        return folder.finish(manifest, settings, shards)


def _pack_shards(
    manifest: Manifest,
    folder: PackFolder,
    shards: list[Shard],
    settings: PackSettings,
    workers: int,
    advance: Any,
    skip_missing: bool,
) -> list[str]:
    """Packs clips in worker processes and writes them in order.

    Returns:
        The files that cannot be opened, one per clip. Their shards are not finished.
    """
    stride = max(1, len(manifest) // _SAMPLED_CLIPS)
    places = ((shard, int(row)) for shard in shards for row in shard.rows)
    jobs = (
        PackJob(clip, settings, manifest.root, clip.row % stride == 0)
        for shard in shards
        for clip in _clips(manifest, shard)
    )
    waiting: dict[int, Any] = {}
    all_missing: list[str] = []
    next_number, build = 0, None
    longest = max((int(manifest.whole("num_frames").max()) if len(manifest) else 0), 0)
    patience_s = max(PATIENCE_S, longest * _SLOWEST_FRAME_S)
    workers = max(1, min(workers, len(manifest)))
    try:
        for done in run_jobs(jobs, pack_clip, workers, ahead=_AHEAD * workers, patience_s=patience_s):
            waiting[done.number] = done
            advance()
            while next_number in waiting:
                shard, row = next(places)
                ready = waiting.pop(next_number)
                next_number += 1
                if build is None:
                    build = ShardBuild(folder, shard)
                _write(build, row, ready)
                if row == shard.rows[-1]:
                    missing = [] if skip_missing else [path for _, path, stage, _ in build.skipped if stage == MISSING]
                    all_missing += missing
                    build.abandon() if missing else build.close()
                    build = None
    except BaseException:
        if build is not None:
            build.abandon()
        raise
    return all_missing


def _clips(manifest: Manifest, shard: Shard) -> Iterator[Any]:
    for begin in range(0, len(shard.rows), 256):
        yield from manifest.clips(shard.rows[begin : begin + 256])


def _write(build: ShardBuild, row: int, done: Any) -> None:
    """Writes one clip, or records why it was skipped."""
    clip, result = done.job.clip, done.result
    if isinstance(result, PackedClip):
        build.add(row, result)
    elif done.died or result is None:
        build.skipped.append((clip.id, clip.source, "pack", "the decoder crashed or hung on this clip"))
    else:
        path, reason, stage = result
        build.skipped.append((clip.id, path or clip.source, stage, reason))
