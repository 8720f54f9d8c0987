"""The real loop, and what holds it up: `python -m benchmarks train [RECIPE] [--section.key value ...]`.

In turns, in one process, with the trainer's own step and loader: batches alone; the model alone, on a batch that stays
on the device; both, as a run does; and the model while batches are made and thrown away (under DDP also the model
without sending gradients). From these follow overlap efficiency (the slower side alone over both together),
interference, the wait of the host beside the idle time of the device, joules a clip, and the name of what binds with
the knob to turn. `--vary optim.ema=0,0.999` (any key) measures variants beside each other, A B B A, with a verdict from
the interval of the pairs.

Without a recipe: two ViT-B/16 towers in bf16 on a GPU, `launch/recipes/small.toml` without one. Without a manifest:
clips that are made and packed for it (`--footage FILE` takes a real video). Under torchrun or accelerate the step is
that of all ranks; RECIPE must then name data and `--folder` a place that they share.
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
from fastav.core.cli import Parser, split_overrides
from fastav.core.errors import UserError
from fastav.recipe.parse import load_recipe, to_table
from fastav.recipe.schema import Recipe
from fastav.training.ranks import shutdown

_ROOT = Path(__file__).parents[2]
_ONE_FOR_ALL = ("train.threads", "train.deterministic")
_COPIES = 512  # rows of the manifest of made clips
_PLOTTED = {
    "clips_per_s": "clips per second", "overlap_efficiency": "overlap efficiency: the slower side alone over both",
    "interference": "interference: the model beside the loader over the model alone",
    "host_wait_pct": "host waits for batches, % of the real loop", "joules_per_clip": "joules a clip, real loop",
}  # fmt: skip
_OF_THE_LOOP = ("host_wait_pct", "device_idle_pct", "mfu_pct", "joules_per_clip", "peak_mem_gib", "sm_pct", "nvdec_pct")


def split_keys(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts a suite's own words from the recipe's: options with a dot, `--optim.lr 1e-4`, and their values."""
    return split_overrides(words, lambda word: "." in word.partition("=")[0])


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Reads the suite's options; keys of the recipe are in `overrides`."""
    parser = Parser(prog="python -m benchmarks train", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="what to train")
    parser.add_argument("--vary", metavar="KEY=A,B", help="variants: this key of the recipe with each of the values")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each that count (10)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a turn (10)")
    parser.add_argument("--footage", type=Path, metavar="FILE", help="a real video of 10 s for the clips that are made")
    parser.add_argument("--folder", type=Path, help="keep clips and run folders here; default: a temporary one")
    parser.add_argument("--out", type=Path, help="the JSON (benchmarks/results/)")
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps: whether it runs, not how fast")
    own, overrides = split_keys(words)
    args = parser.parse_args(own)
    args.overrides = overrides
    if args.quick:
        args.rounds, args.steps = 2, 2
    if args.rounds < 1 or args.steps < 1:
        raise UserError(f"--rounds {args.rounds}, --steps {args.steps}: expected 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.folder is None:
        raise UserError("several ranks need --folder, a place that all of them share, for the run folder")
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
                found["notes"].append(f"{_COPIES} rows of one packed clip: read from memory, not from a disk")
            found["ranks"], found["device"] = first.state.ranks.world, first.state.ranks.describe()
            # Variants of a mode are neighbours, as they are compared in pairs.
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
            console.print(f"{path}, with a picture beside it", highlight=False, soft_wrap=True)
    return 0


def without_places(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without where its files lie on this machine."""
    data = msgspec.structs.replace(recipe.data, manifest=Path(recipe.data.manifest).name, shards="", aliases="")
    return to_table(msgspec.structs.replace(recipe, data=data, out=""))


def prepared(
    recipe: Path | None, overrides: Sequence[str], footage: Path | None, folder: Path
) -> tuple[Path, list[str]]:
    """The recipe's file and the keys to add to it; makes and packs clips where it names no manifest.

    Raises:
        UserError: A key, value or file that is wrong.
    """
    default = _ROOT / ("benchmarks/recipe_vit_b.toml" if torch.cuda.is_available() else "launch/recipes/small.toml")
    path, words = recipe or default, [*overrides, "--data.test", "", "--train.eval_every", "0"]
    if not load_recipe(path, words).data.manifest:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"{path}: data.manifest is not set; several ranks cannot all make clips")
        media = make(folder / "media", footage)
        manifest = repeated(media.packed["balanced"], _COPIES, folder / "clips.parquet")
        words += ["--data.manifest", str(manifest.path)]
    return path, words


def variants(args: argparse.Namespace, folder: Path) -> dict[str, Recipe]:
    """The recipes that are compared, by name; an empty name for a single one.

    Raises:
        UserError: A key, value or file that is wrong.
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
    """The variants that `--vary` asks for: (name, keys of the recipe); one without a name where it is not given.

    Raises:
        UserError: The words are not KEY=A,B, or the key cannot differ within a process.
    """
    if vary is None:
        return [("", [])]
    key, equals, values = vary.partition("=")
    if not equals or len(values.split(",")) < 2:
        raise UserError(f"--vary {vary}: expected KEY=A,B with two values or more")
    if key in _ONE_FOR_ALL:
        raise UserError(f"--vary {vary}: {key} holds for the whole process; measure the values one after the other")
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
    """Returns seconds of a step, for each turn."""
    return np.array([turn.facts["step_ms"] / 1e3 for turn in turns])


def _report(found: dict[str, Any], console: Console, variant: str, bench: Bench, turns: dict[str, list[Turn]]) -> None:
    """Adds and prints what was measured of a variant, what follows from it, and what binds."""
    table = Table(title=variant or None)
    for column in ("", "ms a step", "clips/s", "CPU %", "GPU %", "NVDEC %", "J/clip"):
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
    binds = bound(parts(bench, turns))
    found.setdefault("bound", []).append({"variant": variant, **asdict(binds)})
    found["runs"].append({"variant": variant or "start", "repeat": 0, "start_s": round(bench.start_s, 2)})
    throttled = sorted({reason for made in turns.values() for turn in made
                        for reason in turn.facts["throttled"] or ()})  # fmt: skip
    if throttled:
        found["notes"].append(f"{_label(variant, 'the GPU')} was throttled: {', '.join(throttled)}")
        console.print(found["notes"][-1], style="yellow", highlight=False)
    console.print(f"{binds}", highlight=False, soft_wrap=True, style="bold")


def parts(bench: Bench, turns: dict[str, list[Turn]]) -> Parts:
    """What tells which side binds: medians of the turns."""
    data, model, beside = turns["data"], turns["model"], turns["model beside data"]
    stages = {name: float(np.median([turn.facts["stages"][name] for turn in data])) for name in data[0].facts["stages"]}
    d, m, e, b = (float(np.median(step_s(turns[mode]))) for mode in MODES)
    sent = 1 - float(np.median(step_s(turns[APART]))) / m if APART in turns else 0.0
    data_beside_ms = median_of(beside, "data_step_ms")
    whole = "prepare" in stages  # decoders of whole batches have clips prepared for them
    worker = bench.state.recipe.loading.worker
    return Parts(
        d, m, e, b, cpu_pct=median_of(data, "cpu_pct"), nvdec_pct=median_of(data, "nvdec_pct"),
        copy_pct=median_of(data, "copy_pct"), sm_pct=median_of(model, "sm_pct"), stages=stages,
        data_beside_s=None if data_beside_ms is None else data_beside_ms / 1e3,
        decodes="dali" if whole else "processes" if worker == "process" else "threads",
        gpu=bench.device.type == "cuda", communication_pct=100 * max(0.0, sent),
    )  # fmt: skip


def median_of(turns: Sequence[Turn], key: str) -> float | None:
    """The median of a fact of some turns; None where one lacks it."""
    values = known(turns, key)
    return None if values is None else float(np.median(values))


def known(turns: Sequence[Turn], key: str) -> NDArray[np.float64] | None:
    """A fact of each turn; None where one lacks it."""
    values = [turn.facts.get(key) for turn in turns]
    return None if any(value is None for value in values) else np.array(values, np.float64)


def _verdicts(found: dict[str, Any], console: Console, names: Sequence[str], made: dict[str, list[Turn]]) -> None:
    """Every variant against the first, in each mode, by the pairs of turns."""
    for name in names[1:]:
        for mode in MODES:
            a, b = _label(name, mode), _label(names[0], mode)
            interval = paired_ratio(per_second(made[a]), per_second(made[b]))
            word = results.judge(found, a, b, "clips_per_s", interval)
            console.print(f"{a} / {names[0]}: {interval} ({word})", highlight=False)
