"""The training loop and its bottleneck: `python -m benchmarks train [RECIPE] [--section.key value ...]`.

Measures in alternation, in one process, with the trainer's own step and loader: loading batches alone; the model alone,
on a batch that stays on the device; both, as in a run; and the model while batches are loaded and discarded (under DDP
also the model without the all-reduce of gradients). From these follow overlap efficiency (the slower of loading and
model over both together), interference, waiting time of the host, idle time of the device, joules per clip, and the
bottleneck with the setting to change. `--vary optim.ema=0,0.999` (any key) compares variants in alternation (A B B A),
with a verdict from the interval of the paired ratios.

Default recipe: two ViT-B/16 towers in bf16 on a GPU, `launch/recipes/small.toml` without one. Without a manifest, clips
are generated and packed (`--footage FILE` uses a real video). Under torchrun or accelerate, a step is that of all
ranks; RECIPE must then name data, and `--folder` a folder that all ranks share.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import result as results
from benchmarks.console import open_console
from benchmarks.data.clips import make, repeated
from benchmarks.timing import Turn, interleave, median, paired_ratio, per_second, short
from benchmarks.train.bench import APART, MODES, Bench
from benchmarks.train.bound import Parts, bound
from fastav.core.command_runner import Parser, split_overrides
from fastav.core.errors import UserError
from fastav.recipe.parse import load_recipe, to_table
from fastav.recipe.schema import Recipe
from fastav.training.process_setup import shutdown

_ROOT = Path(__file__).parents[2]
_ONE_FOR_ALL = ("train.threads", "train.deterministic")
_COPIES = 512  # rows of the manifest of made clips
_PLOTTED = {
    "clips_per_s": "clips per second", "overlap_efficiency": "overlap efficiency: the slower of both alone over both",
    "interference": "interference: step time while loading over step time alone",
    "host_wait_pct": "host waits for batches, % of the training loop",
    "joules_per_clip": "joules per clip, training loop",
}  # fmt: skip
_OF_THE_LOOP = ("host_wait_pct", "device_idle_pct", "mfu_pct", "joules_per_clip", "peak_mem_gib", "sm_pct", "nvdec_pct")


def split_keys(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into the suite's own and recipe overrides (options with a dot, `--optim.lr 1e-4`)."""
    return split_overrides(words, lambda word: "." in word.partition("=")[0])


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parses the suite's options; overrides of recipe keys are in `overrides`."""
    parser = Parser(prog="python -m benchmarks train", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="recipe to train")
    parser.add_argument("--vary", metavar="KEY=A,B", help="compare variants: this recipe key with each of the values")
    parser.add_argument("--rounds", type=int, default=10, help="measured turns of each mode (10)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps per turn (10)")
    parser.add_argument("--footage", type=Path, metavar="FILE", help="real video of 10 s for the generated clips")
    parser.add_argument("--folder", type=Path, help="keep clips and run folders here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="JSON file of the result (in benchmarks/results/)")
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps: a functional test, no timing")
    own, overrides = split_keys(words)
    args = parser.parse_args(own)
    args.overrides = overrides
    if args.quick:
        args.rounds, args.steps = 2, 2
    if args.rounds < 1 or args.steps < 1:
        raise UserError(f"--rounds {args.rounds}, --steps {args.steps}: expected 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.folder is None:
        raise UserError("several ranks need --folder, a folder that all of them share, for the run folder")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Runs the suite."""
    args = arguments(list(words or []))
    console = open_console(quiet=os.environ.get("RANK", "0") != "0")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        chosen = variants(args, folder)
        found = results.new("train", list(words or []), _varied(args.vary))
        found["recipe"] = without_places(next(iter(chosen.values())))
        benches = {name: Bench(recipe, args.steps) for name, recipe in chosen.items()}
        try:
            first = next(iter(benches.values()))
            found["gpu"] = first.gpu.facts() if first.gpu else None
            if Path(next(iter(chosen.values())).data.manifest).parent == folder:
                found["notes"].append(f"the data is {_COPIES} rows of one packed clip, so it is read from memory")
            found["ranks"], found["device"] = first.state.ranks.world, first.state.ranks.describe()
            # The variants of a mode are neighbours, because they are compared in pairs.
            turns = {_label(name, mode): run for mode in (*MODES, APART) for name, one in benches.items()
                     if (run := one.modes().get(mode))}  # fmt: skip
            made = interleave(turns, args.rounds, log=lambda text: console.log(text), warm=not args.quick)
            for name, one in benches.items():
                _report(found, console, name, one, {mode: made[_label(name, mode)] for mode in one.modes()})
            _verdicts(found, console, list(benches), made)
        finally:
            for one in benches.values():
                one.close()
            shutdown()
        if not console.quiet:
            path = results.write(found, args.out, _PLOTTED, {"end to end": "#d1495b"})
            console.print(f"wrote {path}, and a plot next to it", highlight=False, soft_wrap=True)
    return 0


def without_places(recipe: Recipe) -> dict[str, Any]:
    """Returns the resolved recipe as a table, without paths of this machine."""
    data = msgspec.structs.replace(recipe.data, manifest=Path(recipe.data.manifest).name, shards="", aliases="")
    return to_table(msgspec.structs.replace(recipe, data=data, out=""))


def prepared(
    recipe: Path | None, overrides: Sequence[str], footage: Path | None, folder: Path
) -> tuple[Path, list[str]]:
    """Returns the recipe file and the overrides to use; generates and packs clips if the recipe names no manifest.

    Raises:
        UserError: A key, value or file is wrong.
    """
    default = _ROOT / ("benchmarks/recipe_vit_b.toml" if torch.cuda.is_available() else "launch/recipes/small.toml")
    path, words = recipe or default, [*overrides, "--data.test", "", "--train.eval_every", "0"]
    if not load_recipe(path, words).data.manifest:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"{path}: data.manifest is not set; several ranks need one (they cannot generate clips)")
        media = make(folder / "media", footage)
        manifest = repeated(media.packed["balanced"], _COPIES, folder / "clips.parquet")
        words += ["--data.manifest", str(manifest.path)]
    return path, words


def variants(args: argparse.Namespace, folder: Path) -> dict[str, Recipe]:
    """Returns the recipes to compare by name; a single one has an empty name.

    Raises:
        UserError: A key, value or file is wrong.
    """
    path, words = prepared(args.recipe, args.overrides, args.footage, folder)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    found = {}
    for number, (name, chosen) in enumerate(choices(args.vary)):
        recipe = load_recipe(path, [*words, *chosen])
        run = f"run_{number}_{os.getpid()}" if alone else f"run_{number}"  # the same folder for all ranks
        found[name] = msgspec.structs.replace(recipe, out=str(folder / run))
    return found


def choices(vary: str | None) -> list[tuple[str, list[str]]]:
    """Returns the variants of `--vary` as (name, recipe overrides); without it, a single one with an empty name.

    Raises:
        UserError: The value is not KEY=A,B, or the key cannot differ within a process.
    """
    if vary is None:
        return [("", [])]
    key, equals, values = vary.partition("=")
    if not equals or len(values.split(",")) < 2:
        raise UserError(f"--vary {vary}: expected KEY=A,B with at least two values")
    if key in _ONE_FOR_ALL:
        raise UserError(f"--vary {vary}: {key} holds for the whole process; measure each value in its own run")
    listed = values.split(",")
    twice = [
        f" ({listed[:place].count(value) + 1})" if value in listed[:place] else "" for place, value in enumerate(listed)
    ]
    return [(f"{key}={value}{again}", [f"--{key}", value]) for value, again in zip(listed, twice, strict=True)]


def _varied(vary: str | None) -> dict[str, list[Any]]:
    key, _, values = (vary or "").partition("=")
    return {"mode": list(MODES)} | ({key: values.split(",")} if vary else {})


def _label(variant: str, mode: str) -> str:
    return f"{variant}: {mode}" if variant else mode


def step_s(turns: Sequence[Turn]) -> NDArray[np.float64]:
    """Returns the seconds per step of each turn."""
    return np.array([turn.facts["step_ms"] / 1e3 for turn in turns])


def _report(found: dict[str, Any], console: Console, variant: str, bench: Bench, turns: dict[str, list[Turn]]) -> None:
    """Adds and prints the measurements of a variant, the derived values, and the bottleneck."""
    table = Table(title=variant or None)
    for column in ("", "ms/step", "clips/s", "CPU %", "GPU %", "NVDEC %", "J/clip"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for mode, made in turns.items():
        label, seconds = _label(variant, mode), step_s(made)
        results.summarise(found, label, "clips_per_s", rate := median(per_second(made)))
        medians = [median_of(made, key) for key in ("cpu_pct", "sm_pct", "nvdec_pct", "joules_per_clip")]
        shown = ["" if value is None else short(value) for value in medians]
        table.add_row(mode, str(median(1e3 * seconds)), f"{rate.median:.3g}", *shown)
        found["runs"] += [{"variant": label, "repeat": number, **turn.facts} for number, turn in enumerate(made)]
    console.print(table)
    d, m, e, b = (step_s(turns[mode]) for mode in MODES)
    derived = {"overlap_efficiency": median(np.maximum(d, m) / e), "interference": median(b / m)}
    loop = turns["end to end"]
    for key in _OF_THE_LOOP:
        if (values := known(loop, key)) is not None:
            derived[key] = median(values)
    for key, interval in derived.items():
        results.summarise(found, _label(variant, "end to end"), key, interval)
        console.print(f"{key.replace('_', ' ')}: {interval}", highlight=False)
    bottleneck = bound(parts(bench, turns))
    found.setdefault("bound", []).append({"variant": variant, **asdict(bottleneck)})
    found["runs"].append({"variant": variant or "start", "repeat": 0, "start_s": round(bench.start_s, 2)})
    throttled = sorted({reason for made in turns.values() for turn in made
                        for reason in turn.facts["throttled"] or ()})  # fmt: skip
    if throttled:
        found["notes"].append(f"{_label(variant, 'the GPU')} was throttled: {', '.join(throttled)}")
        console.print(found["notes"][-1], style="yellow", highlight=False)
    console.print(f"{bottleneck}", highlight=False, soft_wrap=True, style="bold")


def parts(bench: Bench, turns: dict[str, list[Turn]]) -> Parts:
    """Returns the medians from which the bottleneck is found."""
    data, model, beside = turns["data"], turns["model"], turns["model beside data"]
    stages = {name: float(np.median([turn.facts["stages"][name] for turn in data])) for name in data[0].facts["stages"]}
    d, m, e, b = (float(np.median(step_s(turns[mode]))) for mode in MODES)
    sent = 1 - float(np.median(step_s(turns[APART]))) / m if APART in turns else 0.0
    data_beside_ms = median_of(beside, "data_step_ms")
    whole = "prepare" in stages  # only decoders of whole batches have this stage
    worker = bench.state.recipe.loading.worker
    return Parts(
        d, m, e, b, cpu_pct=median_of(data, "cpu_pct"), nvdec_pct=median_of(data, "nvdec_pct"),
        copy_pct=median_of(data, "copy_pct"), sm_pct=median_of(model, "sm_pct"), stages=stages,
        data_beside_s=None if data_beside_ms is None else data_beside_ms / 1e3,
        decodes="dali" if whole else "processes" if worker == "process" else "threads",
        gpu=bench.device.type == "cuda", communication_pct=100 * max(0.0, sent),
    )  # fmt: skip


def median_of(turns: Sequence[Turn], key: str) -> float | None:
    """Returns the median of a fact over turns; None if a turn does not have it."""
    values = known(turns, key)
    return None if values is None else float(np.median(values))


def known(turns: Sequence[Turn], key: str) -> NDArray[np.float64] | None:
    """Returns a fact of each turn; None if a turn does not have it."""
    values = [turn.facts.get(key) for turn in turns]
    return None if any(value is None for value in values) else np.array(values, np.float64)


def _verdicts(found: dict[str, Any], console: Console, names: Sequence[str], made: dict[str, list[Turn]]) -> None:
    """Compares every variant with the first one, in each mode, by paired turns."""
    for name in names[1:]:
        for mode in MODES:
            a, b = _label(name, mode), _label(names[0], mode)
            interval = paired_ratio(per_second(made[a]), per_second(made[b]))
            word = results.judge(found, a, b, "clips_per_s", interval)
            console.print(f"{a} / {names[0]}: {interval} ({word})", highlight=False)
