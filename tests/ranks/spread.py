"""Run by torchrun on two ranks: every strategy on a small model, one after the other; prints a line of JSON each.

What is asserted here holds on every rank; `test_strategies.py` compares the lines.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from fastav.distributed.gloo_group import GlooGroup
from fastav.distributed.strategy_choice import Requested, WrapOptions, wrap_model
from fastav.optim.ema import Ema
from fastav.optim.optimizer import Optim
from fastav.training.checkpoint_writer import TensorSplit
from tests import ROOT

STEPS, BATCH = 4, 8


class Net(nn.Module):
    """Two blocks, a buffer, a frozen and an odd-sized parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.blocks = nn.Sequential(nn.Linear(7, 7), nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7)))
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.blocks(self.first(x).relu() + self.frozen) * self.scale)


def inputs(step, part, accumulation):
    """This rank's micro-batch."""
    x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))
    rank, world = dist.get_rank(), dist.get_world_size()
    micro = BATCH // world // accumulation
    at = (part * world + rank) * micro
    return x[at : at + micro]


def backward(spread, step, accumulation, spoil=1.0):
    """A step's backward passes."""
    for part in range(accumulation):
        with spread.micro_batch(last=part == accumulation - 1):
            loss = spread.network(inputs(step, part, accumulation)).square().sum()
            spread.backward(loss * spoil * dist.get_world_size() / BATCH)


def whole(spread, shards):
    """All saved tensors, whole."""
    found = {}
    for name, tensor in spread.tensors_to_save(shards):
        value = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = value.detach().clone()
    return found


def run(name, accumulation, clip_norm):
    """Steps, with one discarded and one that is not finite between them; then out and into a second model."""
    model = Net()
    settings = {"reshard": True} if name == "fsdp" else {}
    if name.startswith("zero"):
        settings = json.loads((ROOT / "launch" / "deepspeed" / f"{name}.json").read_text())
    wanted = Requested(name.partition("_")[0], settings)
    options = WrapOptions(BATCH // 2 // accumulation, accumulation, clip_norm)

    def build(model):
        made = {}

        def make_optimizer():
            made["optimizer"], made["schedule"] = Optim(lr=0.05).build(model, STEPS)
            return made["optimizer"]

        spread = wrap_model(wanted, model, make_optimizer, options)
        spread.check(2, accumulation)
        return spread, made["schedule"]

    spread, schedule = build(model)
    ema = Ema(model, 0.9, spread.trainable_shards(), spread.sync_from_shards)
    norms = []
    for step in range(STEPS):
        schedule.set_step(step)
        before = whole(spread, spread.model_shards())
        if step == 1:
            backward(spread, 100, accumulation)
            spread.discard_gradients()
            backward(spread, 100, accumulation, spoil=float("inf"))
            assert not torch.tensor(spread.step(clip_norm)).isfinite()
            after = whole(spread, spread.model_shards())
            assert all(torch.equal(before[key], after[key]) for key in before), f"{name}: a left-out step was taken"
        backward(spread, step, accumulation)
        norms.append(spread.step(clip_norm))
        ema.update()
    with ema.swap():
        averaged = model(inputs(0, 0, 1)).sum().item()
    gloo_group = GlooGroup(dist.get_rank(), 2, None)
    named, meta = spread.optimizer_to_save()
    optimizer = whole_of(named)
    states = {
        "model": whole(spread, spread.model_shards()),
        "optimizer": optimizer,
        "ema": whole(spread, ema.state_dict()),
    }
    shares = [len(TensorSplit(gloo_group).select(iter(states["model"].items())))]
    again = resumed(build, states, meta, accumulation, clip_norm, schedule)
    backward(spread, STEPS, accumulation)
    spread.step(clip_norm)
    last = whole(spread, spread.model_shards())
    assert all(torch.equal(last[key], again[key]) for key in last), f"{name}: what was put back differs"
    return {
        "name": f"{name} {accumulation} {clip_norm}", "norms": norms, "averaged": averaged, "shares": shares,
        "sums": {kind: {key: value.double().sum().item() for key, value in s.items()} for kind, s in states.items()},
    }  # fmt: skip


def whole_of(named):
    """Saved optimizer tensors, whole."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in named
    }


def check_order(spread):
    """What has been put back is listed in one order on all ranks, though each hashes its words in another way."""
    shares, orders = TensorSplit(GlooGroup(dist.get_rank(), 2, None)), [None] * 2
    shares.select(spread.optimizer_to_save()[0])
    dist.all_gather_object(orders, shares.order)
    assert orders[0] == orders[1], f"{spread.name}: ranks list the optimizer's tensors in different orders"


def resumed(build, states, meta, accumulation, clip_norm, schedule):
    """The state put into a new model, and one more step of it."""
    model = Net()
    model.load_state_dict(states["model"])
    spread, schedule = build(model)
    targets = {}
    for full, value in states["optimizer"].items():
        target = spread.empty_target(full.rpartition(":")[0], value.shape, value.dtype)
        if hasattr(target, "device_mesh"):
            value = torch.distributed.tensor.distribute_tensor(value, target.device_mesh, target.placements)
        targets[full] = target.copy_(value)
    spread.restore_optimizer(targets, meta)
    check_order(spread)
    schedule.set_step(STEPS - 1)
    backward(spread, STEPS, accumulation)
    spread.step(clip_norm)
    return whole(spread, spread.model_shards())


def hash_unlike_others():
    """Starts again with a seed of this rank's own, by which sets of a few words come in another order on each."""
    if os.environ.get("PYTHONHASHSEED") != os.environ["RANK"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": os.environ["RANK"]})


if __name__ == "__main__":
    hash_unlike_others()
    dist.init_process_group("gloo")
    orders = [None] * 2
    dist.all_gather_object(orders, list({"exp_avg", "exp_avg_sq"}))
    assert orders[0] != orders[1], "choose other seeds"
    torch.set_num_threads(1)
    for words in sys.argv[1:]:
        name, accumulation, clip_norm = words.split(",")
        line = json.dumps(run(name, int(accumulation), float(clip_norm)))
        if dist.get_rank() == 0:
            print("FOUND", line, flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads may abort an interpreter that takes its leave
