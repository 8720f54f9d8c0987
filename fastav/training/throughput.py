"""Meter: throughput, loader stalls, MFU and memory of a run, for the console, `metrics.jsonl` and trackers."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastav.core.log_lines import clock_time


@dataclass(frozen=True, slots=True)
class Rates:
    """Throughput since the last report of the meter.

    Attributes:
        clips_per_s: Training samples per second, over all ranks.
        unique_clips_per_s: Decoded clips per second, over all ranks; less than `clips_per_s` with `sampling.repeat`.
        step_ms: Mean duration of an optimizer step, milliseconds.
        stall_pct: Share of the time spent waiting for the loader, percent.
        mfu_pct: Model FLOP/s as a share of the devices' peak, percent; None if the peak is unknown.
        peak_mem_gib: Peak device memory of this process, GiB; without a GPU its peak resident memory.
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
        clock: Monotonic clock, seconds.
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
        """Resets the counts, after an evaluation or a save: their time is not part of the throughput."""
        self._since, self._steps, self._clips, self._unique, self._wait = self._clock(), 0, 0, 0, 0.0

    def step(self, clips: int, unique: int, wait_s: float) -> None:
        """Counts one optimizer step.

        Args:
            clips: Samples of the step, over all ranks.
            unique: Decoded clips of the step, over all ranks.
            wait_s: Seconds this rank waited for the loader.
        """
        self._steps += 1
        self._clips += clips
        self._unique += unique
        self._wait += wait_s

    def rates(self) -> Rates:
        """Returns the rates since the last call or restart, and starts the next interval."""
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
        """Returns the remaining seconds of the run at the last measured step time."""
        return (self.total_steps - step) * self._seconds_per_step

    def line(self, step: int, loss: float, rates: Rates) -> str:
        """Formats the progress line of the console."""
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
    """Flattens a row of metrics to numbers for a tracker: `{"eval": {"top1": 1}}` -> `{"eval/top1": 1.0}`."""
    values: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            values |= tracker_values(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            values[prefix + key] = float(value)
    return values


def peak_memory_gib() -> float:
    """Returns the peak allocated device memory of this process, GiB; without a GPU its peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
