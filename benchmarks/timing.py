"""Interleaved timing: medians over rounds, with bootstrap intervals.

All variants run in alternation in one process, so that other load on the machine affects all of them equally. Intervals
are percentile bootstrap intervals (Efron and Tibshirani 1993, section 13.3).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
ENOUGH = 7
"""Smallest number of turns for a verdict."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One timed turn of a variant.

    Attributes:
        clips: Number of clips processed.
        cpu_s: CPU seconds of this process, all threads.
        wall_s: Wall-clock seconds.
        facts: Further measurements; names end in their units.
    """

    clips: int
    cpu_s: float
    wall_s: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MedianInterval:
    """A median with its 95 % interval.

    Attributes:
        median: Median over the turns.
        low: Lower end of the interval.
        high: Upper end of the interval.
        turns: Number of turns; 0 if unknown.
    """

    median: float
    low: float
    high: float
    turns: int = 0

    def __str__(self) -> str:
        low, high = (f"{value:.{_digits(self.median)}f}" for value in (self.low, self.high))
        return f"{short(self.median)} ({low} to {high})"

    def rounded(self) -> list[float]:
        """Median, low and high to five significant digits, for a file."""
        return [float(f"{value:.5g}") for value in (self.median, self.low, self.high)]


def short(value: float) -> str:
    """Formats a number with about three digits."""
    return f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2


def interleave(
    variants: Mapping[str, Callable[[], int | Turn]],
    rounds: int,
    *,
    log: Callable[[str], None] = lambda text: None,
    warm: bool = True,
) -> dict[str, list[Turn]]:
    """Runs every variant once per round, in alternating order (A B, B A, ...), after a warm-up round.

    Args:
        variants: Name -> a function that processes some clips and returns their number; or one that measures itself
            and returns a `Turn`.
        rounds: Number of measured rounds.
        log: Called with a line of text after each round.
        warm: Whether to run the warm-up round. Without it the times are those of a cold start.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(-1 if warm else 0, rounds):
        for name in names if number % 2 else names[::-1]:
            cpu, wall = time.process_time(), time.perf_counter()
            made = variants[name]()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            turn = made if isinstance(made, Turn) else Turn(made, *spent)
            if number >= 0:
                turns[name].append(turn)
        log(f"round {number + 1} of {rounds}")
    return turns


def per_cpu_second(turns: Sequence[Turn]) -> NDArray[np.float64]:
    """Returns clips per CPU-second of each turn."""
    return np.array([turn.clips / max(turn.cpu_s, 1e-9) for turn in turns])


def per_second(turns: Sequence[Turn]) -> NDArray[np.float64]:
    """Returns clips per second of each turn."""
    return np.array([turn.clips / max(turn.wall_s, 1e-9) for turn in turns])


def median(values: NDArray[np.float64]) -> MedianInterval:
    """Returns the median of turns with its interval."""
    drawn = _resampled(len(values))
    medians = np.median(values[drawn], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return MedianInterval(float(np.median(values)), float(low), float(high), len(values))


def ratio(one: NDArray[np.float64], other: NDArray[np.float64]) -> MedianInterval:
    """Returns the ratio of two medians with its interval; round n of one is paired with round n of the other."""
    drawn = _resampled(min(len(one), len(other)))
    ratios = np.median(one[drawn], axis=1) / np.median(other[drawn], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return MedianInterval(float(np.median(one) / np.median(other)), float(low), float(high), min(len(one), len(other)))


def paired_ratio(one: NDArray[np.float64], other: NDArray[np.float64]) -> MedianInterval:
    """Returns the median of the ratios of pairs with its interval; turn n of one ran next to turn n of the other."""
    return median(one / other)


def grouped_ratio(one: Sequence[NDArray[np.float64]], other: Sequence[NDArray[np.float64]]) -> MedianInterval:
    """Returns the ratio of two medians with its interval, for turns in groups that differ from each other.

    The bootstrap draws groups first, then turns within them (Davison and Hinkley 1997, section 3.8).

    Args:
        one: Turns of each start of a program.
        other: Turns of each start of another program.
    """
    rng = np.random.default_rng(0)
    ratios = _drawn_medians(one, rng) / _drawn_medians(other, rng)
    low, high = np.percentile(ratios, [2.5, 97.5])
    middle = float(np.median(np.concatenate(one)) / np.median(np.concatenate(other)))
    return MedianInterval(middle, float(low), float(high), min(len(one), len(other)))


def _drawn_medians(groups: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns the medians of resamples, each with the same number of groups, and of turns per group."""
    sizes = np.array([len(group) for group in groups])
    padded_GT = np.full((len(groups), sizes.max()), np.nan)
    for place, group in enumerate(groups):
        padded_GT[place, : len(group)] = group
    chosen_RG1 = rng.integers(0, len(groups), (RESAMPLES // 4, len(groups), 1))
    size_RG1, place_T = sizes[chosen_RG1], np.arange(sizes.max())
    turn_RGT = rng.integers(0, np.broadcast_to(size_RG1, (*size_RG1.shape[:2], len(place_T))))
    drawn_RGT = np.where(place_T < size_RG1, padded_GT[chosen_RG1, turn_RGT], np.nan)
    return np.nanmedian(drawn_RGT.reshape(len(drawn_RGT), -1), axis=1)


def verdict(found: MedianInterval) -> str:
    """Returns `faster`, `slower` or `no difference` from the interval of a ratio.

    With fewer than seven turns the interval of a median is too narrow; the verdict is `too few turns`.
    """
    if 0 < found.turns < ENOUGH:
        return "too few turns"
    return "faster" if found.low > 1 else "slower" if found.high < 1 else "no difference"


def _resampled(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
