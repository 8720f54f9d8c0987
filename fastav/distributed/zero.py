"""DeepSpeed ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) are sharded over the ranks.

DeepSpeed trains the model, but its checkpoints are not used: they are tied to the number of ranks and are pickled.
Instead its state is read and written parameter by parameter with DeepSpeed's own functions
(`deepspeed.utils.safe_get_*`), so that checkpoints are the same as those of all other strategies.
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
from typing_extensions import override

from fastav.core.errors import FastavError, UserError
from fastav.distributed.strategy import MakeOptimizer, Strategy, StrategyName

# Settings that the recipe and the ranks determine. A DeepSpeed file that sets them is an error.
_RECIPE_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip
_FORBIDDEN_TABLES = ("optimizer", "scheduler", "bf16", "fp16", "amp", "torch_autocast")


class Zero(Strategy):
    """A DeepSpeed engine around the model.

    Args:
        model: The model, on its device.
        make_optimizer: Makes the optimizer of the model's parameters.
        settings: DeepSpeed settings, as in `launch/deepspeed/*.json`.
        where: File of the settings, for error messages.
        micro_batch: Clips per forward pass and rank.
        accumulation: Micro-batches per optimizer step.
        clip_norm: Global norm to which gradients are clipped; 0 disables clipping.
        bf16: Whether to autocast the forward pass to bfloat16.
        compiled: Whether DeepSpeed compiles the model.
        reduce_dtype: dtype of the gradient reduction, `fp32` or `bf16`.

    Raises:
        UserError: DeepSpeed is not installed, or its settings contradict the recipe.
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
        from_recipe: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_norm,
            "communication_data_type": reduce_dtype,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": sys.maxsize,
        }
        if bf16:  # as under every strategy, parameters and reduced gradients stay float32
            from_recipe["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        self.name: StrategyName = f"zero{stage}"  # type: ignore[assignment]
        self.model, self.optimizer, self._clip_norm = model, make_optimizer(), clip_norm
        initialize = _import_deepspeed(next(model.parameters()).device)
        self.engine, *_ = initialize(model=model, optimizer=self.optimizer, config={**settings, **from_recipe})
        if compiled:
            self.engine.compile(compile_kwargs={"dynamic": False})
        self.network: nn.Module = self.engine
        self._zero = self.engine.optimizer
        self._parameters = dict(model.named_parameters())

    @override
    def check(self, world: int, accumulation: int) -> None:
        settings = {
            "ZeRO stage": (self.engine.zero_optimization_stage(), int(self.name[-1])),
            "world size": (self.engine.dp_world_size, world),
            "gradient accumulation": (self.engine.gradient_accumulation_steps(), accumulation),
        }
        for what, (got, expected) in settings.items():
            if got != expected:
                raise UserError(f"DeepSpeed: {what} is {got}, expected {expected}")
        unsharded = [name for name, p in self._parameters.items() if not hasattr(p, "ds_tensor")]
        if self.name == "zero3" and unsharded:
            raise UserError(f"DeepSpeed ZeRO-3: {len(unsharded)} parameters are not sharded, such as {unsharded[0]}")

    @override
    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()  # the engine counts the micro-batches itself

    @override
    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch; the optimizer steps in `step`

    @override
    def step(self, clip_norm: float) -> float:
        assert clip_norm == self._clip_norm
        self.engine.step()
        return float("nan") if self._zero.overflow else float(self.engine.get_global_grad_norm())

    @override
    def discard_gradients(self) -> None:
        # DeepSpeed skips a step with an infinite gradient norm and then frees the gradients. Make the norm infinite.
        infinite_norm = patch.object(type(self._zero), *_INFINITE_NORM[self.name])
        with infinite_norm:
            self.engine.step()
        if not self._zero.overflow:
            raise FastavError(
                f"internal error: DeepSpeed ({self.name}) applied an optimizer step that should have been skipped; "
                "please report it"
            )

    @override
    def trainable_shards(self) -> dict[str, Tensor]:
        return {name: getattr(p, "ds_tensor", p) for name, p in self._parameters.items() if p.requires_grad}

    @override
    def model_shards(self) -> dict[str, Tensor]:
        return {
            name: getattr(self._parameters.get(name), "ds_tensor", tensor)
            for name, tensor in self.model.state_dict().items()
        }

    @override
    @torch.no_grad()
    def sync_from_shards(self) -> None:
        # ZeRO-3 keeps small parameters gathered: partition them again and gather the new values.
        persistent = getattr(self._zero, "persistent_parameters", [])
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    @override
    def tensors_to_save(self, shards: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, shard in shards.items():
            parameter = self._parameters.get(name)
            yield name, shard if parameter is None or self.name != "zero3" else _gather(shard, parameter)

    @override
    def empty_target(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)

    @override
    def shard_of(self, name: str, whole: Tensor) -> Tensor:
        parameter = self._parameters.get(name)
        return whole if parameter is None or self.name != "zero3" else _shard(whole, parameter)

    @override
    def optimizer_to_save(self) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        meta = {"optimizer": type(self.optimizer).__name__, "parameters": list(self.trainable_shards()), "others": {}}
        return self._optimizer_tensors(), meta

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_optimizer_state()
        state: dict[str, Any] = next(iter(self.optimizer.state.values()), {})
        for name in self.trainable_shards():
            for key, value in sorted(state.items()):  # sorted, because the reads are collective
                if isinstance(value, Tensor) and value.ndim:
                    yield f"{name}:{key}", safe_get_full_optimizer_state(self._parameters[name], key)
                else:
                    yield f"{name}:{key}", torch.as_tensor(value)

    @override
    @torch.no_grad()
    def restore_optimizer(self, filled: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if meta["optimizer"] != type(self.optimizer).__name__:
            raise FastavError(f"the saved optimizer is {meta['optimizer']}, expected {type(self.optimizer).__name__}")
        if not filled:
            return
        whole = sorted({full.rpartition(":")[2] for full, value in filled.items() if value.ndim})
        counts = {full.rpartition(":")[2]: value for full, value in filled.items() if not value.ndim}
        for flat in self._flat_parameters():
            self.optimizer.state[flat].update({key: torch.zeros_like(flat) for key in whole})
            # A fused optimizer needs its step counts on the device of the parameters, any other one on the CPU.
            device = flat.device if self.optimizer.defaults.get("fused") else torch.device("cpu")
            self.optimizer.state[flat].update({key: value.to(device, copy=True) for key, value in counts.items()})
        self._link_optimizer_state()
        for full, value in filled.items():
            name, _, key = full.rpartition(":")
            if key not in whole:
                continue
            parameter = self._parameters[name]
            if self.name == "zero3":
                safe_set_local_optimizer_state(parameter, _shard(value, parameter), key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _link_optimizer_state(self) -> None:
        """Links parameters to their slices of the optimizer state (stages 1 and 2).

        DeepSpeed links only once, when the first parameter group has state and the other groups do not have it yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.name != "zero3":
            for parameters, flat in zip(self._zero.bit16_groups, self._flat_parameters(), strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _flat_parameters(self) -> list[Tensor]:
        """Returns the parameters of the wrapped optimizer: one flat shard per parameter group."""
        if self.name == "zero3":
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)


def check_settings(settings: Mapping[str, Any], where: str) -> int:
    """Checks DeepSpeed settings and returns their ZeRO stage.

    Args:
        settings: DeepSpeed settings.
        where: File of the settings, for error messages.

    Raises:
        UserError: They set a value that the recipe determines, or no valid stage.
    """
    for key in _RECIPE_KEYS:
        if settings.get(key, "auto") != "auto":
            raise UserError(f"{where}: {key} = {settings[key]}: the recipe sets this; remove it from the file")
    for key in _FORBIDDEN_TABLES:
        table = settings.get(key)
        if table and (not isinstance(table, Mapping) or table.get("enabled", True)):
            raise UserError(
                f'{where}: "{key}" is set, but the recipe sets it by optim and train.precision; remove it from the file'
            )
    stage = (settings.get("zero_optimization") or {}).get("stage")
    if stage not in (1, 2, 3):
        raise UserError(f"{where}: zero_optimization.stage = {stage}: expected 1, 2 or 3")
    return stage


def _import_deepspeed(device: torch.device) -> Callable[..., Any]:
    """Imports DeepSpeed, joins it to the existing process group, and returns `deepspeed.initialize`.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"DeepSpeed cannot be imported ({error}); run pip install fastav[deepspeed]") from None
    # DeepSpeed would compile its shared-memory collectives for CPUs at the first use, which takes a minute. Use gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", dist_init_required=False)
    return deepspeed.initialize


def _gather(shard: Tensor, parameter: Any) -> Tensor:
    """All-gathers a ZeRO-3 parameter, or a tensor sharded like it: equal flat shards, the last one padded."""
    if torch.cuda.is_available():  # NCCL cannot send shards that are offloaded to host memory
        shard = shard.to(torch.cuda.current_device())
    whole = shard.new_empty(shard.numel() * torch.distributed.get_world_size())
    torch.distributed.all_gather_into_tensor(whole, shard.detach().contiguous())
    return whole[: parameter.ds_numel].view(parameter.ds_shape)


def _shard(whole: Tensor, parameter: Any) -> Tensor:
    """Returns this rank's flat shard of a whole tensor, padded with zeros as in DeepSpeed."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * torch.distributed.get_world_size(), dtype=whole.dtype)
    padded[: whole.numel()] = whole.flatten()
    start = size * torch.distributed.get_rank()
    return padded[start : start + size].to(parameter.ds_tensor.device)


def _infinite(self: Any) -> float:
    return math.inf


def _infinite_group(self: Any) -> list[Tensor]:
    return [torch.tensor(math.inf)]


# (method of DeepSpeed's optimizer that computes the gradient norm, replacement that returns an infinite norm)
_INFINITE_NORM = {
    "zero1": ("scaled_global_norm", _infinite),
    "zero2": ("scaled_global_norm", _infinite),
    "zero3": ("_get_norm_groups", _infinite_group),
}
