"""What the trainer needs of a way to spread one model over ranks.

Three words keep checkpoints independent of it:

* a *shard* is what a rank keeps of a parameter: the parameter itself, a DTensor, or a flat piece of it;
* *saved* tensors go into a checkpoint under the parameter's name: DTensors by their pieces, all others whole and from
  one rank only, so that a checkpoint of any strategy and number of ranks starts any other;
* a *target* is an empty tensor that a rank wants filled from a checkpoint.
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
    """One model, its optimizer and the ranks that share them.

    Attributes:
        name: `single`, `ddp`, `fsdp` (FSDP2) or `zero1` to `zero3` (DeepSpeed).
        network: What is called in training.
        optimizer: Whose groups hold the learning rates.
    """

    name: StrategyName
    network: nn.Module
    optimizer: Optimizer

    def check(self, world: int, accumulation: int) -> None:
        """Asserts that what is in force is what was asked for.

        Raises:
            UserError: It is not; the message says which setting.
        """

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surrounds forward and backward pass of a micro-batch; gradients are reduced in the last of a step only."""

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch, inside `part`."""

    def step(self, clip_norm: float) -> float:
        """Clips the gradient, takes the optimizer's step unless the norm is not finite, and forgets the gradient.

        Args:
            clip_norm: Global norm to clip to; 0 for none.

        Returns:
            The norm before clipping, the same on every rank.
        """

    def discard_gradients(self) -> None:
        """Forgets the gradient without a step."""

    def trainable_shards(self) -> dict[str, Tensor]:
        """What this rank keeps of each trainable parameter, by its name; the tensors themselves, no copies."""

    def model_shards(self) -> dict[str, Tensor]:
        """Shards of all that a checkpoint holds of the model: trainable and frozen parameters, and buffers."""

    def sync_from_shards(self) -> None:
        """Makes the model see what was written into the shards."""

    def tensors_to_save(self, shards: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields what a checkpoint holds of tensors that are sharded as parameters are; every rank must exhaust it.

        Whole tensors are the same on every rank.
        """

    def empty_target(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor to be filled with the saved tensor of a parameter or of its optimizer state."""

    def shard_of(self, name: str, whole: Tensor) -> Tensor:
        """Returns this rank's shard of a filled target."""

    def optimizer_to_save(self) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """Yields the optimizer's saved tensors, as `parameter:key`, and returns the rest as JSON; see `saved`."""

    def restore_optimizer(self, filled: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes back what `saved_optimizer` gave, from filled targets."""
