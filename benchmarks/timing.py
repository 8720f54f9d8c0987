"""Interleaved measurement: medians over rounds, with bootstrap intervals.

All variants take turns in one process, so that whatever else the machine does falls on all alike. Intervals are
percentiles of the bootstrap (Efron and Tibshirani 1993, section 13.3).
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
"""Turns, at least, for a verdict."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a variant.

    Attributes:
        clips: Clips it made.
        cpu_s: CPU seconds of this process, all threads.
        wall_s: Seconds.
        facts: What else was measured of it, by names with their units.
    """

    clips: int
    cpu_s: float
    wall_s: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MedianInterval:
    """A median and where it lies with 95 %.

    Attributes:
        median: Of the turns.
        low: Lower end.
        high: Upper end.
        turns: How many there were; 0 where that is not known.
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
    """A figure with about three digits."""
    return f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2


def interleave(
    variants: Mapping[str, Callable[[], int | Turn]],
    rounds: int,
    *,
    told: Callable[[str], None] = lambda text: None,
    warm: bool = True,
) -> dict[str, list[Turn]]:
    """Lets every variant make its clips once a round, in turning order, after one round that is thrown away.

    Args:
        variants: Name -> a function that makes some clips and returns how many; or one that times itself, without what
            comes before and after, and returns the turn.
        rounds: How many count.
        told: Is told of each round.
        warm: Whether there is that round before; without it all is made cold, and only whether it runs is seen.
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
        told(f"round {number + 1} of {rounds}")
    return turns


def per_cpu_second(turns: Sequence[Turn]) -> NDArray[np.float64]:
    """Returns clips per CPU-second of each turn."""
    return np.array([turn.clips / max(turn.cpu_s, 1e-9) for turn in turns])


def per_second(turns: Sequence[Turn]) -> NDArray[np.float64]:
    """Returns clips per second of each turn."""
    return np.array([turn.clips / max(turn.wall_s, 1e-9) for turn in turns])


def median(values: NDArray[np.float64]) -> MedianInterval:
    """Returns the median of some turns and its interval."""
    drawn = _resampled(len(values))
    medians = np.median(values[drawn], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return MedianInterval(float(np.median(values)), float(low), float(high), len(values))


def ratio(one: NDArray[np.float64], other: NDArray[np.float64]) -> MedianInterval:
    """Returns the ratio of two medians and its interval; round n of one is paired with round n of the other."""
    drawn = _resampled(min(len(one), len(other)))
    ratios = np.median(one[drawn], axis=1) / np.median(other[drawn], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return MedianInterval(float(np.median(one) / np.median(other)), float(low), float(high), min(len(one), len(other)))


def paired_ratio(one: NDArray[np.float64], other: NDArray[np.float64]) -> MedianInterval:
    """Returns the median of the ratios of pairs and its interval: turn n of one was beside turn n of the other."""
    return median(one / other)


def grouped_ratio(one: Sequence[NDArray[np.float64]], other: Sequence[NDArray[np.float64]]) -> MedianInterval:
    """Returns the ratio of two medians and its interval, where turns come in groups that differ among themselves.

    Groups are drawn first and turns within them (Davison and Hinkley 1997, section 3.8).

    Args:
        one: Turns of each start of a program.
        other: Likewise, of another.
    """
    rng = np.random.default_rng(0)
    ratios = _drawn_medians(one, rng) / _drawn_medians(other, rng)
    low, high = np.percentile(ratios, [2.5, 97.5])
    middle = float(np.median(np.concatenate(one)) / np.median(np.concatenate(other)))
    return MedianInterval(middle, float(low), float(high), min(len(one), len(other)))


def _drawn_medians(groups: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians of resamples: as many groups as there are, drawn again, and of each as many turns as it has."""
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
    """Returns `faster`, `slower` or `no difference`, from the interval of a ratio alone.

    Of fewer than seven turns the interval of a median is too narrow to go by: then it is `too few turns`.
    """
    if 0 < found.turns < ENOUGH:
        return "too few turns"
    return "faster" if found.low > 1 else "slower" if found.high < 1 else "no difference"


def _resampled(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
