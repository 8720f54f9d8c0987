"""Guard: watches the loss, the gradient and the ranks, and says what to do where one of them is out of bounds."""

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
    """What is out of bounds, and what happens then; each case is told, and listed with its clips in `incidents.jsonl`.

    Attributes:
        on_non_finite: A loss or gradient norm that is not finite: leave the step out (`skip`), or end the run.
        limit: Steps left out in a row after which the run ends all the same.
        spike: A loss of more than so many times the median of the last `window` ones is a spike; 0 looks for none.
        window: Losses that a spike is measured against; the first so many cannot be one.
        on_spike: Tell it and go on (`log`), leave the step out (`skip`), or end the run (`stop`).
        slow_rank: A rank is slow if loading and forward pass take it more than so many times as long as the median
            rank, over at least 20 steps; 0 looks for none.
        preflight: Whether devices and network are measured before the first step: in jobs of more than one node
            (`auto`), or also on a single one.
        slow_device: A rank is slow in the preflight with less than this share of the median rate; 0 looks for none.
        on_slow_device: Tell it and go on (`log`), or end the run (`stop`). On a CPU it is only told: rates depend on
            who else runs there. A device that computes wrong, or not at all, always ends the run.
        preflight_patience_s: Seconds within which each measurement of the preflight must end.
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
    """Judges steps; every rank must pass the same (reduced) numbers, so that all do the same.

    Args:
        config: The bounds.

    Attributes:
        skipped: Steps left out so far.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config, self.skipped, self._in_a_row = config, 0, 0
        self._losses: deque[float] = deque(maxlen=config.window)

    def classify(self, loss: float) -> LossFault:
        """Says what a step's loss is, before the optimizer steps."""
        if not math.isfinite(loss):
            return "non-finite"
        full = self.config.spike and len(self._losses) == self.config.window
        return "spike" if full and loss > self.config.spike * statistics.median(self._losses) else ""

    def allows_step(self, kind: LossFault) -> bool:
        """Whether the optimizer may step."""
        return not kind or (kind == "spike" and self.config.on_spike == "log")

    def record(self, kind: LossFault, loss: float, grad_norm: float) -> tuple[LossFault, bool]:
        """Counts a step.

        Args:
            kind: As judged.
            loss: Of the step.
            grad_norm: Of its gradient; a step with one that is not finite was not taken.

        Returns:
            What it was after all, and whether it was taken.
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
        """Ends the run where the bounds say so.

        Raises:
            FastavError: Naming the step and its clips.
        """
        clips_told = f"its clips: {listed(clips, MAX_CLIPS_NAMED) or 'none'}"
        if kind == "non-finite" and (self.config.on_non_finite == "stop" or self._in_a_row >= self.config.limit):
            raise FastavError(
                f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}: not finite for {self._in_a_row} steps "
                f"in a row; try a lower optim.lr, a longer warm-up or optim.clip_norm; {clips_told}"
            )
        if kind == "spike" and (self.config.on_spike == "stop" or self._in_a_row >= self.config.limit):
            raise FastavError(
                f"step {step}: loss {loss:g} is more than {self.config.spike:g} times the median of the last "
                f"{self.config.window}, {statistics.median(self._losses):g}; {clips_told}"
            )

    def slow_ranks(self, seconds: Sequence[float]) -> list[tuple[int, float]]:
        """Returns which ranks are slow, and how many times as long they take as the median one.

        Args:
            seconds: That each rank took for its own part of the same steps.
        """
        if len(seconds) < 2 or not self.config.slow_rank:
            return []
        usual = max(statistics.median_low(seconds), 1e-9)
        return [(rank, took / usual) for rank, took in enumerate(seconds) if took > self.config.slow_rank * usual]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))  # checkpoints of format 1 have none
