"""Threads or processes as workers of the loader: `python -m benchmarks loader_workers MANIFEST [--make 60]`.

Both sides decode the same plan with the same decoder, clip by clip, into rows of a batch. `threads` is the loader
itself. `processes` is a process pool in its best form: spawned once (fork is not safe with threads and CUDA), it gets
the decoder at its start and one clip per task, and writes into batches in shared memory, so that no frame is pickled or
copied. Both stay running and alternate (A B B A ...) in short segments, without and with training-like load in the main
thread, so that other load on the machine affects both equally. Prints medians with intervals.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from benchmarks import result as results
from benchmarks.timing import median, paired_ratio
from fastav.core.command_runner import Parser
from fastav.data.clip import Clip, ClipPlan
from fastav.data.manifest import Manifest, write_manifest
from fastav.data.plan import Plan, Sampling
from fastav.loader.loader import Loader, Loading
from fastav.media.decoder import DecodeSpec
from fastav.media.probe import probe
from fastav.media.pyav import PyAV
from fastav.media.spectrogram import Frontend

_PLOTTED = {
    "first_batch_s": "time to the first batch, s",
    "clips_per_s": "clips per second, without and with load",
    "step_ms": "step of the load, ms",
}
PREFETCH = 2
SETTLE_S = 0.5
SAMPLING = Sampling(frames=4, image_size=64, window=400, mask_bands=0)


def make_clips(manifest: Path, num: int) -> Manifest:
    """Writes `num` mp4 files of 4 s (H.264 96 x 96 with B-frames, GOP 250, AAC 44.1 kHz stereo) and their manifest."""
    folder = manifest.parent / f"{manifest.stem}_media"
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for i in range(num):
        path = folder / f"{i:04d}.mp4"
        if not path.exists():
            write_mp4(path, np.random.default_rng(i))
        info = probe(path)
        clips.append(
            Clip(
                id=path.stem,
                video=path,
                audio=path,
                duration_s=info.duration_s,
                num_frames=info.num_frames,
                fps=info.fps,
                width=info.width,
                height=info.height,
                rotation=info.rotation,
                video_codec=info.video_codec,
                num_samples=info.num_samples,
                sample_rate=info.sample_rate,
                channels=info.channels,
                audio_codec=info.audio_codec,
                audio_offset_s=info.audio_offset_s,
                labels=(f"class {i % 4}",),
            )
        )
    return write_manifest(manifest, clips)


def write_mp4(path: Path, rng: np.random.Generator, seconds: int = 4, rate: int = 25) -> None:
    """Writes a video of a drifting texture with a chirp as audio."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate, options={"g": "250", "bf": "3", "crf": "23"})
        video.width = video.height = 96
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=44_100, layout="stereo")
        texture = rng.integers(0, 256, (96 * 2, 96 * 2, 3), dtype=np.uint8)
        for t in range(seconds * rate):
            picture = np.ascontiguousarray(texture[t % 96 : t % 96 + 96, (2 * t) % 96 : (2 * t) % 96 + 96])
            picture = picture // 4 + 96
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        at = np.arange(seconds * 44_100) / 44_100
        chirp = 0.3 * np.sin(2 * np.pi * (400 * at + rng.uniform(100, 900) * at**2)).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(np.stack([chirp, chirp]), format="fltp", layout="stereo")
        sound.rate = 44_100
        container.mux(audio.encode(sound))
        container.mux(audio.encode())


def make_plan(manifest: Manifest) -> Plan:
    frontend = Frontend()
    return Plan([(manifest, 1.0)], SAMPLING, seed=0, mel_bands=frontend.num_mels, mel_frames=frontend.num_frames_s)


def make_decoder() -> Any:
    return PyAV().build(DecodeSpec(image_size=SAMPLING.image_size, frontend=Frontend(), window=SAMPLING.window))


class Side(ABC):
    """One of the two kinds of workers, as an endless stream of batches."""

    def __init__(self) -> None:
        self.stream = self.tensors()

    @abstractmethod
    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields frames and spectrograms of one batch after another."""

    @abstractmethod
    def workers(self) -> list[int]:
        """Returns the process ids of the workers."""

    @abstractmethod
    def close(self) -> None:
        """Ends the workers."""


class ThreadSide(Side):
    """The loader with threads."""

    def __init__(self, manifest: Manifest, batch: int, workers: int) -> None:
        config = Loading(workers=workers, prefetch=PREFETCH)
        self._loader = Loader(
            make_plan(manifest),
            make_decoder(),
            config,
            modalities=("video", "audio"),
            classes=manifest.classes,
            on_broken=lambda clip, error: None,
        )
        self._batch = batch
        super().__init__()

    @override
    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        for made in self._loader.batches(("train", i * self._batch, self._batch) for i in count()):
            assert made.frames_BTCHW is not None
            assert made.mel_BWCML is not None
            yield made.frames_BTCHW, made.mel_BWCML

    @override
    def workers(self) -> list[int]:
        return []

    @override
    def close(self) -> None:
        self._loader.close()


class ProcessSide(Side):
    """A pool of processes that write into batches in shared memory."""

    def __init__(self, manifest: Manifest, batch: int, workers: int) -> None:
        self._manifest, self._plan, self._batch = manifest, make_plan(manifest), batch
        slots, frames, size = PREFETCH + 1, SAMPLING.frames, SAMPLING.image_size
        self._frames = torch.empty(slots, batch, frames, 3, size, size, dtype=torch.uint8).share_memory_()
        self._mel = torch.empty(slots, batch, 1, 1, Frontend().num_mels, SAMPLING.window).share_memory_()
        context: BaseContext = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, _start_process, (self._frames, self._mel))
        super().__init__()

    @override
    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        pending: deque[list[Future[None]]] = deque()
        for number in count():
            while len(pending) < PREFETCH:
                pending.append(self._submit(number + len(pending)))
            for future in pending.popleft():
                future.result()
            slot = number % len(self._frames)
            yield self._frames[slot], self._mel[slot]

    def _submit(self, number: int) -> list[Future[None]]:
        plan = self._plan.train(number * self._batch, self._batch)
        clips = self._manifest.clips(plan.row_B)
        slot = number % len(self._frames)
        pairs = zip(clips, plan, strict=True)
        return [self._pool.submit(_decode, slot, row, clip, one) for row, (clip, one) in enumerate(pairs)]

    @override
    def workers(self) -> list[int]:
        return list(self._pool._processes)

    @override
    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


_in_process: dict[str, Any] = {}


def _start_process(frames: Tensor, mel: Tensor) -> None:
    torch.set_num_threads(1)
    _in_process.update(decoder=make_decoder(), frames=frames, mel=mel)


def _decode(slot: int, row: int, clip: Clip, plan: ClipPlan) -> None:
    (sample,) = _in_process["decoder"].decode(clip, [plan])
    _in_process["frames"][slot, row].copy_(sample.frames_TCHW)
    _in_process["mel"][slot, row].copy_(sample.mel_WCML)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _private_mib(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    if not rollup.exists():
        return math.nan
    lines = rollup.read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def training_step() -> Callable[[], None]:
    """Returns a training step of a small transformer on the CPU: long operations that release Python's GIL."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.0)
    network = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(network.parameters())
    tokens = torch.randn(8, 128, 128)

    def step() -> None:
        network(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def launching_step() -> Callable[[], None]:
    """Returns a step like the launches of a GPU model: thousands of short calls, each of which takes Python's GIL."""
    tiny = torch.zeros(8)

    def step() -> None:
        for _ in range(4000):
            tiny.add_(1)

    return step


def first_batch_s(make: Callable[[], Side]) -> float:
    """Returns the seconds from the start to the first batch."""
    start_s = time.perf_counter()
    side = make()
    try:
        next(side.stream)
        return time.perf_counter() - start_s
    finally:
        side.close()


def segment(side: Side, batches: int, step: Callable[[], None] | None) -> dict[str, float]:
    """Measures the rate over some batches of a running side."""
    for _ in range(PREFETCH):  # prefetched batches
        next(side.stream)
    pids = [os.getpid(), *side.workers()]
    begun, burnt, stepped, clips = time.perf_counter(), sum(map(_cpu_s, pids)), 0.0, 0
    for _ in range(batches):
        frames, _ = next(side.stream)
        clips += len(frames)
        if step:
            stepped += _timed(step)
    wall, burnt = time.perf_counter() - begun, sum(map(_cpu_s, pids)) - burnt
    time.sleep(SETTLE_S)  # until its queue is full, so that it does not disturb the other side
    return {
        "clips_per_s": clips / wall,
        "cpu_ms_per_clip": 1e3 * burnt / clips,
        "step_ms": 1e3 * stepped / batches,
        "worker_mib": sum(map(_private_mib, side.workers())),
    }


def main(words: Sequence[str]) -> int:
    """Runs the suite."""
    parser = Parser(prog="python -m benchmarks loader_workers", description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path, help="a .parquet manifest")
    parser.add_argument("--make", type=int, default=0, metavar="N", help="first generate the manifest with N clips")
    parser.add_argument("--workers", type=int, default=Loading().num_workers(), help="threads or processes")
    parser.add_argument("--batch", type=int, default=16, help="clips per batch (%(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="timed batches per segment (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="segments of each side (%(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="timed starts of each side (%(default)s)")
    parser.add_argument("--step-threads", type=int, default=1, help="torch threads of the load (%(default)s)")
    parser.add_argument("--switch-ms", type=float, default=5.0, help="Python's thread switch interval (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file of the result (in benchmarks/results/)")
    args = parser.parse_args(words)
    sys.setswitchinterval(args.switch_ms / 1e3)
    manifest = make_clips(args.manifest, args.make) if args.make else Manifest.open(args.manifest)
    makers: dict[str, Callable[[], Side]] = {
        "threads": lambda: ThreadSide(manifest, args.batch, args.workers),
        "processes": lambda: ProcessSide(manifest, args.batch, args.workers),
    }
    made_by: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(args.starts):
        for name in _turn(makers, number):
            made_by[f"start {name}"].append({"first_batch_s": first_batch_s(makers[name])})
    torch.set_num_threads(args.step_threads)
    loads = {"idle": None, "training": training_step(), "launching": launching_step()}
    sides = {name: make() for name, make in makers.items()}
    for number in range(-1, args.rounds):  # the first round warms up
        for load, step in loads.items():
            for name in _turn(makers, number):
                made = segment(sides[name], args.batches, step)
                if number >= 0:
                    made_by[f"{load} {name}"].append(made)
                print(f"{load:9} {name:9}", {k: round(v, 1) for k, v in made.items()}, flush=True)
            if number >= 0 and step:
                alone = statistics.median(_timed(step) for _ in range(args.batches))
                made_by[f"{load} alone"].append({"step_ms": 1e3 * alone})
    for side in sides.values():
        side.close()
    report(made_by, words, args)
    return 0


def report(made_by: dict[str, list[dict[str, float]]], words: Sequence[str], args: argparse.Namespace) -> None:
    """Prints medians with their intervals, and writes the result."""
    found = results.new("loader_workers", list(words), {"workers": [args.workers], "kind": ["threads", "processes"]})
    for name, many in sorted(made_by.items()):
        found["runs"] += [{"variant": name, "repeat": number, **one} for number, one in enumerate(many)]
        measured = {key: median(np.array([one[key] for one in many])) for key in many[0]}
        for key, interval in measured.items():
            results.summarise(found, name, key, interval)
        print(f"{name:20}", *(f"{key} {interval}" for key, interval in measured.items()), sep="  ")
    for load in ("idle", "training", "launching"):
        sides = [
            np.array([one["clips_per_s"] for one in made_by[f"{load} {name}"]]) for name in ("threads", "processes")
        ]
        names = (f"{load} threads", f"{load} processes")
        results.judge(found, *names, "clips_per_s", paired_ratio(*sides))
    print(f"wrote {results.write(found, args.out, _PLOTTED)}")


def _turn(names: Iterable[str], number: int) -> list[str]:
    """Returns the names in alternating order (A B, then B A), so that drift affects both equally."""
    return sorted(names, reverse=bool(number % 2))


def _timed(step: Callable[[], None]) -> float:
    before = time.perf_counter()
    step()
    return time.perf_counter() - before
