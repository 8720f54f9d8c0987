"""One process, or DistributedDataParallel: every rank has all of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fastav.core.errors import UserError
from fastav.distributed.strategy import MakeOptimizer, StrategyName
from fastav.optim.optimizer_state import optimizer_tensors, restore_optimizer


class Single:
    """One process.

    Args:
        model: On its device.
        make_optimizer: Of the model's parameters.
        compiled: Whether to compile it, for the one shape of its batches: a second model of other shapes in the process
            would make both slower by symbolic sizes.
    """

    name: StrategyName = "single"
    network: nn.Module

    def __init__(self, model: nn.Module, make_optimizer: MakeOptimizer, *, compiled: bool = False) -> None:
        self.model, self.optimizer = model, make_optimizer()
        self.network = torch.compile(model, dynamic=False) if compiled else model  # type: ignore[assignment]

    def check(self, world: int, accumulation: int) -> None:
        """See `Strategy`."""
        if world != 1:
            raise UserError(f"{world} processes are in force, but nothing joins their gradients")

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """See `Strategy`."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        loss.backward()

    def step(self, clip_norm: float) -> float:
        """See `Strategy`."""
        norm = _whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm or float("inf")))
        if math.isfinite(norm):
            self.optimizer.step()
        self.discard_gradients()
        return norm

    def discard_gradients(self) -> None:
        """See `Strategy`."""
        self.optimizer.zero_grad(set_to_none=True)

    def trainable_shards(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def model_shards(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        return self.model.state_dict()

    def sync_from_shards(self) -> None:
        """See `Strategy`."""

    def tensors_to_save(self, shards: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See `Strategy`."""
        yield from shards.items()

    def empty_target(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """See `Strategy`."""
        return torch.empty(size, dtype=dtype)

    def shard_of(self, name: str, whole: Tensor) -> Tensor:
        """See `Strategy`."""
        return whole

    def optimizer_to_save(self) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """See `Strategy`."""
        tensors, meta = optimizer_tensors(self.optimizer)
        return iter(tensors.items()), meta

    def restore_optimizer(self, filled: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """See `Strategy`."""
        restore_optimizer(self.optimizer, filled, meta)


class DDP(Single):
    """A copy of the model on every rank; gradients are averaged in buckets while the backward pass goes on.

    Args:
        model: On its device.
        make_optimizer: Of the model's parameters.
        compiled: Whether to compile it, in as many graphs as there are buckets.
        accumulation: Micro-batches per step; with one of them the graph is static, and DDP need not look for it.
        bucket_mb: Size of a bucket, MB.
        reduce_dtype: `bf16` halves what is sent.
    """

    name: StrategyName = "ddp"

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        *,
        compiled: bool,
        accumulation: int,
        bucket_mb: float,
        reduce_dtype: str,
    ) -> None:
        self.model, self.optimizer = model, make_optimizer()
        device = next(model.parameters()).device
        self._ddp = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=accumulation == 1 and not compiled,
            bucket_cap_mb=bucket_mb,
        )
        if reduce_dtype == "bf16":
            self._ddp.register_comm_hook(None, bf16_compress_hook)
        self.network = torch.compile(self._ddp, dynamic=False) if compiled else self._ddp  # type: ignore[assignment]

    def check(self, world: int, accumulation: int) -> None:
        """See `Strategy`."""
        found = torch.distributed.get_world_size(self._ddp.process_group)
        if found != world:
            raise UserError(f"{world} processes are in force, but gradients are averaged over {found}")

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """See `Strategy`."""
        return nullcontext() if last else self._ddp.no_sync()


def _whole(norm: Tensor) -> float:
    """A norm as a number, also where it is a DTensor."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
