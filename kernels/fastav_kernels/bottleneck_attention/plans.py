"""How the kernels are cut into tiles on each architecture: data in `plans/*.json`, written by the benchmark's `--tune`.

Nothing is tuned at run time: the same call launches the same kernels on every rank and in every run. A file says, for
each kernel, head width and bytes of a number, the tiles for sequences of up to so many keys; and, once it has been
measured, for which shapes the kernels beat PyTorch's attention (`wins`), which is all that `impl = "auto"` believes.
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
    """Tiles of one kernel.

    Attributes:
        kernel: One of `KERNELS`.
        head_dim: d.
        num_bytes: Of a number: 2 or 4.
        max_keys: N + Z of a sequence that it is for, at most.
        block_m: Queries of a tile.
        block_n: Keys of a tile; with `backward_whole` all of them.
        num_warps: Of a program.
        num_stages: Of its software pipeline.
        shared_bytes: Shared memory of a program, at most.
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
    """Shapes for which the kernels, forward and backward, were measured to beat PyTorch's attention.

    Attributes:
        frames: Kind.
        head_dim: d.
        dtype: Such as `bfloat16`.
        num_frames: T.
        num_bottleneck: Z.
        need_bottleneck: Whether the bottleneck's own result is made.
        min_tokens: N of a frame, at least.
        max_tokens: N of a frame, at most.
        ratio: How much faster, at the worst of the measured shapes.
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
    """What decides on a plan.

    Attributes:
        architecture: One of `ARCHITECTURES`.
        shared_bytes: Shared memory that a program may have; some chips of an architecture have less than others.
    """

    architecture: str
    shared_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class PlanFile:
    """What is known of an architecture.

    Attributes:
        plans: In order of preference.
        wins: Empty until it was measured.
        measured: Machine, versions and date of the measurement, or `predicted`.
    """

    plans: tuple[LaunchPlan, ...]
    wins: tuple[Win, ...]
    measured: str


@functools.cache
def read_plans(architecture: str) -> PlanFile:
    """Returns the file of an architecture."""
    text = resources.files("fastav_kernels.bottleneck_attention").joinpath(f"plans/{architecture}.json").read_text()
    told: dict[str, Any] = json.loads(text)
    return PlanFile(
        tuple(LaunchPlan(**plan) for plan in told["plans"]), tuple(Win(**win) for win in told["wins"]), told["measured"]
    )


def architecture_of(capability: tuple[int, int]) -> str:
    """Returns whose plans a GPU of some compute capability uses: the nearest older architecture."""
    number = 10 * capability[0] + capability[1]
    fitting = [name for name in ARCHITECTURES if int(name[3:]) <= number]
    return fitting[-1] if fitting else ARCHITECTURES[0]


def plan_for(kernel: str, chip: Chip, head_dim: int, num_bytes: int, keys: int) -> LaunchPlan | None:
    """Returns the first plan that fits, or None."""
    for plan in read_plans(chip.architecture).plans:
        if (plan.kernel, plan.head_dim, plan.num_bytes) != (kernel, head_dim, num_bytes):
            continue
        if keys <= plan.max_keys and plan.shared_bytes <= chip.shared_bytes:
            return plan
    return None
