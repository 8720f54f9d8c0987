"""Single process and DistributedDataParallel: every rank holds the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from fastav.core.errors import UserError
from fastav.distributed.strategy import MakeOptimizer, Strategy, StrategyName
from fastav.optim.optimizer_state import optimizer_tensors, restore_optimizer


class Single(Strategy):
    """A single process.

    Args:
        model: The model, on its device.
        make_optimizer: Makes the optimizer of the model's parameters.
        compiled: Whether to compile the model with static shapes. (With dynamic shapes, a second model with other
            shapes in the same process would slow down both.)
    """

    name: StrategyName = "single"
    network: nn.Module

    def __init__(self, model: nn.Module, make_optimizer: MakeOptimizer, *, compiled: bool = False) -> None:
        self.model, self.optimizer = model, make_optimizer()
        self.network = torch.compile(model, dynamic=False) if compiled else model  # type: ignore[assignment]

    @override
    def check(self, world: int, accumulation: int) -> None:
        if world != 1:
            raise UserError(
                f"{world} processes are running but the model is not wrapped (DDP, FSDP or ZeRO): gradients would not "
                "be synchronised"
            )

    @override
    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    @override
    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @override
    def step(self, clip_norm: float) -> float:
        norm = _to_float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm or float("inf")))
        if math.isfinite(norm):
            self.optimizer.step()
        self.discard_gradients()
        return norm

    @override
    def discard_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @override
    def trainable_shards(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @override
    def model_shards(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    @override
    def sync_from_shards(self) -> None:
        pass  # the shards are the parameters themselves

    @override
    def tensors_to_save(self, shards: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from shards.items()

    @override
    def empty_target(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)

    @override
    def shard_of(self, name: str, whole: Tensor) -> Tensor:
        return whole

    @override
    def optimizer_to_save(self) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        tensors, meta = optimizer_tensors(self.optimizer)
        return iter(tensors.items()), meta

    @override
    def restore_optimizer(self, filled: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        restore_optimizer(self.optimizer, filled, meta)


class DDP(Single):
    """DistributedDataParallel: every rank holds the model; gradients are averaged during the backward pass.

    Args:
        model: The model, on its device.
        make_optimizer: Makes the optimizer of the model's parameters.
        compiled: Whether to compile the model, as one graph per gradient bucket.
        accumulation: Micro-batches per optimizer step. With 1 the graph is static, which saves DDP the search for
            unused parameters.
        bucket_mb: Size of a gradient bucket, MB.
        reduce_dtype: dtype of the all-reduce; `bf16` halves the traffic.
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

    @override
    def check(self, world: int, accumulation: int) -> None:
        ddp_world = torch.distributed.get_world_size(self._ddp.process_group)
        if ddp_world != world:
            raise UserError(f"DDP: the world size is {world}, but gradients are averaged over {ddp_world} ranks")

    @override
    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._ddp.no_sync()


def _to_float(norm: Tensor) -> float:
    """Converts a norm to float, also if it is a DTensor."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
