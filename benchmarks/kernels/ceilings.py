"""Measured ceilings of a GPU: copies, a large matrix product, and the products of a ViT's layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.timing import MedianInterval, interleave, median, per_second

_TURN_S = 0.05


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A measured rate.

    Attributes:
        name: Name of the operation.
        unit: `GB/s` or `TFLOP/s`.
        rate: Median rate with its interval.
    """

    name: str
    unit: str
    rate: MedianInterval


def timed(run: Callable[[], object]) -> Callable[[], int]:
    """Returns a function that repeats `run` for about 0.05 s on the GPU and returns the number of repetitions."""
    torch.cuda.synchronize()
    once = _elapsed(run)
    count = max(3, min(200, round(_TURN_S / max(once, 1e-6))))

    def turn() -> int:
        for _ in range(count):
            run()
        torch.cuda.synchronize()
        return count

    return turn


def _elapsed(run: Callable[[], object]) -> float:
    """Returns the seconds of the second of two runs; the first may compile."""
    run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def ceilings(rows: int, width: int, rounds: int) -> list[Ceiling]:
    """Measures copies of 2 GiB, bf16 products of 8192 cubed, and the matrix products of a ViT layer.

    Args:
        rows: Number of rows of the layer's input.
        width: Width of the model; the MLP is four times as wide.
        rounds: Number of measured rounds.
    """
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    turns: dict[str, Callable[[], int]] = {"copy": timed(lambda: target.copy_(source))}
    work = {"copy": ("GB/s", 2 * source.numel() * 2 / 1e9)}
    shapes = {
        "8192 cubed": (8192, 8192, 8192),
        "QKV": (rows, width, 3 * width),
        "projection": (rows, width, width),
        "MLP up": (rows, width, 4 * width),
        "MLP down": (rows, 4 * width, width),
        "MLP up, gradient of the input": (rows, 4 * width, width),
        "MLP up, gradient of the weight": (width, rows, 4 * width),
    }
    for name, (m, k, n) in shapes.items():
        a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16).t()
        turns[name] = timed(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        work[name] = ("TFLOP/s", 2 * m * k * n / 1e12)
    made = interleave(turns, rounds)
    found = []
    for name, (unit, amount) in work.items():
        rate = median(per_second(made[name]) * amount)
        found.append(Ceiling(name if unit == "GB/s" else f"product, {name}", unit, rate))
    return found
