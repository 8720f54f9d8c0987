"""Run by torchrun on two ranks: how far their parameters are apart after steps with and without sending gradients."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.train.bench import Bench
from fastav.recipe.parse import load_recipe
from fastav.training.process_setup import shutdown


def spread(bench):
    """Largest difference of a parameter between the ranks."""
    flat = torch.cat([p.detach().flatten() for p in bench.state.model.parameters()])
    sums = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(sums, flat)
    return float((sums[0] - sums[1]).abs().max())


if __name__ == "__main__":
    bench = Bench(load_recipe(None, [*sys.argv[1:], "--optim.schedule.kind", "constant"]), 2)
    bench.end_to_end()
    bench.model()
    found = {"joined": spread(bench)}
    bench.apart()
    found["apart"] = spread(bench)
    if bench.state.ranks.main:
        print(json.dumps(found), flush=True)
    bench.close()
    shutdown()
