"""Rows of many processes: every strategy the same, resumed at any size, killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.acceptance.rows import TINY, Failed, Result, call, fastav, fresh, weights

SPREAD = ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload")
STEPS = 20
_BIN = Path(sys.executable).parent
_MARK = "FASTAV_ROW"
_ALONE = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def launched(strategy: str, ranks: int = 2, module: str = "fastav.train") -> list[str]:
    """The words that start a run of one process, or of some under a strategy."""
    if strategy == "single":
        return [sys.executable, "-m", module]
    config = f"launch/accelerate/{'cpu_2' if strategy == 'ddp' else f'cpu_2_{strategy}'}.yaml"
    return [str(_BIN / "accelerate"), "launch", "--config_file", config, "--num_processes", str(ranks), "-m", module]


def common(work: Path, *words: str) -> list[str]:
    """A recipe of 20 steps of 16 clips."""
    if not (work / "data").exists():
        fastav("synth", str(work / "data"), "--train", "64", "--test", "16")
    return [
        "launch/recipes/quickstart_video.toml", "--data.manifest", str(work / "data" / "manifest.parquet"),
        "--data.test", "", *TINY, "--train.epochs", "5", "--log.every", "1", "--train.threads", "1",
        "--log.trackers", "[]", "--saving.every", "4", "--saving.keep", "9", *words,
    ]  # fmt: skip


def asked(strategy: str, ranks: int = 2) -> list[str]:
    """Keys that insist on the strategy and on the number of ranks."""
    strategy = strategy.partition("_")[0]
    return ["--train.strategy", strategy, "--train.num_processes", "1" if strategy == "single" else str(ranks)]


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def apart(one: Path, other: Path) -> tuple[float, float, bool]:
    """Largest difference of the losses, relative global L2 of the (averaged) weights, whether all bits are the same."""
    mine, theirs = losses(one), losses(other)
    if len(mine) != STEPS or mine.keys() != theirs.keys():
        raise Failed(f"{one} has {len(mine)} steps, {other} {len(theirs)}; {STEPS} expected")
    gap = max(abs(mine[step] - theirs[step]) for step in mine)
    a, b = weights(one), weights(other)
    norm = sum(float(a[k].double().square().sum()) for k in a) ** 0.5
    distance = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a) ** 0.5 / norm
    return gap, distance, all(torch.equal(a[k], b[k]) for k in a)


def spread(work: Path) -> Result:
    """20 steps, fp32, EMA: 1 process; DDP, FSDP2, ZeRO-1/2/3, offload x 2, accumulation 1 and 2: 1e-6, weights 1e-5."""
    fresh(work)
    words, figures, good = common(work), {}, True
    call(*launched("single"), *words, *asked("single"), "--out", str(work / "single"), env=_ALONE)
    for strategy in SPREAD:
        for accumulation in (1, 2):
            run = work / f"{strategy}_{accumulation}"
            more = ["--train.micro_batch", str(8 // accumulation), "--out", str(run)]
            call(*launched(strategy), *words, *asked(strategy), *more, env=_ALONE)
            gap, distance, _ = apart(work / "single", run)
            figures[run.name] = {"loss": gap, "weights": distance}
            good &= gap <= 1e-6 and distance <= 1e-5
    return figures, good


def resumes(work: Path) -> Result:
    """Each strategy from and to 1, 2 and 4 ranks, stopped twice in an epoch: 2->2 the same bits, else 1e-6."""
    fresh(work)
    words, figures, good = common(work, "--train.epochs", "5"), {}, True
    for strategy in ("single", *SPREAD):
        call(*launched(strategy), *words, *asked(strategy), "--out", str(work / strategy), env=_ALONE)
    for strategy in SPREAD:
        for name in ("2->2->2", "2->2->1", "1->1->2", "2->4->1", "1->4->2"):
            run, record = work / f"{strategy} {name}", work / f"ids {strategy} {name}"
            # Epochs are of 4 steps: both stops are in the second, before the sixth and before the seventh step.
            for ranks, stop in zip(map(int, name.split("->")), ("6", "7", "-1"), strict=True):
                _leg("single" if ranks == 1 else strategy, ranks, stop, words, run, record)
            gap, distance, bits = apart(work / (strategy if name == "2->2->2" else "single"), run)
            twice, missed = _seen(record)
            figures[run.name] = {"loss": gap, "weights": distance, "bits": bits, "twice": twice, "missed": missed}
            good &= not twice and not missed and (bits if name == "2->2->2" else gap <= 1e-6 and distance <= 1e-5)
    return figures, good


def _leg(strategy: str, ranks: int, stop: str, words: list[str], run: Path, record: Path) -> None:
    """Starts or resumes a run that stops before a step, or ends where that is -1."""
    expected = 0 if stop == "-1" else 75 if ranks == 1 else 1  # accelerate turns 75 into 1
    environment = _ALONE | {"FASTAV_RECORD": str(record), "FASTAV_STOP_AT": stop, "PYTHONPATH": _paths()}
    start = launched(strategy, ranks, "tests.ranks.recorded")
    call(*start, *words, *asked(strategy, ranks), "--out", str(run), env=environment, expect=expected)
    state = json.loads((run / "status.json").read_text())["state"]
    if state != ("done" if stop == "-1" else "stopped"):
        raise Failed(f"{run}: {state} after being stopped before step {stop}")


def _paths() -> str:
    return os.pathsep.join([str(Path.cwd()), str(Path("kernels").resolve()), os.environ.get("PYTHONPATH", "")])


def _seen(record: Path) -> tuple[int, int]:
    """Clips that an epoch of 64 saw more than once, and those that it missed, over all ranks and restarts."""
    steps: dict[int, dict[int, list[str]]] = {}
    for file in record.glob("rank_*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], {}).setdefault(int(file.stem[5:]), []).append(row["ids"])
    if sorted(steps) != list(range(STEPS)):
        raise Failed(f"steps {sorted(steps)} were made, 0 to {STEPS - 1} expected")
    twice = missed = 0
    for epoch in range(STEPS // 4):
        ids = [clip for step in range(4 * epoch, 4 * epoch + 4) for rank in steps[step].values() for made in rank
               for clip in made]  # fmt: skip
        twice += len(ids) - len(set(ids))
        missed += 64 - len(set(ids))
    return twice, missed


def kills_ranks(work: Path) -> Result:
    """20 times `kill -9` of a random rank at a random moment, saves included: the weights of the run without a kill."""
    fresh(work)
    every, figures, good = 2, {}, True
    words = common(work, "--saving.every", str(every), "--saving.keep", "3", "--train.epochs", "15")
    rng = random.Random(int(time.time()))
    for strategy in ("ddp", "fsdp"):
        call(*launched(strategy), *words, *asked(strategy), "--out", str(work / strategy), env=_ALONE)
        run = work / f"killed {strategy}"
        resumed, at, inside, seconds = [], [], 0, []
        while len(at) < 10:
            before = _newest(run)
            command = [*launched(strategy), *words, *asked(strategy), "--out", str(run)]
            environment = {**os.environ, **_ALONE, _MARK: str(run)}
            process = subprocess.Popen(
                command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
            )
            try:
                half = _kill(process, run, before, rng, in_save=len(at) % 3 == 2)
                killed = time.monotonic()
                _, log = process.communicate(timeout=120)
                seconds.append(time.monotonic() - killed)
            finally:
                _end(run)
            at.append(_newest(run))
            inside += half
            if process.returncode == 0:
                raise Failed(f"{strategy}: a run with a dead rank ended well: {log[-500:]}")
        done = call(*launched(strategy), *words, *asked(strategy), "--out", str(run), env=_ALONE)
        resumed.append(int(done.stderr.split("resumed after step ")[1].split()[0]))
        one, two = weights(work / strategy), weights(run)
        same = all(torch.equal(one[k], two[k]) for k in one)
        figures[strategy] = {
            "checkpoints after each kill": at, "inside a save": inside, "same bits": same,
            "longest end_s": round(max(seconds), 1),
        }  # fmt: skip
        good &= same and inside >= 1 and at == sorted(at) and resumed[-1] == at[-1] and max(seconds) < 90
    return figures, good


def _newest(run: Path) -> int:
    steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")]
    return max(steps, default=0)


def _kill(process: subprocess.Popen[str], run: Path, before: int, rng: random.Random, *, in_save: bool) -> bool:
    """Kills a random rank once the run has saved anew, after a random moment or inside a save; says if inside one."""
    deadline = time.monotonic() + 300
    while _newest(run) <= before or not (run / "status.json").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"{run}: the run ended before it had saved: {(process.stderr or sys.stdin).read()[-1500:]}")
        time.sleep(0.01)
    time.sleep(rng.random())
    while in_save and not list((run / "checkpoints").glob(".step_*.tmp")) and process.poll() is None:
        time.sleep(0.0005)
    workers = _processes(run, b"LOCAL_RANK=")
    if not workers:
        raise Failed(f"{run}: no rank to kill")
    os.kill(rng.choice(workers), signal.SIGKILL)
    return bool(list((run / "checkpoints").glob(".step_*.tmp")))


def _processes(run: Path, variable: bytes = b"") -> list[int]:
    """Processes that were started for a run, by their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                variables = (folder / "environ").read_bytes().split(b"\0")
                if f"{_MARK}={run}".encode() in variables and any(one.startswith(variable) for one in variables):
                    found.append(int(folder.name))
    return found


def _end(run: Path) -> None:
    """Ends what may be left of a run."""
    for pid in _processes(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def async_save(work: Path) -> Result:
    """150 MB of state on 2 ranks: the training is held up <= 0.2 of a synchronous save, and the snapshot is exact."""
    fresh(work)
    done = call(
        str(_BIN / "torchrun"), "--standalone", "--nproc-per-node", "2",
        "tests/ranks/async_save.py", str(work / "saved"),
        env=_ALONE | {"PYTHONPATH": _paths()},
    )  # fmt: skip
    shutil.rmtree(work / "saved")
    found = json.loads(done.stdout.split("FOUND ")[1].splitlines()[0])
    return found, found["ratio"] <= 0.2 and found["exact"] and found["state_mb"] >= 150


CLUSTER_ROWS = {"spread": spread, "resumes": resumes, "kills_ranks": kills_ranks, "async_save": async_save}
