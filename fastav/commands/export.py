"""Exports the model from a checkpoint of a run as safetensors and JSON.

Example: `fastav export weights runs/mine --step 1200`

A finished run already has its model in RUN/model/. Use this verb for a run that is unfinished or stopped, or for an
earlier step. The checkpoint may come from any number of processes and any strategy. The data and a GPU are not needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastav.core.errors import UserError
from fastav.core.log_lines import Console
from fastav.data.manifest import Manifest
from fastav.model.av_model import AVModel
from fastav.recipe.parse import parse_recipe, with_renamed_keys
from fastav.training.checkpoint import Checkpoint, Checkpoints
from fastav.training.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastav export`."""
    parser.add_argument("what", choices=("weights",), help="weights: the whole model in one file")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; default: the newest")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to create; default: RUN/exported/step_N")
    parser.add_argument("--raw", action="store_true", help="trained weights instead of their average (optim.ema)")


def main(args: argparse.Namespace) -> int:
    """Writes the model and prints its folder.

    Raises:
        UserError: No such run or checkpoint, or the output folder exists.
    """
    run = RunFolder(args.run, writer=False)
    if not run.checkpoints.is_dir():
        raise UserError(f"{args.run}: not a run folder: checkpoints/ is missing")
    checkpoints = Checkpoints(run.checkpoints)
    if args.step is not None and args.step not in checkpoints.steps():
        known = ", ".join(map(str, checkpoints.steps()))
        raise UserError(f"{args.run}: no checkpoint of step {args.step}; available steps: {known or 'none'}")
    found = checkpoints.newest() if args.step is None else checkpoints.read(args.step)
    if found is None:
        raise UserError(f"{args.run}: has no checkpoint yet")
    out = args.out or run.path / "exported" / f"step_{found.step:08d}"
    if out.exists():
        raise UserError(f"{out}: already exists; choose another --out")
    model = load(found, averaged=not args.raw)
    model.save(out)
    Console().log(f"{out}: wrote the model of step {found.step}")
    return 0


@torch.no_grad()
def load(found: Checkpoint, *, averaged: bool = True) -> AVModel:
    """Loads the model of a checkpoint.

    Args:
        found: The checkpoint.
        averaged: Use the exponentially averaged weights if the checkpoint has them.

    Raises:
        UserError: The checkpoint has format 1, which does not store the classes, and its manifest is missing.
    """
    recipe = parse_recipe(with_renamed_keys(found.state["recipe"]), {}, str(found.path))
    classes = found.state.get("classes") or Manifest.open(recipe.data.manifest).classes
    model = AVModel.empty(recipe.model, classes, recipe.sampling, recipe.frontend)
    state = model.state_dict()
    found.load("model", state)
    if averaged:
        averages = {name: state[name] for name in found.sizes("ema") if name in state}
        found.load("ema", averages)
    return model.eval()
