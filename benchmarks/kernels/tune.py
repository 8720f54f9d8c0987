"""`--tune`: times the candidates of every tile plan on this GPU, and where the kernels beat PyTorch's attention.

What it writes, `plans/sm_XX.json` of the kernels' package, is what every later run goes by; nothing is tuned at run
time.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.kernels.cases import Case
from benchmarks.kernels.ceilings import timed
from benchmarks.result import machine
from benchmarks.timing import interleave, median, paired_ratio, per_second
from fastav.meter import num_cores
from fastav.parallel import each
from fastav_kernels.bottleneck_attention import IMPLEMENTATIONS, Segments, launch
from fastav_kernels.bottleneck_attention.gate import usage_of
from fastav_kernels.bottleneck_attention.launch import chip_of
from fastav_kernels.bottleneck_attention.plans import Chip, Plan, Win, architecture_of, plan_for, read_plans

MOST_STACK = 64  # bytes of a thread: more of them is slower than smaller tiles
_TOKENS = (50, 65, 101, 145, 197)
_WIN_CLIPS, _FINALISTS = 64, 6


def tune(console: Console, rounds: int) -> list[str]:
    """Tunes the plans for 16-bit numbers, then looks for wins; writes the file, and returns what it did in lines."""
    architecture = architecture_of(torch.cuda.get_device_capability())
    chip, plans = chip_of(torch.device("cuda")), list(read_plans(architecture).plans)
    file = Path(str(resources.files("fastav_kernels.bottleneck_attention").joinpath(f"plans/{architecture}.json")))
    told = []
    for place, plan in enumerate(plans):
        if plan.num_bytes != 2:
            continue
        case = stage_of(plan)
        best, gain = _fastest(plan, case, chip, rounds)
        plans[place] = best
        write_plans(file, _measured(), plans, [])  # what is found is kept, whatever comes
        if best != plan:
            told.append(f"{plan.kernel}, heads of {plan.head_dim}, up to {plan.max_keys} keys: {_tiles(plan)} -> "
                        f"{_tiles(best)}, {gain:.2f} times as fast")  # fmt: skip
            console.print(told[-1], highlight=False)
    read_plans.cache_clear()
    wins = list(_wins(console, rounds))
    write_plans(file, _measured(), plans, wins)
    read_plans.cache_clear()
    return [*told, f"wins: {', '.join(f'{w.frames} {w.min_tokens}-{w.max_tokens} x{w.ratio}' for w in wins) or 'none'}"]


def stage_of(plan: Plan) -> Case:
    """Returns the case on which a plan is timed: sequences as long as it is made for, 197 tokens at most or 577."""
    tokens = {64: 60, 128: 124, 256: 197}.get(plan.max_keys, 197 if plan.kernel == "forward" else 577)
    segments = Segments(_WIN_CLIPS if tokens < 577 else 16, 8, tokens, 4, "shared")
    return Case(f"{tokens} tokens", segments, heads=768 // plan.head_dim, dim=plan.head_dim)


def candidates(plan: Plan) -> Iterator[Plan]:
    """Yields other ways to cut the same work."""
    columns = (plan.block_n,) if plan.kernel == "backward_whole" else (32, 64, 128)
    for m, n, warps, stages in itertools.product((16, 32, 64, 128), columns, (4, 8), (1, 2, 3)):
        if m * n <= 128 * 256:
            yield replace(plan, block_m=m, block_n=n, num_warps=warps, num_stages=stages)


def _fastest(plan: Plan, case: Case, chip: Chip, rounds: int) -> tuple[Plan, float]:
    """Returns the plan that is proven faster than the given one, or that one, and how many times faster."""
    fitting = [plan, *(one for one in _compiled(list(candidates(plan)), case, chip) if _tiles(one) != _tiles(plan))]
    turns: dict[str, Callable[[], int]] = {}
    for one in fitting:
        try:
            turns[_tiles(one)] = timed(_runner(one, case))
        except Exception:  # launches that the device refuses; whatever Triton raises
            if one is plan:
                raise
    rough = interleave(turns, 3)
    order = sorted(rough, key=lambda name: -median(per_second(rough[name])).median)
    names = list(dict.fromkeys([*order[:_FINALISTS], _tiles(plan)]))
    made = interleave({name: turns[name] for name in names}, rounds)
    rates = {name: per_second(made[name]) for name in names}
    best = max(names, key=lambda name: median(rates[name]).median)
    gain = paired_ratio(rates[best], rates[_tiles(plan)])
    if best == _tiles(plan) or gain.low <= 1.02:
        return plan, 1.0
    return next(one for one in fitting if _tiles(one) == best), gain.median


def _compiled(wanted: Sequence[Plan], case: Case, chip: Chip) -> list[Plan]:
    """Returns the plans that compile without spilling and fit into shared memory, with what they take of it."""
    jobs = [(plan, chip.architecture, case.segments, case.heads) for plan in wanted]
    # A compiler that crashes, or hangs, takes its process along and no other candidate.
    found = [done.result for done in each(jobs, _usage, num_cores(), patience_s=60.0)]
    return [plan for plan in found if plan is not None and plan.shared_bytes <= chip.shared_bytes]


def _usage(job: tuple[Plan, str, Segments, int]) -> Plan | None:
    plan, architecture, segments, heads = job
    try:
        usage = usage_of(plan, architecture, segments, torch.bfloat16, heads)
    except Exception:  # whatever the compiler raises: then it is no candidate
        return None
    if usage.stack > MOST_STACK or usage.registers < 16:
        return None
    return replace(plan, shared_bytes=usage.shared)


def _runner(plan: Plan, case: Case) -> Callable[[], object]:
    """Returns a function that runs the passes that have the plan's kernel, with this plan."""

    def chosen(kernel: str, chip: Chip, head_dim: int, num_bytes: int, keys: int) -> Plan | None:
        if kernel == plan.kernel:
            return plan
        if kernel == "backward_whole" and plan.kernel.startswith("backward_"):
            return None
        return plan_for(kernel, chip, head_dim, num_bytes, keys)

    qkv = case.inputs(torch.bfloat16, "cuda").detach()
    out, lse = launch.run_forward(qkv, case.segments)
    dout = torch.randn_like(out)

    def run() -> object:
        with patch.object(launch, "plan_for", chosen):
            if plan.kernel == "forward":
                return launch.run_forward(qkv, case.segments)
            return launch.run_backward(dout, qkv, out, lse, case.segments)

    return run


def _wins(console: Console, rounds: int) -> Iterator[Win]:
    """Yields the ranges of tokens, at the ends measured, for which both passes together beat SDPA."""
    for frames in ("shared", "mean"):
        for dim in (64, 32, 128):
            ratios = []
            for tokens in _TOKENS:
                segments = Segments(_WIN_CLIPS, 8, tokens, 4, frames)
                case = Case(f"{tokens} tokens, {frames}", segments, heads=768 // dim, dim=dim)
                made = interleave({name: timed(_step(case, name)) for name in ("triton", "sdpa")}, rounds)
                interval = paired_ratio(per_second(made["triton"]), per_second(made["sdpa"]))
                console.print(f"{case.name}, heads of {dim}: triton / sdpa: {interval}", highlight=False)
                ratios.append((tokens, interval.low, interval.median))
            yield from _ranges(frames, dim, ratios)


def _ranges(frames: str, dim: int, ratios: Sequence[tuple[int, float, float]]) -> Iterator[Win]:
    """Neighbouring measured shapes that all win are one range."""
    for wins, group in itertools.groupby(ratios, key=lambda one: one[1] > 1):
        if wins:
            shapes = list(group)
            worst = math.floor(100 * min(middle for _, _, middle in shapes) + 1e-9) / 100
            yield Win(frames, dim, "bfloat16", shapes[0][0], shapes[-1][0], worst)


def _step(case: Case, impl: str) -> Callable[[], object]:
    qkv = case.inputs(torch.bfloat16, "cuda")
    dout = torch.randn(case.segments.out_rows, case.heads, case.dim, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(IMPLEMENTATIONS[impl](qkv, case.segments), qkv, dout)


def write_plans(file: Path, measured: str, plans: Sequence[Plan], wins: Sequence[Win]) -> None:
    """Writes a file of plans, one plan a line."""

    def listed(rows: Sequence[Any]) -> str:
        return ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)

    blocks = [f' "{name}": [{"" if not rows else chr(10) + listed(rows) + chr(10) + " "}]'
              for name, rows in (("wins", wins), ("plans", plans))]  # fmt: skip
    file.write_text("{\n" + ",\n".join([f' "measured": {json.dumps(measured)}', *blocks]) + "\n}\n", encoding="utf-8")


def _measured() -> str:
    facts = machine()
    import triton

    return f"{facts['gpu']}, torch {torch.__version__}, triton {triton.__version__}, CUDA {facts['cuda']}"


def _tiles(plan: Plan) -> str:
    return f"{plan.block_m} x {plan.block_n}, {plan.num_warps} warps, {plan.num_stages} stages"
