"""Strategy: the interface between the trainer and a way to train one model on many ranks (DDP, FSDP2, ZeRO).

Three terms keep checkpoints independent of the strategy:

* A *shard* is the part of a parameter that a rank holds: the parameter itself, a DTensor, or a flat slice of it.
* *Tensors to save* go into a checkpoint under the parameter's name. DTensors are saved in pieces by all ranks, all
  other tensors whole by one rank. So a checkpoint can be loaded by any strategy with any number of ranks.
* A *target* is an empty tensor to be filled from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

StrategyName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
MakeOptimizer = Callable[[], Optimizer]


class Strategy(Protocol):
    """A model and its optimizer, trained on one or more ranks. Every rank must make the same calls.

    Attributes:
        name: `single`, `ddp`, `fsdp` (FSDP2) or `zero1` to `zero3` (DeepSpeed).
        network: The wrapped model, to be called in training.
        optimizer: The optimizer, whose groups hold the learning rates.
    """

    name: StrategyName
    network: nn.Module
    optimizer: Optimizer

    def check(self, world: int, accumulation: int) -> None:
        """Checks that the model is really distributed as requested.

        Args:
            world: World size of the run.
            accumulation: Micro-batches per optimizer step.

        Raises:
            UserError: It is not; the message names the setting.
        """

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Returns the context manager for forward and backward pass of a micro-batch.

        Args:
            last: Whether this is the last micro-batch of an optimizer step. Gradients are reduced over ranks only then.
        """

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass of a micro-batch; call it inside `micro_batch`."""

    def step(self, clip_norm: float) -> float:
        """Clips the gradients, runs the optimizer step unless the norm is not finite, and clears the gradients.

        Args:
            clip_norm: Global norm to clip to; 0 disables clipping.

        Returns:
            The global gradient norm before clipping, the same on every rank.
        """

    def discard_gradients(self) -> None:
        """Clears the gradients without an optimizer step."""

    def trainable_shards(self) -> dict[str, Tensor]:
        """Returns name -> this rank's shard of each trainable parameter. The tensors are not copies."""

    def model_shards(self) -> dict[str, Tensor]:
        """Returns name -> this rank's shard of all parameters, trainable and frozen, and all buffers."""

    def sync_from_shards(self) -> None:
        """Updates the model after values were written into the shards."""

    def tensors_to_save(self, shards: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields the (name, tensor) pairs of a checkpoint for tensors that are sharded like the parameters.

        Collective: every rank must exhaust the iterator. Tensors are DTensors, or whole and the same on every rank.

        Args:
            shards: Name -> shard, for example from `model_shards`.
        """

    def empty_target(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """Returns an empty tensor to be filled from a checkpoint with a parameter or its optimizer state.

        Args:
            name: Name of the parameter.
            size: Size of the saved tensor.
            dtype: dtype of the saved tensor.
        """

    def shard_of(self, name: str, whole: Tensor) -> Tensor:
        """Returns this rank's shard of a filled target. Local.

        Args:
            name: Name of the parameter.
            whole: The target, filled from a checkpoint.
        """

    def optimizer_to_save(self) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """Returns the state of the optimizer for a checkpoint.

        Returns:
            An iterator over (`parameter:key`, tensor), which every rank must exhaust, and the rest of the state, JSON-
            serialisable.
        """

    def restore_optimizer(self, filled: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restores the state of the optimizer.

        Args:
            filled: `parameter:key` -> target, filled from a checkpoint.
            meta: The JSON part of `optimizer_to_save`.
        """
