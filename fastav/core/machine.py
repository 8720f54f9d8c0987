"""What this machine has: cores, memory, and the peak rates of known GPUs."""

from __future__ import annotations

import os
import re

# Dense bf16 peak of data-sheet FLOP/s by a part of the device's name (NVIDIA data sheets, no sparsity).
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


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
