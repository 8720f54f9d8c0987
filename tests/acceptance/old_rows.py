"""Rows about files of an older version: this one reads, continues and evaluates them; all is the same, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from tests.acceptance.old_files import ASK, OLD, PACKING, REPOSITORY, RUNS, Case, Code, export_tree, make
from tests.acceptance.rows import Failed, Result, fresh

ADDED = {"factory": "", "args": {}}
"""Keys that this version has added to the spectrogram's settings, and the defaults that leave it as it was."""


def without_added(description: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe or a model's description as the old code would have written it."""
    frontend = description["frontend"]
    kept = {key: value for key, value in frontend.items() if key not in ADDED or value != ADDED[key]}
    return {**description, "frontend": kept}


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
    skipped = [run / "skipped.csv" for run in (old, new)]  # no such file where every clip could be read
    equal("skipped.csv", *(file.read_text() if file.exists() else "" for file in skipped))
    newest = [sorted((run / "checkpoints").glob("step_*"))[-1] for run in (old, new)]
    equal("the newest checkpoint", *(folder.name for folder in newest))
    equal_tensors(*newest)
    states = [json_file(folder / "state.json") for folder in newest]
    for state in states:
        del state["recipe"]["out"]
        state["recipe"] = without_added(state["recipe"])
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


def refuses_half_pack(case: Case) -> None:
    """A pack begun with other encoder settings is refused by name and left as it was: its bytes would be mixed."""
    half = case.copied("half", "half")
    before = {file.relative_to(half): digest(file) for file in sorted(half.rglob("*")) if file.is_file()}
    words = ["pack", case.made / "synth" / "manifest.parquet", half, *PACKING]
    process = case.new.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    error = process.communicate(timeout=300)[1]
    if process.returncode != 2 or "contains a different pack (x264 is " not in error or error.count("\n") != 1:
        raise Failed(f"exit code {process.returncode}, expected 2 and one line that names x264: {error[-800:]}")
    after = {file.relative_to(half): digest(file) for file in sorted(half.rglob("*")) if file.is_file()}
    equal("files of the half pack", before, {name: value for name, value in after.items() if name in before})


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
        equal("model.json", json_file(old / "model.json"), without_added(json_file(new / "model.json")))


def loads_model(case: Case) -> None:
    """`AVModel.from_pretrained`: the same numbers, the same answer."""
    told = case.new.python("-c", ASK, str(case.run("whole") / "model")).stdout
    for one, two in zip((case.made / "asked.txt").read_text().splitlines(), told.splitlines(), strict=True):
        equal("the model", one, two)


def shows_recipe(case: Case) -> None:
    """`recipe show` of a run's recipe says the same."""
    shown = case.new.fastav("recipe", "show", case.run("whole") / "recipe.toml").stdout
    old = (case.made / "shown.toml").read_text()
    added = ('factory = ""', "[frontend.args]")
    kept = [line for line in shown.splitlines() if line and line not in added]
    for one, two in zip([line for line in old.splitlines() if line], kept, strict=True):
        equal("recipe show", one, two)


def fuses_scores(case: Case) -> None:
    """Score fusion of two runs of the old code gives the same figures."""
    words = [w for m in ("video", "audio") for w in (f"--model.{m}.init_from", case.run(m))]
    case.new.fastav("train", case.recipe("score"), *words, "--out", case.ours / "score")
    equal_figures(case.run("score"), case.ours / "score")


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


CHECKS: tuple[Callable[[Case], None], ...] = (
    shows_recipe, evaluates, resumes, fuses_scores, verifies_pack, trains_on_pack, refuses_half_pack,
    reports, exports, loads_model,
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
