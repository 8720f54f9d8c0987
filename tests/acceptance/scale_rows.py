"""Rows about size: a pack of 100,000 clips, a manifest of ten million rows, and clips that break."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from fastav.data.clip import Clip
from fastav.data.manifest import Manifest, write_manifest, write_table
from fastav.media.shards import ShardReader, ShardReading
from tests.acceptance.rows import TINY, Failed, Result, fastav, fresh

_ENCODED, _CLIPS, _BATCHES = 200, 100_000, 10_000
_ROWS = 10_000_000

_FIRST_BATCH = """
import json, sys, time, resource
import numpy, torch, pyarrow
from fastav.media.decoder import DecodeSpec
from fastav.media.pyav import PyAV
from fastav.media.spectrogram import Frontend
from fastav.loader.loader import Loader, Loading
from fastav.data.manifest import Manifest
from fastav.data.plan import Plan, Sampling

def resident_kib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])

begun = time.perf_counter()
manifest = Manifest.open(sys.argv[1]).split("train")
frontend, sampling = Frontend(), Sampling(frames=2, image_size=32, window=100)
plan = Plan([(manifest, 1.0)], sampling, seed=0, mel_bands=frontend.num_mels, mel_frames=frontend.num_frames_s)
spec = DecodeSpec(("video", "audio"), 32, frontend, 100)
named = []
loader = Loader(plan, PyAV().build(spec), Loading(workers=2), modalities=("video", "audio"), classes=manifest.classes,
                on_broken=lambda clip, error: named.append(str(error)))
batches = loader.batches(("train", i * 4, 4) for i in range(int(sys.argv[2])))
next(batches)
first_s = time.perf_counter() - begun
sizes = []
for number, _ in enumerate(batches, 2):
    if number % 500 == 0:
        sizes.append(resident_kib())
print(json.dumps({"first_batch_s": first_s, "resident_kib": sizes, "broken": named[:3]}))
"""

_PLANS = """
import json, sys, time
import numpy as np
from fastav.media.spectrogram import Frontend
from fastav.data.manifest import Manifest
from fastav.data.plan import Plan, Sampling

def resident_kib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])

frontend = Frontend()
Plan.__init__  # imports apart
before, begun = resident_kib(), time.perf_counter()
manifest = Manifest.open(sys.argv[1])
opened = resident_kib() - before
plans = {}
for name, options in (("global", {}), ("blocked", {"order": "blocked"}), ("balanced", {"balance": "class"})):
    plan = Plan([(manifest, 1.0)], Sampling(**options), seed=0, mel_bands=128, mel_frames=frontend.num_frames_s)
    if name == "global":
        plan.train(0, 1)
        first_s = time.perf_counter() - begun
    rng, at = np.random.default_rng(0), 0
    starts = rng.integers(0, len(manifest) - 512, 60)
    for start in starts[:10]:
        plan.train(int(start), 512)
    cpu = time.process_time()
    for start in starts[10:]:
        plan.train(int(start), 512)
    plans[name] = 50 * 512 / (time.process_time() - cpu)
print(json.dumps({"open_and_first_plan_s": first_s, "growth_mb": opened / 1024, "plans_per_s": plans}))
"""


def _alone(program: str, *words: str) -> dict[str, object]:
    """Runs a program in a process of its own, and reads the line of JSON it ends with."""
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise Failed(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def pack_100k(work: Path) -> Result:
    """A 100,000-clip pack (200 clips repeated): first batch <= 3 s; memory after 10,000 batches grows <= 1 %."""
    fresh(work)
    fastav("synth", str(work / "data"), "--train", str(_ENCODED - 8), "--test", "8")
    fastav("pack", str(work / "data" / "manifest.parquet"), str(work / "pack"))
    made = Manifest.open(work / "pack" / "manifest.parquet").split("train")
    clips = made.clips(range(len(made)))
    many = (replace(clips[i % len(clips)], id=f"{i:06d}") for i in range(_CLIPS))
    write_manifest(work / "pack" / "many.parquet", many, made.classes)
    found = _alone(_FIRST_BATCH, str(work / "pack" / "many.parquet"), str(_BATCHES))
    sizes = found.pop("resident_kib")
    assert isinstance(sizes, list)
    growth_pct = 100 * (sizes[-1] / sizes[0] - 1)
    figures = found | {"resident_mib_after_500": sizes[0] / 1024, "growth_pct": growth_pct, "batches": _BATCHES}
    first_s = found["first_batch_s"]
    assert isinstance(first_s, float)
    return figures, first_s <= 3 and growth_pct <= 1 and not found["broken"]


def manifest_10m(work: Path) -> Result:
    """A manifest of ten million rows: open and first plan <= 2 s, growth <= 50 MB, >= 100,000 plans/s per core."""
    fresh(work)
    number = pa.array(np.arange(_ROWS))
    names = pa.array([f"class {k}" for k in range(100)])
    label = names.take(pa.array(np.arange(_ROWS) % 100))
    table = pa.table(
        {
            "id": number.cast(pa.string()),
            "split": pa.array(["train"]).take(pa.array(np.zeros(_ROWS, np.int32))),
            "labels": pa.ListArray.from_arrays(pa.array(np.arange(_ROWS + 1, dtype=np.int32)), label),
            "video": pa.array([f"media/{k:04d}.mp4" for k in range(1000)]).take(pa.array(np.arange(_ROWS) % 1000)),
            "duration_s": pa.array(np.full(_ROWS, 10.0)),
            "num_frames": pa.array(np.full(_ROWS, 250, np.int32)),
            "width": pa.array(np.full(_ROWS, 448, np.int32)),
            "height": pa.array(np.full(_ROWS, 256, np.int32)),
            "num_samples": pa.array(np.full(_ROWS, 160_000)),
            "sample_rate": pa.array(np.full(_ROWS, 16_000, np.int32)),
        }
    )
    write_table(work / "m.parquet", table)
    found = _alone(_PLANS, str(work / "m.parquet"))
    plans = found["plans_per_s"]
    assert isinstance(plans, dict)
    first_s, growth_mb = float(str(found["open_and_first_plan_s"])), float(str(found["growth_mb"]))
    good = first_s <= 2 and growth_mb <= 50 and min(plans["global"], plans["blocked"]) >= 100_000
    for file in work.glob("m.*"):
        file.unlink()
    return found, good


def broken_weight(work: Path) -> Result:
    """A run with 1 % broken clips gives the losses of the same manifest with those rows at weight 0."""
    fresh(work)
    fastav("synth", str(work / "data"), "--train", "200", "--test", "16")
    fastav("pack", str(work / "data" / "manifest.parquet"), str(work / "whole"))
    shutil.copytree(work / "whole", work / "broken")
    whole = Manifest.open(work / "whole" / "manifest.parquet")
    clips = whole.clips(range(len(whole)))
    chosen = [clip for clip in clips if clip.split == "train"][50:52]
    for clip in chosen:
        _destroy(clip, work / "broken" / "shards" / Path(clip.shard).name)
    spared = {clip.id for clip in chosen}
    rows = (replace(clip, weight=0.0) if clip.id in spared else clip for clip in clips)
    write_manifest(work / "whole" / "spared.parquet", rows, whole.classes)
    losses = {}
    for name, manifest in (
        ("broken", work / "broken" / "manifest.parquet"),
        ("spared", work / "whole" / "spared.parquet"),
    ):
        run = work / f"run_{name}"
        words = [
            *TINY,
            "--sampling.mixup",
            "0",
            "--train.epochs",
            "3",
            "--train.batch",
            "10",
            "--train.eval_every",
            "0",
        ]
        words += ["--data.manifest", str(manifest), "--out", str(run), "--log.every", "1"]
        words += ["--train.threads", "1", "--frontend.mean", "-40", "--frontend.std", "20"]
        fastav("train", "launch/recipes/quickstart.toml", *words, "--loading.max_broken", "0.1")
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses[name] = [row["loss"] for line in lines if "loss" in (row := json.loads(line))]
    report = work / "run_broken" / "skipped.csv"
    skipped = report.read_text() if report.exists() else ""
    one, two = np.array(losses["broken"]), np.array(losses["spared"])
    difference = float(np.abs(one - two).max()) if len(one) == len(two) else float("inf")
    figures = {"steps": len(one), "largest_difference": difference, "named": skipped.count(".tar")}
    return figures, len(one) >= 50 and difference <= 1e-6


def _destroy(clip: Clip, shard: Path) -> None:
    """Zeroes every unit of a clip."""
    units = ShardReader(ShardReading()).units(clip)
    with shard.open("r+b") as file:
        for at, size in zip(units.at_U.tolist(), units.size_U.tolist(), strict=True):
            file.seek(at)
            file.write(bytes(size))


SCALE_ROWS = {"pack_100k": pack_100k, "manifest_10m": manifest_10m, "broken_weight": broken_weight}
