"""Learning-rate schedules: pure functions of the optimizer step.

`plateau` also depends on the evaluation metrics recorded so far. So resuming needs no replay, and neither gradient
accumulation nor the number of processes can advance a schedule twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Protocol

from msgspec import Meta
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from torch.optim import Optimizer
from typing_extensions import override

from fastav.core.config import Kind, NonNegativeFloat, NonNegativeInt, PositiveFloat


class Cosine(Kind, frozen=True, tag="cosine"):
    """Linear warm-up, then half a cosine down to `min_lr` at the last step.

    Attributes:
        warmup: Length of the linear warm-up: a share of all optimizer steps if below 1, else a number of steps.
        min_lr: Learning rate at the last step.
    """

    warmup: NonNegativeFloat = 0.05
    min_lr: NonNegativeFloat = 0.0


class Plateau(Kind, frozen=True, tag="plateau"):
    """Linear warm-up, then a learning rate that drops when the evaluation metric stops improving.

    Attributes:
        factor: Factor of the learning rate at each drop.
        patience: The learning rate drops after more than this number of evaluations in a row without improvement.
        warmup: Length of the linear warm-up: a share of all optimizer steps if below 1, else a number of steps.
        min_lr: Lower bound of the learning rate.
    """

    factor: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    patience: NonNegativeInt = 5
    warmup: NonNegativeFloat = 0.05
    min_lr: NonNegativeFloat = 0.0


class Constant(Kind, frozen=True, tag="constant"):
    """Linear warm-up, then a constant learning rate.

    Attributes:
        warmup: Length of the linear warm-up: a share of all optimizer steps if below 1, else a number of steps.
    """

    warmup: NonNegativeFloat = 0.0


class Step(Kind, frozen=True, tag="step"):
    """Linear warm-up, then a learning rate that drops at regular intervals.

    Attributes:
        every: Interval between drops: a share of all optimizer steps if below 1, else a number of steps.
        factor: Factor of the learning rate at each drop.
        warmup: Length of the linear warm-up: a share of all optimizer steps if below 1, else a number of steps.
    """

    every: PositiveFloat = 0.3
    factor: Annotated[float, Meta(gt=0, le=1)] = 0.1
    warmup: NonNegativeFloat = 0.0


ScheduleConfig = Cosine | Plateau | Constant | Step


class Schedule(Protocol):
    """Learning rate of each optimizer step."""

    def set_step(self, step: int) -> float:
        """Sets the learning rates of all groups for optimizer step `step`, counted from 0.

        Returns:
            The learning rate of a group with `lr_scale` 1.
        """

    def record_metric(self, value: float) -> None:
        """Records the result of an evaluation; higher is better."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that resuming needs besides the step, JSON-serialisable."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`."""


def make_schedule(config: ScheduleConfig, optimizer: Optimizer, total_steps: int, lr: float) -> Schedule:
    """Makes the learning-rate schedule of an optimizer.

    Args:
        config: Kind of schedule and its settings.
        optimizer: Optimizer whose groups get the learning rate times their `lr_scale`.
        total_steps: Optimizer steps of the whole run.
        lr: Peak learning rate.
    """

    def steps(value: float) -> int:
        return round(value * total_steps) if value < 1 else round(value)

    warmup = steps(config.warmup)
    if isinstance(config, Plateau):
        return PlateauSchedule(config, optimizer, warmup, lr)
    # timm starts at warmup_lr_init. With this value the ramp is lr (n + 1) / (warmup + 1), so no step has rate 0.
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


class TimmSchedule(Schedule):
    """A schedule of timm that depends on the step only.

    Args:
        scheduler: timm scheduler, made with `t_in_epochs=False`.
        optimizer: Optimizer whose learning rates the scheduler sets.
    """

    def __init__(self, scheduler: Any, optimizer: Optimizer) -> None:
        self._scheduler, self._optimizer = scheduler, optimizer

    @override
    def set_step(self, step: int) -> float:
        self._scheduler.step_update(step)
        return _base_rate(self._optimizer)

    @override
    def record_metric(self, value: float) -> None:
        """Does nothing: the schedule does not depend on metrics."""

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: the step determines the learning rate."""
        return {}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: there is no state to restore."""


class PlateauSchedule(Schedule):
    """Drops the learning rate when the evaluation metric stops improving.

    timm's plateau scheduler is deprecated and does not save its count of bad evaluations.
    """

    def __init__(self, config: Plateau, optimizer: Optimizer, warmup: int, lr: float) -> None:
        self._config, self._optimizer, self._warmup, self._lr = config, optimizer, warmup, lr
        self._best: float | None = None
        self._bad, self._drops = 0, 0

    @override
    def set_step(self, step: int) -> float:
        ramp = min(1.0, (step + 1) / (self._warmup + 1))
        rate = max(self._lr * ramp * self._config.factor**self._drops, min(self._config.min_lr, self._lr))
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate

    @override
    def record_metric(self, value: float) -> None:
        """Counts an evaluation. A value that is not finite or not above the best one so far counts as bad."""
        if math.isfinite(value) and (self._best is None or value > self._best):
            self._best, self._bad = value, 0
            return
        self._bad += 1
        if self._bad > self._config.patience:
            self._drops, self._bad = self._drops + 1, 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the best metric, the bad evaluations since then, and the number of drops."""
        return {"best": self._best, "bad": self._bad, "drops": self._drops}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._bad, self._drops = state["best"], state["bad"], state["drops"]


def _base_rate(optimizer: Optimizer) -> float:
    """Returns the learning rate of `lr_scale` 1, derived from the first group with a scale above 0."""
    scaled = ((group["lr"], group.get("lr_scale", 1.0)) for group in optimizer.param_groups)
    return next((lr / scale for lr, scale in scaled if scale > 0), 0.0)
