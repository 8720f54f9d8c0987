"""Weak and strong scaling: `python -m benchmarks scale [RECIPE] [--ranks 1,2,4] [--section.key value ...]`.

Starts each number of ranks in turn (1 2 4, 4 2 1, ...). Each start measures in alternation: steps with the same clips
per rank (weak), steps with the same clips in total (strong), both with and without the all-reduce of gradients, the
training loop, and all-reduces alone. Efficiency is relative to one rank. The share of the all-reduce is the additional
time of a step with it. The analytical model (`benchmarks/scaling.md`) is fitted to one rank and to the links of the
smallest group, and compared with the other measurements.

Several nodes: run `python -m benchmarks.scale.rank` under torchrun or srun for each number of nodes, then
`python -m benchmarks scale --files FILE ...`. `--paper` measures nothing; it prints the model's prediction for given
numbers, up to 1,024 ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import result as results
from benchmarks.console import open_console
from benchmarks.plot import lines
from benchmarks.scale.paper import Cluster, Link, Work, all_reduce_s, fitted, fitted_between, strong, weak
from benchmarks.timing import MedianInterval, grouped_ratio, median, short
from benchmarks.train import prepared, split_keys
from fastav.core.command_runner import Parser
from fastav.core.errors import FastavError, UserError
from fastav.recipe.parse import load_recipe

KINDS = ("weak", "strong")
_PATIENCE_S = 3600  # timeout of one start
_ALIKE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "batch": lambda one: one["batch"], "recipe": lambda one: one["recipe"], "GPU": lambda one: one["machine"]["gpu"],
    "torch": lambda one: one["versions"]["torch"], "threads": lambda one: one["threads"],
}  # fmt: skip
_FAR = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SHARDED = ("fsdp", "zero3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that the suite and its ranks share."""
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="recipe to train")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps per turn (8)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each mode per start of the ranks (5)")
    parser.add_argument("--quick", action="store_true", help="one short start of 1 and 2 ranks: a functional test")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parses the suite's options; overrides of recipe keys are in `overrides`."""
    parser = Parser(prog="python -m benchmarks scale", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_arguments(parser)
    gpus = torch.cuda.device_count()
    counts = ",".join(str(n) for n in (1, 2, 4, 8) if n <= gpus) or "1,2,4"
    parser.add_argument("--ranks", default=counts, metavar="N,M", help=f"numbers of ranks ({counts})")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each number of ranks (5)")
    parser.add_argument(
        "--config", metavar="FILE", help="accelerate config with the strategy for more than one rank (default: DDP)"
    )
    parser.add_argument("--footage", type=Path, metavar="FILE", help="real video of 10 s for the generated clips")
    parser.add_argument("--folder", type=Path, help="keep clips and rank files here (default: a temporary folder)")
    parser.add_argument("--files", nargs="+", type=Path, metavar="FILE", help="evaluate files of earlier measurements")
    parser.add_argument("--out", type=Path, help="JSON file of the result (in benchmarks/results/)")
    paper = parser.add_argument_group("prediction without measurement")
    paper.add_argument("--paper", action="store_true", help="predict from the options below, measure nothing")
    paper.add_argument("--step-ms", type=float, help="duration of a step on a single rank, ms")
    paper.add_argument("--clips", type=int, default=64, help="clips of that step; divided in strong scaling (64)")
    paper.add_argument("--gradient-mb", type=float, help="size of the gradients that are reduced in a step, MB")
    paper.add_argument("--bucket-mb", type=float, default=25.0, help="size of a bucket of gradients, MB (25)")
    paper.add_argument("--inside", default="0,0", metavar="GB/S,US", help="link within a node: bandwidth and latency")
    paper.add_argument("--between", default="0,0", metavar="GB/S,US", help="link of one rank to other nodes")
    paper.add_argument("--per-node", type=int, default=8, help="ranks per node (8)")
    paper.add_argument("--jitter-ms", type=float, default=0.0, help="standard deviation of a rank's step, ms (0)")
    paper.add_argument("--fixed-ms", type=float, default=0.0, help="part of a step independent of its clips, ms (0)")
    paper.add_argument("--sharded", action="store_true", help="FSDP or ZeRO-3: 1.5 times the traffic")
    own, overrides = split_keys(words)
    args = parser.parse_args(own)
    args.overrides = overrides
    if args.quick:
        args.ranks, args.rounds, args.steps, args.turns = "1,2", 1, 1, 2
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Runs the suite."""
    args, console = arguments(list(words or [])), open_console()
    if args.paper:
        show_paper(args, console)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        files = args.files or launch(args, folder, console)
        measured = [_read(file) for file in files]
    found = results.new(
        "scale", list(words or []), {"ranks": sorted({one["world"] for one in measured}), "kind": list(KINDS)}
    )
    series, dashed = report(found, console, measured, args.between)
    path = results.write(found, args.out)
    labels = ("ranks", "efficiency relative to one rank")
    plot = lines(found, series, path.with_suffix(".png"), labels, dashed)
    console.print(f"wrote {path} and {plot}", highlight=False, soft_wrap=True)
    return 0


def launch(args: argparse.Namespace, folder: Path, console: Console) -> list[Path]:
    """Starts each number of ranks in alternating order; returns the files that they wrote.

    Raises:
        FastavError: A start failed.
        UserError: `--ranks` is wrong, or the batch cannot be divided by one of its numbers.
    """
    try:
        counts = [int(count) for count in args.ranks.split(",")]
    except ValueError:
        raise UserError(f"--ranks {args.ranks}: expected numbers, such as 1,2,4") from None
    if 1 not in counts:
        raise UserError(f"--ranks {args.ranks}: expected 1 among them, because efficiency is relative to one rank")
    path, words = prepared(args.recipe, args.overrides, args.footage, folder)
    batch = load_recipe(path, words).train.batch
    if any(batch % count for count in (*counts, 2)):
        raise UserError(f"train.batch = {batch}: expected an even multiple of all --ranks {args.ranks}")
    files = []
    for number in range(args.rounds):
        for count in counts if number % 2 == 0 else counts[::-1]:
            out = folder / f"ranks_{count}_{number}.json"
            rank = ["-m", "benchmarks.scale.rank", str(path), *words, "--steps", str(args.steps)]
            rank += ["--turns", str(args.turns), "--folder", str(folder / f"runs_{number}"), "--out", str(out)]
            rank += ["--quick"] if args.quick else []
            _start(count, rank, args.config if count > 1 else None, folder / f"ranks_{count}_{number}.log")
            console.log(f"round {number + 1} of {args.rounds}: {count} ranks")
            files.append(out)
    return files


def _start(count: int, rank: Sequence[str], config: str | None, log: Path) -> None:
    """Starts `count` ranks and waits for them.

    Raises:
        UserError: The ranks report a wrong option, key or file.
        FastavError: The ranks failed or timed out.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    # On a CPU a rank computes with one thread, so that more ranks use more cores, up to the number of cores.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if config:
        environment["FASTAV_ACCELERATE_CONFIG"] = config
    try:
        with log.open("w") as file:
            done = subprocess.run(
                [*launcher, *rank], env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=_PATIENCE_S
            )
    except subprocess.TimeoutExpired:
        raise FastavError(f"{count} ranks timed out after {_PATIENCE_S} s; see {log}") from None
    if done.returncode:
        errors = [line for line in log.read_text().splitlines() if line.startswith("benchmarks: ")]
        if errors:
            raise UserError(f"{count} ranks: {errors[0].removeprefix('benchmarks: ')}")
        raise FastavError(f"{count} ranks ended with {done.returncode}; see {log}:\n{log.read_text()[-2000:]}")


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        found["world"], found["step_s"], found["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a file written by benchmarks.scale.rank: {error!r}") from None
    return found


def check_alike(measured: Sequence[dict[str, Any]]) -> None:
    """Checks that the files can be compared.

    Raises:
        UserError: They differ in batch, recipe, GPU, torch version or threads; the message names it.
    """
    first = measured[0]
    for other in measured[1:]:
        for what, of in _ALIKE.items():
            one, two = of(first), of(other)
            if one != two:
                raise UserError(
                    f"files of {first['world']} and {other['world']} ranks differ in their {what}: {one}, {two}"
                )


def report(
    found: dict[str, Any], console: Console, measured: Sequence[dict[str, Any]], between: str
) -> tuple[Any, Any]:
    """Adds and prints all results; returns the measured and the predicted lines of the plot."""
    counts = sorted({one["world"] for one in measured})
    if counts[0] != 1:
        raise UserError("no file of a single rank, to which efficiency is relative; measure with --ranks 1,...")
    check_alike(measured)
    first = next(one for one in measured if one["world"] == 1)
    found |= {key: first[key] for key in ("machine", "versions", "recipe")}
    many = next(one for one in measured if one["world"] == counts[-1])
    found["work"] = {key: many[key] for key in ("strategy", "batch", "gradient_mb", "bucket_mb", "threads", "device")}
    paper = _on_paper(measured, between)
    table = Table(title=f"{many['strategy']}, {first['batch']} clips, {first['gradient_mb']:.1f} MB of gradients")
    for column in ("", "ms/step", "efficiency", "predicted", "all-reduce %", "loop"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    series: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for count in counts:
            row = _row(found, measured, kind, count)
            series[kind].append((count, row["efficiency"].median, row["efficiency"].low, row["efficiency"].high))
            predicted = paper[kind].get(count)
            off = ""
            if predicted is not None:
                off = f"{predicted:.2f} ({100 * (predicted / row['efficiency'].median - 1):+.0f}%)"
            ms, share, loop = (short(row[key].median) if key in row else "" for key in ("ms", "share", "loop"))
            table.add_row(f"{kind}, {count}", ms, str(row["efficiency"]), off, share, loop)
            found["runs"].append({"variant": f"{kind}, {count} ranks", "repeat": 0, "paper_efficiency": predicted})
    console.print(table)
    found["paper"] = paper["inputs"]
    console.print(f"predicted from {paper['inputs']}", highlight=False, soft_wrap=True)
    for count, one in paper.get("all_reduce", {}).items():
        found["runs"].append({"variant": f"all-reduce, {count} ranks", "repeat": 0, **one})
        took = f"{one['measured_ms']:.3g} ms, predicted {one['paper_ms']:.3g} ms"
        console.print(f"all-reduce of {one['mb']:.3g} MB over {count} ranks: {took}", highlight=False)
    if between == "0,0" and counts[1:] and counts[1] > max(one["per_node"] for one in measured) > 1:
        found["notes"].append(
            "no run within one node: the prediction uses the same link within and between nodes; give --between"
        )
    if first["device"] == "cpu" and counts[-1] * first["threads"] > first["cores"]:
        found["notes"].append(f"the ranks have more threads than the machine has cores ({first['cores']})")
    for note in found["notes"]:
        console.print(note, highlight=False)
    return series, {kind: sorted(paper[kind].items()) for kind in KINDS if paper[kind]}


def _row(found: dict[str, Any], measured: Sequence[dict[str, Any]], kind: str, count: int) -> dict[str, MedianInterval]:
    """Returns and adds the measurements of one number of ranks."""
    named = kind if count > 1 else "weak"
    share = 1 if kind == "weak" else count  # ideal ratio of the step time of one rank to that of `count` ranks
    alone, groups = _starts(measured, 1, "weak: model"), _starts(measured, count, f"{named}: model")
    many, apart = np.concatenate(groups), np.concatenate(_starts(measured, count, f"{named}: apart") or [np.empty(0)])
    clips = measured[0]["batch"] * (count if kind == "weak" else 1)
    row = {"ms": median(1e3 * many), "clips": median(clips / many)}
    row["efficiency"] = grouped_ratio(alone, [one * share for one in groups])
    if len(apart):
        row["share"] = median(100 * np.maximum(0, 1 - apart / many))
    loop = [one * share for one in _starts(measured, count, f"{named}: end to end")]
    row["loop"] = grouped_ratio(_starts(measured, 1, "weak: end to end"), loop)
    units = {"ms": "step_ms", "clips": "clips_per_s", "share": "all_reduce_pct", "efficiency": "efficiency",
             "loop": "loop_efficiency"}  # fmt: skip
    for key, interval in row.items():
        results.summarise(found, f"{kind}, {count} ranks", units[key], interval)
    for one in (one for one in measured if one["world"] == count):
        for mode, facts in one["facts"].items():
            if mode.startswith(named):
                found["runs"] += [{"variant": f"{count} ranks, {mode}", "repeat": i, **f} for i, f in enumerate(facts)]
    return row


def _starts(measured: Sequence[dict[str, Any]], count: int, mode: str) -> list[Any]:
    """Returns for each start the seconds per step of its turns."""
    return [np.array(one["step_s"][mode]) for one in measured if one["world"] == count and mode in one["step_s"]]


def _all_reduces(measured: Sequence[dict[str, Any]], count: int) -> list[tuple[float, float]]:
    """Returns (MB, median seconds) of all-reduces over `count` ranks."""
    files = [one for one in measured if one["world"] == count and one["all_reduce_s"]]
    return [
        (mb, float(np.median([s for one in files for s in one["all_reduce_s"][place][1]])))
        for place, (mb, _) in enumerate(files[0]["all_reduce_s"] if files else [])
    ]


def _on_paper(measured: Sequence[dict[str, Any]], between: str) -> dict[str, Any]:
    """Returns the efficiencies that the model predicts from one rank and the links of the smallest group."""
    first = next(one for one in measured if one["world"] == 1)
    counts = sorted({one["world"] for one in measured})
    if len(counts) < 2:
        return {"weak": {}, "strong": {}, "inputs": None}
    group = next(one for one in measured if one["world"] == counts[1])
    per_node, on_cpu = max(one["per_node"] for one in measured), first["device"] == "cpu"
    link, outside = links(measured, counts, per_node, between)
    cluster = Cluster(link, outside, per_node, cores=first["cores"] / first["threads"] if on_cpu else None)
    compute = float(np.median(np.concatenate(_starts(measured, 1, "weak: model"))))
    halves = _starts(measured, 1, "half: model")
    fixed = min(max(0.0, 2 * float(np.median(np.concatenate(halves))) - compute), compute) if halves else 0.0
    turns = [facts for one in measured if one["world"] == 1 for facts in one["facts"]["weak: model"]]
    jitter_ms = float(np.median([np.std(facts["steps_ms"]) for facts in turns]))
    sharded = group["strategy"] in _SHARDED
    work = Work(
        compute, first["gradient_mb"], fixed, first["bucket_mb"], hidden=0.0 if on_cpu else 1.0,
        passes=(2.5 if group["reduce_dtype"] == "bf16" else 1.5) if sharded else 1.0,
        jitter_s=jitter_ms / 1e3,
    )  # fmt: skip
    inputs = {
        "compute_ms": 1e3 * work.compute_s, "fixed_ms": 1e3 * work.fixed_s, "jitter_ms": 1e3 * work.jitter_s,
        "gradient_mb": work.gradient_mb, "link_gb_per_s": link.gb_per_s, "latency_us": link.latency_us,
    }  # fmt: skip
    if counts[-1] > per_node:
        inputs |= {"between_gb_per_s": outside.gb_per_s, "between_latency_us": outside.latency_us}
    sent = {
        count: {"mb": mb, "measured_ms": 1e3 * took, "paper_ms": 1e3 * all_reduce_s(mb, count, cluster)}
        for count in counts[1:]
        for mb, took in _all_reduces(measured, count)[-1:]
    }
    predicted = {"weak": weak(work, counts, cluster), "strong": strong(work, counts, cluster)}
    made = {kind: {one.ranks: efficiency for one, efficiency in rows} for kind, rows in predicted.items()}
    return {**made, "inputs": {key: float(f"{value:.4g}") for key, value in inputs.items()}, "all_reduce": sent}


def links(measured: Sequence[dict[str, Any]], counts: Sequence[int], per_node: int, between: str) -> tuple[Link, Link]:
    """Returns the links within a node and between nodes, from `--between` or fitted to the smallest groups.

    Args:
        measured: Content of the ranks' files.
        counts: Their numbers of ranks, ascending.
        per_node: Ranks per node.
        between: Link between nodes as `GB/S,US`; `0,0`: fit it.
    """
    inside = fitted(_all_reduces(measured, counts[1]), counts[1])
    if between != "0,0":
        return inside, _link("--between", between)
    far = next((count for count in counts if count > per_node), None)
    if far is None or far == counts[1]:  # a single node, or no measurement within one
        return inside, inside
    return inside, fitted_between(_all_reduces(measured, far), -(-far // per_node), per_node, inside)


def show_paper(args: argparse.Namespace, console: Console) -> None:
    """Prints the prediction for given numbers.

    Raises:
        UserError: A required option is missing.
    """
    if not args.step_ms or not args.gradient_mb:
        raise UserError("--paper needs --step-ms and --gradient-mb, and --inside and --between as GB/S,US")
    cluster = Cluster(_link("--inside", args.inside), _link("--between", args.between), args.per_node)
    work = Work(
        args.step_ms / 1e3, args.gradient_mb, args.fixed_ms / 1e3, args.bucket_mb, jitter_s=args.jitter_ms / 1e3,
        passes=1.5 if args.sharded else 1.0,
    )  # fmt: skip
    for line in paper_table(work, cluster, args.clips):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def paper_table(work: Work, cluster: Cluster, clips: int) -> list[str]:
    """Returns the prediction as a Markdown table; strong scaling ends at one clip per rank."""
    found = [
        "| ranks | ms/step | transfers, ms | exposed transfers, ms | slowest rank, ms | weak | strong |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (one, efficiency), (_, shared) in zip(weak(work, _FAR, cluster), strong(work, _FAR, cluster), strict=True):
        times = (one.seconds, one.communication_s, one.exposed_s, one.straggling_s)
        cells = " | ".join(f"{1e3 * seconds:.1f}" for seconds in times)
        found.append(f"| {one.ranks} | {cells} | {efficiency:.3f} | {f'{shared:.3f}' if one.ranks <= clips else ''} |")
    return found


def _link(option: str, words: str) -> Link:
    try:
        bandwidth, latency = (float(word) for word in words.split(","))
    except ValueError:
        raise UserError(f"{option} {words}: expected GB/S,US, such as 450,3") from None
    if bandwidth <= 0:
        raise UserError(f"{option} {words}: expected a bandwidth above 0 in GB/S,US, such as 450,3")
    return Link(bandwidth, latency)
