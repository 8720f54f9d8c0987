"""Measures scaling on all ranks of a job: `torchrun ... -m benchmarks.scale.rank RECIPE --out FILE`.

In alternation: weak scaling (`train.batch` clips per rank) and strong scaling (`train.batch` clips in total), each with
steps on a batch that stays on the device, the same without the all-reduce of gradients (DDP), and the training loop;
then all-reduces of several sizes. Rank 0 writes the measurements; `python -m benchmarks scale --files FILE ...`
evaluates them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from benchmarks import result as results
from benchmarks.scale import add_arguments
from benchmarks.timing import interleave
from benchmarks.train import split_keys, without_places
from benchmarks.train.bench import Bench
from fastav.core.atomic_files import write_text
from fastav.core.command_runner import Parser
from fastav.core.errors import FastavError, UserError
from fastav.core.machine import num_cores
from fastav.recipe.parse import load_recipe
from fastav.recipe.schema import Recipe
from fastav.training.process_setup import shutdown

SIZES_MB = (0.004, 0.25, 1.0, 4.0)
"""Sizes of the all-reduces that separate bandwidth from latency, in addition to one of all gradients."""
_REPEATS = 7


def main(words: Sequence[str]) -> int:
    """Measures and writes the file; all ranks of the job must call it."""
    parser = Parser(prog="benchmarks.scale.rank", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--folder", type=Path, help="folder for run folders, shared by all nodes")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    own, overrides = split_keys(words)
    args = parser.parse_args(own)
    recipe = load_recipe(args.recipe, [*overrides, "--data.test", "", "--train.eval_every", "0"])
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(recipe, args.folder or Path(scratch), args.steps, args.turns, warm=not args.quick)
    if os.environ.get("RANK", "0") == "0":
        write_text(args.out, json.dumps(found, indent=1) + "\n")
    shutdown()
    return 0


def measure(recipe: Recipe, folder: Path, steps: int, turns: int, *, warm: bool = True) -> dict[str, Any]:
    """Runs all turns and returns the content of the file.

    Raises:
        UserError: The ranks were started without WORLD_SIZE, or cannot share the batch.
    """
    world, tasks = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ and "SLURM_PROCID" in os.environ:
        raise UserError(
            f"srun started {tasks} tasks, but WORLD_SIZE is not set: each would measure alone; "
            "FASTAV_VERB=scale sbatch launch/slurm/train.sbatch sets it, or start them with torchrun"
        )
    batch = recipe.train.batch
    if batch % world or batch % 2:
        raise UserError(f"train.batch = {batch}: expected a multiple of {world} ranks, and an even number")
    # On one rank both kinds are the same; half of the batch shows the part of a step that does not shrink with it.
    batches = {"weak": batch * world, "strong": batch} if world > 1 else {"weak": batch, "half": batch // 2}
    benches = {}
    for kind, clips in batches.items():
        micro = min(recipe.train.micro_batch or batch, clips // world)
        sized = msgspec.structs.replace(recipe.train, batch=clips, micro_batch=micro)
        benches[kind] = Bench(msgspec.structs.replace(recipe, train=sized, out=str(folder / f"{world}_{kind}")), steps)
    modes = {}
    for kind, bench in benches.items():
        modes[f"{kind}: model"] = bench.model
        if bench.sends:
            modes[f"{kind}: apart"] = bench.apart
        if kind != "half":
            modes[f"{kind}: end to end"] = bench.end_to_end
    made = interleave(modes, turns, warm=warm)
    first = benches["weak"]
    found: dict[str, Any] = {
        "world": world, "per_node": int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "device": first.device.type,
        "strategy": first.state.strategy.name, "batch": batch, "cores": num_cores(),
        "threads": torch.get_num_threads(), "gradient_mb": _gradient_mb(first, recipe),
        "bucket_mb": recipe.train.bucket_mb, "reduce_dtype": recipe.train.reduce_dtype,
        "step_s": {name: [turn.wall_s / steps for turn in turns] for name, turns in made.items()},
        "facts": {name: [turn.facts for turn in turns] for name, turns in made.items()},
        "machine": results.machine(), "versions": results.versions(),
        "recipe": without_places(recipe),
    }  # fmt: skip
    found["all_reduce_s"] = _all_reduces(first.device, found["gradient_mb"]) if world > 1 else []
    for bench in benches.values():
        bench.close()
    return found


def _gradient_mb(bench: Bench, recipe: Recipe) -> float:
    """Returns the size of the gradients that are reduced in a step, MB."""
    trained = [p for p in bench.state.model.parameters() if p.requires_grad]
    count = sum(getattr(p, "ds_numel", p.numel()) for p in trained)  # under ZeRO-3 a parameter's own size is 0
    return count * (2 if recipe.train.reduce_dtype == "bf16" else 4) / 1e6


def _all_reduces(device: torch.device, gradient_mb: float) -> list[tuple[float, list[float]]]:
    """Times all-reduces of several sizes; returns (MB, seconds of each repeat)."""
    found = []
    for mb in sorted({*SIZES_MB, round(gradient_mb, 3)}):
        tensor = torch.ones(max(1, int(mb * 1e6 / 4)), device=device)
        times = []
        for _ in range(_REPEATS + 2):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begun)
        found.append((tensor.numel() * 4 / 1e6, times[2:]))
    return found


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FastavError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
