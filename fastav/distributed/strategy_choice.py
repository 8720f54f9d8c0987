"""Chooses the strategy (DDP, FSDP2, ZeRO) that the launcher requests, and wraps the model for it.

`accelerate launch --config_file launch/accelerate/*.yaml` requests a strategy by environment variables; the recipe can
require one by `train.strategy`. accelerate's own wrappers for FSDP and DeepSpeed are not used: on some machines they
silently train without sharding, and they set precision, accumulation and schedule independently of the recipe. Instead
PyTorch's `fully_shard` and DeepSpeed's `initialize` are called here, and the result is checked.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastav.core.errors import UserError
from fastav.distributed.ddp import DDP, Single
from fastav.distributed.strategy import MakeOptimizer as MakeOptimizer
from fastav.distributed.strategy import Strategy as Strategy
from fastav.distributed.strategy import StrategyName as StrategyName

_DEEPSPEED_KEYS = {
    "deepspeed_config_file": "CONFIG_FILE",
    "zero_stage": "ZERO_STAGE",
    "offload_optimizer_device": "OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "OFFLOAD_PARAM_DEVICE",
}
# Variables that make accelerate wrap models by itself.
_SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True, slots=True)
class Requested:
    """The strategy that the launcher requests.

    Attributes:
        name: Name of the strategy.
        settings: DeepSpeed settings for ZeRO, `{"reshard": bool}` for FSDP, else empty.
        where: File or variables that request it, for error messages.
    """

    name: StrategyName
    settings: Mapping[str, Any] = field(default_factory=dict)
    where: str = "the launcher"


@dataclass(frozen=True, slots=True)
class WrapOptions:
    """Settings of the recipe that strategies need.

    Attributes:
        micro_batch: Clips per forward pass and rank.
        accumulation: Micro-batches per optimizer step.
        clip_norm: Global norm to which gradients are clipped; 0 disables clipping.
        bf16: Whether to autocast the forward pass to bfloat16.
        compiled: Whether to compile the model.
        bucket_mb: Size of DDP's gradient buckets, MB.
        reduce_dtype: dtype of the gradient reduction, `fp32` or `bf16`.
    """

    micro_batch: int
    accumulation: int = 1
    clip_norm: float = 0.0
    bf16: bool = False
    compiled: bool = False
    bucket_mb: float = 25.0
    reduce_dtype: str = "fp32"


def requested(world: int, environment: Mapping[str, str] = os.environ) -> Requested:
    """Reads which strategy the launcher requests.

    Args:
        world: World size.
        environment: Environment variables that `accelerate launch` sets. For ranks that srun or torchrun starts,
            FASTAV_ACCELERATE_CONFIG names the accelerate config instead.

    Returns:
        The requested strategy: without any variables `ddp`, or `single` for one process.

    Raises:
        UserError: The requested settings are not supported.

    Example:
        >>> requested(2, {}).name
        'ddp'
    """
    if file := environment.get("FASTAV_ACCELERATE_CONFIG"):
        environment = _as_variables(file)
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        settings, where = _deepspeed(environment)
        from fastav.distributed.zero import check_settings

        stage = check_settings(settings, where)
        return Requested(f"zero{stage}", settings, where)  # type: ignore[arg-type]
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        return Requested("fsdp", _fsdp(environment), "the accelerate config's fsdp_config")
    return Requested("ddp" if world > 1 else "single")


def _as_variables(file: str) -> dict[str, str]:
    """Translates an accelerate config to the variables that `accelerate launch` would set."""
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"FASTAV_ACCELERATE_CONFIG={file}: cannot read it: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"FASTAV_ACCELERATE_CONFIG={file}: not valid YAML: {' '.join(str(error).split())}") from None
    kind = config.get("distributed_type") if isinstance(config, dict) else None
    if kind == "FSDP":
        options = config.get("fsdp_config") or {}
        return {"ACCELERATE_USE_FSDP": "true"} | {key.upper(): str(value) for key, value in options.items()}
    if kind == "DEEPSPEED":
        options = config.get("deepspeed_config") or {}
        return {"ACCELERATE_USE_DEEPSPEED": "true"} | {
            f"ACCELERATE_DEEPSPEED_{_DEEPSPEED_KEYS[key]}": str(value)
            for key, value in options.items()
            if key in _DEEPSPEED_KEYS
        }
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UserError(
            f'FASTAV_ACCELERATE_CONFIG={file}: distributed_type = "{kind}": expected NO, MULTI_GPU, MULTI_CPU, FSDP or '
            "DEEPSPEED"
        )
    return {}


def _deepspeed(environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Returns the DeepSpeed settings that the environment requests, and where they are from."""
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() == "none":
        where = "the accelerate config's deepspeed_config"
        zero: dict[str, Any] = {"stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
        for what in ("optimizer", "param"):
            device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none").lower()
            if device != "none":
                zero[f"offload_{what}"] = {"device": device}
        return {"zero_optimization": zero}, where
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot read DeepSpeed's settings: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file}: expected a JSON object with DeepSpeed's settings")
    return settings, file


def _fsdp(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the FSDP settings that the environment requests."""

    def value(key: str, default: str) -> str:
        return environment.get(key, default).lower()

    where = "the accelerate config's fsdp_config"
    if value("FSDP_VERSION", "1") != "2":
        raise UserError(f"{where}: fsdp_version = {value('FSDP_VERSION', '1')}: expected 2")
    if value("FSDP_OFFLOAD_PARAMS", "false") == "true":
        raise UserError(
            f"{where}: fsdp_offload_params is not supported; use launch/deepspeed/zero3_offload.json for offloading"
        )
    if value("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true":
        raise UserError(
            f"{where}: fsdp_activation_checkpointing is not supported; set train.activation_checkpointing instead"
        )
    return {"reshard": value("FSDP_RESHARD_AFTER_FORWARD", "true") in ("true", "full_shard", "1")}


@contextlib.contextmanager
def without_wrappers() -> Iterator[None]:
    """Context manager in which a new `Accelerator` joins the process group but does not wrap models."""
    kept = {key: os.environ.pop(key) for key in _SWITCHES if key in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def wrap_model(wanted: Requested, model: nn.Module, make_optimizer: MakeOptimizer, options: WrapOptions) -> Strategy:
    """Wraps a model for the requested strategy, and makes its optimizer.

    Args:
        wanted: The strategy, from `requested`.
        model: The whole model, on its device and the same on every rank.
        make_optimizer: Makes the optimizer. Called after sharding, which replaces the model's parameters.
        options: Settings of the recipe.

    Raises:
        UserError: The strategy is not installed, or its settings contradict the recipe.

    Example:
        strategy = wrap_model(requested(world), model, make_optimizer, WrapOptions(micro_batch=32))
        with strategy.micro_batch(last=True):
            strategy.backward(strategy.network(x).mean())
        grad_norm = strategy.step(clip_norm=1.0)
    """
    if wanted.name == "single":
        return Single(model, make_optimizer, compiled=options.compiled)
    if wanted.name == "ddp":
        return DDP(
            model, make_optimizer, compiled=options.compiled, accumulation=options.accumulation,
            bucket_mb=options.bucket_mb, reduce_dtype=options.reduce_dtype,
        )  # fmt: skip
    if wanted.name == "fsdp":
        from fastav.distributed.fsdp import FSDP

        blocks = [block for module in model.modules() for block in _blocks(module)]
        return FSDP(
            model, make_optimizer, blocks=blocks, compiled=options.compiled, reduce_dtype=options.reduce_dtype,
            **wanted.settings,
        )  # fmt: skip
    from fastav.distributed.zero import Zero

    return Zero(
        model, make_optimizer, settings=wanted.settings, where=wanted.where, micro_batch=options.micro_batch,
        accumulation=options.accumulation, clip_norm=options.clip_norm, bf16=options.bf16, compiled=options.compiled,
        reduce_dtype=options.reduce_dtype,
    )  # fmt: skip


def checkpoint_activations(model: nn.Module) -> None:
    """Enables activation checkpointing: transformer blocks keep only their input and recompute the rest backwards."""
    for module in model.modules():
        for block in _blocks(module):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the transformer blocks in `module.blocks`, timm's name for them."""
    blocks = getattr(module, "blocks", None)
    if isinstance(module, nn.Module) and isinstance(blocks, nn.Sequential | nn.ModuleList):
        yield from blocks
