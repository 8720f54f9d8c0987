"""`--tune`: times candidates of every tile plan on this GPU, and finds where the kernels beat PyTorch's attention.

It writes `plans/sm_XX.json` in the kernels' package, which all later runs use; nothing is tuned at run time.
"""

from __future__ import annotations

import functools
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
from fastav.core.machine import num_cores
from fastav.core.process_pool import run_jobs
from fastav_kernels.bottleneck_attention import IMPLEMENTATIONS, Frames, Segments, launch
from fastav_kernels.bottleneck_attention.gate import faults, usage_of
from fastav_kernels.bottleneck_attention.launch import chip_of
from fastav_kernels.bottleneck_attention.plans import Chip, LaunchPlan, Win, architecture_of, plan_for, read_plans

_TOKENS = (50, 65, 101, 145, 197)
_WIN_CLIPS, _WIN_FRAMES, _WIN_BOTTLENECK, _FINALISTS = 64, 8, 4, 6


def tune(console: Console, rounds: int, only: str = "", folder: Path | None = None) -> list[str]:
    """Tunes the plans for 16-bit types, then measures wins; writes the file and returns a summary as lines of text.

    Args:
        console: Console to which each new plan is printed.
        rounds: Rounds of every measurement.
        only: Only plans and wins whose name contains this text, such as `forward, heads of 64`.
        folder: Folder of the file; None for the kernels' package.
    """
    architecture = architecture_of(torch.cuda.get_device_capability())
    chip, known = chip_of(torch.device("cuda")), read_plans(architecture)
    inside = Path(str(resources.files("fastav_kernels.bottleneck_attention").joinpath("plans")))
    file = (folder or inside) / f"{architecture}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines, plans = [], list(known.plans)
    for plan in known.plans:
        if plan.num_bytes != 2 or only not in (name := _name(plan)):
            continue
        best, gain = _fastest(plan, stage_of(plan), chip, rounds)
        if best != plan:
            plans.insert(plans.index(plan), best)  # before the old one, which chips with less memory may need
            plans = reachable(plans)
            lines.append(f"{name}: {_tiles(plan)} -> {_tiles(best)}, {gain:.2f} times as fast")
            console.print(lines[-1], highlight=False)
        write_plans(file, _measured(), plans, known.wins)  # after each plan, so that an abort loses nothing
    wins = [win for win in known.wins if only not in _win_name(win.frames, win.head_dim)]
    with patch.object(launch, "plan_for", functools.partial(plan_among, tuple(plans))):
        for found in _wins(console, rounds, only):
            wins.append(found)
            write_plans(file, _measured(), plans, wins)
    read_plans.cache_clear()
    names = ", ".join(f"{w.frames} {w.min_tokens}-{w.max_tokens} x{w.ratio}" for w in wins)
    return [*lines, f"wins: {names or 'none'}", f"plans: {file}"]


def reachable(plans: Sequence[LaunchPlan]) -> list[LaunchPlan]:
    """Drops plans that are never chosen: an earlier one covers the same lengths with no more shared memory."""
    kept: list[LaunchPlan] = []
    for plan in plans:
        hidden = any(
            (one.kernel, one.head_dim, one.num_bytes) == (plan.kernel, plan.head_dim, plan.num_bytes)
            and one.max_keys >= plan.max_keys
            and one.shared_bytes <= plan.shared_bytes
            for one in kept
        )
        if not hidden:
            kept.append(plan)
    return kept


def plan_among(
    plans: Sequence[LaunchPlan], kernel: str, chip: Chip, head_dim: int, num_bytes: int, keys: int
) -> LaunchPlan | None:
    """Selects a plan as `plan_for` does, from plans that are not in a file yet."""
    fitting = (p for p in plans if (p.kernel, p.head_dim, p.num_bytes) == (kernel, head_dim, num_bytes))
    return next((p for p in fitting if keys <= p.max_keys and p.shared_bytes <= chip.shared_bytes), None)


def _name(plan: LaunchPlan) -> str:
    return f"{plan.kernel}, heads of {plan.head_dim}, up to {plan.max_keys} keys"


def _win_name(frames: str, dim: int) -> str:
    return f"wins, {frames}, heads of {dim}"


def stage_of(plan: LaunchPlan) -> Case:
    """Returns the case on which a plan is timed: sequences of the length that the plan is for, at most 577 tokens."""
    tokens = {64: 60, 128: 124, 256: 197}.get(plan.max_keys, 197 if plan.kernel == "forward" else 577)
    segments = Segments(_WIN_CLIPS if tokens < 577 else 16, 8, tokens, 4, "shared")
    return Case(f"{tokens} tokens", segments, heads=768 // plan.head_dim, dim=plan.head_dim)


def candidates(plan: LaunchPlan) -> Iterator[LaunchPlan]:
    """Yields plans with other tile sizes, warps and stages."""
    columns = (plan.block_n,) if plan.kernel == "backward_whole" else (32, 64, 128)
    for m, n, warps, stages in itertools.product((16, 32, 64, 128), columns, (4, 8), (1, 2, 3)):
        if m * n <= 128 * 256:
            yield replace(plan, block_m=m, block_n=n, num_warps=warps, num_stages=stages)


def _fastest(plan: LaunchPlan, case: Case, chip: Chip, rounds: int) -> tuple[LaunchPlan, float]:
    """Returns a plan that is significantly faster than `plan`, or else `plan`, and the speed relative to `plan`."""
    fitting = [plan, *(one for one in _compiled(list(candidates(plan)), case, chip) if _tiles(one) != _tiles(plan))]
    turns: dict[str, Callable[[], int]] = {}
    for one in fitting:
        try:
            turns[_tiles(one)] = timed(_runner(one, case))
        except Exception:  # the launch fails on this device; Triton raises many types
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
    found = next(one for one in fitting if _tiles(one) == best)
    return replace(found, shared_bytes=_most_shared(found, case, chip)), gain.median


def _most_shared(plan: LaunchPlan, case: Case, chip: Chip) -> int:
    """Returns the largest shared memory of a program over all kinds of frames."""
    kinds: tuple[Frames, ...] = ("shared", "mean", "joint")
    cases = [replace(case.segments, frames=kind, num_frames=1 if kind == "joint" else 8) for kind in kinds]
    return max(usage_of(plan, chip.architecture, one, torch.bfloat16, case.heads).shared for one in cases)


def _compiled(wanted: Sequence[LaunchPlan], case: Case, chip: Chip) -> list[LaunchPlan]:
    """Returns the plans that compile without spilling and fit into shared memory, with `shared_bytes` set."""
    jobs = [(plan, chip.architecture, case.segments, case.heads) for plan in wanted]
    # In processes: a compiler that crashes or hangs does not affect other candidates.
    found = [done.result for done in run_jobs(jobs, tried, num_cores(), patience_s=60.0)]
    return [plan for plan in found if plan is not None and plan.shared_bytes <= chip.shared_bytes]


def tried(job: tuple[LaunchPlan, str, Segments, int]) -> LaunchPlan | None:
    """Compiles a plan; returns it with its shared memory, or None if it cannot be used."""
    plan, architecture, segments, heads = job
    try:
        usage = usage_of(plan, architecture, segments, torch.bfloat16, heads)
    except Exception:  # the compiler raises many types; the plan is not a candidate
        return None
    if faults(plan, architecture, usage, torch.bfloat16):
        return None
    return replace(plan, shared_bytes=usage.shared)


def _runner(plan: LaunchPlan, case: Case) -> Callable[[], object]:
    """Returns a function that runs the pass of the plan's kernel with this plan."""

    def chosen(kernel: str, chip: Chip, head_dim: int, num_bytes: int, keys: int) -> LaunchPlan | None:
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


def _wins(console: Console, rounds: int, only: str) -> Iterator[Win]:
    """Yields the measured ranges of tokens for which forward plus backward pass beat SDPA."""
    kinds: tuple[Frames, ...] = ("shared", "mean")
    for frames, dim, need_bottleneck in itertools.product(kinds, (64, 32, 128), (True, False)):
        if only not in _win_name(frames, dim):
            continue
        ratios = []
        for tokens in _TOKENS:
            segments = Segments(_WIN_CLIPS, _WIN_FRAMES, tokens, _WIN_BOTTLENECK, frames, need_bottleneck)
            title = f"{tokens} tokens, {frames}, need_bottleneck {need_bottleneck}"
            case = Case(title, segments, heads=768 // dim, dim=dim)
            made = interleave({name: timed(_step(case, name)) for name in ("triton", "sdpa")}, rounds)
            interval = paired_ratio(per_second(made["triton"]), per_second(made["sdpa"]))
            console.print(f"{case.name}, heads of {dim}: triton / sdpa: {interval}", highlight=False)
            ratios.append((tokens, interval.low, interval.median))
        yield from winning_ranges(frames, dim, need_bottleneck, ratios)


def winning_ranges(
    frames: str, dim: int, need_bottleneck: bool, ratios: Sequence[tuple[int, float, float]]
) -> Iterator[Win]:
    """Merges neighbouring measured shapes that win into ranges."""
    for wins, group in itertools.groupby(ratios, key=lambda one: one[1] > 1):
        if wins:
            shapes = list(group)
            worst = math.floor(100 * min(middle for _, _, middle in shapes) + 1e-9) / 100
            ends = shapes[0][0], shapes[-1][0]
            yield Win(frames, dim, "bfloat16", _WIN_FRAMES, _WIN_BOTTLENECK, need_bottleneck, *ends, worst)


def _step(case: Case, impl: str) -> Callable[[], object]:
    qkv = case.inputs(torch.bfloat16, "cuda")
    dout = torch.randn(case.segments.out_rows, case.heads, case.dim, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(IMPLEMENTATIONS[impl](qkv, case.segments), qkv, dout)


def write_plans(file: Path, measured: str, plans: Sequence[LaunchPlan], wins: Sequence[Win]) -> None:
    """Writes a file of plans, one plan per line."""

    def listed(rows: Sequence[Any]) -> str:
        return ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)

    blocks = [f' "{name}": [{"" if not rows else chr(10) + listed(rows) + chr(10) + " "}]'
              for name, rows in (("wins", wins), ("plans", plans))]  # fmt: skip
    file.write_text("{\n" + ",\n".join([f' "measured": {json.dumps(measured)}', *blocks]) + "\n}\n", encoding="utf-8")


def _measured() -> str:
    facts = machine()
    import triton

    return f"{facts['gpu']}, torch {torch.__version__}, triton {triton.__version__}, CUDA {facts['cuda']}"


def _tiles(plan: LaunchPlan) -> str:
    return f"{plan.block_m} x {plan.block_n}, {plan.num_warps} warps, {plan.num_stages} stages"
