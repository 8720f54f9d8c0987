"""Optimizer, learning-rate schedule and averaged weights.

Parameter groups follow timm's (after BEiT): biases, norms and other 1-D parameters, position embeddings and class,
register and bottleneck tokens are not decayed; a network's blocks can have a learning rate that falls by
`layer_decay` per block from the head down; each tower has its own factor; what is frozen is left out. A group's
learning rate is the schedule's times its `lr_scale`.

Schedules are pure functions of the number of the optimizer step (`plateau` also of the metrics it was told), so
resuming needs no replay, and accumulation or the number of processes cannot step them twice.

State is exchanged as named tensors and JSON, never pickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Protocol

import torch
from msgspec import Meta
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from fastav.core.config import Config, Kind, NonNegativeFloat, NonNegativeInt, PositiveFloat
from fastav.core.errors import FastavError, UserError

# The last part of the names of parameters that are tables of positions or single tokens, whatever their shape.
_TOKEN_OR_POSITION = re.compile(r".*(pos_embed|pos_emb|position|positions|tokens?|bottleneck|bias_table)")
_BELOW_ONE = Annotated[float, Meta(ge=0, lt=1)]
NUM_UPDATES = "num_updates"


class Cosine(Kind, frozen=True, tag="cosine"):
    """Linear warm-up, then half a cosine down to `min_lr` at the last step.

    Attributes:
        warmup: Share of all steps if below 1, else a number of steps.
        min_lr: Learning rate at the end.
    """

    warmup: NonNegativeFloat = 0.05
    min_lr: NonNegativeFloat = 0.0


class Plateau(Kind, frozen=True, tag="plateau"):
    """The learning rate times `factor` whenever the evaluation metric has not risen for some time.

    Attributes:
        factor: What the rate is multiplied by.
        patience: Evaluations without a new best that are put up with.
        warmup: Share of all steps if below 1, else a number of steps.
        min_lr: The rate never falls below this.
    """

    factor: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    patience: NonNegativeInt = 5
    warmup: NonNegativeFloat = 0.05
    min_lr: NonNegativeFloat = 0.0


class Constant(Kind, frozen=True, tag="constant"):
    """Linear warm-up, then always the same.

    Attributes:
        warmup: Share of all steps if below 1, else a number of steps.
    """

    warmup: NonNegativeFloat = 0.0


class Step(Kind, frozen=True, tag="step"):
    """Linear warm-up, then the learning rate times `factor` at regular distances.

    Attributes:
        every: Distance: a share of all steps if below 1, else a number of steps.
        factor: What the rate is multiplied by.
        warmup: Share of all steps if below 1, else a number of steps.
    """

    every: PositiveFloat = 0.3
    factor: Annotated[float, Meta(gt=0, le=1)] = 0.1
    warmup: NonNegativeFloat = 0.0


ScheduleConfig = Cosine | Plateau | Constant | Step


class Optim(Config, frozen=True):
    """Optimizer and schedule.

    Attributes:
        name: `adamw`, `sgd`, `adam`, `rmsprop` or `adagrad` of torch, made by timm's factory. AdamW's weight decay is
            decoupled, that of the others is added to the gradient.
        lr: Peak learning rate for the nominal global batch; nothing scales it.
        weight_decay: For the parameters that are decayed at all (see `fastav.optim.optimizer`).
        betas: Of adamw and adam.
        momentum: Of sgd and rmsprop.
        nesterov: Nesterov's momentum in sgd.
        eps: Of all but sgd; absent: the optimizer's own default.
        layer_decay: Factor of the learning rate from each block of a tower to the one below; 1 is off.
        clip_norm: Global norm to which gradients are clipped; 0 is off.
        ema: Decay of the averaged weights that are evaluated and saved; 0 is off.
        schedule: Course of the learning rate.
    """

    name: Literal["adamw", "sgd", "adam", "rmsprop", "adagrad"] = "adamw"
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[_BELOW_ONE, _BELOW_ONE] = (0.9, 0.999)
    momentum: _BELOW_ONE = 0.9
    nesterov: bool = True
    eps: PositiveFloat | None = None
    layer_decay: Annotated[float, Meta(gt=0, le=1)] = 1.0
    clip_norm: NonNegativeFloat = 0.0
    ema: _BELOW_ONE = 0.0
    schedule: ScheduleConfig = Cosine()

    def build(
        self, model: nn.Module, total_steps: int, lr_scales: Mapping[str, float] | None = None
    ) -> tuple[Optimizer, Schedule]:
        """Makes the optimizer of a model's trainable parameters and its schedule.

        Args:
            model: Any module; parameters of networks with timm's `group_matcher()` get layer-wise rates.
            total_steps: Optimizer steps of the whole run, at least 1.
            lr_scales: Name of a submodule, such as `video` -> factor of its learning rate.

        Raises:
            UserError: Everything is frozen, but there are steps to train.
        """
        groups = parameter_groups(model, self.weight_decay, self.layer_decay, lr_scales or {})
        if not groups and total_steps > 1:
            raise UserError("nothing to train: every parameter is frozen (model.video.freeze, model.audio.freeze)")
        extra: dict[str, Any] = {}
        if self.name == "sgd":
            extra["nesterov"] = self.nesterov and self.momentum > 0
        if self.name in ("adamw", "adam"):
            extra["betas"] = self.betas
        if self.name in ("adamw", "adam", "sgd"):
            extra["fused"] = True  # one kernel for a whole step, on a GPU as on a CPU
        if self.eps is not None and self.name != "sgd":
            extra["eps"] = self.eps
        optimizer = create_optimizer_v2(
            groups or [{"params": [], "name": "none", "param_names": []}],
            opt=self.name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            **extra,
        )
        return optimizer, make_schedule(self.schedule, optimizer, total_steps, self.lr)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, lr_scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Sorts a model's trainable parameters into groups of equal decay and learning-rate factor.

    Returns:
        Groups with `name`, `params`, `param_names`, `weight_decay` and `lr_scale`, in the model's order.
    """
    layers, undecayed = _layers(model), _undecayed(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next((p for p in lr_scales if f".{p}." in f".{name}"), "")
        network, layer, last = layers.get(name, ("", 0, 0))
        scale = lr_scales.get(part, 1.0) * layer_decay ** (last - layer)
        token = name in undecayed or _TOKEN_OR_POSITION.fullmatch(name.rpartition(".")[2])
        decayed = parameter.ndim > 1 and not token
        words = [network or part or name.partition(".")[0]]
        if layer_decay != 1 and last:
            words.append(f"layer{layer:02d}")
        words.append("decay" if decayed else "no_decay")
        group = groups.setdefault(
            ".".join(words),
            {
                "name": ".".join(words),
                "params": [],
                "param_names": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": scale,
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def _undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that the model or a network in it says are not to be decayed (timm's convention)."""
    return {
        (f"{path}." if path else "") + name
        for path, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }


def _layers(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Parameter name -> (its network, its layer, the layer of the head), for all networks that know their layers.

    As in timm, layer 0 is the embedding and a final norm belongs to the last block.
    """
    found: dict[str, tuple[str, int, int]] = {}
    head = "\0"  # a name no matcher knows: timm puts it behind the last block, where heads are
    for path, module in model.named_modules():
        if hasattr(module, "group_matcher"):
            parameters = [*module.named_parameters(), (head, None)]
            layer = group_with_matcher(iter(parameters), module.group_matcher(), reverse=True)
            prefix = f"{path}." if path else ""
            found |= {prefix + name: (path, at, layer[head]) for name, at in layer.items() if name != head}
    return found


class Schedule(Protocol):
    """The course of the learning rate over a run."""

    def set_step(self, step: int) -> float:
        """Sets the groups' rates for optimizer step `step` (0 is the first); returns the rate of factor 1."""

    def note_metric(self, value: float) -> None:
        """Takes the result of an evaluation, higher is better."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the step, JSON-able."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""


def make_schedule(config: ScheduleConfig, optimizer: Optimizer, total_steps: int, lr: float) -> Schedule:
    """Makes the schedule of an optimizer; see `Schedule`."""

    def steps(value: float) -> int:
        return round(value * total_steps) if value < 1 else round(value)

    warmup = steps(config.warmup)
    if isinstance(config, Plateau):
        return PlateauSchedule(config, optimizer, warmup, lr)
    # timm starts from warmup_lr_init itself; with this value the ramp is lr (n + 1) / (warmup + 1): no step at 0.
    shared = {
        "warmup_t": warmup,
        "warmup_lr_init": lr / (warmup + 1),
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if isinstance(config, Cosine):
        length = max(total_steps - warmup, 1)
        return TimmSchedule(CosineLRScheduler(optimizer, t_initial=length, lr_min=config.min_lr, **shared), optimizer)
    every, factor = (max(steps(config.every), 1), config.factor) if isinstance(config, Step) else (1, 1.0)
    return TimmSchedule(StepLRScheduler(optimizer, decay_t=every, decay_rate=factor, **shared), optimizer)


class TimmSchedule:
    """A schedule of timm's that depends on the number of the step alone.

    Args:
        scheduler: timm's, made with `t_in_epochs=False`.
        optimizer: Whose groups it sets.
    """

    def __init__(self, scheduler: Any, optimizer: Optimizer) -> None:
        self._scheduler, self._optimizer = scheduler, optimizer

    def set_step(self, step: int) -> float:
        """See `Schedule`."""
        self._scheduler.step_update(step)
        return _rate(self._optimizer)

    def note_metric(self, value: float) -> None:
        """Nothing: the course is fixed."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the step says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class PlateauSchedule:
    """Falls when the metric stands still.

    timm's own is deprecated and forgets its count of bad evaluations when it is saved.
    """

    def __init__(self, config: Plateau, optimizer: Optimizer, warmup: int, lr: float) -> None:
        self._config, self._optimizer, self._warmup, self._lr = config, optimizer, warmup, lr
        self._best: float | None = None
        self._bad, self._drops = 0, 0

    def set_step(self, step: int) -> float:
        """See `Schedule`."""
        ramp = min(1.0, (step + 1) / (self._warmup + 1))
        rate = max(self._lr * ramp * self._config.factor**self._drops, min(self._config.min_lr, self._lr))
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate

    def note_metric(self, value: float) -> None:
        """Counts an evaluation; one that is not above the best so far is bad, as is one that is not finite."""
        if math.isfinite(value) and (self._best is None or value > self._best):
            self._best, self._bad = value, 0
            return
        self._bad += 1
        if self._bad > self._config.patience:
            self._drops, self._bad = self._drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Best metric, bad evaluations since, and falls so far."""
        return {"best": self._best, "bad": self._bad, "drops": self._drops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Schedule`."""
        self._best, self._bad, self._drops = state["best"], state["bad"], state["drops"]


def _rate(optimizer: Optimizer) -> float:
    """The learning rate of factor 1, from the first group that has any."""
    scaled = ((group["lr"], group.get("lr_scale", 1.0)) for group in optimizer.param_groups)
    return next((lr / scale for lr, scale in scaled if scale > 0), 0.0)


class Ema:
    """Exponentially averaged weights, float32: average <- d average + (1 - d) weight after each step.

    d = min(decay, (1 + n) / (10 + n)) at the n-th step, so that short runs are not held at their initial weights.
    Buffers (BatchNorm's statistics) are copied. Works on shards (DTensors): everything is elementwise.

    Args:
        model: Its trainable parameters are averaged; they must stay the same objects.
        decay: Upper bound of d.
        shards: What this process keeps of these parameters, by name; None: the parameters themselves.
        refresh: Makes the model see what was written into the shards.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        shards: Mapping[str, Tensor] | None = None,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self.decay, self.num_updates, self._refresh = decay, 0, refresh
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = trainable if shards is None else dict(shards)
        saved = model.state_dict().keys()
        self._buffers = {name: b for name, b in model.named_buffers() if name in saved}
        self._average = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self._copied = {name: b.detach().clone() for name, b in self._buffers.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after an optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [p.detach().float() for p in self._parameters.values()]
        if weights:
            torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)
        self._copy(self._copied, self._buffers)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within the block the model holds the averages; afterwards, also on an error, its own weights, bit for bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        own_buffers = {name: b.detach().clone() for name, b in self._buffers.items()}
        try:
            self._copy(self._parameters, self._average)
            self._copy(self._buffers, self._copied)
            self._refresh()
            yield
        finally:
            self._copy(self._parameters, own)
            self._copy(self._buffers, own_buffers)
            self._refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """Averages and copied buffers by their names in the model, and `num_updates`; not copies."""
        return {**self._average, **self._copied, NUM_UPDATES: torch.tensor(self.num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`.

        Raises:
            FastavError: The state is of other parameters.
        """
        own = {**self._average, **self._copied}
        _same_names(own.keys(), state.keys() - {NUM_UPDATES}, "averaged weights")
        self._copy(own, state)
        self.num_updates = int(state[NUM_UPDATES])

    @staticmethod
    @torch.no_grad()
    def _copy(to: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
        for name, tensor in to.items():
            tensor.copy_(source[name])


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and JSON.

    Args:
        optimizer: Made by `Optim.build`, whose groups know their parameters' names.

    Returns:
        `parameter:key` -> tensor (not copies), and the rest: the optimizer's class, the parameters that have a
        state, and what of it is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for name, parameter in _named(optimizer).items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                tensors[f"{name}:{key}"] = value.detach()
            else:
                others.setdefault(name, {})[key] = value
    meta = {"optimizer": type(optimizer).__name__, "parameters": list(_named(optimizer)), "others": others}
    return tensors, meta


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_tensors` gave; learning rate, decay and the like stay those of the groups.

    Raises:
        FastavError: The state is another optimizer's, or of other parameters.
    """
    if meta["optimizer"] != type(optimizer).__name__:
        raise FastavError(f"the saved optimizer is {meta['optimizer']}, not {type(optimizer).__name__}")
    named = _named(optimizer)
    _same_names(named.keys(), meta["parameters"], "optimizer")
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in meta["others"].items()}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(":")
        state.setdefault(name, {})[key] = tensor.clone()
    # torch's own loading knows which tensors go to the parameter's device and which, as step counts, do not.
    content = optimizer.state_dict()
    number = {
        name: n
        for saved, group in zip(content["param_groups"], optimizer.param_groups, strict=True)
        for name, n in zip(group["param_names"], saved["params"], strict=True)
    }
    content["state"] = {number[name]: values for name, values in state.items()}
    optimizer.load_state_dict(content)


def _named(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _same_names(own: Any, given: Any, what: str) -> None:
    missing, strange = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or strange:
        first = f'"{missing[0]}" is missing' if missing else f'"{strange[0]}" is unknown to the model'
        raise FastavError(f"the saved state of the {what} is of another model: {first}")
