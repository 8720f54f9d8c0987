"""`fastav export weights RUN`: a model out of any checkpoint of a run, as safetensors and JSON.

A finished run has its `model/` already. This takes a checkpoint: of a run that is not finished, that was stopped,
or of a step before the last; whatever number of processes and strategy have written it. Nothing is trained, and
neither the data nor a GPU need be there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastav.core.console import Console
from fastav.core.errors import UserError
from fastav.data.manifest import Manifest
from fastav.model.av_model import AVModel
from fastav.recipe.parse import parse_recipe, renewed
from fastav.training.checkpoint import Checkpoint, Checkpoints
from fastav.training.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    parser.add_argument("what", choices=("weights",), help="the whole model in one file")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--step", type=int, help="of which checkpoint; the newest unless given")
    parser.add_argument("--out", type=Path, help="folder to make (RUN/exported/step_N)")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their running average")


def main(args: argparse.Namespace) -> int:
    """Writes the model, and says where."""
    run = RunFolder(args.run, writer=False)
    if not run.checkpoints.is_dir():
        raise UserError(f"{args.run}: not a run folder with checkpoints/")
    checkpoints = Checkpoints(run.checkpoints)
    if args.step is not None and args.step not in checkpoints.steps():
        known = ", ".join(map(str, checkpoints.steps()))
        raise UserError(f"{args.run}: no checkpoint of step {args.step}; there are: {known or 'none'}")
    found = checkpoints.newest() if args.step is None else checkpoints.read(args.step)
    if found is None:
        raise UserError(f"{args.run}: no checkpoint yet")
    out = args.out or run.path / "exported" / f"step_{found.step:08d}"
    if out.exists():
        raise UserError(f"{out}: already exists; choose another --out")
    model = load(found, averaged=not args.raw)
    model.save(out)
    Console().log(f"{out}: the model after step {found.step}")
    return 0


@torch.no_grad()
def load(found: Checkpoint, *, averaged: bool = True) -> AVModel:
    """Makes the model of a checkpoint.

    Args:
        found: The checkpoint.
        averaged: Whether the running average is wanted, where there is one.

    Raises:
        UserError: A checkpoint of format 1 names no classes, and its manifest is not there.
    """
    recipe = parse_recipe(renewed(found.state["recipe"]), {}, str(found.path))
    classes = found.state.get("classes") or Manifest.open(recipe.data.manifest).classes
    model = AVModel.empty(recipe.model, classes, recipe.sampling, recipe.frontend)
    state = model.state_dict()
    found.load("model", state)
    if averaged:
        averages = {name: state[name] for name in found.sizes("ema") if name in state}
        found.load("ema", averages)
    return model.eval()
