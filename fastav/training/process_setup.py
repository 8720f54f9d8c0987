"""Ranks: the processes of one run. Starts accelerate and checks the launcher's settings against the recipe."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import nn

from fastav.core.errors import UserError
from fastav.distributed.gloo_group import GlooGroup
from fastav.distributed.rank_log import record_flights
from fastav.distributed.strategy_choice import Requested, requested, without_wrappers
from fastav.recipe.schema import Training
from fastav.training.batch_split import BatchSplit


class Ranks:
    """Joins the processes of a run, and checks that the launcher's settings are those of the recipe.

    Args:
        training: Table `train` of the recipe.
        trackers: Names of accelerate trackers.
        folder: Run folder, to which trackers and NCCL's flight recorder write; empty for none.

    Raises:
        UserError: World size, strategy, precision or gradient accumulation differ between launcher and recipe.

    Attributes:
        requested: Strategy that the launcher requests.
        gloo_group: The same processes in a separate gloo group, for agreement on files.
    """

    requested: Requested

    def __init__(self, training: Training, trackers: Sequence[str] = (), folder: str = "") -> None:
        if training.threads:
            torch.set_num_threads(training.threads)
        if training.deterministic:
            torch.use_deterministic_algorithms(True)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        if folder and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            record_flights(Path(folder) / "logs")
        timeout = timedelta(seconds=training.patience_s)
        try:
            with without_wrappers():
                self.accelerator = Accelerator(
                    cpu=not accelerated,
                    mixed_precision="no",  # the trainer autocasts by itself, in the same way under every strategy
                    step_scheduler_with_optimizer=False,
                    log_with=list(trackers) or None,
                    project_dir=folder or None,
                    kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
                )
        except ValueError as error:  # an unknown tracker, or one that is not installed
            raise UserError(f"log.trackers = {list(trackers)}: {' '.join(str(error).split())}") from None
        self.precision = training.precision
        self._check_world(training)
        self.requested = requested(self.world)
        self._check(training)
        group = torch.distributed.new_group(backend="gloo", timeout=timeout) if self.world > 1 else None
        self.gloo_group = GlooGroup(self.rank, self.world, group)

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """World size: the number of processes."""
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this is the main process, which writes the run folder."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Device on which this process computes."""
        return self.accelerator.device

    def _check_world(self, training: Training) -> None:
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.world:
            raise UserError(
                f"the launcher started {started} processes (WORLD_SIZE), but the process group has {self.world}: each "
                "would train alone; on CPUs use torchrun, or an accelerate config with distributed_type MULTI_GPU and "
                "ACCELERATE_USE_CPU=true"
            )
        if training.num_processes and training.num_processes != self.world:
            raise UserError(
                f"train.num_processes = {training.num_processes}, but the launcher started {self.world}; note that "
                "accelerate's distributed_type MULTI_CPU without mpirun starts one process"
            )

    def _check(self, training: Training) -> None:
        if training.strategy not in ("any", self.requested.name):
            raise UserError(
                f'train.strategy = "{training.strategy}", but the launcher requests "{self.requested.name}"; '
                "launch/accelerate/ has a config for each strategy"
            )
        steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if steps not in ("1", "auto"):
            raise UserError(
                f"gradient accumulation is set in the accelerate config or environment ({steps}); remove it there and "
                "set train.micro_batch instead"
            )
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in ("no", training.precision):
            raise UserError(
                f'train.precision = "{training.precision}", but the accelerate config or environment says '
                f'mixed_precision "{precision}"; set it to "no" there'
            )

    def split_batch(self, training: Training, multiple: int = 1) -> BatchSplit:
        """Splits the global batch over ranks and gradient accumulation.

        Args:
            training: Table `train` of the recipe.
            multiple: Number of which the micro-batch must be a multiple (mixup pairs, repeats).

        Raises:
            UserError: The numbers are not divisible.
        """
        batch, world = training.batch, self.world
        if batch % world:
            raise UserError(f"train.batch = {batch} is not divisible by the {world} processes")
        micro = training.micro_batch or batch // world
        if (batch // world) % micro:
            raise UserError(
                f"train.micro_batch = {micro}: expected a divisor of the {batch // world} clips of each process "
                f"(train.batch = {batch})"
            )
        if micro % multiple:
            raise UserError(
                f"train.micro_batch = {micro}: expected a multiple of {multiple} (mixup pairs and sampling.repeat)"
            )
        return BatchSplit(batch, micro, batch // world // micro, self.rank, world)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums a few numbers over all ranks by an all-reduce in float64. Collective: every rank must call it."""
        if self.world == 1:
            return [float(v) for v in values]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        summed = self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=self.device), reduction="sum")
        return [float(v) for v in summed.tolist()]

    def gather(self, item: Any) -> list[Any]:
        """Gathers one object from every rank, in rank order. Collective: every rank must call it."""
        return gather_object([item]) if self.world > 1 else [item]

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Broadcasts the buffers of rank 0 (BatchNorm statistics), as DDP does at each forward pass in training."""
        if self.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def end(self) -> None:
        """Ends the trackers and resets accelerate. The process group stays open for the next recipe."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        AcceleratorState._reset_state()
        GradientState._reset_state()

    def seed(self, seed: int, step: int) -> None:
        """Seeds torch's generators from (seed, step, rank), so that no generator state needs to be saved."""
        digest = hashlib.blake2b(f"{seed}:{step}:{self.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    def describe(self) -> str:
        """Describes device, processes and precision, for the first log line."""
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        else:
            why = "" if self.device.type != "cpu" else ", no GPU found"
            device = f"{self.device.type} ({torch.get_num_threads()} threads{why})"
        processes = f"{self.world} processes ({self.requested.name})" if self.world > 1 else "1 process"
        return f"{device}, {processes}, {self.precision}"


def shutdown() -> None:
    """Destroys the process group. Call it once, at the end of the command."""
    if PartialState._shared_state:
        PartialState().destroy_process_group()
        PartialState._reset_state()
