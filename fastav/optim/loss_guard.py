"""LossGuard: checks loss, gradient norm and speed of the ranks, and decides what to do about a fault."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastav.core.config import Config, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from fastav.core.errors import FastavError, listed

LossFault = Literal["", "non-finite", "spike"]
MAX_CLIPS_NAMED = 8


class GuardConfig(Config, frozen=True):
    """Which faults of steps, ranks and devices are detected, and what happens then.

    Every fault is logged and recorded in `incidents.jsonl`, those of steps with the clips of the step.

    Attributes:
        on_non_finite: What happens when the loss or gradient norm is not finite: `skip` omits the optimizer step,
            `stop` ends the run.
        limit: Number of skipped optimizer steps in a row after which the run ends.
        spike: A loss above this multiple of the median of the last `window` losses is a spike; 0 disables the check.
        window: Number of recent losses in the median for `spike`. No spike is detected before that many steps.
        on_spike: What happens at a spike: `log` continues, `skip` omits the optimizer step, `stop` ends the run.
        slow_rank: A rank is slow if its loading and forward passes take more than this multiple of the time of the
            median rank, over at least 20 steps; 0 disables the check. Slow ranks are logged only.
        preflight: Whether to measure devices and network before the first step: `auto` in jobs on more than one node,
            `always`, or `never`.
        slow_device: In the preflight, a rank is slow below this share of the median rate; 0 disables the check.
        on_slow_device: What happens to a run with a slow rank in the preflight: `log` continues, `stop` ends the run.
            On CPUs slow ranks are only logged, because other programs share the cores. A device that gives wrong
            results or does not answer always ends the run.
        preflight_patience_s: Timeout of each measurement of the preflight, seconds.
    """

    on_non_finite: Literal["skip", "stop"] = "skip"
    limit: PositiveInt = 20
    spike: NonNegativeFloat = 0.0
    window: PositiveInt = 50
    on_spike: Literal["log", "skip", "stop"] = "log"
    slow_rank: NonNegativeFloat = 1.5
    preflight: Literal["auto", "always", "never"] = "auto"
    slow_device: Fraction = 0.8
    on_slow_device: Literal["log", "stop"] = "log"
    preflight_patience_s: PositiveFloat = 60.0


class LossGuard:
    """Decides for each step whether the optimizer may step. Every rank must pass the same all-reduced numbers.

    Args:
        config: Thresholds and actions.

    Attributes:
        skipped: Number of skipped optimizer steps so far.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config, self.skipped, self._in_a_row = config, 0, 0
        self._losses: deque[float] = deque(maxlen=config.window)

    def classify(self, loss: float) -> LossFault:
        """Returns the fault of a loss, before the optimizer step: `non-finite`, `spike`, or an empty string."""
        if not math.isfinite(loss):
            return "non-finite"
        full = self.config.spike and len(self._losses) == self.config.window
        return "spike" if full and loss > self.config.spike * statistics.median(self._losses) else ""

    def allows_step(self, kind: LossFault) -> bool:
        """Returns whether the optimizer may step in spite of this fault."""
        return not kind or (kind == "spike" and self.config.on_spike == "log")

    def record(self, kind: LossFault, loss: float, grad_norm: float) -> tuple[LossFault, bool]:
        """Counts a step after the optimizer has stepped or not.

        Args:
            kind: Fault from `classify`.
            loss: Loss of the step.
            grad_norm: Gradient norm. If it is not finite, the strategy has skipped the optimizer step.

        Returns:
            The final fault, and whether the optimizer stepped.
        """
        if self.allows_step(kind) and not math.isfinite(grad_norm):
            kind = "non-finite"
        taken = self.allows_step(kind)
        self._in_a_row = 0 if taken else self._in_a_row + 1
        self.skipped += not taken
        if taken:
            self._losses.append(loss)
        return kind, taken

    def check(self, kind: LossFault, step: int, loss: float, grad_norm: float, clips: Sequence[str]) -> None:
        """Raises an error if the fault ends the run. Call it after `record`.

        Raises:
            FastavError: The configuration ends the run at this fault; the message names the step and its clips.
        """
        clips_text = f"clips of this step: {listed(clips, MAX_CLIPS_NAMED) or 'none'}"
        if kind == "non-finite" and (self.config.on_non_finite == "stop" or self._in_a_row >= self.config.limit):
            raise FastavError(
                f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}: not finite for {self._in_a_row} steps "
                f"in a row; try a lower optim.lr, a longer warm-up or optim.clip_norm; {clips_text}"
            )
        if kind == "spike" and (self.config.on_spike == "stop" or self._in_a_row >= self.config.limit):
            raise FastavError(
                f"step {step}: loss {loss:g} is more than {self.config.spike:g} times the median of the last "
                f"{self.config.window} losses, {statistics.median(self._losses):g}; {clips_text}"
            )

    def slow_ranks(self, seconds: Sequence[float]) -> list[tuple[int, float]]:
        """Finds slow ranks.

        Args:
            seconds: Time that each rank spent on its own work in the same steps.

        Returns:
            (rank, multiple of the time of the median rank) of each slow rank.
        """
        if len(seconds) < 2 or not self.config.slow_rank:
            return []
        median = max(statistics.median_low(seconds), 1e-9)
        return [(rank, own / median) for rank, own in enumerate(seconds) if own > self.config.slow_rank * median]

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters and recent losses, JSON-serialisable."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))  # checkpoints of format 1 have no losses
