"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and parameters (3) are cut over the ranks.

DeepSpeed trains; what it saves is not used. Its files are bound to the number of ranks and are unpickled; here its
state is taken out and put back parameter by parameter, by its own functions for that (`deepspeed.utils.safe_get_*`),
so that a checkpoint is the same as that of any other strategy.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fastav.core.errors import FastavError, UserError
from fastav.distributed.strategy import MakeOptimizer, StrategyName

# What the recipe and the ranks decide; a file that says otherwise is refused.
_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_NOT_HERE = ("optimizer", "scheduler", "bf16", "fp16", "amp", "torch_autocast")


class Zero:
    """DeepSpeed's engine around the model.

    Args:
        model: On its device.
        make_optimizer: Of the model's parameters.
        settings: DeepSpeed's, as in `launch/deepspeed/*.json`.
        where: The file they are from.
        micro_batch: Clips per forward pass and rank.
        accumulation: Micro-batches per step.
        clip_norm: Global norm to which gradients are clipped; 0 for none.
        bf16: Whether the forward pass is autocast.
        compiled: Whether DeepSpeed compiles the model.
        reduce_dtype: Of the gradients as they are sent.

    Raises:
        UserError: DeepSpeed is not there, or its settings contradict the recipe.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        *,
        settings: Mapping[str, Any],
        where: str,
        micro_batch: int,
        accumulation: int,
        clip_norm: float,
        bf16: bool,
        compiled: bool,
        reduce_dtype: str,
    ) -> None:
        stage = check_settings(settings, where)
        ours: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_norm,
            "communication_data_type": reduce_dtype,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": sys.maxsize,
        }
        if bf16:  # as everywhere: parameters stay float32, and so do the gradients that are sent
            ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        self.name: StrategyName = f"zero{stage}"  # type: ignore[assignment]
        self.model, self.optimizer, self._clip_norm = model, make_optimizer(), clip_norm
        start = _start_deepspeed(next(model.parameters()).device)
        self.engine, *_ = start(model=model, optimizer=self.optimizer, config={**settings, **ours})
        if compiled:
            self.engine.compile(compile_kwargs={"dynamic": False})
        self.network: nn.Module = self.engine
        self._zero = self.engine.optimizer
        self._parameters = dict(model.named_parameters())

    def check(self, world: int, accumulation: int) -> None:
        """See `Strategy`."""
        found = {
            "ZeRO stage": (self.engine.zero_optimization_stage(), int(self.name[-1])),
            "processes": (self.engine.dp_world_size, world),
            "gradient accumulation": (self.engine.gradient_accumulation_steps(), accumulation),
        }
        for what, (given, expected) in found.items():
            if given != expected:
                raise UserError(f"DeepSpeed's {what} is {given}, {expected} expected")
        whole = [name for name, p in self._parameters.items() if not hasattr(p, "ds_tensor")]
        if self.name == "zero3" and whole:
            raise UserError(f"DeepSpeed's ZeRO-3 has left {len(whole)} parameters whole, such as {whole[0]}")

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """See `Strategy`; the engine counts the micro-batches itself."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts, and does nothing else

    def step(self, clip_norm: float) -> float:
        """See `Strategy`."""
        assert clip_norm == self._clip_norm
        self.engine.step()
        return float("nan") if self._zero.overflow else float(self.engine.get_global_grad_norm())

    def discard_gradients(self) -> None:
        """See `Strategy`; DeepSpeed leaves out a step whose norm is infinite, and clears up after it."""
        infinite = patch.object(type(self._zero), *_NORM[self.name])
        with infinite:
            self.engine.step()
        if not self._zero.overflow:
            raise FastavError(f"DeepSpeed took a step of {self.name} that it was to leave out")

    def trainable_shards(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        return {name: getattr(p, "ds_tensor", p) for name, p in self._parameters.items() if p.requires_grad}

    def model_shards(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        return {
            name: getattr(self._parameters.get(name), "ds_tensor", tensor)
            for name, tensor in self.model.state_dict().items()
        }

    @torch.no_grad()
    def sync_from_shards(self) -> None:
        """See `Strategy`; small parameters stay gathered in ZeRO-3, and are gathered anew."""
        kept = getattr(self._zero, "persistent_parameters", [])
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def tensors_to_save(self, shards: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See `Strategy`."""
        for name, shard in shards.items():
            parameter = self._parameters.get(name)
            yield name, shard if parameter is None or self.name != "zero3" else _gathered(shard, parameter)

    def empty_target(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """See `Strategy`."""
        return torch.empty(size, dtype=dtype)

    def shard_of(self, name: str, whole: Tensor) -> Tensor:
        """See `Strategy`."""
        parameter = self._parameters.get(name)
        return whole if parameter is None or self.name != "zero3" else _piece(whole, parameter)

    def optimizer_to_save(self) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """See `Strategy`."""
        meta = {"optimizer": type(self.optimizer).__name__, "parameters": list(self.trainable_shards()), "others": {}}
        return self._optimizer_tensors(), meta

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        state: dict[str, Any] = next(iter(self.optimizer.state.values()), {})
        for name in self.trainable_shards():
            for key, value in sorted(state.items()):  # all ranks together, whatever order each has them in
                if isinstance(value, Tensor) and value.ndim:
                    yield f"{name}:{key}", safe_get_full_optimizer_state(self._parameters[name], key)
                else:
                    yield f"{name}:{key}", torch.as_tensor(value)

    @torch.no_grad()
    def restore_optimizer(self, filled: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """See `Strategy`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if meta["optimizer"] != type(self.optimizer).__name__:
            raise FastavError(f"the saved optimizer is {meta['optimizer']}, not {type(self.optimizer).__name__}")
        if not filled:
            return
        whole = sorted({full.rpartition(":")[2] for full, value in filled.items() if value.ndim})
        counts = {full.rpartition(":")[2]: value for full, value in filled.items() if not value.ndim}
        for flat in self._flat_parameters():
            self.optimizer.state[flat].update({key: torch.zeros_like(flat) for key in whole})
            # A fused optimizer wants its counts where the parameters are, any other one on the CPU.
            place = flat.device if self.optimizer.defaults.get("fused") else torch.device("cpu")
            self.optimizer.state[flat].update({key: value.to(place, copy=True) for key, value in counts.items()})
        self._link()
        for full, value in filled.items():
            name, _, key = full.rpartition(":")
            if key not in whole:
                continue
            parameter = self._parameters[name]
            if self.name == "zero3":
                safe_set_local_optimizer_state(parameter, _piece(value, parameter), key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _link(self) -> None:
        """Ties parameters to their pieces of the optimizer's state.

        DeepSpeed does so once, when the first of several parameter groups has a state and the others have none yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.name != "zero3":
            for parameters, flat in zip(self._zero.bit16_groups, self._flat_parameters(), strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _flat_parameters(self) -> list[Tensor]:
        """What the wrapped optimizer takes for its parameters: flat pieces of whole groups."""
        if self.name == "zero3":
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)


def check_settings(settings: Mapping[str, Any], where: str) -> int:
    """Returns the ZeRO stage of DeepSpeed's settings.

    Raises:
        UserError: They set what the recipe sets, or name no stage.
    """
    for key in _OURS:
        if settings.get(key, "auto") != "auto":
            raise UserError(f"{where}: {key} = {settings[key]}: the recipe sets it; remove it there")
    for key in _NOT_HERE:
        table = settings.get(key)
        if table and (not isinstance(table, Mapping) or table.get("enabled", True)):
            raise UserError(f'{where}: "{key}" is set, but the recipe has optim and train.precision; remove it')
    stage = (settings.get("zero_optimization") or {}).get("stage")
    if stage not in (1, 2, 3):
        raise UserError(f"{where}: zero_optimization.stage = {stage} given, 1, 2 or 3 expected")
    return stage


def _start_deepspeed(device: torch.device) -> Callable[..., Any]:
    """Imports DeepSpeed and joins it to the processes that are there.

    Raises:
        UserError: It is not installed.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"DeepSpeed cannot be imported ({error}); pip install fastav[deepspeed]") from None
    # Its collectives in shared memory, for CPUs, are compiled at the first use: a minute, and gloo is there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", dist_init_required=False)
    return deepspeed.initialize


def _gathered(shard: Tensor, parameter: Any) -> Tensor:
    """The whole of a ZeRO-3 parameter, or of something cut like it: equal flat pieces, the last one padded."""
    if torch.cuda.is_available():  # pieces that are kept in the host's memory are no use to NCCL
        shard = shard.to(torch.cuda.current_device())
    whole = shard.new_empty(shard.numel() * torch.distributed.get_world_size())
    torch.distributed.all_gather_into_tensor(whole, shard.detach().contiguous())
    return whole[: parameter.ds_numel].view(parameter.ds_shape)


def _piece(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's piece of a whole parameter, padded with zeros as DeepSpeed pads it."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * torch.distributed.get_world_size(), dtype=whole.dtype)
    padded[: whole.numel()] = whole.flatten()
    at = size * torch.distributed.get_rank()
    return padded[at : at + size].to(parameter.ds_tensor.device)


def _infinite(self: Any) -> float:
    return math.inf


def _infinite_group(self: Any) -> list[Tensor]:
    return [torch.tensor(math.inf)]


_NORM = {
    "zero1": ("scaled_global_norm", _infinite),
    "zero2": ("scaled_global_norm", _infinite),
    "zero3": ("_get_norm_groups", _infinite_group),
}
