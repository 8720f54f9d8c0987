"""Speed of a GPU's video decoder on whole files and spliced GOPs: `python -m benchmarks nvdec [--footage FILE]`.

For {640x360, 448x256} x {GOP 250, 8, 4, 1} x {whole file, spliced} x decoding threads: clips/s of eight frames each,
and use of the decoder. Then the loader on a pack with 1, 2 and 3 pipelines, and use of the GPU. Pixels are first
compared with PyAV, in the same process. Without a GPU the graph is checked on MJPEG and nothing is timed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import result as results
from benchmarks.console import open_console
from benchmarks.data.clips import make, repeated, scene
from benchmarks.nvml import Gpu, Watch
from fastav.core.command_runner import Parser
from fastav.core.errors import FastavError
from fastav.data.plan import Plan, Sampling, segment_frames
from fastav.loader.loader import Loader, Loading
from fastav.media import mp4_muxer
from fastav.media.dali.decoder import Dali, missing_requirement
from fastav.media.dali.graph import Engine, PipelinePlace, VideoGraph, VideoSample
from fastav.media.decoder import DecodeSpec
from fastav.media.shards.format import UnitKind
from fastav.media.shards.gop_splice import needed_units
from fastav.media.spectrogram import Frontend

SIZES, GOPS, FRAMES, BATCH, SIDE = ((640, 360), (448, 256)), (250, 8, 4, 1), 8, 64, 224
_PLOTTED = {
    "clips_per_s": "clips per second, eight frames each, without audio",
    "loader_clips_per_s": "the loader's clips per second, with audio",
}
_TOLERANCE = 3.0  # largest mean difference of two decoders, grey levels


class EncodedStream:
    """The access units of one clip."""

    def __init__(self, codec: str, units: list[bytes], gop: int, size: tuple[int, int]) -> None:
        self.codec, self.units, self.gop, self.size = codec, units, gop, size
        kinds = [UnitKind.FRAME if i % gop else UnitKind.KEYFRAME for i in range(len(units))]
        self.kinds: NDArray[np.int64] = np.array(kinds, np.int64)

    def sample(self, numbers: NDArray[np.int32], spliced: bool) -> VideoSample:
        """Returns the input of DALI for the planned frames: the whole file, or only the GOPs that are needed."""
        chosen = needed_units(self.kinds, numbers.tolist()) if spliced else np.arange(len(self.units))
        units = [self.units[i] for i in chosen.tolist()]
        keys = [int(self.kinds[i]) == UnitKind.KEYFRAME for i in chosen.tolist()]
        width, height = self.size
        shown = np.searchsorted(chosen, numbers).astype(np.int32)
        data = mp4_muxer.mux(self.codec, units, keys, width, height)
        places = np.arange(len(numbers), dtype=np.int32)
        return VideoSample(data, shown, places, ((0, 0, width, height),), (False,), 3 * width * height)

    def truth(self, numbers: NDArray[np.int32]) -> NDArray[np.float64]:
        """Returns the same frames decoded by PyAV and resized, [T, 3, SIDE, SIDE]."""
        context: Any = av.CodecContext.create(self.codec, "r")
        frames = []
        for unit in (*self.units, None):
            frames += context.decode(None if unit is None else av.Packet(unit))
        made = [frames[n].reformat(SIDE, SIDE, "rgb24", interpolation="BILINEAR").to_ndarray() for n in numbers]
        return np.stack(made).transpose(0, 3, 1, 2).astype(np.float64)


def encode(pictures: Sequence[NDArray[np.uint8]], size: tuple[int, int], gop: int, codec: str) -> EncodedStream:
    """Encodes planar 4:2:0 frames as packs are encoded, with any GOP length."""
    context: Any = av.CodecContext.create("libx264" if codec == "h264" else codec, "w")
    context.width, context.height = size
    context.pix_fmt = "yuv420p" if codec == "h264" else "yuvj420p"
    context.time_base, context.framerate, context.thread_count = Fraction(1, 25), Fraction(25), 1
    if codec == "h264":
        params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:ref=1:aud=1:repeat-headers=1:annexb=1:open-gop=0"
        context.options = {"preset": "veryfast", "tune": "fastdecode", "crf": "23", "x264-params": params}
    else:
        context.options = {"qmin": "3", "qmax": "3"}
    units = []
    for i, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, "yuv420p").reformat(*size, format=context.pix_fmt)
        frame.pts = i
        units += [bytes(packet) for packet in context.encode(frame)]
    return EncodedStream(codec, units + [bytes(packet) for packet in context.encode(None)], gop, size)


def main(words: Sequence[str]) -> int:
    """Runs the suite."""
    parser = Parser(prog="benchmarks nvdec", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--footage", type=Path, metavar="FILE", help="real video of 10 s (default: a generated scene)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 7, 14, 28], help="numbers of decoding threads")
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each measurement, s (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file of the result (in benchmarks/results/)")
    args = parser.parse_args(words)
    console = open_console()
    missing = missing_requirement("gpu")
    if missing:
        _check_on_cpu(console)
        console.print(f"checked on the CPU with MJPEG; nothing is timed: {missing}", highlight=False, soft_wrap=True)
        return 0
    found = results.new("nvdec", list(words), {"size": list(SIZES), "gop": list(GOPS), "threads": args.threads})
    table = Table(title=f"{FRAMES} frames per clip, batches of {BATCH}")
    for column in ("size", "GOP", "read", "threads", "clips/s", "frames/s decoded", "NVDEC %"):
        table.add_column(column, justify="right")
    for size in SIZES:
        pictures = scene(args.footage, 250, size)
        for gop in GOPS:
            stream = encode(pictures, size, gop, "h264")
            for spliced in (False, True):
                _check(stream, spliced, PipelinePlace(torch.cuda.current_device(), 4))
                for threads in args.threads:
                    row = _time(stream, spliced, threads, args.seconds)
                    name = f"{size[0]}x{size[1]}, GOP {gop}, {'spliced' if spliced else 'whole'}, {threads} threads"
                    found["runs"].append({"variant": name, "repeat": 0, **row})
                    shown = ("spliced" if spliced else "whole", str(threads), f"{row['clips_per_s']:.0f}")
                    rest = (f"{row['decoded_frames_per_s']:.0f}", _percent(row["nvdec_pct"]))
                    table.add_row(f"{size[0]}x{size[1]}", str(gop), *shown, *rest)
    console.print(table)
    _loaders(found, console, args.footage, args.seconds)
    console.print(f"{results.write(found, args.out, _PLOTTED)}", highlight=False, soft_wrap=True)
    return 0


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _plans(stream: EncodedStream, count: int, seed: int = 0) -> list[NDArray[np.int32]]:
    u = np.random.default_rng(seed).random((count, FRAMES))
    return list(segment_frames(np.full(count, len(stream.units)), u))


def _check(stream: EncodedStream, spliced: bool, place: PipelinePlace) -> None:
    """Compares a few clips with PyAV.

    Raises:
        FastavError: DALI's frames differ, or DALI cannot decode them.
    """
    engine: Engine[VideoSample] = Engine(VideoGraph(place, SIDE))
    plans = _plans(stream, 3)
    engine.start([stream.sample(numbers, spliced) for numbers in plans])
    outcome = engine.finish()
    if outcome.failed:
        raise FastavError(f"DALI cannot decode the stream: {next(iter(outcome.failed.values()))}")
    for numbers_of_part, outputs in outcome.parts:
        for place_in_part, number in enumerate(numbers_of_part):
            decoded = outputs[0][place_in_part].cpu().double().numpy()
            truth = stream.truth(plans[number])
            if decoded.shape[-1] == 3:  # channels last
                truth = truth.transpose(0, 2, 3, 1)
            if decoded.shape != truth.shape:
                raise FastavError(f"DALI returned frames of shape {decoded.shape}, PyAV {truth.shape}")
            difference = np.abs(decoded - truth).mean()
            if difference > _TOLERANCE:
                raise FastavError(f"DALI's frames differ from PyAV's by {difference:.1f} grey levels on average")


def _check_on_cpu(console: Console) -> None:
    pictures = scene(None, 30, (448, 256))
    stream = encode(pictures, (448, 256), 1, "mjpeg")
    for spliced in (False, True):
        _check(stream, spliced, PipelinePlace(None, 2))
    console.print("MJPEG, whole and spliced: DALI's frames equal PyAV's", highlight=False)


def _time(stream: EncodedStream, spliced: bool, threads: int, seconds: float) -> dict[str, Any]:
    """Measures clips/s of one setting, after a warm-up of two batches."""
    engine: Engine[VideoSample] = Engine(VideoGraph(PipelinePlace(torch.cuda.current_device(), threads), SIDE))
    samples = [stream.sample(numbers, spliced) for numbers in _plans(stream, 4 * BATCH, seed=1)]
    decoded = sum(int(sample.frames_U[-1]) + 1 for sample in samples) / len(samples)

    def run(number: int) -> None:
        begin = number % 4 * BATCH
        engine.start(samples[begin : begin + BATCH])
        engine.finish()
        torch.cuda.synchronize()

    for number in range(2):
        run(number)
    clips, begun = 0, time.perf_counter()
    with Watch(Gpu.of(torch.device("cuda"))) as watch:
        while time.perf_counter() - begun < seconds:
            run(clips // BATCH)
            clips += BATCH
    rate = clips / (time.perf_counter() - begun)
    engine.close()
    return {
        "spliced": spliced, "threads": threads, "clips_per_s": round(rate, 1),
        "decoded_frames_per_s": round(rate * decoded), "nvdec_pct": watch.found.nvdec_pct,
        "sm_pct": watch.found.sm_pct,
    }  # fmt: skip


def _loaders(found: dict[str, Any], console: Console, footage: Path | None, seconds: float) -> None:
    """Measures the loader on packs with different numbers of pipelines."""
    frontend, sampling = Frontend(), Sampling()
    with tempfile.TemporaryDirectory() as scratch:
        media = make(Path(scratch), footage)
        for pack in ("balanced", "fast"):
            manifest = repeated(media.packed[pack], 1024, Path(scratch) / f"{pack}s.parquet")
            for pipelines in (1, 2, 3):
                plan = Plan(
                    [(manifest, 1.0)], sampling, seed=0, mel_bands=frontend.num_mels, mel_frames=frontend.num_frames_s
                )
                decoder = Dali(device="gpu", pipelines=pipelines).build(DecodeSpec(("video", "audio"), SIDE, frontend))
                with Loader(
                    plan, decoder, Loading(prefetch=2 + pipelines), modalities=("video", "audio"), classes=("a",),
                    on_broken=lambda clip, error: console.print(f"{clip.id}: {error}"),
                ) as loader:  # fmt: skip
                    batches = iter(loader.batches(("train", i * BATCH, BATCH) for i in range(1 << 30)))
                    next(batches)
                    clips, begun = 0, time.perf_counter()
                    with Watch(Gpu.of(torch.device("cuda"))) as watch:
                        while time.perf_counter() - begun < 2 * seconds:
                            clips += len(next(batches))
                    rate = clips / (time.perf_counter() - begun)
                use = {"nvdec_pct": watch.found.nvdec_pct, "sm_pct": watch.found.sm_pct}
                row = {"repeat": 0, "loader_clips_per_s": round(rate, 1), "pipelines": pipelines, **use}
                found["runs"].append({"variant": f"{pack}, {pipelines} pipelines", **row})
                console.print(f"loader, {pack}, {pipelines} pipelines: {rate:.0f} clips/s, {use}", highlight=False)
