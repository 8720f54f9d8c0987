"""Evaluates a trained run on its test split, or on another manifest: metrics, predictions and unreadable clips.

Example: `fastav evaluate runs/mine my/new.parquet`

It writes metrics.json and predictions.parquet: for the run's own test split to the run folder, for another manifest or
split to a folder in RUN/evaluations/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.table import Table

from fastav.core.atomic_files import write_text
from fastav.core.errors import MediaError, UserError
from fastav.core.log_lines import Console
from fastav.data.clip import Clip
from fastav.evaluate import evaluate
from fastav.model.av_model import AVModel, external_names
from fastav.recipe.parse import load_recipe
from fastav.task.metrics import Evaluation
from fastav.task.predictions import write_predictions
from fastav.training.inputs import describe_unknown_classes, evaluation_source
from fastav.training.process_setup import Ranks
from fastav.training.run_folder import RunFolder

OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastav evaluate`. Recipe keys (`--loading.workers 4`) apply to this evaluation only."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("manifest", metavar="MANIFEST", nargs="?",
                        help="manifest; default: data.manifest of the run. Classes are matched by name")  # fmt: skip
    parser.add_argument("split", metavar="SPLIT", nargs="?", help="split to evaluate on; default: data.test of the run")


def main(args: argparse.Namespace) -> int:
    """Evaluates the run, prints the metrics, and writes `metrics.json` and `predictions.parquet`.

    Raises:
        UserError: Not a finished run folder, or a wrong manifest, split or recipe key.
    """
    saved = Path(args.run) / "recipe.toml"
    if not saved.exists():
        raise UserError(f"{args.run}: not a run folder: recipe.toml is missing")
    recipe = msgspec.structs.replace(load_recipe(saved, args.overrides), out=args.run)
    if not (Path(args.run) / "model").is_dir():
        raise UserError(f"{args.run}: the run is not finished: model/ is missing; finish it with `fastav train`")
    ranks = Ranks(recipe.train)
    console = Console(quiet=not ranks.main)
    run = RunFolder(args.run, writer=ranks.main)
    # External code is loaded only if the recipe of this run names it.
    factories = list(external_names(recipe.model).values())
    model = AVModel.from_pretrained(run.model, factories=factories).to(ranks.device)
    source = evaluation_source(recipe, args.manifest, args.split, model.classes)
    unknown = describe_unknown_classes(source)
    if unknown:
        console.log(unknown)
    folder = run.path
    if args.manifest or args.split:
        manifest = Path(args.manifest or recipe.data.manifest).resolve()
        folder = run.path / "evaluations" / f"{manifest.parent.name}_{manifest.stem}_{args.split or recipe.data.test}"
    evaluation, predictions = evaluate(
        model, recipe, source, ranks, console, split=args.split or recipe.data.test, on_broken=_log_broken(console)
    )
    if ranks.main:
        write_text(folder / "metrics.json", evaluation.to_json())
        write_predictions(folder / "predictions.parquet", predictions)
        console.show(table(evaluation))
        console.log(f"written: {folder}/metrics.json, predictions.parquet")
    return 0


def table(evaluation: Evaluation) -> Table:
    """Returns the metrics as a terminal table."""
    rows = Table(title=f"split {evaluation.split}", show_header=False)
    for key, value in evaluation.metrics.items():
        rows.add_row(key, f"{value:.4g}" if value != int(value) else f"{int(value)}")
    return rows


def _log_broken(console: Console) -> Callable[[Clip, MediaError], None]:
    """Returns a callback that logs a clip that cannot be read. The loader calls it once per clip."""
    return lambda clip, error: console.log(f"cannot read clip {json.dumps(clip.id)}: {error}")
