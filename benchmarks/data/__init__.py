"""Decoding and loading: `python -m benchmarks data [--footage FILE]`.

Measures in alternation, in one process: a raw web clip through torchcodec; the same clip packed, through fastav and
through other readers of the same access units; ten JPEGs per clip, extracted beforehand. Then compares fastav with the
fastest of these in pairs, by CPU time, and with one thread per core by wall time. Then measures the loader on raw and
packed clips with both modalities, `repeat`, and (with --sweep) workers and resolutions. Prints medians with 95 %
intervals; writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import result as results
from benchmarks.console import open_console
from benchmarks.data.clips import PACKS, TestFiles, make
from benchmarks.data.duels import duels
from benchmarks.data.loading import loading_turns, sweep_turns
from benchmarks.data.peers import SIZE, Dump, Ours, Peer, peers_of, processes
from benchmarks.timing import MedianInterval, Turn, interleave, median, per_cpu_second, per_second, ratio
from fastav.core.command_runner import Parser
from fastav.core.machine import num_cores
from fastav.data.clip import Clip, ClipPlan
from fastav.data.plan import random_crops, segment_frames

FRAMES = 8
_LONGER = 4
_PLANS = 97  # prime, so that turns start at different plans
_PLOTTED = {"clips_per_cpu_s": "clips per CPU-second (8 frames, cropped and resized to 224 x 224)"}
_COLOURS = {"ours": "#d1495b", "torchcodec exact": "#30638e", "torchcodec approximate": "#6a9bc3", "SPDL": "#edae49"}
_RAW = "raw through torchcodec exact"


def main(words: Sequence[str]) -> int:
    """Runs the suite."""
    args = _arguments(words)
    torch.set_num_threads(1)
    console = open_console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        media = make(folder, args.footage, frames=args.frames, size=args.size)
        if args.profile:
            return _profile(media)
        found = results.new("data", list(words), {"decoder": [], "pack": list(PACKS), "workers": [1, args.workers]})
        _describe(found, media)
        turns = interleave(
            _decoding(media, args.clips), args.rounds, log=lambda text: console.log(text), warm=not args.quick
        )
        _report(found, console, "one thread, video only", turns, per_cpu_second, "clips_per_cpu_s")
        _verdicts(found, console, turns, per_cpu_second, "clips_per_cpu_s")
        with ThreadPoolExecutor(args.workers) as pool:
            clips = args.clips * args.workers
            parallel = interleave(_parallel(media, clips, args.workers, pool), args.rounds, warm=not args.quick)
        name = f"{args.workers} threads, video only"
        _report(found, console, name, parallel, per_second, f"clips_per_s_{args.workers}_threads")
        for duel in duels(_readers(media), _plans, turns, list(PACKS), args.workers, args.rounds, args.clips * 2):
            _verdict(found, console, *duel)
        loading_turns(found, console, media, folder, args.workers, args.rounds, args.clips)
        if args.sweep:
            sweep_turns(found, console, media, folder, args.rounds)
        if args.out or not args.quick:
            path = results.write(found, args.out, _PLOTTED, _COLOURS)
            console.print(f"wrote {path}, and a plot next to it", highlight=False, soft_wrap=True)
    return 0


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="benchmarks data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--footage", type=Path, metavar="FILE", help="real video of 10 s (default: a generated scene)")
    parser.add_argument("--folder", type=Path, help="keep the media here and use them again")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (%(default)s)")
    parser.add_argument("--clips", type=int, default=6, help="clips per turn (%(default)s)")
    parser.add_argument("--workers", type=int, default=num_cores(), help="threads of the parallel comparison")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file of the result (in benchmarks/results/)")
    parser.add_argument("--sweep", action="store_true", help="also vary workers and resolutions of the loader")
    parser.add_argument("--profile", action="store_true", help="only profile fastav's decoder")
    parser.add_argument("--quick", action="store_true", help="small clips, two rounds: a functional test, no timing")
    args = parser.parse_args(words)
    args.frames, args.size = 250, (640, 360)
    if args.quick:
        args.frames, args.size, args.rounds, args.clips = 50, (320, 192), 2, 1
    return args


def planner(clip: Clip, seed: int = 0) -> Callable[[], ClipPlan]:
    """Returns a function that draws training plans of a clip: one frame per segment, torchvision's random crop."""
    rng = np.random.default_rng(seed)
    lock = threading.Lock()

    def draw() -> ClipPlan:
        with lock:
            u_F, u_C = rng.random((1, FRAMES)), rng.random((1, 22))
        frames_T = segment_frames(np.array([clip.num_frames]), u_F)[0]
        crop = random_crops(np.array([clip.width]), np.array([clip.height]), u_C, (0.08, 1.0), (3 / 4, 4 / 3))[0]
        x, y, w, h = map(float, crop)
        return ClipPlan(0, 0, 0, 0, frames_T, (x, y, w, h), False, np.zeros(1, np.int32), (0, 0), 1.0, 0, 1.0)

    return draw


def _plans(clip: Clip) -> Iterator[ClipPlan]:
    """Draws plans in advance, the same for every reader of a clip, so that drawing is not measured."""
    draw = planner(clip)
    return cycle([draw() for _ in range(_PLANS)])


def _readers(media: TestFiles) -> dict[str, tuple[Clip, Peer]]:
    """Returns all readers with their clips."""
    readers: dict[str, tuple[Clip, Peer]] = {}
    assert media.raw.video is not None, "a raw clip has a video file"
    for name, build in peers_of(media.raw.video, media.raw).items():
        if name != "PyAV by hand":  # one keyframe: seeking to each frame would decode the file eight times
            readers[f"raw through {name}"] = (media.raw, build())
    readers["raw through ours"] = (media.raw, Ours(media.raw))
    for pack, clip in media.packed.items():
        readers[f"{pack} through ours"] = (clip, Ours(clip))
        for name, build in peers_of(media.remuxed[pack], clip).items():
            if name != "PyAV linear":
                readers[f"{pack} through {name}"] = (clip, build())
    readers["ten JPEGs"] = (media.packed["balanced"], Dump(media.dump, media.raw.num_frames))
    return readers


def _decoding(media: TestFiles, clips: int) -> dict[str, Callable[[], int]]:
    def turn(clip: Clip, peer: Peer) -> Callable[[], int]:
        plans = _plans(clip)

        def run() -> int:
            for _ in range(clips):
                peer.frames(next(plans))
            return clips

        return run

    return {name: turn(clip, peer) for name, (clip, peer) in _readers(media).items()}


def _parallel(media: TestFiles, clips: int, workers: int, pool: ThreadPoolExecutor) -> dict[str, Callable[[], int]]:
    """Returns turns on the packed files with `workers` threads, and with the processes of a DataLoader."""

    def turn(clip: Clip, peer: Peer) -> Callable[[], int]:
        plans = _plans(clip)

        def run() -> int:
            list(pool.map(peer.frames, [next(plans) for _ in range(clips)]))
            return clips

        return run

    chosen = {n: r for n, r in _readers(media).items() if n.split()[0] in ("balanced", "fast")}
    turns = {name: turn(clip, peer) for name, (clip, peer) in chosen.items()}
    for name, (clip, peer) in chosen.items():
        if name.split(" through ")[1] in ("torchcodec approximate", "PyAV by hand"):
            draw = planner(clip)
            feed = processes(peer, [draw() for _ in range(_PLANS)], workers)
            turns[f"{name}, DataLoader"] = _taking(feed, clips * _LONGER)
    return turns


def _taking(feed: Iterator[Tensor], clips: int) -> Callable[[], int]:
    """Returns a turn of worker processes; it is longer than others because they prefetch a few clips between turns."""

    def run() -> int:
        for _ in range(clips):
            next(feed)
        return clips

    return run


def _describe(found: dict[str, Any], media: TestFiles) -> None:
    """Records file sizes, quality, and how much of a packed clip is read and decoded."""
    assert media.raw.video is not None, "a raw clip has a video file"
    raw_kb = media.raw.video.stat().st_size / 1e3
    found["notes"].append(f"video: {media.footage}; raw {media.raw.width}x{media.raw.height}, {raw_kb:.0f} kB")
    for pack, clip in media.packed.items():
        draw, ours = planner(clip), Ours(clip)
        fetched = [ours.shards.fetch(clip, sorted(set(draw().frames_T.tolist())), None) for _ in range(50)]
        decoded = [len(one.frames.units) for one in fetched if one.frames is not None]
        video_kb = int((ours.shards.units(clip).size_U[: clip.num_frames]).sum()) / 1e3
        found["runs"].append(
            {
                "variant": pack, "repeat": 0, "video_kb": round(video_kb, 1), "raw_kb": round(raw_kb, 1),
                "psnr_y_db": media.quality[pack],
                "frames_decoded_per_used": round(float(np.mean(decoded)) / FRAMES, 2),
                "kb_read_per_clip": round(float(np.mean([one.num_bytes for one in fetched])) / 1e3, 1),
            }
        )  # fmt: skip
    dump_kb = sum(p.stat().st_size for p in media.dump.glob("*.jpg")) / 1e3
    found["notes"].append(
        f"ten JPEGs: {dump_kb:.0f} kB per clip; the same ten frames in every epoch, frame count and rate are fixed"
    )


def _report(
    found: dict[str, Any], console: Console, title: str, turns: dict[str, list[Turn]],
    measure: Callable[[Sequence[Turn]], Any], metric: str,
) -> None:  # fmt: skip
    table = Table(title=title)
    for column in ("", metric.replace("_", " "), "ms/clip", "relative to raw"):
        table.add_column(column, justify="left" if not column else "right")
    for name, rounds in turns.items():
        interval = median(measure(rounds))
        against = str(ratio(measure(rounds), measure(turns[_RAW]))) if _RAW in turns else ""
        table.add_row(name, str(interval), f"{1e3 / interval.median:.2f}", against)
        results.summarise(found, name, metric, interval)
        for number, turn in enumerate(rounds):
            found["runs"].append(
                {"variant": name, "repeat": number, "clips": turn.clips, "cpu_s": round(turn.cpu_s, 5),
                 "wall_s": round(turn.wall_s, 5), "metric": metric}
            )  # fmt: skip
    console.print(table)


def _verdicts(
    found: dict[str, Any], console: Console, turns: dict[str, list[Turn]],
    measure: Callable[[Sequence[Turn]], Any], metric: str,
) -> None:  # fmt: skip
    """Compares fastav on packed clips with the raw clip and with the extracted JPEGs."""
    for pack in PACKS:
        ours = f"{pack} through ours"
        if ours not in turns:
            continue
        for other in [name for name in (_RAW, "ten JPEGs") if name in turns]:
            _verdict(found, console, (ours, other), ratio(measure(turns[ours]), measure(turns[other])), metric)


def _verdict(
    found: dict[str, Any], console: Console, names: tuple[str, str], interval: MedianInterval, metric: str
) -> None:
    word = results.judge(found, *names, metric, interval)
    console.print(f"{names[0]} / {names[1]}: {interval} ({word})", highlight=False)


def _profile(media: TestFiles) -> int:
    """Profiles fastav's decoder on packed clips."""
    for pack in ("balanced", "fast"):
        draw, ours = planner(media.packed[pack]), Ours(media.packed[pack])
        for _ in range(20):
            ours.frames(draw())
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(200):
            ours.frames(draw())
        profile.disable()
        print(f"{pack}, 200 clips of {FRAMES} frames at {SIZE}:")
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)
    return 0
