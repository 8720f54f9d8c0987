"""`fastav train RECIPE`, or `accelerate launch -m fastav.train RECIPE`: build, train, evaluate, save.

A run resumes from the newest checkpoint in its run folder. The state of the input pipeline is one integer, the step:
sample `step * batch + i` of the plan is the same for any number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from fastav.core.atomic_files import write_text
from fastav.core.command_runner import run as run_verb
from fastav.core.errors import FastavError, Stopped, UserError
from fastav.core.log_lines import Console, clock_time
from fastav.evaluate import evaluate, forward, summary
from fastav.loader.batch import Batch
from fastav.recipe.parse import load_recipe
from fastav.recipe.schema import Recipe
from fastav.task.metrics import Evaluation
from fastav.task.predictions import write_predictions
from fastav.training.inputs import choose_pin_memory, evaluation_source, make_loader
from fastav.training.process_setup import shutdown
from fastav.training.run_folder import RunFolder
from fastav.training.signals import StopSignals
from fastav.training.state import TrainState
from fastav.training.throughput import tracker_values

OVERRIDES = True
WATCH_EVERY = 20  # minimum number of steps over which ranks are compared: a single step may be slow by chance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastav train`. Every recipe key is an option too: `--optim.lr 1e-4`."""
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="recipe file; several are trained one after another"
    )


def main(args: argparse.Namespace) -> int:
    """Trains the recipes one after another."""
    recipes = [load_recipe(path, args.overrides) for path in args.recipes]
    folders = [recipe.out for recipe in recipes]
    if len(set(folders)) < len(folders):
        raise UserError(
            f"several recipes share the run folder {max(folders, key=folders.count)}; train them one by one"
        )
    try:
        with StopSignals() as signals:
            for recipe in recipes:
                train(recipe, signals)
    finally:
        shutdown()
    return 0


def train(recipe: Recipe, signals: StopSignals | None = None) -> Evaluation | None:
    """Trains one recipe to its end.

    Args:
        recipe: The resolved recipe.
        signals: Records signals that stop the run; None if no signal does.

    Returns:
        The evaluation on the test split; None without a test split.

    Raises:
        UserError: Recipe, data, run folder and launcher contradict each other (exit 2).
        TooManyBroken: More than `loading.max_broken` of the samples cannot be read (exit 3).
        Stopped: A signal stopped the run; a checkpoint of the last step is on disk (exit 75).
        FastavError: For example a full disk, or a loss that stays non-finite (exit 1).

    Example:
        train(load_recipe("launch/recipes/small.toml", ["--data.manifest", "my/manifest.parquet", "--out", "runs/a"]))
    """
    try:
        trainer = Trainer(recipe, signals or StopSignals())
    except FastavError as error:
        record_failed_start(recipe, error)
        raise
    try:
        trainer.fit()
        return trainer.finish()
    except BaseException as error:
        trainer.record_failure(error)
        raise
    finally:
        trainer.state.ranks.end()


class Trainer:
    """The training loop.

    Args:
        recipe: The resolved recipe.
        signals: Records signals that stop the run.
    """

    def __init__(self, recipe: Recipe, signals: StopSignals) -> None:
        self.signals, self.started = signals, time.perf_counter()
        self.state = TrainState(recipe)
        if self.state.ranks.total([float(bool(signals.name))])[0]:
            raise Stopped(f"{recipe.out}: stopped by a signal before the first step; run the same command to start it")
        self._own_s, self._compared_at = 0.0, self.state.step
        self._save_every = recipe.saving.every or self.state.steps_per_epoch
        self._evaluate_every = round(recipe.train.eval_every * self.state.steps_per_epoch)

    def fit(self) -> None:
        """Runs the remaining steps, with evaluations and checkpoints in between; returns after the last checkpoint."""
        state = self.state
        if state.step >= state.total_steps:
            return
        pin_memory = choose_pin_memory(state.ranks.device)
        loader = make_loader(state.recipe, state.source, state.skip, pin_memory=pin_memory)
        requests = state.batch_split.requests(state.step, state.total_steps)
        state.model.train()
        with loader, contextlib.closing(loader.batches(requests)) as batches:
            state.meter.restart()
            while state.step < state.total_steps:
                row = self.step(batches)
                loader.check_broken(state.broken, state.seen)
                last = state.step == state.total_steps
                if state.step % state.recipe.log.every == 0 or last:
                    self._report(row, last=last)
                due = bool(self._evaluate_every) and state.step % self._evaluate_every == 0 and not last
                better = due and self._evaluate_between()
                if state.step % self._save_every == 0 or better or last or row["stop"]:
                    state.save()
                    state.meter.restart()
                if row["stop"] or last:
                    state.checkpoint_writer.wait()
                if row["stop"] and not last:
                    reason = f"stopped by {self.signals.name or 'a signal to another rank'}"
                    raise Stopped(f"{reason} after step {state.step}/{state.total_steps}; the same command resumes")

    def step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """Runs one optimizer step; returns `loss`, `lr`, `grad_norm` and whether to `stop`."""
        state, recipe = self.state, self.state.recipe
        state.ranks.seed(recipe.train.seed, state.step)
        lr = state.schedule.set_step(state.step)
        sums, waited, ids = self._accumulate(batches)
        # One small all-reduce carries the loss, the counts and the stop flag, so that all ranks stop at the same step.
        flags = [float(bool(self.signals.name)), float(state.checkpoint_writer.failed)]
        loss, broken, seen, unique, stop, save_failed = state.ranks.total([*sums, *flags])
        loss /= recipe.train.batch
        if save_failed:
            state.checkpoint_writer.wait()  # raises the error on every rank
        kind, grad_norm = state.guard.classify(loss), float("nan")
        if state.guard.allows_step(kind):
            grad_norm = state.strategy.step(recipe.optim.clip_norm)
        else:
            state.strategy.discard_gradients()
        kind, taken = state.guard.record(kind, loss, grad_norm)
        if kind:
            state.incident(kind, loss, grad_norm, ids)
        if taken and state.ema:
            state.ema.update()
        state.step += 1
        state.meter.step(recipe.train.batch, int(unique), waited)
        state.broken, state.seen = state.broken + int(broken), state.seen + int(seen)
        return {"loss": loss, "lr": lr, "grad_norm": grad_norm, "stop": stop > 0}

    def _accumulate(self, batches: Iterator[Batch]) -> tuple[list[float], float, list[str]]:
        """Runs the forward and backward passes of one step.

        Returns:
            Sums of (loss, broken, seen, decoded clips) of this rank, seconds waited for the loader, and clip ids.
        """
        state, recipe, world = self.state, self.state.recipe, self.state.ranks.world
        sums, waited, ids, begun = [0.0] * 4, 0.0, list[str](), time.perf_counter()
        for part in range(state.batch_split.accumulation):
            before = time.perf_counter()
            host = next(batches)
            waited += time.perf_counter() - before
            ids += host.ids
            batch = host.to(state.ranks.device)
            with state.strategy.micro_batch(last=part == state.batch_split.accumulation - 1):
                with state.autocast():
                    logits_BK = forward(state.strategy.network, batch)
                loss = recipe.task.loss(logits_BK, batch.targets_BK, batch.weight_B, batch.mix_B, batch.partner_B)
                self._own_s += (
                    time.perf_counter() - begun
                )  # loading and forward pass, in which no rank waits for others
                # Divide by the nominal batch, not by the sum of weights: exact for any number of ranks. The strategies
                # average gradients over ranks, so multiply by the world size.
                state.strategy.backward(loss * (world / recipe.train.batch))
                begun = time.perf_counter()
            counts = (loss.item(), host.num_broken, len(host), host.num_unique)
            sums = [total + value for total, value in zip(sums, counts, strict=True)]
        return sums, waited, ids

    def _report(self, row: dict[str, Any], *, last: bool) -> None:
        state = self.state
        rates = state.meter.rates()
        state.console.progress(state.meter.line(state.step, row["loss"], rates), last=last)
        kept = {key: row[key] for key in ("loss", "lr", "grad_norm")}
        speed = {name: getattr(rates, name) for name in rates.__slots__}
        counts = {"broken": state.broken, "skipped_steps": state.guard.skipped}
        self._log({"epoch": state.step / state.steps_per_epoch, **kept, **speed, **counts})
        if state.step - self._compared_at >= WATCH_EVERY:
            state.watch_ranks(self._own_s)
            self._own_s, self._compared_at = 0.0, state.step
        eta_s = state.meter.eta_s(state.step)
        state.run.write_status("running", step=state.step, total_steps=state.total_steps, eta_s=eta_s)

    def _log(self, values: dict[str, Any]) -> None:
        state = self.state
        state.run.append_metrics({"step": state.step, **values, "time": time.time()})
        if state.ranks.accelerator.log_with:
            state.ranks.accelerator.log(tracker_values(values), step=state.step)

    def _evaluate_between(self) -> bool:
        """Evaluates during training; returns whether the model is the best one so far."""
        state = self.state
        try:
            evaluation = self._evaluate()
        except Stopped:  # the next step handles the signal and saves
            return False
        state.meter.restart()
        metric = state.recipe.saving.best or state.recipe.task.main
        if evaluation is None or metric not in evaluation.metrics:
            return False
        value = evaluation.metrics[metric]
        state.schedule.record_metric(value)
        if state.best and value <= state.best["value"]:
            return False
        state.best = {"step": state.step, "metric": metric, "value": value}
        return True

    def _evaluate(self, *, final: bool = False) -> Evaluation | None:
        """Evaluates the model, with EMA the averaged one, on the test split; writes files if `final`."""
        state = self.state
        split = state.recipe.data.test
        if not split:
            return None
        source = evaluation_source(state.recipe, classes=state.source.classes)
        averaged = state.ema.swap() if state.ema else contextlib.nullcontext()
        with averaged:
            evaluation, predictions = evaluate(
                state.model,
                state.recipe,
                source,
                state.ranks,
                state.console,
                split=split,
                on_broken=state.skip,
                stopping=lambda: bool(self.signals.name),
            )
        state.console.log(f"step {state.step}/{state.total_steps}: {summary(evaluation)}")
        self._log({"eval": evaluation.metrics})
        if final and state.ranks.main:
            write_text(state.run.evaluation, evaluation.to_json())
            write_predictions(state.run.predictions, predictions)
        return evaluation

    def finish(self) -> Evaluation | None:
        """Writes `model/`, evaluates on the test split, and sets the status of the run to `done`."""
        state = self.state
        weights = state.weights()
        if state.ranks.main:
            state.model.save(state.run.model, weights)
        evaluation = self._evaluate(final=True)
        state.collect_skipped()
        result = {} if evaluation is None else {evaluation.main: evaluation.value}
        state.run.write_status("done", step=state.step, total_steps=state.total_steps, **result)
        if state.broken:
            state.console.log(f"{state.broken} of {state.seen} samples could not be read; see {state.run.skipped}")
        state.console.log(f"{state.run.path}: done in {clock_time(time.perf_counter() - self.started)}")
        state.ranks.accelerator.wait_for_everyone()
        return evaluation

    def record_failure(self, error: BaseException) -> None:
        """Writes the reason of an early end to `status.json`, which launch scripts read."""
        state, stopped = self.state, isinstance(error, Stopped)
        facts: dict[str, Any] = {"step": state.step, "total_steps": state.total_steps, "reason": str(error)}
        if not stopped:
            state.log.fail(error)
            facts["first"], state.run.writer = state.log.first_failure()
            if state.run.writer and facts["first"] and not isinstance(error, FastavError):
                Console().log(f"{state.run.path}: {facts['first']}")
        with contextlib.suppress(OSError):  # a full disk may be the reason
            state.run.write_status("stopped" if stopped else "failed", **facts)


def record_failed_start(recipe: Recipe, error: FastavError) -> None:
    """Writes the reason of a failed start to `status.json`, unless the run folder holds a finished run."""
    with contextlib.suppress(OSError, UserError):
        run = RunFolder(recipe.out, writer=os.environ.get("RANK", "0") == "0")
        if run.read_status().get("state") != "done":
            run.write_status("failed", reason=str(error))


if __name__ == "__main__":
    sys.exit(run_verb("train", "fastav.train", sys.argv[1:]))
