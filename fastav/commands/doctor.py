"""Looks over this machine and, given a manifest, measures which stage will hold a run up, and says what to change.

fastav doctor                      packages, GPU, video decoder, container, cores
fastav doctor MANIFEST             also disk, codecs, and clips/s of every stage and decoder on your own clips
fastav doctor MANIFEST --recipe F  also the recipe's model on this device, and which of the two binds
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastav.core.atomic_files import write_text
from fastav.core.errors import MediaError, UserError
from fastav.core.machine import num_cores
from fastav.data.clip import Clip, PlanBatch
from fastav.data.manifest import Manifest
from fastav.diagnostics.machine import Disk, Fact, disk, gpus, host, packages
from fastav.loader.loader import Loader, Worker
from fastav.media.dali.decoder import Dali, can_decode, missing_requirement
from fastav.media.decoder_choice import ClipStats, choose_decoder, sample_clips
from fastav.media.pyav import PyAV, PyAVDecoder
from fastav.model.av_model import AVModel
from fastav.recipe.parse import load_recipe
from fastav.recipe.schema import Recipe
from fastav.training.inputs import SplitSource, cpu_only, decode_spec, make_plan, modalities

_PLANNED = 64  # clips that a single stage is measured on
_SECONDS = 4.0  # of each measurement
_COMFORT = 1.3  # a loader this much faster than its model never holds it up for long


@dataclass(frozen=True)
class Speed:
    """A stage by itself on the user's clips.

    Attributes:
        stage: What was done.
        clips_per_s: How fast.
        clips_per_cpu_s: For one core; None for what a GPU or other processes do.
    """

    stage: str
    clips_per_s: float
    clips_per_cpu_s: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    parser.add_argument("manifest", nargs="?", type=Path, help="measure on its clips")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="whose sampling and model to measure; default: default"
    )
    parser.add_argument("--no-gpu", action="store_true", help="do not look for a GPU (while an image is built)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found, too")
    parser.add_argument("--seconds", type=float, default=_SECONDS, metavar="S", help="of each measurement; default 4")


def main(args: argparse.Namespace) -> int:
    """Runs `fastav doctor`; returns 1 where something is wrong for any run.

    Raises:
        UserError: A wrong manifest or recipe.
    """
    console = Console()
    manifest = None if args.manifest is None else Manifest.open(args.manifest)
    if args.recipe is not None and manifest is None:
        raise UserError("fastav doctor: --recipe needs a MANIFEST to measure on")
    facts = [*packages(), *([] if args.no_gpu else gpus()), *host(manifest.root if manifest else None)]
    _show_facts(console, facts)
    found: dict[str, object] = {"facts": [asdict(fact) for fact in facts]}
    if manifest is not None:
        found |= _examine(console, manifest, load_recipe(args.recipe, []), args.recipe is not None, args.seconds)
    if args.json is not None:
        write_text(args.json, json.dumps(found, indent=1) + "\n")
    bad = [fact for fact in facts if fact.verdict == "bad"]
    if bad:
        console.print(f"[red]wrong: {escape('; '.join(f'{fact.topic}: {fact.text}' for fact in bad))}[/]")
    return 1 if bad else 0


def _show_facts(console: Console, facts: Sequence[Fact]) -> None:
    table = Table(show_header=False)
    colour = {"good": "", "note": "yellow", "bad": "red"}
    for fact in facts:
        table.add_row(fact.topic, escape(fact.text), style=colour[fact.verdict])
    console.print(table)


def _examine(
    console: Console, manifest: Manifest, recipe: Recipe, with_model: bool, seconds: float
) -> dict[str, object]:
    """Measures on the user's clips and gives advice."""
    clips = sample_clips([manifest])
    clip_stats = ClipStats.of(clips)
    console.print(
        f"{escape(str(manifest.path))}: {len(manifest)} clips; {clip_stats.describe()}", highlight=False, soft_wrap=True
    )
    files = sorted({Path(name) for clip in clips if "://" not in (name := clip.source)})[:32]
    speed_of_disk = disk(files)
    if speed_of_disk is not None:
        text = (
            f"disk: {speed_of_disk.mb_per_s:.0f} MB/s in a row, {speed_of_disk.splices_per_s:.0f} splices/s at random"
        )
        console.print(text, highlight=False)
    source = SplitSource(((manifest, 1.0),), manifest.classes, {})
    speeds = list(_stages(recipe, source, seconds))
    model = _model_speed(recipe, source, seconds) if with_model else None
    table = Table(title="measured on your clips")
    for column in ("stage", "clips/s", "clips per CPU-second"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for speed in [*speeds, *([model] if model else [])]:
        per_cpu = "" if speed.clips_per_cpu_s is None else f"{speed.clips_per_cpu_s:.1f}"
        table.add_row(speed.stage, f"{speed.clips_per_s:.1f}", per_cpu)
    console.print(table)
    advised = list(advice(clips, clip_stats, speeds, model, speed_of_disk, recipe))
    for line in advised:
        console.print(f"- {escape(line)}", highlight=False, soft_wrap=True)
    return {
        "clip_stats": dict(clip_stats.codecs), "disk": asdict(speed_of_disk) if speed_of_disk else None,
        "speeds": [asdict(speed) for speed in speeds], "model": asdict(model) if model else None, "advice": advised,
    }  # fmt: skip


def _stages(recipe: Recipe, source: SplitSource, seconds: float) -> Iterator[Speed]:
    """Decoding by itself, each modality, and whole loaders."""
    plan, used = make_plan(recipe, source), modalities(recipe)
    picked = plan.train(0, _PLANNED)
    rows = source.manifests[0][0].clips(picked.row_B)
    torch.set_num_threads(1)
    has = {"video": any(clip.has_video for clip in rows), "audio": any(clip.has_audio for clip in rows)}
    for what in (what for what in used if has[what]):
        decoder = PyAV().build(decode_spec(recipe, (what,)))
        yield _timed(f"decode {what}, PyAV, one thread", seconds, _decoding(decoder, rows, picked))
    for worker in _WORKERS if recipe.loading.num_workers() > 1 else _WORKERS[:1]:
        yield _loading("PyAV", PyAV(), recipe, source, seconds, worker)
    device: Literal["gpu", "cpu"] = "gpu" if torch.cuda.is_available() else "cpu"
    clip_stats = ClipStats.of(rows)
    if not missing_requirement(device) and any(can_decode(device, *size) for size in clip_stats.sizes):
        yield _loading(f"DALI on the {device.upper()}", Dali(device=device), recipe, source, seconds)


def _loading(
    name: str, kind: PyAV | Dali, recipe: Recipe, source: SplitSource, seconds: float, worker: Worker = "thread"
) -> Speed:
    """A whole loader with one decoder."""
    used, batch = modalities(recipe), 16
    broken: set[str] = set()
    with Loader(
        make_plan(recipe, source), kind.build(decode_spec(recipe, used)),
        msgspec.structs.replace(recipe.loading, worker=worker), modalities=used,
        classes=source.classes, on_broken=lambda clip, error: broken.add(clip.id),
    ) as loader:  # fmt: skip
        batches = iter(loader.batches(("train", i * batch, batch) for i in range(1 << 30)))
        next(batches)
        workers = f"{recipe.loading.num_workers()} {'threads' if worker == 'thread' else 'processes'}"
        found = _timed(f"loader, {name}, {workers}", seconds, lambda: len(next(batches)))
    if worker == "process":
        found = replace(found, clips_per_cpu_s=None)  # the time of other processes is not known here
    if broken:
        few = "clip" if len(broken) == 1 else "clips"
        found = replace(found, stage=f"{found.stage} ({len(broken)} {few} cannot be read, such as {min(broken)})")
    return found


def _decoding(decoder: PyAVDecoder, rows: Sequence[Clip], picked: PlanBatch) -> Callable[[], int]:
    at = -1

    def run() -> int:
        nonlocal at
        at = (at + 1) % len(rows)
        try:
            decoder.decode(rows[at], [picked[at]])
        except MediaError:
            return 0
        return 1

    return run


def _timed(stage: str, seconds: float, make: Callable[[], int]) -> Speed:
    made, cpu, wall = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        made += make()
    took, used = time.perf_counter() - wall, time.process_time() - cpu
    return Speed(stage, made / took, made / max(used, 1e-9))


def _model_speed(recipe: Recipe, source: SplitSource, seconds: float) -> Speed:
    """Forward and backward of the recipe's model, with random weights, on a batch that stays on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frontend = msgspec.structs.replace(
        recipe.frontend, mean=recipe.frontend.mean or 0.0, std=recipe.frontend.std or 1.0
    )
    model = AVModel.empty(recipe.model, source.classes, recipe.sampling, frontend).to(device).train()
    used, count = modalities(recipe), min(recipe.train.micro_batch or recipe.train.batch, _MODEL_CLIPS)
    with Loader(
        make_plan(recipe, source), PyAV().build(decode_spec(recipe, used)), recipe.loading, modalities=used,
        classes=source.classes, on_broken=lambda clip, error: None,
    ) as loader:  # fmt: skip
        batch = next(iter(loader.batches([("train", 0, count)]))).to(device)
    torch.set_num_threads(num_cores())

    def step() -> int:
        inputs = {name: getattr(batch, name) for name in _MODEL_INPUTS}
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            logits = model(**inputs)
        logits.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return len(batch)

    step()
    return _timed(f"model, forward and backward, {device.type}", seconds, step)


def advice(
    clips: Sequence[Clip],
    clip_stats: ClipStats,
    speeds: Sequence[Speed],
    model: Speed | None,
    found: Disk | None,
    recipe: Recipe,
) -> Iterator[str]:
    """What to change, the most useful first."""
    choice = choose_decoder(recipe.decode, clip_stats, "video" in modalities(recipe), cpu_only(recipe))
    if model is None:
        yield "which stage will bind: give --recipe FILE, and its model is measured beside the loader"
    yield f"decoder: {type(choice.config).__name__.lower()} ({choice.reason})"
    loaders = [speed for speed in speeds if speed.stage.startswith("loader")]
    best = max(loaders, key=lambda speed: speed.clips_per_s)
    threads, processes = (max((s.clips_per_s for s in loaders if kind in s.stage), default=0.0) for kind in _KINDS)
    if processes > _WORTH_A_PROCESS * max(threads, 1e-9):
        yield f'loading.worker = "process" is {processes / threads:.2f} times as fast as threads here'
    if model is not None and model.clips_per_s > 0:
        ratio = best.clips_per_s / model.clips_per_s
        binds = "the loader" if ratio < 1 else "the model" if ratio > _COMFORT else "both alike"
        yield f"{binds} will bind: {best.stage} makes {ratio:.2f} times the clips that the model takes"
        per_core = max(speed.clips_per_cpu_s or 0.0 for speed in loaders)
        if ratio < _COMFORT and per_core:
            need = _COMFORT * model.clips_per_s / per_core
            yield f"to feed this model with a margin takes {need:.0f} cores at this decoder's speed (loading.workers)"
    raw = sum(not clip.shard for clip in clips)
    videos = sum(clip.has_video and not clip.shard for clip in clips)
    if videos:
        yield (
            f"pack: {100 * raw / len(clips):.0f} % of the clips are raw; `fastav pack MANIFEST OUT` makes them decode "
            "many times faster (README has the figures)"
        )
    elif raw == 0 and any(clip.has_video for clip in clips):
        yield "packed: preset `fast` decodes faster still, at half as many bytes again; `small` is for slow disks"
    rates = {clip.sample_rate for clip in clips if clip.num_samples}
    if rates - {recipe.frontend.sample_rate} and "audio" in modalities(recipe):
        listed = ", ".join(str(rate) for rate in sorted(rates))
        wanted = recipe.frontend.sample_rate
        yield f"sound is at {listed} Hz and resampled to {wanted} Hz for every clip; packing does it once"
    if found is not None and best.clips_per_s * _GROUPS > found.splices_per_s * recipe.loading.num_workers():
        yield 'the disk is slow at random places: sampling.order = "blocked", or a faster disk'


_WORKERS: tuple[Worker, ...] = ("thread", "process")
_KINDS = ("threads", "processes")
_WORTH_A_PROCESS = 1.1  # of its memory
_MODEL_CLIPS = 16
_MODEL_INPUTS = (
    "frames_BTCHW", "mel_BWCML", "window_BW", "has_video_B", "has_audio_B", "band_B2", "mix_B", "partner_B",
)  # fmt: skip
_GROUPS = 9  # reads of a packed clip: its table and about eight groups of pictures
