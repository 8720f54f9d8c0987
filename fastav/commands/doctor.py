"""Checks this machine; with a manifest, measures every stage of the input on its clips and finds the bottleneck.

fastav doctor                         packages, GPU, video decoder, container, cores
fastav doctor MANIFEST                also disk, codecs, and clips/s of every stage and decoder on your own clips
fastav doctor MANIFEST --recipe FILE  also the model of the recipe on this device: is the loader or the model slower?
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

_NUM_CLIPS = 64  # clips on which a single stage is measured
_SECONDS = 4.0  # duration of each measurement
_MARGIN = 1.3  # a loader this many times as fast as the model delays it only briefly


@dataclass(frozen=True)
class Speed:
    """Measured speed of one stage on the user's clips.

    Attributes:
        stage: Name of the stage.
        clips_per_s: Clips per second of wall time.
        clips_per_cpu_s: Clips per second of CPU time; None if other processes do the work.
    """

    stage: str
    clips_per_s: float
    clips_per_cpu_s: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastav doctor`."""
    parser.add_argument("manifest", nargs="?", type=Path, metavar="MANIFEST", help="manifest whose clips are measured")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE",
        help="recipe whose sampling and model are measured; without it, the default sampling and no model",
    )  # fmt: skip
    parser.add_argument("--no-gpu", action="store_true", help="do not check the GPU (such as during an image build)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--seconds", type=float, default=_SECONDS, metavar="S", help="of each measurement; default 4")


def main(args: argparse.Namespace) -> int:
    """Runs `fastav doctor`; returns 1 if a check failed that affects every run.

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
        found |= _measure(console, manifest, load_recipe(args.recipe, []), args.recipe is not None, args.seconds)
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


def _measure(
    console: Console, manifest: Manifest, recipe: Recipe, with_model: bool, seconds: float
) -> dict[str, object]:
    """Measures disk, stages and model on the user's clips, and prints advice."""
    clips = sample_clips([manifest])
    clip_stats = ClipStats.of(clips)
    console.print(
        f"{escape(str(manifest.path))}: {len(manifest)} clips; {clip_stats.describe()}", highlight=False, soft_wrap=True
    )
    files = sorted({Path(name) for clip in clips if "://" not in (name := clip.source)})[:32]
    speed_of_disk = disk(files)
    if speed_of_disk is not None:
        random_reads = f"{speed_of_disk.splices_per_s:.0f} random reads of 16 KiB per second"
        console.print(f"disk: {speed_of_disk.mb_per_s:.0f} MB/s sequential, {random_reads}", highlight=False)
    source = SplitSource(((manifest, 1.0),), manifest.classes, {})
    speeds = list(_measure_stages(recipe, source, seconds))
    model = _measure_model(recipe, source, seconds) if with_model else None
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


def _measure_stages(recipe: Recipe, source: SplitSource, seconds: float) -> Iterator[Speed]:
    """Measures decoding of each modality in one thread, and whole loaders with each decoder."""
    plan, used = make_plan(recipe, source), modalities(recipe)
    planned = plan.train(0, _NUM_CLIPS)
    rows = source.manifests[0][0].clips(planned.row_B)
    torch.set_num_threads(1)
    has = {"video": any(clip.has_video for clip in rows), "audio": any(clip.has_audio for clip in rows)}
    for modality in (modality for modality in used if has[modality]):
        decoder = PyAV().build(decode_spec(recipe, (modality,)))
        yield _timed(f"decode {modality}, PyAV, one thread", seconds, _decode_next(decoder, rows, planned))
    for worker in _WORKERS if recipe.loading.num_workers() > 1 else _WORKERS[:1]:
        yield _measure_loader("PyAV", PyAV(), recipe, source, seconds, worker)
    device: Literal["gpu", "cpu"] = "gpu" if torch.cuda.is_available() else "cpu"
    clip_stats = ClipStats.of(rows)
    if not missing_requirement(device) and any(can_decode(device, *size) for size in clip_stats.sizes):
        yield _measure_loader(f"DALI on the {device.upper()}", Dali(device=device), recipe, source, seconds)


def _measure_loader(
    name: str, kind: PyAV | Dali, recipe: Recipe, source: SplitSource, seconds: float, worker: Worker = "thread"
) -> Speed:
    """Measures a whole loader with one decoder."""
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
        found = replace(found, clips_per_cpu_s=None)  # the CPU time of other processes is not measured
    if broken:
        noun = "clip" if len(broken) == 1 else "clips"
        found = replace(found, stage=f"{found.stage} ({len(broken)} {noun} cannot be read, such as {min(broken)})")
    return found


def _decode_next(decoder: PyAVDecoder, rows: Sequence[Clip], planned: PlanBatch) -> Callable[[], int]:
    """Returns a function that decodes the next clip and returns the number of decoded clips: 1, or 0 on an error."""
    index = -1

    def decode() -> int:
        nonlocal index
        index = (index + 1) % len(rows)
        try:
            decoder.decode(rows[index], [planned[index]])
        except MediaError:
            return 0
        return 1

    return decode


def _timed(stage: str, seconds: float, work: Callable[[], int]) -> Speed:
    """Calls `work`, which returns a number of clips, for some seconds and measures its speed."""
    clips, cpu, wall = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        clips += work()
    took, used = time.perf_counter() - wall, time.process_time() - cpu
    return Speed(stage, clips / took, clips / max(used, 1e-9))


def _measure_model(recipe: Recipe, source: SplitSource, seconds: float) -> Speed:
    """Measures forward and backward pass of the recipe's model with random weights, on one batch kept on the device."""
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
    """Yields advice, the most useful first.

    Args:
        clips: Sample of the clips.
        clip_stats: Codecs and sizes of the sample.
        speeds: Measured stages and loaders.
        model: Measured model; None if no recipe was given.
        found: Measured disk; None if no file is local.
        recipe: The recipe.
    """
    choice = choose_decoder(recipe.decode, clip_stats, "video" in modalities(recipe), cpu_only(recipe))
    if model is None:
        yield "bottleneck unknown: add --recipe FILE to compare the loader with the model of a recipe"
    yield f"decoder: {type(choice.config).__name__.lower()} ({choice.reason})"
    loaders = [speed for speed in speeds if speed.stage.startswith("loader")]
    best = max(loaders, key=lambda speed: speed.clips_per_s)
    threads, processes = (max((s.clips_per_s for s in loaders if kind in s.stage), default=0.0) for kind in _KINDS)
    if processes > _WORTH_A_PROCESS * max(threads, 1e-9):
        yield f'loading.worker = "process" is {processes / threads:.2f} times as fast as threads here'
    if model is not None and model.clips_per_s > 0:
        ratio = best.clips_per_s / model.clips_per_s
        slower = "the loader" if ratio < 1 else "the model" if ratio > _MARGIN else "loader and model alike"
        yield f"bottleneck: {slower}; {best.stage} delivers {ratio:.2f} times the clips/s of the model"
        per_core = max(speed.clips_per_cpu_s or 0.0 for speed in loaders)
        if ratio < _MARGIN and per_core:
            need = _MARGIN * model.clips_per_s / per_core
            yield f"feeding this model with a margin takes {need:.0f} cores with this decoder; set loading.workers"
    raw = sum(not clip.shard for clip in clips)
    videos = sum(clip.has_video and not clip.shard for clip in clips)
    if videos:
        yield (
            f"pack: {100 * raw / len(clips):.0f} % of the clips are raw; `fastav pack MANIFEST OUT` makes them decode "
            "many times faster (figures in README.md)"
        )
    elif raw == 0 and any(clip.has_video for clip in clips):
        yield (
            "packed already: preset `fast` decodes 1.5 times faster and takes 1.7 times the bytes (figures in "
            "README.md); `small` suits slow disks"
        )
    rates = {clip.sample_rate for clip in clips if clip.num_samples}
    if rates - {recipe.frontend.sample_rate} and "audio" in modalities(recipe):
        listed = ", ".join(str(rate) for rate in sorted(rates))
        target = recipe.frontend.sample_rate
        yield f"audio is at {listed} Hz and resampled to {target} Hz for every clip; packing does this once"
    if found is not None and best.clips_per_s * _READS_PER_CLIP > found.splices_per_s * recipe.loading.num_workers():
        yield 'random reads from the disk are slow: set sampling.order = "blocked", or use a faster disk'


_WORKERS: tuple[Worker, ...] = ("thread", "process")
_KINDS = ("threads", "processes")
_WORTH_A_PROCESS = 1.1  # speed-up that justifies the memory of worker processes
_MODEL_CLIPS = 16
_MODEL_INPUTS = (
    "frames_BTCHW", "mel_BWCML", "window_BW", "has_video_B", "has_audio_B", "band_B2", "mix_B", "partner_B",
)  # fmt: skip
_READS_PER_CLIP = 9  # reads of a packed clip: its frame index and about eight groups of pictures
