"""FSDP2: parameters, gradients and optimizer state are sharded over the ranks, block by block (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from fastav.core.errors import UserError
from fastav.distributed.ddp import Single
from fastav.distributed.strategy import MakeOptimizer, StrategyName


class FSDP(Single):
    """FSDP2: each rank holds a shard of every parameter. A block is gathered only while it is computed.

    Args:
        model: The model, on its device.
        make_optimizer: Makes the optimizer of the sharded parameters.
        blocks: Modules that are gathered as a unit. Parameters outside all blocks are gathered with the model itself.
        compiled: Whether to compile the model; there is a graph break at every block.
        reshard: Whether to free the gathered parameters of a block after the forward pass, and gather them again in the
            backward pass. Saves memory and costs communication.
        reduce_dtype: dtype of the gradient reduction; `bf16` halves its traffic.
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

    @override
    def check(self, world: int, accumulation: int) -> None:
        unsharded = [name for name, p in self.model.named_parameters() if not isinstance(p, DTensor)]
        if unsharded or self.mesh.size() != world:
            raise UserError(
                f"FSDP: the mesh has {self.mesh.size()} ranks, the world size is {world}"
                + (f"; {len(unsharded)} parameters are not sharded, such as {unsharded[0]}" if unsharded else "")
            )

    @override
    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    @override
    def empty_target(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        own = self._parameters.get(name)
        if own is None or own.shape != size:
            return super().empty_target(name, size, dtype)
        return torch.empty_like(own, dtype=dtype, requires_grad=False)
