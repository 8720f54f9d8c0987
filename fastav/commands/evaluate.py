"""`fastav evaluate RUN [MANIFEST]`: a trained model over a split: predictions, metrics and what could not be read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.table import Table

from fastav.core.atomic_files import write_text
from fastav.core.console import Console
from fastav.core.errors import MediaError, UserError
from fastav.data.clip import Clip
from fastav.evaluate import evaluate
from fastav.model.av_model import AVModel, external_names
from fastav.recipe.parse import load_recipe
from fastav.task.metrics import Evaluation
from fastav.task.predictions import write_predictions
from fastav.training.inputs import describe_unknown_classes, evaluation_source
from fastav.training.ranks import Ranks
from fastav.training.run_folder import RunFolder

OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options; `--loading.workers 4` and the like change the run's recipe for this evaluation."""
    parser.add_argument("run", help="run folder")
    parser.add_argument("manifest", nargs="?", help="another manifest; classes are matched by name")
    parser.add_argument("split", nargs="?", help="split; the recipe's data.test unless given")


def main(args: argparse.Namespace) -> int:
    """Evaluates, prints the table, writes `metrics.json` and `predictions.parquet`."""
    saved = Path(args.run) / "recipe.toml"
    if not saved.exists():
        raise UserError(f"{args.run}: not a run folder: it has no recipe.toml")
    recipe = msgspec.structs.replace(load_recipe(saved, args.overrides), out=args.run)
    if not (Path(args.run) / "model").is_dir():
        raise UserError(f"{args.run}: the run has no model/ yet; finish it with `fastav train`")
    ranks = Ranks(recipe.train)
    console = Console(quiet=not ranks.main)
    run = RunFolder(args.run, writer=ranks.main)
    # Code outside this project runs only where the run's own recipe names it.
    factories = list(external_names(recipe.model).values())
    model = AVModel.from_pretrained(run.model, factories=factories).to(ranks.device)
    source = evaluation_source(recipe, args.manifest, args.split, model.classes)
    unknown = describe_unknown_classes(source)
    if unknown:
        console.log(unknown)
    folder = run.path
    if args.manifest or args.split:
        of = Path(args.manifest or recipe.data.manifest).resolve()
        folder = run.path / "evaluations" / f"{of.parent.name}_{of.stem}_{args.split or recipe.data.test}"
    evaluation, predictions = evaluate(
        model, recipe, source, ranks, console, split=args.split or recipe.data.test, on_broken=_tell(console)
    )
    if ranks.main:
        write_text(folder / "metrics.json", evaluation.to_json())
        write_predictions(folder / "predictions.parquet", predictions)
        console.show(table(evaluation))
        console.log(f"written: {folder}/metrics.json, predictions.parquet")
    return 0


def table(evaluation: Evaluation) -> Table:
    """The figures as a terminal table."""
    shown = Table(title=f"split {evaluation.split}", show_header=False)
    for key, value in evaluation.metrics.items():
        shown.add_row(key, f"{value:.4g}" if value != int(value) else f"{int(value)}")
    return shown


def _tell(console: Console) -> Callable[[Clip, MediaError], None]:
    """Names a clip that cannot be read; the loader calls it once for each."""
    return lambda clip, error: console.log(f"cannot read clip {json.dumps(clip.id)}: {error}")
