"""CPU cores available to this process, and the peak FLOP/s of known GPUs."""

from __future__ import annotations

import os
import re

# Dense bf16 peak in FLOP/s from NVIDIA's data sheets (without sparsity), by a part of the device name.
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def peak_flops(name: str) -> float | None:
    """Returns the dense bf16 peak in FLOP/s of a GPU name such as `NVIDIA H200`; None if it is unknown."""
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_each() -> float:
    """Returns the number of CPU cores per training process on this node.

    SLURM binds each task to its own cores; torchrun lets all processes use all cores. So the result is the smaller of
    the cores that this process may use and the cores of the node divided by its processes.
    """
    mine, ranks = num_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(mine, int(os.environ.get("SLURM_CPUS_ON_NODE", mine)) / ranks)
