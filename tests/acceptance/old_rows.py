"""Files of an older version: runs, checkpoints, packs and manifests made by its code, read and continued by this one.

The older code is taken from the history and run from its own folder. Both codes are only called by their command lines
and by `from fastav import AVModel`, so that it makes no difference where modules lie.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from tests.acceptance.rows import Failed, Result, call, fresh, last_step

OLD = "2eb522e4c3868a4321074a090b285f9d11de5a8b"
REPOSITORY = Path(__file__).resolve().parents[2]
RUNS = ("video", "audio", "score", "whole", "packed")
STOP_AFTER = 6  # of 24 steps
PACKING = ("--shard-mib", "1", "--workers", "1")

# One thread, fp32 and deterministic kernels; all that a checkpoint can hold: EMA, a best evaluation, mixup, a schedule.
TINY = """base = {base}
out = {out}
[data]
manifest = {manifest}
[sampling]
frames = 2
image_size = 32
eval_windows = [0]
mixup = 0.3
[model.video.args]
depth = 2
embed_dim = 32
[model.audio.args]
depth = 2
embed_dim = 32
[optim]
ema = 0.9
[train]
batch = 8
epochs = {epochs}
eval_every = 3
threads = 1
seed = 3
deterministic = true
[loading]
workers = 1
[saving]
every = 5
keep = 2
[log]
every = 1
trackers = []
"""
FUSION = '[model.fusion]\nkind = "bottleneck"\nstart = 1\ntokens = 4\n'
KINDS = {
    "video": '[model.fusion]\nkind = "video"\n',
    "audio": '[model.fusion]\nkind = "audio"\n',
    "score": '[model.fusion]\nkind = "score"\n[model.video]\ninit_from = "video"\n[model.audio]\ninit_from = "audio"\n',
    "whole": FUSION,
    "packed": FUSION,
}
EPOCHS = {"video": 1, "audio": 1, "score": 0, "whole": 6, "packed": 2}

# What a model says of made input, and all of its numbers, as digests.
ASK = """
import hashlib, sys, torch
from fastav import AVModel
torch.set_num_threads(1)
model = AVModel.from_pretrained(sys.argv[1]).eval()
inputs, made = model.inputs, torch.Generator().manual_seed(5)
size = inputs.image_size
frames = torch.randint(0, 256, (2, inputs.frames, 3, size, size), dtype=torch.uint8, generator=made)
mel = 20 * torch.randn((2, 1, 1, inputs.num_mels, inputs.window), generator=made) - 40
with torch.no_grad():
    logits = model(frames, mel)
assert logits.shape == (2, len(model.classes)) and bool(torch.isfinite(logits).all())
for name, tensor in [*sorted(model.state_dict().items()), ("logits", logits)]:
    print(name, hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
print(*model.classes)
"""


@dataclass(frozen=True)
class Code:
    """The package as it lies in one tree."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Where Python finds this package before any other."""
        return {"PYTHONPATH": os.pathsep.join([str(self.root), str(self.root / "kernels")])}

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs Python in the tree."""
        return call(sys.executable, *words, env=self.environment, cwd=self.root, timeout=600)

    def fastav(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Runs a verb."""
        return self.python("-m", "fastav", *map(str, words))

    def start(self, *words: object, **options: Any) -> subprocess.Popen[str]:
        """Starts a verb, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "fastav", *map(str, words)], cwd=self.root, text=True, start_new_session=True,
            env={**os.environ, **self.environment}, **options,
        )  # fmt: skip

    def check_place(self) -> None:
        """Refuses to go on where Python would take the package from elsewhere."""
        found = self.python("-c", "import fastav, fastav_kernels as k; print(fastav.__file__); print(k.__file__)")
        for file in found.stdout.split("\n")[:2]:
            inside = Path(file).resolve().relative_to(self.root).parts if self.root in Path(file).parents else ()
            if not inside or inside[0] == "acceptance":
                raise Failed(f"python in {self.root} takes the package from {file}")


@dataclass(frozen=True)
class Case:
    """What every check is given: both codes, what the old one made, and a folder for what the new one makes."""

    old: Code
    new: Code
    made: Path
    ours: Path

    def run(self, name: str) -> Path:
        """A run of the old code."""
        return self.made / "runs" / name

    def recipe(self, name: str) -> Path:
        """A run's recipe."""
        return self.made / f"{name}.toml"

    def copied(self, what: str, name: str) -> Path:
        """A copy of something that the old code made, which may be changed."""
        shutil.copytree(self.made / what, self.ours / name)
        return self.ours / name


def export_tree(folder: Path) -> Path:
    """Writes the tree of the old commit into a folder."""
    git = ["git", "-C", str(REPOSITORY)]
    known = subprocess.run([*git, "cat-file", "-e", f"{OLD}^{{commit}}"], capture_output=True, text=True)
    if known.returncode:
        raise Failed(
            f"the history here lacks commit {OLD}, whose files are to be read; in a shallow clone run "
            f"`git fetch --unshallow` first ({known.stderr.strip()})"
        )
    archive = subprocess.run([*git, "archive", "--format=tar", OLD], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def make(case: Case) -> None:
    """Makes everything with the old code."""
    old, made = case.old, case.made
    made.mkdir()
    synth = made / "synth"
    old.fastav("synth", synth, "--train", "32", "--test", "16", "--size", "64", "--workers", "1")
    arrange(synth, made / "media")
    old.fastav("index", "folder", made / "media", "--out", made / "folder.parquet", "--workers", "1")
    old.fastav("pack", synth / "manifest.parquet", made / "pack", *PACKING)
    kill_pack(case)
    for name in RUNS:
        write_recipe(case, name)
    old.fastav("train", *(case.recipe(name) for name in RUNS))
    stop_run(case)
    old.fastav("evaluate", case.run("whole"), made / "folder.parquet", "train")
    shown = old.fastav("recipe", "show", case.run("whole") / "recipe.toml").stdout
    (made / "shown.toml").write_text(shown)
    for name in ("whole", "stopped"):
        old.fastav("export", "weights", case.run(name), "--out", made / f"exported_{name}")
    (made / "asked.txt").write_text(old.python("-c", ASK, str(case.run("whole") / "model")).stdout)
    shutil.copytree(made / "runs", made / "reported", ignore=shutil.ignore_patterns("checkpoints", "stopped"))
    old.fastav("report", made / "reported", "--clips", "2")


def arrange(synth: Path, media: Path) -> None:
    """Copies a made data set into a folder for each split and class, as `index folder` reads them."""
    for row in pq.read_table(synth / "manifest.parquet", columns=["video", "split", "labels"]).to_pylist():
        if row["video"]:
            folder = media / row["split"] / row["labels"][0]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(synth / row["video"], folder)


def write_recipe(case: Case, name: str) -> None:
    """Writes the recipe of a run, on top of one that lies in the old tree."""
    manifest = case.made / ("pack" if name == "packed" else "synth") / "manifest.parquet"
    places = {
        "base": case.old.root / "launch" / "recipes" / "quickstart.toml", "out": case.run(name), "manifest": manifest,
    }  # fmt: skip
    quoted = {key: json.dumps(str(value)) for key, value in places.items()}
    case.recipe(name).write_text(TINY.format(**quoted, epochs=EPOCHS[name]) + KINDS[name])


def kill_pack(case: Case) -> None:
    """Leaves `half`, a pack that was killed after its third shard."""
    half = case.made / "half"
    words = ("pack", case.made / "synth" / "manifest.parquet", half, *PACKING)
    process = case.old.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait(process, lambda: len(list(half.glob("parts/[0-9]*.parquet"))) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if (half / "manifest.parquet").exists():
        raise Failed("the pack was finished before it could be killed")


def stop_run(case: Case) -> None:
    """Leaves `stopped`, the run `whole` as SIGTERM has ended it half-way."""
    stopped = case.run("stopped")
    process = case.old.start("train", case.recipe("whole"), "--out", stopped, stderr=subprocess.PIPE)
    wait(process, lambda: last_step(stopped) >= STOP_AFTER)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=300)
    if process.returncode != 75:
        raise Failed(f"SIGTERM ended the run with {process.returncode}, not 75: {log[-800:]}")


def wait(process: subprocess.Popen[str], come: Callable[[], bool]) -> None:
    """Waits until something has come while a process runs."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if come():
            return
        time.sleep(0.005)
    process.kill()
    raise Failed(f"{process.args}: ended before it was to be stopped")


def equal(what: str, old: object, new: object) -> None:
    """Refuses two values that differ, and shows both."""
    if old != new:
        raise Failed(f"{what} differs: {str(old)[:300]} by the old code, {str(new)[:300]} by the new")


def equal_tensors(old: Path, new: Path) -> None:
    """Refuses safetensors files in two folders that differ in one bit."""
    one, two = (
        {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        for folder in (old, new)
    )
    if not one:
        raise Failed(f"no tensors in {old}")
    equal(f"{old.name}: names of tensors", sorted(one), sorted(two))
    apart = [name for name in one if one[name].dtype != two[name].dtype or not torch.equal(one[name], two[name])]
    if apart:
        raise Failed(f"{old.name}: {len(apart)} of {len(one)} tensors differ, {apart[0]} among them")


def equal_figures(old: Path, new: Path) -> None:
    """Refuses two folders of an evaluation whose metrics or predictions differ in one bit."""
    one, two = (pq.read_table(folder / "predictions.parquet") for folder in (old, new))
    if not one.num_rows or not one.equals(two):
        raise Failed(f"the predictions on {one.num_rows} clips differ from those in {new} on {two.num_rows}")
    for key, value in json_file(old / "metrics.json").items():
        equal(f"metrics.json: {key}", json.dumps(value), json.dumps(json_file(new / "metrics.json").get(key)))


def equal_runs(old: Path, new: Path) -> None:
    """Refuses two finished runs that differ in a loss, an evaluation, a weight, a checkpoint or a skipped clip."""
    told, again = rows(old), rows(new)
    for one, two in zip(told, again, strict=False):
        equal("metrics.jsonl", one, two)
    equal("number of rows in metrics.jsonl", len(told), len(again))
    equal_tensors(old / "model", new / "model")
    equal_figures(old, new)
    equal("skipped.csv", (old / "skipped.csv").read_text(), (new / "skipped.csv").read_text())
    one, two = (sorted((run / "checkpoints").glob("step_*"))[-1] for run in (old, new))
    equal("the newest checkpoint", one.name, two.name)
    equal_tensors(one, two)
    states = [json_file(folder / "state.json") for folder in (one, two)]
    for state in states:
        del state["recipe"]["out"]
    for key, value in states[0].items():
        equal(f"state.json: {key}", json.dumps(value), json.dumps(states[1].get(key)))


def rows(run: Path) -> list[str]:
    """What `metrics.jsonl` says of the training, without what depends on the clock."""
    kept = ("step", "epoch", "loss", "lr", "grad_norm", "broken", "skipped_steps", "eval")
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({key: row[key] for key in kept if key in row}) for row in every]


def json_file(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def evaluates(case: Case) -> None:
    """A finished run evaluates to the same figures, on its own test split and on a manifest of `index folder`."""
    run = case.copied("runs/whole", "evaluated")
    (other,) = (case.run("whole") / "evaluations").iterdir()
    shutil.rmtree(run / "evaluations")
    for name in ("metrics.json", "predictions.parquet"):
        (run / name).unlink()
    case.new.fastav("evaluate", run)
    equal_figures(case.run("whole"), run)
    case.new.fastav("evaluate", run, case.made / "folder.parquet", "train")
    equal_figures(other, run / "evaluations" / other.name)


def resumes(case: Case) -> None:
    """A stopped run is resumed and ends in the same bits as the one that was not stopped."""
    run = case.copied("runs/stopped", "resumed")
    step, total = (json_file(run / "status.json")[key] for key in ("step", "total_steps"))
    if not 0 < step < total:
        raise Failed(f"the run was stopped after step {step} of {total}, not half-way")
    done = case.new.fastav("train", case.recipe("whole"), "--out", run)
    if f"resumed after step {step} " not in done.stderr:
        raise Failed(f"not resumed after step {step}: {done.stderr[-800:]}")
    equal_runs(case.run("whole"), run)


def verifies_pack(case: Case) -> None:
    """`pack --verify` finds no fault in a pack."""
    case.new.fastav("pack", "--verify", case.made / "pack", "--workers", "1")


def trains_on_pack(case: Case) -> None:
    """A run on a pack, from its first step: losses, weights and figures as before."""
    case.new.fastav("train", case.recipe("packed"), "--out", case.ours / "packed")
    equal_runs(case.run("packed"), case.ours / "packed")


def finishes_pack(case: Case) -> None:
    """A pack that was killed half-way is finished: no shard that was there is packed again, and it verifies."""
    half = case.copied("half", "half")
    kept = {file.name: digest(file) for file in half.glob("shards/[0-9]*.tar")}
    kept = {name: value for name, value in kept.items() if (half / "parts" / f"{Path(name).stem}.parquet").exists()}
    done = case.new.fastav("pack", case.made / "synth" / "manifest.parquet", half, *PACKING)
    if not kept or "shards were packed before" not in done.stdout:
        raise Failed(f"the pack was begun anew: {done.stdout[-800:]}")
    equal("shards packed before", kept, {name: digest(half / "shards" / name) for name in kept})
    case.new.fastav("pack", "--verify", half, "--workers", "1")


def finished_pack_is_the_same(case: Case) -> None:
    """That pack has the bytes of the one that the old code packed to its end."""
    half, whole = case.ours / "half", case.made / "pack"
    names = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.suffix in (".tar", ".parquet"))
    apart = [name for name in names if not (half / name).exists() or digest(half / name) != digest(whole / name)]
    if apart:
        raise Failed(
            f"{len(apart)} of {len(names)} files, {apart[0]} among them, have other bytes than those of {OLD[:7]}. "
            "Where this version encodes in another way on purpose, this check alone fails, and must be taken out; "
            "otherwise packing has changed, or half a pack was read wrong"
        )


def reports(case: Case) -> None:
    """`report` over the runs: the same comparison, and a page for each."""
    runs = case.copied("reported", "reported")
    for file in [*runs.rglob("report.html"), *runs.rglob("results.json")]:
        file.unlink()
    case.new.fastav("report", runs, "--clips", "2")
    old, new = (json_file(folder / "results.json") for folder in (case.made / "reported", runs))
    equal("results.json", json.dumps(old), json.dumps(new))
    lacking = [name for name in RUNS if not (runs / name / "report.html").exists()]
    if lacking or not (runs / "report.html").exists():
        raise Failed(f"no report.html for {lacking}")


def exports(case: Case) -> None:
    """`export weights` of a finished and of a stopped run: the same model."""
    for name in ("whole", "stopped"):
        old, new = case.made / f"exported_{name}", case.ours / f"exported_{name}"
        case.new.fastav("export", "weights", case.run(name), "--out", new)
        equal(f"files of {old.name}", sorted(p.name for p in old.iterdir()), sorted(p.name for p in new.iterdir()))
        equal_tensors(old, new)
        equal("model.json", json_file(old / "model.json"), json_file(new / "model.json"))


def loads_model(case: Case) -> None:
    """`AVModel.from_pretrained`: the same numbers, the same answer."""
    told = case.new.python("-c", ASK, str(case.run("whole") / "model")).stdout
    for one, two in zip((case.made / "asked.txt").read_text().splitlines(), told.splitlines(), strict=True):
        equal("the model", one, two)


def shows_recipe(case: Case) -> None:
    """`recipe show` of a run's recipe says the same."""
    shown = case.new.fastav("recipe", "show", case.run("whole") / "recipe.toml").stdout
    old = (case.made / "shown.toml").read_text()
    for one, two in zip(old.splitlines(), shown.splitlines(), strict=False):
        equal("recipe show", one, two)
    equal("recipe show", old, shown)


def fuses_scores(case: Case) -> None:
    """Score fusion of two runs of the old code gives the same figures."""
    words = [w for m in ("video", "audio") for w in (f"--model.{m}.init_from", case.run(m))]
    case.new.fastav("train", case.recipe("score"), *words, "--out", case.ours / "score")
    equal_figures(case.run("score"), case.ours / "score")


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


CHECKS: tuple[Callable[[Case], None], ...] = (
    shows_recipe, evaluates, resumes, fuses_scores, verifies_pack, trains_on_pack, finishes_pack,
    finished_pack_is_the_same, reports, exports, loads_model,
)  # fmt: skip


def compare(case: Case) -> Result:
    """Runs every check, also where one before it has failed."""
    shutil.rmtree(case.ours, ignore_errors=True)
    case.ours.mkdir()
    failed = {}
    for check in CHECKS:
        try:
            check(case)
        except Exception as error:
            failed[check.__name__] = f"{type(error).__name__}: {error}"
    status = json_file(case.run("stopped") / "status.json")
    parts = len(list((case.made / "half").glob("parts/[0-9]*.parquet")))
    shards = len(list((case.made / "pack").glob("shards/*.tar")))
    figures = {
        "made_by": OLD[:7], "checks": len(CHECKS), "failed": failed,
        "stopped_after_step": f"{status['step']} of {status['total_steps']}",
        "half_pack": f"{parts} of {shards} shards",
    }  # fmt: skip
    return figures, not failed


def case_in(work: Path) -> Case:
    """The folders of the row."""
    work = work.resolve()
    return Case(Code(work / "tree"), Code(REPOSITORY), work / "made", work / "ours")


def old_files(work: Path) -> Result:
    """Runs, checkpoints, packs and manifests made by the code of 2eb522e: read, resumed and evaluated, bit for bit."""
    case = case_in(fresh(work))
    export_tree(case.old.root)
    for code in (case.old, case.new):
        code.check_place()
    make(case)
    return compare(case)


OLD_ROWS = {"old_files": old_files}
