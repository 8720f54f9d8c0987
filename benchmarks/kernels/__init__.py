"""All implementations of bottleneck attention: `python -m benchmarks kernels [--tune]`.

First compares each implementation with float64, in the same process; wrong ones are not timed. Then times all of them
in alternation on the shapes of `cases.CASES`: forward, backward and both, as time, as useful TFLOP/s (only query-key
pairs that attend to each other) and relative to the measured ceilings. `--tune` times candidates of every tile plan,
and writes the plans and the wins that `impl = "auto"` uses. Without a GPU everything is checked and nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import result as results
from benchmarks.console import open_console
from benchmarks.kernels.cases import BACKENDS, CASES, Case, CaseResult, check, implementation, implementations
from benchmarks.kernels.ceilings import Ceiling, ceilings, timed
from benchmarks.timing import interleave, median, paired_ratio, per_second
from fastav.core.command_runner import Parser
from fastav.core.errors import FastavError, UserError

PASSES = ("forward", "backward", "both")
_PLOTTED = {f"{what}_ms": f"{what}, ms in bfloat16" for what in PASSES}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Reads the suite's options."""
    parser = Parser(prog="python -m benchmarks kernels", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (15)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this text")
    parser.add_argument(
        "--tune",
        nargs="?",
        const="",
        metavar="TEXT",
        help="first time candidate tile plans and write the best; "
        "with TEXT only those whose name contains it, such as `forward, heads of 64` or `wins`",
    )
    parser.add_argument("--plans", type=Path, metavar="FOLDER", help="folder for --tune (default: kernels' package)")
    parser.add_argument("--check", action="store_true", help="only check, do not time")
    parser.add_argument("--out", type=Path, help="JSON file of the result (in benchmarks/results/)")
    args = parser.parse_args(words)
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: expected 1 or more")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Runs the suite."""
    args, console = arguments(words), open_console()
    # FlexAttention is compiled for each shape and dtype; above the limit it runs unfused without a warning.
    torch._dynamo.config.recompile_limit = 256
    gpu = torch.cuda.is_available()
    if args.tune is not None and not gpu:
        raise UserError("--tune times kernels and needs a CUDA device, but none was found")
    chosen = [case for case in CASES if args.only in case.name]
    if not chosen:
        raise UserError(f'--only "{args.only}": no case has this text in its name')
    found = results.new("kernels", list(words or []), {"case": [case.name for case in chosen], "pass": list(PASSES)})
    if args.tune is not None:
        from benchmarks.kernels.tune import tune

        found["notes"] += tune(console, args.rounds, args.tune, args.plans)
    wrong = _check(found, console, chosen, "cuda" if gpu else "cpu")
    if gpu and not args.check:
        _time(found, console, chosen, wrong, args)
    else:
        found["notes"].append("checked only" if gpu else "no GPU: everything was checked, nothing was timed")
        console.print(found["notes"][-1])
    if gpu or args.out:
        console.print(f"wrote {results.write(found, args.out, _PLOTTED)}", highlight=False)
    failed = [one for one in wrong if one[1] not in BACKENDS]  # a backend of SDPA need not support every shape
    if failed:
        raise FastavError(f"{len(failed)} checks failed: {', '.join(sorted(map(str, failed)))}")
    return 0


def _check(found: dict[str, Any], console: Console, chosen: Sequence[Case], device: str) -> set[tuple[str, str, str]]:
    """Compares everything with float64; returns (case, implementation, dtype) of those that are wrong."""
    table = Table(title="relative error against float64")
    for column in ("case", "implementation", "dtype", "forward", "backward", "allowed", "deterministic"):
        table.add_column(column, justify="left" if column in ("case", "implementation", "dtype") else "right")
    wrong = set()
    for case in chosen:
        for dtype in _DTYPES.values() if device == "cuda" else [torch.float32]:
            for one in check(case, dtype, device):
                _record(found, table, one)
                if not one.good:
                    wrong.add((one.case, one.impl, one.dtype))
    console.print(table)
    return wrong


def _record(found: dict[str, Any], table: Table, one: CaseResult) -> None:
    cells = [one.case, one.impl, one.dtype, *(f"{x:.1e}" for x in (one.forward, one.backward, one.allowed))]
    table.add_row(*cells, "yes" if one.repeats else "no", style="" if one.good else "red")
    found["runs"].append(
        {"variant": f"{one.case}: {one.impl}, {one.dtype}", "repeat": 0, "error_forward": one.forward,
         "error_backward": one.backward, "allowed": one.allowed, "repeats": one.repeats, "good": one.good}
    )  # fmt: skip


def _time(
    found: dict[str, Any],
    console: Console,
    chosen: Sequence[Case],
    wrong: set[tuple[str, str, str]],
    args: argparse.Namespace,
) -> None:
    """Times the correct implementations in bfloat16, and the ceilings; writes the result after each case."""
    tops = ceilings(chosen[0].segments.in_rows, chosen[0].heads * chosen[0].dim, args.rounds)
    for top in tops:
        console.print(f"ceiling: {top.name}: {top.rate} {top.unit}", highlight=False)
        results.summarise(found, f"ceiling: {top.name}", top.unit, top.rate)
    for case in chosen:
        right = [name for name in implementations(case, "cuda") if (case.name, name, "bfloat16") not in wrong]
        _time_case(found, console, case, right, tops, args.rounds)
        results.write(found, args.out)  # the plot is written at the end


def _time_case(
    found: dict[str, Any], console: Console, case: Case, names: Sequence[str], tops: Sequence[Ceiling], rounds: int
) -> None:
    """Times all implementations of a case in alternation, for each pass."""
    rates = {top.name: top.rate.median for top in tops}
    copy, products = rates["copy"] * 1e9, rates["8192 cubed"] * 1e12
    least = dict(zip(PASSES, (*case.bytes(2), sum(case.bytes(2))), strict=True))
    work = dict(zip(PASSES, (case.flops, 2.5 * case.flops, 3.5 * case.flops), strict=True))
    table = Table(title=case.name)
    for column in ("pass", "implementation", "ms", "TFLOP/s", "GB/s", "of the ceiling", "peak MiB"):
        table.add_column(column, justify="left" if column in ("pass", "implementation") else "right")
    for what in PASSES:
        turns, peaks = {}, {}
        for name in names:
            try:
                run = _runner(case, name, what)
                peaks[name] = _peak(run)
                turns[name] = timed(run)
            except (RuntimeError, ValueError) as error:  # out of memory, or an unsupported shape
                found["notes"].append(f"{case.name}: {name}, {what}: {' '.join(str(error).split())[:200]}")
        made = interleave(turns, rounds)
        times = {name: median(1e3 / per_second(one)) for name, one in made.items()}
        for name, ms in times.items():
            floor = max(least[what] / copy, work[what] / products) * 1e3  # shortest time by the measured ceilings
            table.add_row(
                what, name, str(ms), f"{work[what] / ms.median / 1e9:.0f}", f"{least[what] / ms.median / 1e6:.0f}",
                f"{100 * floor / ms.median:.0f} %", f"{peaks[name]:.0f}",
            )  # fmt: skip
            results.summarise(found, f"{case.name}: {name}", f"{what}_ms", ms)
            found["runs"].append(
                {"variant": f"{case.name}: {name}", "repeat": 0, "pass": what, "peak_mib": round(peaks[name], 1),
                 "tflops": work[what] / ms.median / 1e9, "gb_per_s": least[what] / ms.median / 1e6}
            )  # fmt: skip
        _verdicts(found, console, case, what, {name: per_second(one) for name, one in made.items()})
        turns.clear()
        gc.collect()
        torch.cuda.empty_cache()
    console.print(table)


def _runner(case: Case, impl: str, what: str) -> Callable[[], object]:
    """Returns a function that runs one pass on the GPU, in bfloat16."""
    qkv = case.inputs(torch.bfloat16, "cuda")
    attend = implementation(impl)
    if what == "forward":
        return lambda: attend(qkv, case.segments)
    out = attend(qkv, case.segments)
    dout = torch.randn_like(out)
    if what == "backward":
        return lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True)
    return lambda: torch.autograd.grad(attend(qkv, case.segments), qkv, dout)


def _peak(run: Callable[[], object]) -> float:
    """Returns the MiB that a pass allocates at its peak."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _verdicts(found: dict[str, Any], console: Console, case: Case, what: str, rates: dict[str, Any]) -> None:
    """Compares the kernel with each other implementation, by paired turns."""
    if "triton" not in rates:
        return
    for name in rates:
        if name == "triton":
            continue
        interval = paired_ratio(rates["triton"], rates[name])
        names = (f"{case.name}: triton", f"{case.name}: {name}")
        word = results.judge(found, *names, f"{what}_per_s", interval)
        console.print(f"{case.name}, {what}: triton / {name}: {interval} ({word})", highlight=False)
