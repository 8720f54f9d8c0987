"""FSDP2: parameters, gradients and optimizer state are cut over the ranks, block by block (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastav.core.errors import UserError
from fastav.distributed.ddp import Single
from fastav.distributed.strategy import MakeOptimizer, StrategyName


class FSDP(Single):
    """A piece of every parameter on each rank; a block is whole only while it is computed.

    Args:
        model: On its device.
        make_optimizer: Of the pieces.
        blocks: Modules that are gathered as one; what is in none of them is gathered with the model itself.
        compiled: Whether to compile it; there is a break in the graph at every block.
        reshard: Whether blocks are cut again after the forward pass, to be gathered anew in the backward pass.
        reduce_dtype: `bf16` halves what is sent of the gradients.
    """

    name: StrategyName = "fsdp"

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        *,
        blocks: Iterable[nn.Module],
        compiled: bool,
        reshard: bool,
        reduce_dtype: str,
    ) -> None:
        device = next(model.parameters()).device
        self.mesh: DeviceMesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if reduce_dtype == "bf16" else None)
        for module in (*blocks, model):
            fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=reshard)
        super().__init__(model, make_optimizer, compiled=compiled)
        self._parameters = dict(model.named_parameters())

    def check(self, world: int, accumulation: int) -> None:
        """See `Strategy`."""
        whole = [name for name, p in self.model.named_parameters() if not isinstance(p, DTensor)]
        if whole or self.mesh.size() != world:
            raise UserError(
                f"train.strategy fsdp: {world} processes are in force, but parameters are cut for {self.mesh.size()}"
                + (f", and {len(whole)} of them are whole, such as {whole[0]}" if whole else "")
            )

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """See `Strategy`."""
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def empty_target(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """See `Strategy`."""
        own = self._parameters.get(name)
        if own is None or own.shape != size:
            return super().empty_target(name, size, dtype)
        return torch.empty_like(own, dtype=dtype, requires_grad=False)
