"""Learning-rate schedules: pure functions of the number of the optimizer step.

`plateau` is also one of the metrics it was given. So resuming needs no replay, and accumulation or the number of
processes cannot step a schedule twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Protocol

from msgspec import Meta
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from torch.optim import Optimizer

from fastav.core.config import Kind, NonNegativeFloat, NonNegativeInt, PositiveFloat


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


class Schedule(Protocol):
    """The course of the learning rate over a run."""

    def set_step(self, step: int) -> float:
        """Sets the groups' rates for optimizer step `step` (0 is the first); returns the rate of factor 1."""

    def record_metric(self, value: float) -> None:
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

    def record_metric(self, value: float) -> None:
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

    def record_metric(self, value: float) -> None:
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
