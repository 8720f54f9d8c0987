"""Run by torchrun: how long a training under FSDP2 is held up by a checkpoint, written at once and meanwhile.

Prints one line of JSON on rank 0: seconds that `CheckpointWriter.start` takes for each, in turns, and whether what was
written is what was there when it began.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fastav.distributed.gloo_group import GlooGroup
from fastav.distributed.strategy_choice import Requested, WrapOptions, wrap_model
from fastav.optim.optimizer import Optim
from fastav.training.checkpoint import Checkpoints
from fastav.training.checkpoint_writer import CheckpointWriter, TensorSplit

ROUNDS, WIDTH = 8, 1024


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential()
    model.blocks = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(12)))
    model.forward = model.blocks.forward
    wanted = Requested("fsdp" if world > 1 else "single", {"reshard": True})
    spread = wrap_model(wanted, model, lambda: Optim().build(model, 100)[0], WrapOptions(4))
    gloo_group = GlooGroup(rank, world, dist.new_group(backend="gloo") if world > 1 else None)
    checkpoints = Checkpoints(folder, 2, gloo_group)
    savers = {name: CheckpointWriter(checkpoints, asynchronous=name == "async") for name in ("sync", "async")}
    blocked, steps, exact = {"sync": [], "async": []}, [], True

    def step() -> None:
        begun = time.perf_counter()
        spread.backward(spread.network(torch.randn(4, WIDTH)).square().mean())
        spread.step(1.0)
        steps.append(time.perf_counter() - begun)

    for number in range(1, ROUNDS + 2):
        for name, checkpoint_writer in savers.items():
            step()
            optimizer, _ = spread.optimizer_to_save()
            shares, tensors = TensorSplit(gloo_group), {}
            for kind, named in (("model", spread.tensors_to_save(spread.model_shards())), ("optimizer", optimizer)):
                tensors |= shares.select((f"{kind}/{key}", value) for key, value in named)
            before = {key: _local(value).clone() for key, value in tensors.items()}
            dist.barrier()
            begun = time.perf_counter()
            checkpoint_writer.start(2 * number + (name == "async"), tensors, {}, order=shares.order)
            took = time.perf_counter() - begun
            for _ in range(3):
                step()
            checkpoint_writer.wait()
            if number > 1:  # buffers and files are new in the first
                blocked[name].append(max(gloo_group.gather(took)))
            read = checkpoints.read(2 * number + (name == "async"))
            targets = {key: torch.empty_like(value) for key, value in tensors.items()}
            for kind in ("model", "optimizer"):
                part = {key.partition("/")[2]: value for key, value in targets.items() if key.startswith(f"{kind}/")}
                read.load(kind, part)
            exact &= all(torch.equal(_local(targets[key]), before[key]) for key in targets)
    megabytes = sum(gloo_group.gather(sum(_local(value).numel() * 4 for value in tensors.values()))) / 1e6
    exact = all(gloo_group.gather(exact))
    if rank == 0:
        found = {name: statistics.median(took) for name, took in blocked.items()}
        ratios = [a / s for a, s in zip(blocked["async"], blocked["sync"], strict=True)]
        print("FOUND", json.dumps({
            "state_mb": round(megabytes, 1), "sync_s": found["sync"], "async_s": found["async"],
            "ratio": statistics.median(ratios), "ratios": [round(r, 3) for r in ratios],
            "step_s": statistics.median(steps),
            "exact": exact,
        }))  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


if __name__ == "__main__":
    main(Path(sys.argv[1]))
