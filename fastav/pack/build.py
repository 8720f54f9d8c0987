"""Builds a pack: transcodes a manifest's clips in worker processes, shard by shard, and continues where it stopped."""

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

_SAMPLED_CLIPS = 64
_SLOWEST_FRAME_S = 0.5  # to decode, resize and encode
_AHEAD = 32  # packed clips a worker that may wait for their turn


def build_pack(
    manifest: Manifest,
    out: Path,
    settings: PackSettings,
    *,
    workers: int = 0,
    skip_missing: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Packs all clips of a manifest, or goes on with it; returns the manifest of the pack.

    Args:
        manifest: Of raw media.
        out: Folder of the pack: new, empty, or the same pack begun before.
        settings: What to make.
        workers: Processes; 0 for one a core.
        skip_missing: Whether clips whose files are gone are left out like broken ones.
        console: Where the progress goes; standard output by default.

    Raises:
        UserError: The folder holds something else, none of the clips can be read, or files are gone.
    """
    if len(manifest) and all(clip.shard for clip in manifest.clips(range(min(len(manifest), 16)))):
        raise UserError(f"{manifest.path}: is the manifest of a pack; pack the media that it was made of")
    console, folder = console or Console(), PackFolder(Path(out))
    with folder.locked():
        if folder.begin(manifest, settings):
            console.print(f"{escape(str(out))} is packed already", highlight=False, soft_wrap=True)
            return Manifest.open(folder.path / "manifest.parquet")
        shards = plan_shards(manifest, settings)
        left = [shard for shard in shards if not folder.has(shard)]
        kept = len(shards) - len(left)
        if kept:
            console.print(f"{kept} of {len(shards)} shards were packed before", highlight=False)
        total = sum(len(shard.rows) for shard in left)
        with progress(console, "packing", total, "clips") as advance:
            for shard in left:
                shard.rows.setflags(write=False)
            gone = _pack_shards(manifest, folder, left, settings, workers or num_cores(), advance, skip_missing)
        if gone:
            raise UserError(
                f"{len(gone)} of the media files of {manifest.path} cannot be opened now, the first: {gone[0]}. Their "
                "shards are left open: put the files back and run the same command again, or leave them out by "
                "--skip-missing"
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
    """Packs clips in processes and writes them in their order; returns files that are gone, which leave shards open."""
    stride = max(1, len(manifest) // _SAMPLED_CLIPS)
    places = ((shard, int(row)) for shard in shards for row in shard.rows)
    orders = (
        PackJob(clip, settings, manifest.root, clip.row % stride == 0)
        for shard in shards
        for clip in _clips(manifest, shard)
    )
    waiting: dict[int, Any] = {}
    gone: list[str] = []
    turn, build = 0, None
    longest = max((int(manifest.whole("num_frames").max()) if len(manifest) else 0), 0)
    patience_s = max(PATIENCE_S, longest * _SLOWEST_FRAME_S)
    workers = max(1, min(workers, len(manifest)))
    try:
        for done in run_jobs(orders, pack_clip, workers, ahead=_AHEAD * workers, patience_s=patience_s):
            waiting[done.number] = done
            advance()
            while turn in waiting:
                shard, row = next(places)
                ready = waiting.pop(turn)
                turn += 1
                if build is None:
                    build = ShardBuild(folder, shard)
                _write(build, row, ready)
                if row == shard.rows[-1]:
                    missing = [] if skip_missing else [path for _, path, stage, _ in build.skipped if stage == MISSING]
                    gone += missing
                    build.abandon() if missing else build.close()
                    build = None
    except BaseException:
        if build is not None:
            build.abandon()
        raise
    return gone


def _clips(manifest: Manifest, shard: Shard) -> Iterator[Any]:
    for begin in range(0, len(shard.rows), 256):
        yield from manifest.clips(shard.rows[begin : begin + 256])


def _write(build: ShardBuild, row: int, done: Any) -> None:
    """Writes one clip, or notes why there is none."""
    clip, result = done.job.clip, done.result
    if isinstance(result, PackedClip):
        build.add(row, result)
    elif done.died or result is None:
        build.skipped.append((clip.id, clip.source, "pack", "the decoder crashed on it, or hung"))
    else:
        path, reason, stage = result
        build.skipped.append((clip.id, path or clip.source, stage, reason))
