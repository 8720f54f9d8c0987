"""Measures the loader: raw and packed clips with both modalities, `repeat`, sweeps; busy and waiting time per stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import result as results
from benchmarks.data.clips import TestFiles, repeated
from benchmarks.timing import interleave, median, paired_ratio, per_cpu_second, per_second
from fastav.data.plan import Plan, Sampling
from fastav.loader.loader import Loader, Loading, Worker
from fastav.media.dali.decoder import Dali, missing_requirement
from fastav.media.decoder import DecodeSpec
from fastav.media.pyav import PyAV, PyAVDecoder
from fastav.media.spectrogram import Frontend

BATCH = 8
_COPIES = 64


class Feed:
    """A loader that stays open between turns."""

    def __init__(
        self,
        manifest: Any,
        workers: int,
        *,
        repeat: int = 1,
        size: int = 224,
        audio: bool = True,
        kind: PyAV | Dali | None = None,
        worker: Worker = "thread",
    ) -> None:
        frontend, sampling = Frontend(), Sampling(image_size=size, repeat=repeat)
        modalities: Any = ("video", "audio") if audio else ("video",)
        plan = Plan([(manifest, 1.0)], sampling, seed=0, mel_bands=frontend.num_mels, mel_frames=frontend.num_frames_s)
        spec = DecodeSpec(modalities, size, frontend, sampling.window)
        self._decoder = (kind or PyAV()).build(spec)
        self.loader = Loader(
            plan, self._decoder, Loading(workers=workers, worker=worker), modalities=modalities, classes=("a",),
            on_broken=_refuse,
        )  # fmt: skip
        self._at = 0

    @property
    def mb_read(self) -> float:
        """MB of shards read so far by this process."""
        return self._decoder.read_stats.num_bytes / 1e6 if isinstance(self._decoder, PyAVDecoder) else 0.0

    def turn(self, batches: int) -> Callable[[], int]:
        """Returns a function that loads a number of batches and returns the number of clips."""

        def run() -> int:
            requests = [("train", self._at + i * BATCH, BATCH) for i in range(batches)]
            self._at += batches * BATCH
            return sum(len(batch) for batch in self.loader.batches(requests))

        return run


def _batches(name: str, raw: int) -> int:
    """Returns the batches per turn: more for packs, which decode faster, so that starting threads does not matter."""
    return raw if name.startswith("raw") else 8 * raw


def _refuse(clip: Any, error: Exception) -> None:
    raise error


def loading_turns(
    found: dict[str, Any], console: Console, media: TestFiles, folder: Path, workers: int, rounds: int, clips: int
) -> None:
    """Measures and reports the loader's variants."""
    manifests = {"raw": repeated(media.raw, _COPIES, folder / "raws.parquet")}
    for pack, clip in media.packed.items():
        manifests[pack] = repeated(clip, _COPIES, folder / f"{pack}s.parquet")
    feeds = {name: Feed(manifest, workers) for name, manifest in manifests.items()}
    feeds["balanced, repeat 2"] = Feed(manifests["balanced"], workers, repeat=2)
    feeds["raw, repeat 2"] = Feed(manifests["raw"], workers, repeat=2)
    batches = max(1, clips // 3)
    before = {name: feed.mb_read for name, feed in feeds.items()}
    turns = interleave({name: feed.turn(_batches(name, batches)) for name, feed in feeds.items()}, rounds)
    table = Table(title=f"loader, video and audio, {workers} threads")
    for column in ("", "clips/s", "clips per CPU-s", "MB/s of shards", "decode busy %", "decode waits for work %"):
        table.add_column(column, justify="right" if column else "left")
    for name, made in turns.items():
        stats = feeds[name].loader.stats()
        decode = stats["decode"]
        total = max(decode.busy_s + decode.put_wait_s + decode.get_wait_s, 1e-9)
        speed, cpu = median(per_second(made)), median(per_cpu_second(made))
        busy, waits = 100 * decode.busy_s / total, 100 * decode.get_wait_s / total
        # The statistics include the warm-up round of `interleave`; the turns do not.
        seconds = sum(turn.wall_s for turn in made) * (rounds + 1) / rounds
        mb = (feeds[name].mb_read - before[name]) / seconds
        table.add_row(name, str(speed), str(cpu), f"{mb:.1f}" if mb else "", f"{busy:.0f}", f"{waits:.0f}")
        for metric, interval in (("loader_clips_per_s", speed), ("loader_clips_per_cpu_s", cpu)):
            results.summarise(found, name, metric, interval)
        stages = {stage: {k: round(v, 3) for k, v in asdict(s).items()} for stage, s in stats.items()}
        found["runs"].append(
            {
                "variant": f"loader {name}",
                "repeat": 0,
                "stages": stages,
                "decode_busy_pct": busy,
                "mb_per_s_of_shards": round(mb, 2),
            }
        )
    console.print(table)
    for one, other in (("balanced", "raw"), ("balanced, repeat 2", "balanced"), ("raw, repeat 2", "raw")):
        # In pairs, as in `duels`: with all variants, turns are too far apart on a shared machine.
        both = interleave({name: feeds[name].turn(_batches(name, max(2, batches))) for name in (one, other)}, rounds)
        interval = paired_ratio(per_second(both[one]), per_second(both[other]))
        word = results.judge(found, one, other, "loader_clips_per_s", interval)
        console.print(f"loader: {one} / {other}: {interval} ({word})", highlight=False)
    for feed in feeds.values():
        feed.loader.close()


def sweep_turns(found: dict[str, Any], console: Console, media: TestFiles, folder: Path, rounds: int) -> None:
    """Measures the loader over workers, resolutions and decoders, on raw and packed clips."""
    manifests = {
        "raw": repeated(media.raw, _COPIES, folder / "raws.parquet"),
        "balanced": repeated(media.packed["balanced"], _COPIES, folder / "balanceds.parquet"),
        "fast": repeated(media.packed["fast"], _COPIES, folder / "fasts.parquet"),
    }
    feeds = {
        f"{name}, {workers} workers, {size} px": Feed(manifest, workers, size=size)
        for name, manifest in manifests.items()
        for workers, size in ((1, 224), (2, 224), (4, 224), (2, 112), (2, 336))
    }
    feeds["balanced, 2 workers that are processes, 224 px"] = Feed(manifests["balanced"], 2, worker="process")
    still = repeated(media.packed["mjpeg"], _COPIES, folder / "mjpegs.parquet")
    feeds["mjpeg, 2 workers, 224 px"] = Feed(still, 2)
    if reason := missing_requirement("cpu"):
        found["notes"].append(f"DALI was not measured: {reason}")
    else:
        feeds["mjpeg by DALI on the CPU, 2 workers, 224 px"] = Feed(still, 2, kind=Dali(device="cpu"))
    found["varied"] |= {"loader_workers": [1, 2, 4], "image_size": [112, 224, 336], "decoder": ["pyav", "dali"]}
    turns = interleave({name: feed.turn(_batches(name, 1)) for name, feed in feeds.items()}, rounds)
    table = Table(title="loader, sweep")
    for column in ("", "clips/s", "clips per CPU-s"):
        table.add_column(column, justify="right" if column else "left")
    for name, made in turns.items():
        measured = {"loader_clips_per_s": median(per_second(made))}
        if "processes" not in name:  # the CPU time of worker processes is not measured
            measured["loader_clips_per_cpu_s"] = median(per_cpu_second(made))
        table.add_row(name, *map(str, measured.values()))
        for metric, interval in measured.items():
            results.summarise(found, name, metric, interval)
        feeds[name].loader.close()
    console.print(table)
