"""The rows: each takes a folder to work in and returns (figures, whether they hold)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import SHARED

Result = tuple[dict[str, object], bool]
REALDATA = Path(os.environ.get("FASTAV_REALDATA", SHARED / "realdata"))
LONG_CLIPS = (
    "nasa_13013.mp4", "flipping_a_pancake.mkv", "big_buck_bunny_0_30.webm", "chaplin.mp4", "bigbuckbunny_720p.mp4",
    "bikes.mp4", "sample.avi", "av1_video.mkv",
)  # fmt: skip
# A model small enough that the time goes into starting, killing and resuming, with all that a checkpoint holds.
TINY = [
    "--model.fusion.kind", "bottleneck", "--model.fusion.start", "1", "--sampling.frames", "2",
    "--sampling.image_size", "32",
    "--model.video.args.depth", "2", "--model.audio.args.depth", "2", "--model.video.args.embed_dim", "32",
    "--model.audio.args.embed_dim", "32", "--sampling.eval_windows", "[0]",
    "--sampling.mixup", "0.3", "--optim.ema", "0.9",
]  # fmt: skip
RUNS = ("video", "audio", "score", "late", "bottleneck")


class Failed(Exception):
    """A command failed or a promise does not hold."""


def call(
    *words: str, expect: int = 0, env: dict[str, str] | None = None, timeout: float = 3600, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command, with its output captured."""
    whole = {**os.environ, **(env or {})}
    done = subprocess.run(words, capture_output=True, text=True, env=whole, timeout=timeout, cwd=cwd)
    if done.returncode != expect:
        raise Failed(f"{' '.join(words)} ended with {done.returncode}, not {expect}: {done.stderr[-2000:]}")
    return done


def fastav(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a verb."""
    return call(sys.executable, "-m", "fastav", *words, **options)  # type: ignore[arg-type]


def fresh(work: Path) -> Path:
    """Empties the row's folder."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def top1(run: Path) -> float:
    """Micro top-1 on the test split, percent."""
    return json.loads((run / "metrics.json").read_text())["metrics"]["top1_micro_pct"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Final weights of a run."""
    return load_file(run / "model" / "model.safetensors")


def quickstart(work: Path) -> Result:
    """Three seeds of data and training: single modalities 40 to 50 %, score, late and bottleneck at least 90 %."""
    fresh(work)
    figures: dict[str, object] = {}
    good = True
    for seed in range(3):
        data, runs = work / f"data_{seed}", work / f"seed_{seed}"
        fastav("synth", str(data), "--seed", str(seed))
        started = time.time()
        found = {}
        for name in RUNS:
            fastav(
                "train", f"launch/recipes/quickstart_{name}.toml", "--out", str(runs / name), "--train.seed", str(seed),
                "--data.manifest", str(data / "manifest.parquet"),
            )  # fmt: skip
            found[name] = round(top1(runs / name), 2)
        good &= fusion_wins(found)
        figures[f"seed_{seed}"] = {**found, "train_s": round(time.time() - started)}
    return figures, good


def newcomer(work: Path) -> Result:
    """`make quickstart` and `.ci/run` in a fresh clone with a fresh environment; the table is there and fusion wins."""
    fresh(work)
    clone = work / "clone"
    call("git", "clone", "-q", ".", str(clone))
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    started = time.time()
    subprocess.run(["make", "install"], cwd=clone, env=clean, check=True, capture_output=True)
    installed = time.time()
    subprocess.run(["make", "quickstart"], cwd=clone, env=clean, check=True, capture_output=True)
    learned = time.time()
    results = json.loads((clone / "runs" / "quickstart" / "results.json").read_text())
    found = {name: round(top1(clone / "runs" / "quickstart" / name), 2) for name in RUNS}
    tested = subprocess.run(["bash", ".ci/run"], cwd=clone, env=clean, capture_output=True, text=True)
    (work / "ci.log").write_text(tested.stdout + tested.stderr)
    figures = {
        **found, "install_s": round(installed - started), "quickstart_s": round(learned - installed),
        "ci_exit": tested.returncode, "ci_s": round(time.time() - learned),
    }  # fmt: skip
    return figures, fusion_wins(found) and bool(results) and tested.returncode == 0


def fusion_wins(found: dict[str, float]) -> bool:
    """The quickstart's promise."""
    single = all(40 <= found[name] <= 50 for name in ("video", "audio"))
    return single and all(found[name] >= 90 for name in ("score", "late", "bottleneck"))


def real_clips(work: Path) -> Result:
    """Eight real files, class = file, 2 s pieces, every third held out: 100 % and >= 85 % right."""
    if not REALDATA.is_dir():
        raise Failed("no real media here; set FASTAV_REALDATA")
    fresh(work)
    media = work / "media"
    media.mkdir()
    for name in LONG_CLIPS:
        (media / name).symlink_to((REALDATA / "video" / name).resolve())
    manifest, run = str(work / "manifest.parquet"), work / "run"
    fastav(
        "index",
        "folder",
        str(media),
        "--out",
        manifest,
        "--classes",
        "file",
        "--piece-s",
        "2",
        "--hold-out",
        "every:3",
    )
    fastav("train", "launch/recipes/small.toml", "--data.manifest", manifest, "--out", str(run))
    held_out = top1(run)
    fastav("evaluate", str(run), manifest, "train")
    trained = top1(next((run / "evaluations").iterdir()))
    return {"train_pct": trained, "held_out_pct": held_out}, trained == 100 and held_out >= 85


def ranks(work: Path) -> Result:
    """One process against two gloo processes, 20 steps, fp32: losses within 1e-6, parameters within 1e-5 relative."""
    fresh(work)
    fastav("synth", str(work / "data"), "--train", "64", "--test", "16")
    common = [
        "launch/recipes/quickstart_video.toml", "--data.manifest", str(work / "data" / "manifest.parquet"),
        "--data.test", "", *TINY, "--train.epochs", "5", "--log.every", "1", "--train.threads", "1",
    ]  # fmt: skip
    fastav("train", *common, "--out", str(work / "one"))
    call(
        str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "fastav.train",
        *common,
        "--out", str(work / "two"), "--train.num_processes", "2",
    )  # fmt: skip
    losses = [
        [json.loads(line)["loss"] for line in (work / name / "metrics.jsonl").read_text().splitlines()][:20]
        for name in ("one", "two")
    ]
    if len(losses[0]) < 20 or len(losses[1]) < 20:
        raise Failed(f"{len(losses[0])} and {len(losses[1])} steps, 20 expected")
    loss_gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    one, two = weights(work / "one"), weights(work / "two")
    norm = sum(float(one[k].double().square().sum()) for k in one) ** 0.5
    gap = sum(float((one[k].double() - two[k].double()).square().sum()) for k in one) ** 0.5 / norm
    return {
        "max_loss_gap": loss_gap,
        "parameter_gap_rel": gap,
        "steps": len(losses[0]),
    }, loss_gap <= 1e-6 and gap <= 1e-5


def kills(work: Path) -> Result:
    """`kill -9` at five random moments, one inside a save, resume each time: the weights of the run without a kill."""
    fresh(work)
    every = 4
    fastav("synth", str(work / "data"), "--train", "64", "--test", "16")
    common = [
        "launch/recipes/quickstart_video.toml", "--data.manifest", str(work / "data" / "manifest.parquet"), *TINY,
        "--train.epochs", "40", "--log.every", "1", "--saving.every", str(every), "--log.trackers", "[]",
    ]  # fmt: skip
    fastav("train", *common, "--out", str(work / "whole"))
    killed = work / "killed"
    rng = random.Random(int(time.time()))
    resumed, at, inside = [], [], 0
    attempt = 0
    while attempt < 5 and len(at) < 20:
        before = last_step(killed)
        process = subprocess.Popen(
            [sys.executable, "-m", "fastav", "train", *common, "--out", str(killed)],
            stderr=subprocess.PIPE,
            text=True,
        )
        in_save = attempt == 2
        wait_for_moment(process, killed, before + rng.randint(every + 1, 10), in_save)
        process.send_signal(signal.SIGKILL)
        process.wait()
        log = process.stderr.read() if process.stderr else ""
        if at:
            found = [line for line in log.splitlines() if "resumed after step" in line]
            if not found:
                raise Failed(f"attempt {attempt} did not resume: {log[-800:]}")
            resumed.append(int(found[0].split("resumed after step ")[1].split()[0]))
        at.append(last_step(killed))
        half_written = bool(list((killed / "checkpoints").glob(".step_*.tmp")))  # still there: the kill came first
        inside += in_save and half_written
        attempt += not in_save or half_written
    done = fastav("train", *common, "--out", str(killed))
    resumed.append(int(done.stderr.split("resumed after step ")[1].split()[0]))
    same = weights(work / "whole")
    equal = all(torch.equal(same[name], tensor) for name, tensor in weights(killed).items())
    back = [a - r for a, r in zip(at, resumed, strict=True)]
    good = equal and min(resumed) > 0 and max(back) <= every and inside == 1
    return {
        "killed_at": at,
        "resumed_at": resumed,
        "save_every": every,
        "inside_save": inside,
        "bit_identical": equal,
    }, good


def wait_for_moment(process: subprocess.Popen[str], run: Path, step: int, in_save: bool) -> None:
    """Waits until a step has been logged, then, if asked, for a half-written checkpoint."""
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if last_step(run) >= step:
            break
        time.sleep(0.005)
    while in_save and time.time() < deadline and process.poll() is None:
        if list((run / "checkpoints").glob(".step_*.tmp")):
            return
    if process.poll() is not None or time.time() >= deadline:
        raise Failed(f"the run ended before step {step}: {process.stderr.read()[-800:] if process.stderr else ''}")


def last_step(run: Path) -> int:
    """Step of the last whole row of `metrics.jsonl`."""
    if not (run / "metrics.jsonl").exists():
        return 0
    rows = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return json.loads(rows[-1])["step"] if rows else 0


def full_disk(work: Path) -> Result:
    """A file system that is full while a checkpoint is saved: one clear line, the last checkpoint intact, resumable."""
    fresh(work)
    disk = work / "disk"
    disk.mkdir()
    fastav("synth", str(work / "data"), "--train", "64", "--test", "16")
    common = [
        "launch/recipes/quickstart_video.toml", "--data.manifest", str(work / "data" / "manifest.parquet"),
        "--data.test", "", *TINY, "--train.epochs", "4", "--saving.every", "4", "--saving.keep", "9",
        "--log.trackers", "[]",
        "--out", str(disk / "run"),
    ]  # fmt: skip
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        raise Failed(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    try:
        done = subprocess.run([sys.executable, "-m", "fastav", "train", *common], capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1]
        kept = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = fastav("train", *common)
    finally:
        subprocess.run(["umount", str(disk)], check=False)
    good = (
        done.returncode == 1
        and "cannot save the checkpoint" in last
        and "is intact" in last
        and "resumed after step" in again.stderr
    )
    return {"exit": done.returncode, "message": last, "kept": kept}, good


def packaging(work: Path) -> Result:
    """A wheel and an editable install: Hugging Face's `kernels` and our `fastav_kernels` import beside each other."""
    fresh(work)
    call(sys.executable, "-m", "build", "--wheel", "--outdir", str(work / "dist"), ".")
    wheel = next((work / "dist").glob("*.whl"))
    found: dict[str, object] = {}
    for kind, words in (("wheel", [str(wheel)]), ("editable", ["--editable", "."])):
        python = make_environment(work / kind, words)
        said = call(
            str(python),
            "-c",
            "import kernels, fastav, fastav_kernels; print(kernels.__file__, hasattr(kernels, 'get_kernel'))",
        )
        found[kind] = said.stdout.split()[1]
    return found, all(value == "True" for value in found.values())


def make_environment(folder: Path, words: Sequence[str]) -> Path:
    """A virtual environment that sees the installed dependencies, with this package and `kernels` in it."""
    call(sys.executable, "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    site = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
    ).stdout.strip()
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    call(str(python), "-m", "pip", "install", "-q", "--no-deps", "kernels", *words)
    # The dependencies come from the environment that runs this; its own .pth files (our editable install) do not.
    (Path(site) / "dependencies.pth").write_text(ours + "\n")
    return python


ROWS: dict[str, Callable[[Path], Result]] = {
    "packaging": packaging,
    "ranks": ranks,
    "kills": kills,
    "full_disk": full_disk,
    "real_clips": real_clips,
    "quickstart": quickstart,
    "newcomer": newcomer,
}
