"""TrainState: data, model, optimizer and counters of a run at one step. Builds, saves and restores them."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastav.core.atomic_files import sha256, write_text
from fastav.core.errors import MediaError, UserError, did_you_mean
from fastav.core.log_lines import Console
from fastav.core.machine import peak_flops
from fastav.data.clip import Clip
from fastav.distributed.rank_log import RankLog
from fastav.distributed.strategy_choice import Single, Strategy, WrapOptions, checkpoint_activations, wrap_model
from fastav.model.av_model import AVModel
from fastav.optim.ema import Ema
from fastav.optim.loss_guard import LossFault, LossGuard
from fastav.recipe.parse import parse_recipe, to_table, to_toml, with_renamed_keys
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
from fastav.training.process_setup import Ranks
from fastav.training.run_folder import RunFolder
from fastav.training.throughput import Meter


class TrainState:
    """The state of a run at one step, the same on every rank.

    Args:
        recipe: The resolved recipe. The newest checkpoint in its run folder is restored.

    Attributes:
        recipe: The recipe with mean and standard deviation of the spectrogram filled in.
        source: Training split.
        batch_split: Division of the global batch over ranks and accumulation.
        model: The model, on the device of this rank.
        strategy: The model as it is trained: wrapped by DDP, FSDP2 or DeepSpeed, with its optimizer.
        schedule: Learning-rate schedule.
        ema: Averaged weights; None if `optim.ema` is 0.
        guard: Checks of loss, gradient norm and slow ranks.
        meter: Throughput meter.
        ranks: The processes of the run.
        run: Run folder.
        step: Optimizer steps done.
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of one pass over the training split, rounded up.
        broken: Samples that could not be read so far, over all ranks.
        seen: Samples loaded so far, over all ranks.
        best: Step, metric and value of the best evaluation; empty before the first.

    Raises:
        UserError: Recipe, data, run folder and launcher contradict each other.
        FastavError: All checkpoints are damaged, or the preflight found a broken rank.
    """

    def __init__(self, recipe: Recipe) -> None:
        # The recipe is checked before any process waits for another one.
        best, known = recipe.saving.best, RANKING[recipe.task.name]
        if best and best not in known:
            raise UserError(f'saving.best = "{best}" is not a ranking metric of this task{did_you_mean(best, known)}')
        # Ranks come first: only the main rank writes to the console and the run folder.
        self.ranks = Ranks(recipe.train, recipe.log.trackers if recipe.train.epochs else (), recipe.out)
        self.console = Console(quiet=not self.ranks.main)
        self.run = RunFolder(recipe.out, writer=self.ranks.main)
        self.log = RankLog(self.run.logs, self.ranks.rank, self.ranks.world)
        # From here on failures are recorded in this rank's log, so that the job can name the rank that failed first.
        try:
            self._start(recipe)
        except BaseException as error:
            self.log.fail(error)
            raise

    def _start(self, recipe: Recipe) -> None:
        """Builds the state; the cheap checks come before the expensive steps."""
        # 1. The checkpoint decides whether this is a start or a resume, which all later steps depend on.
        self.checkpoints = Checkpoints(self.run.checkpoints, recipe.saving.keep, self.ranks.gloo_group)
        self.checkpoint_writer = CheckpointWriter(self.checkpoints, asynchronous=recipe.saving.asynchronous)
        checkpoint = self.checkpoints.newest()
        # 2. A slow or broken device is found before data and model take memory and time on it.
        before_training(self.ranks, recipe.guard, self.run, self.console, checkpoint.step if checkpoint else 0)
        # 3. The data come before the model: they give its classes and the number of steps.
        self.source = training_source(recipe)
        if recipe.data.test:
            evaluation_source(recipe)  # report a missing test split now, not after the training
        self.step, self.broken, self.seen = 0, 0, 0
        self.best: dict[str, Any] = {}
        # 4. The statistics of the spectrogram need the data and become part of the recipe, as the model reads them.
        self.recipe = self._complete_recipe(recipe, checkpoint)
        # 5. Ranks agree on checkpoint, recipe and data before the first collective of the model could hang.
        self._check_agreement(checkpoint)
        self._build(checkpoint)
        # 6. Optimizer, averages and schedule exist now and take their saved state. A new run records its recipe.
        if checkpoint:
            self._restore(checkpoint)
        elif self.ranks.main:
            write_text(self.run.recipe, to_toml(self.recipe))
        self._announce(checkpoint)

    def _complete_recipe(self, recipe: Recipe, checkpoint: Checkpoint | None) -> Recipe:
        """Fills in mean and standard deviation of the spectrogram: those of the resumed run, or measured ones."""
        if not checkpoint:
            return msgspec.structs.replace(recipe, frontend=measured_frontend(recipe, self.source))
        saved = parse_recipe(with_renamed_keys(checkpoint.state["recipe"]), {}, str(self.run.path)).frontend
        given = recipe.frontend
        statistics = {name: getattr(saved, name) for name in ("mean", "std") if getattr(given, name) is None}
        recipe = msgspec.structs.replace(recipe, frontend=msgspec.structs.replace(given, **statistics))
        check_resumable(checkpoint.state["recipe"], recipe, self.run.path)
        if checkpoint.state["data"] != self.data_digest:
            raise UserError(
                f"{self.run.path}: cannot resume, {recipe.data.manifest} has changed since; choose another --out"
            )
        return recipe

    def _check_agreement(self, checkpoint: Checkpoint | None) -> None:
        """Checks that all ranks have the same checkpoint, recipe and data. Otherwise they would diverge or hang."""
        own = {
            "newest checkpoint": checkpoint.step if checkpoint else None,
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
        """SHA-256 of the manifests and aliases. A run resumes only on the same rows."""
        return [sha256(path) for path in self.source.files]

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Builds model, optimizer, averages, guard and meter."""
        recipe, training, device = self.recipe, self.recipe.train, self.ranks.device
        # Steps and batches first: the schedule needs the number of steps, DDP and DeepSpeed the micro-batch.
        pairs = 2 if recipe.sampling.mixup else 1
        self.batch_split = self.ranks.split_batch(training, pairs * recipe.sampling.repeat)
        epoch_size = self.source.num_clips * recipe.sampling.repeat
        self.steps_per_epoch = max(1, -(-epoch_size // training.batch))
        self.total_steps = -(-round(training.epochs * epoch_size) // training.batch)
        # Seed directly before the weights are drawn: they depend on the seed only, and are the same on every rank.
        torch.manual_seed(training.seed)
        args = (recipe.model, self.source.classes, recipe.sampling, recipe.frontend)
        self.model = (AVModel.empty(*args) if checkpoint else AVModel.build(*args)).to(device)
        # Weights are loaded into the whole model, before a strategy shards it.
        if checkpoint:
            checkpoint.load("model", self.model.state_dict())
        # FLOPs and attention are derived from the shapes of whole parameters, so also before sharding.
        flops, self._attention = self.model.flops(), self.model.attention(training.precision)
        self.strategy = self._wrap()
        # The averages are kept per shard, so they come after sharding.
        self.ema = None
        if recipe.optim.ema:
            self.ema = Ema(
                self.model, recipe.optim.ema, self.strategy.trainable_shards(), self.strategy.sync_from_shards
            )
        self.guard = LossGuard(recipe.guard)
        self.meter = Meter(self.total_steps, 3 * flops, self._peak_flops())

    def _wrap(self) -> Strategy:
        """Wraps the model for the requested strategy, and makes its optimizer and schedule."""
        recipe, training = self.recipe, self.recipe.train
        # Activation checkpointing replaces the forward methods of blocks, so it comes before wrapping and compiling.
        if training.activation_checkpointing:
            checkpoint_activations(self.model)

        # A callback, because FSDP must shard the parameters before the optimizer takes them.
        def make_optimizer() -> torch.optim.Optimizer:
            scales = {"video": recipe.model.video.lr_scale, "audio": recipe.model.audio.lr_scale}
            optimizer, self.schedule = recipe.optim.build(self.model, max(self.total_steps, 1), scales)
            return optimizer

        if not self.total_steps:  # train.epochs = 0, as for score fusion: nothing is trained
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
        """Returns the context manager for the forward pass: autocast to the recipe's precision under every strategy."""
        if self.recipe.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def _peak_flops(self) -> float | None:
        """Returns the bf16 peak FLOP/s of all devices, or None if MFU is not defined.

        MFU assumes that the backward pass costs twice the forward pass, which is false with frozen parameters.
        """
        frozen = not all(parameter.requires_grad for parameter in self.model.parameters())
        if self.ranks.device.type != "cuda" or self.recipe.train.precision != "bf16" or frozen:
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.ranks.device))
        return peak * self.ranks.world if peak else None

    def _announce(self, checkpoint: Checkpoint | None) -> None:
        """Logs the first lines of the run, and writes `env.json` and `status.json`."""
        recipe, log = self.recipe, self.console.log
        decoder, attention = describe_decoder(recipe, self.source), self._attention
        log(f"{self.run.path}: {self.ranks.describe()}; decoder {decoder}; attention {attention}")
        at = f", resumed after step {self.step} ({checkpoint.path.name})" if checkpoint else ""
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
        """Adds a clip that could not be read to `skipped.csv`."""
        self.run.skip(clip.id, error, self.step)

    def incident(self, kind: LossFault, loss: float, grad_norm: float, ids: list[str]) -> None:
        """Logs a faulty step and records it with the clips of all ranks. Collective: every rank must call it.

        Raises:
            FastavError: The recipe ends the run at this fault (`guard.on_non_finite`, `guard.on_spike`).
        """
        clips = [clip for rank in self.ranks.gather(ids) for clip in rank]
        self.run.append_incident(
            {"step": self.step, "kind": kind, "loss": loss, "grad_norm": grad_norm, "clips": clips}
        )
        text = f"step {self.step}: {kind}: loss {loss:g}, gradient norm {grad_norm:g}"
        self.console.log(f"{text}; clips of the step are in {self.run.incidents}")
        self.guard.check(kind, self.step, loss, grad_norm, clips)

    def watch_ranks(self, seconds: float) -> None:
        """Logs and records slow ranks. Collective: every rank must call it.

        Args:
            seconds: Time since the last call that this rank spent on its own work, without waiting for other ranks.
        """
        all_seconds = [0.0] * self.ranks.world
        all_seconds[self.ranks.rank] = seconds
        for rank, times in self.guard.slow_ranks(self.ranks.total(all_seconds)):
            self.run.append_incident({"step": self.step, "kind": "slow rank", "rank": rank, "times": times})
            self.console.log(f"step {self.step}: rank {rank} takes {times:.1f} times as long as the median rank")

    def save(self) -> None:
        """Starts to write a checkpoint of this step. Collective: every rank must call it.

        Raises:
            FastavError: The previous checkpoint could not be written; older checkpoints are untouched.
        """
        optimizer, meta = self.strategy.optimizer_to_save()
        kinds = {"model": self.strategy.tensors_to_save(self.strategy.model_shards()), "optimizer": optimizer}
        if self.ema:
            kinds["ema"] = self.strategy.tensors_to_save(self.ema.state_dict())
        split, tensors = TensorSplit(self.ranks.gloo_group), dict[str, Tensor]()
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
        """Returns the unsharded weights for the saved model, with EMA the averaged ones. Collective.

        Returns:
            Name -> tensor on the CPU of rank 0; empty on all other ranks.
        """
        averaged = self.ema.swap() if self.ema else nullcontext()
        weights = {}
        with averaged, torch.no_grad():
            for name, tensor in self.strategy.tensors_to_save(self.strategy.model_shards()):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.ranks.main:
                    weights[name] = whole.detach().to("cpu", copy=True)
        return weights

    def collect_skipped(self) -> None:
        """Gathers the skipped clips of all ranks in `skipped.csv`. Collective: every rank must call it."""
        for rows in self.ranks.gather(self.run.pop_skipped()):
            self.run.add_skipped(rows)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Restores all but the model's weights, which `_build` loaded before sharding."""
        self.strategy.restore_optimizer(self._load(checkpoint, "optimizer"), checkpoint.state["optimizer"])
        if self.ema:
            averages = self._load(checkpoint, "ema")
            self.ema.load_state_dict({name: self.strategy.shard_of(name, one) for name, one in averages.items()})
        self.schedule.load_state_dict(checkpoint.state["schedule"])
        self.guard.load_state_dict(checkpoint.state["guard"])
        self.step, self.best = checkpoint.step, checkpoint.state["best"]
        self.broken, self.seen = checkpoint.state["broken"], checkpoint.state["seen"]
        if not self.recipe.train.threads and self.ranks.device.type == "cpu":
            torch.set_num_threads(checkpoint.state["threads"])  # CPU sums depend on the number of threads
        # Rows after the checkpoint will be written again.
        self.run.drop_rows_after(self.step)
        self.run.drop_skipped_after(self.step)

    def _load(self, checkpoint: Checkpoint, kind: str) -> dict[str, Tensor]:
        """Loads what this rank needs of the saved tensors of a kind (`optimizer` or `ema`)."""
        targets = {
            name: self.strategy.empty_target(name.partition(":")[0], size, dtype)
            for name, (size, dtype) in checkpoint.sizes(kind).items()
        }
        checkpoint.load(kind, targets)
        return targets
