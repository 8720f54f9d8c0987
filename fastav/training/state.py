"""Session: everything one run is made of at one step: data, model, optimizer, counters; built, saved and restored."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastav.core.atomic_files import sha256, write_text
from fastav.core.console import Console
from fastav.core.errors import MediaError, UserError, did_you_mean
from fastav.core.machine import peak_flops
from fastav.data.clip import Clip
from fastav.distributed.launcher import Single, Strategy, WrapOptions, checkpoint_activations, wrap_model
from fastav.distributed.rank_log import RankLog
from fastav.model.av_model import AVModel
from fastav.optim.ema import Ema
from fastav.optim.loss_guard import LossFault, LossGuard
from fastav.recipe.parse import parse_recipe, renewed, to_table, to_toml
from fastav.recipe.schema import Recipe
from fastav.task.metrics import RANKING
from fastav.training.checkpoint import Checkpoint, Checkpoints, check_resumable
from fastav.training.checkpoint_writer import CheckpointWriter, TensorSplit
from fastav.training.inputs import (
    describe_decoder,
    describe_unknown_classes,
    evaluation_source,
    measured_frontend,
    modalities,
    training_source,
)
from fastav.training.preflight_gate import before_training
from fastav.training.ranks import Ranks
from fastav.training.run_folder import RunFolder
from fastav.training.throughput import Meter


class TrainState:
    """One run at one step, the same on every rank.

    Args:
        recipe: The resolved recipe; the newest checkpoint in its run folder is restored.

    Attributes:
        recipe: With the spectrogram's statistics filled in.
        step: Optimizer steps done.
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of one pass over the training split, rounded up.
        broken: Reads that failed so far, over all ranks.
        seen: Reads so far, over all ranks.
        best: Step, metric and value of the best evaluation; empty before the first.

    Raises:
        UserError: Recipe, data and run folder do not fit together.
    """

    def __init__(self, recipe: Recipe) -> None:
        best, known = recipe.saving.best, RANKING[recipe.task.name]
        if best and best not in known:
            raise UserError(f'saving.best = "{best}" is no metric of the task to rank by{did_you_mean(best, known)}')
        self.ranks = Ranks(recipe.train, recipe.log.trackers if recipe.train.epochs else (), recipe.out)
        self.console = Console(quiet=not self.ranks.main)
        self.run = RunFolder(recipe.out, writer=self.ranks.main)
        self.log = RankLog(self.run.logs, self.ranks.rank, self.ranks.world)
        try:
            self._start(recipe)
        except BaseException as error:
            self.log.fail(error)
            raise

    def _start(self, recipe: Recipe) -> None:
        self.checkpoints = Checkpoints(self.run.checkpoints, recipe.saving.keep, self.ranks.host_group)
        self.checkpoint_writer = CheckpointWriter(self.checkpoints, asynchronous=recipe.saving.asynchronous)
        found = self.checkpoints.newest()
        before_training(self.ranks, recipe.guard, self.run, self.console, found.step if found else 0)
        self.source = training_source(recipe)
        if recipe.data.test:
            evaluation_source(recipe)  # a missing split is told now, not after the training
        self.step, self.broken, self.seen = 0, 0, 0
        self.best: dict[str, Any] = {}
        self.recipe = self._settle(recipe, found)
        self._check_agreement(found)
        self._build(found)
        if found:
            self._restore(found)
        elif self.ranks.main:
            write_text(self.run.recipe, to_toml(self.recipe))
        self._announce(found)

    def _settle(self, recipe: Recipe, found: Checkpoint | None) -> Recipe:
        """The recipe with the spectrogram's statistics: those of the resumed run, or measured."""
        if not found:
            return msgspec.structs.replace(recipe, frontend=measured_frontend(recipe, self.source))
        saved = parse_recipe(renewed(found.state["recipe"]), {}, str(self.run.path)).frontend
        given = recipe.frontend
        adopted = {name: getattr(saved, name) for name in ("mean", "std") if getattr(given, name) is None}
        recipe = msgspec.structs.replace(recipe, frontend=msgspec.structs.replace(given, **adopted))
        check_resumable(found.state["recipe"], recipe, self.run.path)
        if found.state["data"] != self.data_digest:
            raise UserError(
                f"{self.run.path}: cannot resume, {recipe.data.manifest} has changed since; choose another --out"
            )
        return recipe

    def _check_agreement(self, found: Checkpoint | None) -> None:
        """Refuses ranks that see different run folders, recipes or data: they would train apart or hang."""
        own = {
            "newest checkpoint": found.step if found else None,
            "recipe": to_toml(msgspec.structs.replace(self.recipe, out="")),
            "manifests": self.data_digest,
        }
        for rank, other in enumerate(self.ranks.gather(own)):
            for what, value in own.items():
                if other[what] != value:
                    raise UserError(
                        f"{self.run.path}: processes {self.ranks.rank} and {rank} differ in their {what}; "
                        "the run folder and the data must be on storage that all nodes share"
                    )

    @functools.cached_property
    def data_digest(self) -> list[str]:
        """Digests of manifests and aliases: a run goes on only over the rows that it began with."""
        return [sha256(path) for path in self.source.files]

    def _build(self, found: Checkpoint | None) -> None:
        recipe, training, device = self.recipe, self.recipe.train, self.ranks.device
        pairs = 2 if recipe.sampling.mixup else 1
        self.batch_split = self.ranks.split_batch(training, pairs * recipe.sampling.repeat)
        epoch_size = self.source.num_clips * recipe.sampling.repeat
        self.steps_per_epoch = max(1, -(-epoch_size // training.batch))
        self.total_steps = -(-round(training.epochs * epoch_size) // training.batch)
        torch.manual_seed(training.seed)
        words = (recipe.model, self.source.classes, recipe.sampling, recipe.frontend)
        self.model = (AVModel.empty(*words) if found else AVModel.build(*words)).to(device)
        if found:
            found.load("model", self.model.state_dict())
        # Both by the sizes of parameters, which may be cut into pieces afterwards.
        flops, self._attention = self.model.flops(), self.model.attention(training.precision)
        self.strategy = self._spread()
        self.ema = None
        if recipe.optim.ema:
            self.ema = Ema(
                self.model, recipe.optim.ema, self.strategy.trainable_shards(), self.strategy.sync_from_shards
            )
        self.guard = LossGuard(recipe.guard)
        self.meter = Meter(self.total_steps, 3 * flops, self._peak_flops())

    def _spread(self) -> Strategy:
        """The model over the ranks, with its optimizer and schedule."""
        recipe, training = self.recipe, self.recipe.train
        if training.activation_checkpointing:
            checkpoint_activations(self.model)

        def make_optimizer() -> torch.optim.Optimizer:
            scales = {"video": recipe.model.video.lr_scale, "audio": recipe.model.audio.lr_scale}
            optimizer, self.schedule = recipe.optim.build(self.model, max(self.total_steps, 1), scales)
            return optimizer

        if not self.total_steps:  # nothing is trained: score fusion
            return Single(self.model, make_optimizer)
        options = WrapOptions(
            micro_batch=self.batch_split.micro_batch, accumulation=self.batch_split.accumulation,
            clip_norm=recipe.optim.clip_norm, bf16=training.precision == "bf16", compiled=training.compile,
            bucket_mb=training.bucket_mb, reduce_dtype=training.reduce_dtype,
        )  # fmt: skip
        strategy = wrap_model(self.ranks.requested, self.model, make_optimizer, options)
        strategy.check(self.ranks.world, self.batch_split.accumulation)
        return strategy

    def autocast(self) -> AbstractContextManager[Any]:
        """Surrounds the model's forward pass: the recipe's precision, the same under every strategy."""
        if self.recipe.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def _peak_flops(self) -> float | None:
        """What MFU is measured against: bf16's peak, where the step is forward and a whole backward (twice it)."""
        frozen = not all(parameter.requires_grad for parameter in self.model.parameters())
        if self.ranks.device.type != "cuda" or self.recipe.train.precision != "bf16" or frozen:
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.ranks.device))
        return peak * self.ranks.world if peak else None

    def _announce(self, found: Checkpoint | None) -> None:
        recipe, log = self.recipe, self.console.log
        decoder, attention = describe_decoder(recipe, self.source), self._attention
        log(f"{self.run.path}: {self.ranks.describe()}; decoder {decoder}; attention {attention}")
        at = f", resumed after step {self.step} ({found.path.name})" if found else ""
        kind = to_table(recipe.model.fusion)["kind"]
        log(
            f"{self.source.num_clips} clips, {len(self.source.classes)} classes, {'+'.join(modalities(recipe))}, "
            f"model {kind}, {self.total_steps} steps of {recipe.train.batch}{at}"
        )
        unknown = describe_unknown_classes(self.source)
        if unknown:
            log(unknown)
        self.log.record(f"step {self.step}/{self.total_steps}{at}, strategy {self.strategy.name}")
        self.run.write_environment(device=self.ranks.describe(), attention=attention, world=self.ranks.world)
        self.run.write_status("running", step=self.step, total_steps=self.total_steps)
        if self.ranks.accelerator.log_with:
            self.ranks.accelerator.init_trackers(self.run.path.name)

    def skip(self, clip: Clip, error: MediaError) -> None:
        """Names a clip that could not be read in `skipped.csv`."""
        self.run.skip(clip.id, error, self.step)

    def incident(self, kind: LossFault, loss: float, grad_norm: float, ids: list[str]) -> None:
        """Tells of a step that is out of bounds, with the clips of all ranks; every rank must call it.

        Raises:
            FastavError: The recipe ends the run here.
        """
        clips = [clip for rank in self.ranks.gather(ids) for clip in rank]
        self.run.append_incident(
            {"step": self.step, "kind": kind, "loss": loss, "grad_norm": grad_norm, "clips": clips}
        )
        told = f"step {self.step}: {kind}: loss {loss:g}, gradient norm {grad_norm:g}"
        self.console.log(f"{told}; its clips: {self.run.incidents}")
        self.guard.check(kind, self.step, loss, grad_norm, clips)

    def watch_ranks(self, seconds: float) -> None:
        """Tells of ranks that are slow, by the seconds of each for its own part since the last call."""
        every = [0.0] * self.ranks.world
        every[self.ranks.rank] = seconds
        for rank, times in self.guard.slow_ranks(self.ranks.total(every)):
            self.run.append_incident({"step": self.step, "kind": "slow rank", "rank": rank, "times": times})
            self.console.log(f"step {self.step}: rank {rank} takes {times:.1f} times as long as the median rank")

    def save(self) -> None:
        """Begins to write a checkpoint of this step; every rank must call it.

        Raises:
            FastavError: The one before could not be written; older checkpoints are untouched.
        """
        optimizer, meta = self.strategy.optimizer_to_save()
        kinds = {"model": self.strategy.tensors_to_save(self.strategy.model_shards()), "optimizer": optimizer}
        if self.ema:
            kinds["ema"] = self.strategy.tensors_to_save(self.ema.state_dict())
        split, tensors = TensorSplit(self.ranks.host_group), dict[str, Tensor]()
        for kind, named in kinds.items():
            tensors |= split.select((f"{kind}/{name}", tensor) for name, tensor in named)
        state = {
            "recipe": to_table(self.recipe), "data": self.data_digest, "optimizer": meta,
            "schedule": self.schedule.state_dict(), "guard": self.guard.state_dict(), "best": dict(self.best),
            "broken": self.broken, "seen": self.seen, "threads": torch.get_num_threads(),
            "classes": list(self.source.classes), "world": self.ranks.world, "strategy": self.strategy.name,
        }  # fmt: skip
        self.checkpoint_writer.start(self.step, tensors, state, best=dict(self.best), order=split.order)
        self.collect_skipped()

    def weights(self) -> dict[str, Tensor]:
        """The whole model, averaged where weights are, on the CPU of rank 0; every rank must call it."""
        averaged = self.ema.swap() if self.ema else nullcontext()
        found = {}
        with averaged, torch.no_grad():
            for name, tensor in self.strategy.tensors_to_save(self.strategy.model_shards()):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.ranks.main:
                    found[name] = whole.detach().to("cpu", copy=True)
        return found

    def collect_skipped(self) -> None:
        """Brings what other ranks could not read into the run's list; every rank must call it."""
        for rows in self.ranks.gather(self.run.pop_skipped()):
            self.run.add_skipped(rows)

    def _restore(self, found: Checkpoint) -> None:
        """Takes all but the model's weights from a checkpoint, which were loaded before the model was spread."""
        self.strategy.restore_optimizer(self._filled(found, "optimizer"), found.state["optimizer"])
        if self.ema:
            averages = self._filled(found, "ema")
            self.ema.load_state_dict({name: self.strategy.shard_of(name, one) for name, one in averages.items()})
        self.schedule.load_state_dict(found.state["schedule"])
        self.guard.load_state_dict(found.state["guard"])
        self.step, self.best = found.step, found.state["best"]
        self.broken, self.seen = found.state["broken"], found.state["seen"]
        if not self.recipe.train.threads and self.ranks.device.type == "cpu":
            torch.set_num_threads(found.state["threads"])  # sums on a CPU differ from one number of threads to another
        self.run.drop_rows_after(self.step)
        self.run.drop_skipped_after(self.step)

    def _filled(self, found: Checkpoint, kind: str) -> dict[str, Tensor]:
        """What this rank needs of the saved tensors of a kind."""
        targets = {
            name: self.strategy.empty_target(name.partition(":")[0], size, dtype)
            for name, (size, dtype) in found.sizes(kind).items()
        }
        found.load(kind, targets)
        return targets
