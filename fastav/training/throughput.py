"""Meter: how fast a run goes and what holds it up, on one line, in `metrics.jsonl` and in trackers."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastav.core.console import clock_time


@dataclass(frozen=True, slots=True)
class Rates:
    """Speed since the meter's last report.

    Attributes:
        clips_per_s: Augmented clips over all ranks per second.
        unique_clips_per_s: Decoded clips per second; less with `repeat`.
        step_ms: Mean duration of a step, milliseconds.
        stall_pct: Share of the time spent waiting for the loader, percent.
        mfu_pct: Model FLOP/s over the devices' peak, percent; None where no peak is known.
        peak_mem_gib: Peak device memory, or resident memory of this process on a CPU.
    """

    clips_per_s: float
    unique_clips_per_s: float
    step_ms: float
    stall_pct: float
    mfu_pct: float | None
    peak_mem_gib: float


class Meter:
    """Counts clips, time and waits between reports.

    Args:
        total_steps: Optimizer steps of the whole run.
        flops_per_clip: Forward and backward FLOPs of one clip; 0 if unknown.
        peak_flops: Peak FLOP/s of all devices together; None if unknown.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        flops_per_clip: float = 0.0,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps, self.flops_per_clip, self.peak_flops = total_steps, flops_per_clip, peak_flops
        self._clock = clock
        self._seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted: after an evaluation or a save, which are not part of the rate."""
        self._since, self._steps, self._clips, self._unique, self._wait = self._clock(), 0, 0, 0, 0.0

    def step(self, clips: int, unique: int, wait_s: float) -> None:
        """Counts one optimizer step: clips and decoded clips over all ranks, seconds waited for the loader."""
        self._steps += 1
        self._clips += clips
        self._unique += unique
        self._wait += wait_s

    def rates(self) -> Rates:
        """Rates since the last call or restart; starts the next interval."""
        seconds = max(self._clock() - self._since, 1e-9)
        clips_per_s = self._clips / seconds
        mfu = None
        if self.peak_flops and self.flops_per_clip:
            mfu = 100 * clips_per_s * self.flops_per_clip / self.peak_flops
        if self._steps:
            self._seconds_per_step = seconds / self._steps
        rates = Rates(
            clips_per_s=clips_per_s,
            unique_clips_per_s=self._unique / seconds,
            step_ms=1000 * seconds / max(self._steps, 1),
            stall_pct=min(100.0, 100 * self._wait / seconds),
            mfu_pct=mfu,
            peak_mem_gib=peak_memory_gib(),
        )
        self.restart()
        return rates

    def eta_s(self, step: int) -> float:
        """Seconds left at the last measured rate."""
        return (self.total_steps - step) * self._seconds_per_step

    def line(self, step: int, loss: float, rates: Rates) -> str:
        """The one line a person watches."""
        parts = [
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}",
            f"loss {loss:.4f}",
            f"{rates.clips_per_s:.1f} clips/s",
            f"stall {rates.stall_pct:.0f} %",
            *([f"MFU {rates.mfu_pct:.1f} %"] if rates.mfu_pct is not None else []),
            f"mem {rates.peak_mem_gib:.1f} GiB",
            f"ETA {clock_time(self.eta_s(step))}",
        ]
        return " | ".join(parts)


def tracker_values(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flattens a metrics row to the numbers a tracker takes: `{"eval": {"top1": 1}}` -> `{"eval/top1": 1.0}`."""
    values: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            values |= tracker_values(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            values[prefix + key] = float(value)
    return values


def peak_memory_gib() -> float:
    """Peak allocated device memory of this process, or its peak resident memory where there is no GPU, GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
