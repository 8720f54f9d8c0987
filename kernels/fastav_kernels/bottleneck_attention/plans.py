"""Tile sizes of the kernels for each architecture, from `plans/*.json`.

`python -m benchmarks kernels --tune` writes these files. Nothing is tuned at run time: the same call launches the same
kernels on every rank and in every run. A file lists the tile sizes for each kernel, head width, element size and
maximum number of keys. `wins` lists the shapes for which the kernels were measured to be faster than PyTorch's
attention; `impl = "auto"` uses the kernels only for these.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = ("forward", "backward_whole", "backward_keys", "backward_queries")
HEAD_DIMS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Tile sizes of one kernel.

    Attributes:
        kernel: One of `KERNELS`.
        head_dim: Head width d.
        num_bytes: Bytes per element: 2 or 4.
        max_keys: Largest number of keys N + Z of a sequence for which the plan is used.
        block_m: Queries per tile.
        block_n: Keys per tile; with `backward_whole` all keys.
        num_warps: Warps per program.
        num_stages: Stages of the software pipeline.
        shared_bytes: Largest shared memory of a program, bytes.
    """

    kernel: str
    head_dim: int
    num_bytes: int
    max_keys: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Win:
    """Shapes for which forward plus backward of the kernels was measured to be faster than PyTorch's attention.

    Attributes:
        frames: `mean`, `shared` or `joint`.
        head_dim: Head width d.
        dtype: Type, such as `bfloat16`.
        num_frames: Frames per clip T.
        num_bottleneck: Bottleneck tokens Z.
        need_bottleneck: Whether the result of the bottleneck rows is computed.
        min_tokens: Smallest number of tokens per frame N.
        max_tokens: Largest number of tokens per frame N.
        ratio: Speed relative to PyTorch's, at the worst of the measured shapes.
    """

    frames: str
    head_dim: int
    dtype: str
    num_frames: int
    num_bottleneck: int
    need_bottleneck: bool
    min_tokens: int
    max_tokens: int
    ratio: float


@dataclass(frozen=True, slots=True)
class Chip:
    """Properties of a GPU that select a plan.

    Attributes:
        architecture: One of `ARCHITECTURES`.
        shared_bytes: Shared memory available to a program, bytes; it differs between chips of one architecture.
    """

    architecture: str
    shared_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class PlanFile:
    """Content of one file of `plans/`.

    Attributes:
        plans: Plans in order of preference.
        wins: Shapes for which the kernels are faster; empty until measured.
        measured: Machine, versions and date of the measurement, or `predicted`.
    """

    plans: tuple[LaunchPlan, ...]
    wins: tuple[Win, ...]
    measured: str


@functools.cache
def read_plans(architecture: str) -> PlanFile:
    """Returns the file of an architecture."""
    text = resources.files("fastav_kernels.bottleneck_attention").joinpath(f"plans/{architecture}.json").read_text()
    data: dict[str, Any] = json.loads(text)
    return PlanFile(
        tuple(LaunchPlan(**plan) for plan in data["plans"]), tuple(Win(**win) for win in data["wins"]), data["measured"]
    )


def architecture_of(capability: tuple[int, int]) -> str:
    """Returns the architecture whose plans a GPU of this compute capability uses: its own, or the nearest older one."""
    number = 10 * capability[0] + capability[1]
    fitting = [name for name in ARCHITECTURES if int(name[3:]) <= number]
    return fitting[-1] if fitting else ARCHITECTURES[0]


def plan_for(kernel: str, chip: Chip, head_dim: int, num_bytes: int, keys: int) -> LaunchPlan | None:
    """Returns the first plan that fits kernel, chip, head width, element size and number of keys; None without one."""
    for plan in read_plans(chip.architecture).plans:
        if (plan.kernel, plan.head_dim, plan.num_bytes) != (kernel, head_dim, num_bytes):
            continue
        if keys <= plan.max_keys and plan.shared_bytes <= chip.shared_bytes:
            return plan
    return None
