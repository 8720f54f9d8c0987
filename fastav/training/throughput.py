"""Meter: how fast a run goes and what holds it up, on one line, in `metrics.jsonl` and in trackers."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from rich.console import Console as Screen
from rich.table import Table

# Dense bf16 peak of data-sheet FLOP/s by a part of the device's name (NVIDIA data sheets, no sparsity).
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


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


class Console:
    """Prints log lines, and a progress line that is rewritten in place on a terminal and plain elsewhere.

    Args:
        stream: Where to print; stderr unless given, so that stdout stays clean for results.
        quiet: Prints nothing (ranks other than 0).
        plain_every_s: On a stream that is no terminal, seconds between progress lines.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, plain_every_s: float = 10.0) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet, self._plain_every_s = quiet, plain_every_s
        self._terminal = self._stream.isatty()
        self._last, self._open = -plain_every_s, False

    def log(self, text: str) -> None:
        """Prints a line that stays."""
        if not self._quiet:
            self._end_line()
            print(text, file=self._stream, flush=True)

    def progress(self, text: str, *, last: bool = False) -> None:
        """Shows the progress line; on a plain stream at most one every `plain_every_s` seconds, and the last."""
        if self._quiet:
            return
        if self._terminal:
            print(f"\r\x1b[2K{text}", end="\n" if last else "", file=self._stream, flush=True)
            self._open = not last
        elif last or time.monotonic() - self._last >= self._plain_every_s:
            self._last = time.monotonic()
            print(text, file=self._stream, flush=True)

    def show(self, table: Table) -> None:
        """Prints a table."""
        if not self._quiet:
            self._end_line()
            Screen(file=self._stream).print(table)

    def _end_line(self) -> None:
        if self._open:
            print(file=self._stream)
            self._open = False


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak FLOP/s of a GPU by its name, such as `NVIDIA H200`; None for an unknown one."""
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_each() -> float:
    """Cores for this one of the training processes of its node.

    SLURM gives each task cores of its own, torchrun leaves all of them to all; only the first knows how many there are.
    """
    mine, ranks = num_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(mine, int(os.environ.get("SLURM_CPUS_ON_NODE", mine)) / ranks)


def peak_memory_gib() -> float:
    """Peak allocated device memory of this process, or its peak resident memory where there is no GPU, GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def clock_time(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def tracker_values(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flattens a metrics row to the numbers a tracker takes: `{"eval": {"top1": 1}}` -> `{"eval/top1": 1.0}`."""
    values: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            values |= tracker_values(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            values[prefix + key] = float(value)
    return values
