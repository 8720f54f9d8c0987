"""Ranks: the processes of one run: started, checked against what was asked for, and kept in agreement."""

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
from fastav.distributed.host_group import HostGroup
from fastav.distributed.launcher import Requested, requested, without_wrappers
from fastav.distributed.rank_log import record_flights
from fastav.recipe.schema import Training
from fastav.training.batch_split import BatchSplit


class Ranks:
    """Starts accelerate and asserts that what is in force is what was asked for.

    Args:
        training: The recipe's table.
        trackers: accelerate trackers by name.
        folder: The run's, where trackers and NCCL's recorder write; empty for none.

    Raises:
        UserError: World size, strategy, precision or accumulation in force differ from what was asked for.

    Attributes:
        requested: The strategy that the launcher requests.
        host_group: The processes, in a group of their own for what concerns files.
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
        patience = timedelta(seconds=training.patience_s)
        try:
            with without_wrappers():
                self.accelerator = Accelerator(
                    cpu=not accelerated,
                    mixed_precision="no",  # the trainer's own autocast is in force, under every strategy alike
                    step_scheduler_with_optimizer=False,
                    log_with=list(trackers) or None,
                    project_dir=folder or None,
                    kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
                )
        except ValueError as error:  # an unknown tracker, or one that is not installed
            raise UserError(f"log.trackers = {list(trackers)}: {' '.join(str(error).split())}") from None
        self.precision = training.precision
        self._check_world(training)
        self.requested = requested(self.world)
        self._check(training)
        group = torch.distributed.new_group(backend="gloo", timeout=patience) if self.world > 1 else None
        self.host_group = HostGroup(self.rank, self.world, group)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """How many processes."""
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def _check_world(self, training: Training) -> None:
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.world:
            raise UserError(
                f"the launcher started {started} processes (WORLD_SIZE), but {self.world} are in one group: each would "
                "train alone; on CPUs use torchrun, or an accelerate config with distributed_type MULTI_GPU and "
                "ACCELERATE_USE_CPU=true"
            )
        if training.num_processes and training.num_processes != self.world:
            raise UserError(
                f"train.num_processes = {training.num_processes}, but {self.world} are in force: with accelerate, "
                "distributed_type MULTI_CPU without mpirun starts one process"
            )

    def _check(self, training: Training) -> None:
        if training.strategy not in ("any", self.requested.name):
            raise UserError(
                f'train.strategy = "{training.strategy}", but "{self.requested.name}" is in force; '
                "launch/accelerate/ has a config for each"
            )
        steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if steps not in ("1", "auto"):
            raise UserError(
                f"gradient accumulation is set in the accelerate config or environment ({steps}); set "
                "train.micro_batch instead, it follows from that"
            )
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in ("no", training.precision):
            raise UserError(
                f'train.precision = "{training.precision}", but the accelerate config or environment says '
                f'mixed_precision "{precision}"; the recipe decides: set it to "no" there'
            )

    def shares(self, training: Training, multiple: int = 1) -> BatchSplit:
        """Splits the batch over ranks and accumulation.

        Args:
            training: The recipe's table.
            multiple: What a micro-batch must be a multiple of (mixup pairs, repeats).

        Raises:
            UserError: The numbers do not divide.
        """
        batch, world = training.batch, self.world
        if batch % world:
            raise UserError(f"train.batch = {batch} does not divide by the {world} processes")
        micro = training.micro_batch or batch // world
        if (batch // world) % micro:
            raise UserError(
                f"train.micro_batch = {micro} does not divide the {batch // world} clips of a process "
                f"(train.batch = {batch})"
            )
        if micro % multiple:
            raise UserError(
                f"train.micro_batch = {micro} must be a multiple of {multiple} (mixup pairs and sampling.repeat)"
            )
        return BatchSplit(batch, micro, batch // world // micro, self.rank, world)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums small numbers over all ranks, in float64."""
        if self.world == 1:
            return [float(v) for v in values]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        summed = self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=self.device), reduction="sum")
        return [float(v) for v in summed.tolist()]

    def gather(self, item: Any) -> list[Any]:
        """Collects one object of every rank, in rank order; every rank must call it."""
        return gather_object([item]) if self.world > 1 else [item]

    def share_buffers(self, module: nn.Module) -> None:
        """Gives every rank rank 0's buffers (BatchNorm's), as training does at each forward pass."""
        if self.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def end(self) -> None:
        """Ends the trackers; the processes stay together for the next recipe, which may ask for other settings."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        AcceleratorState._reset_state()
        GradientState._reset_state()

    def seed(self, seed: int, step: int) -> None:
        """Seeds torch's generators from (seed, step, rank), so that no generator state needs saving."""
        digest = hashlib.blake2b(f"{seed}:{step}:{self.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    def describe(self) -> str:
        """Device and processes, for the first log line."""
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        else:
            why = "" if self.device.type != "cpu" else ", no GPU found"
            device = f"{self.device.type} ({torch.get_num_threads()} threads{why})"
        processes = f"{self.world} processes ({self.requested.name})" if self.world > 1 else "1 process"
        return f"{device}, {processes}, {self.precision}"


def shutdown() -> None:
    """Takes shutdown of the other processes, once, at the end of the command."""
    if PartialState._shared_state:
        PartialState().destroy_process_group()
        PartialState._reset_state()
