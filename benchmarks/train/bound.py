"""Finds the bottleneck of a training run from the times of its parts, and the setting to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FULL_PCT = 85.0
"""A resource that is at least this busy is the bottleneck, percent."""
MARGIN = 1.05
"""Times whose ratio is below this count as equal."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Medians of the turns. Seconds are per optimizer step.

    Attributes:
        data_s: Loading the batches, without the model.
        model_s: A step on a resident batch.
        end_s: A step of the training loop.
        beside_s: A step on a resident batch while batches are loaded and discarded.
        cpu_pct: Use of this process's cores while it only loads batches; None if other processes decode.
        nvdec_pct: Use of the video decoder while batches are loaded.
        copy_pct: Percentage of the loading time in which batches are copied to the device.
        sm_pct: Percentage of the model's time in which a kernel runs.
        data_beside_s: Loading the batches while the model runs on a resident batch; None if unknown.
        stages: Stage of the loader -> percentage of the time in which its threads are busy.
        decodes: Who decodes: threads, processes, or DALI, which decodes whole batches.
        gpu: Whether the model runs on a GPU.
        communication_pct: Percentage of a step spent waiting for the gradients of other ranks.
    """

    data_s: float
    model_s: float
    end_s: float
    beside_s: float
    cpu_pct: float | None = None
    nvdec_pct: float | None = None
    copy_pct: float | None = None
    sm_pct: float | None = None
    data_beside_s: float | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    decodes: Literal["threads", "processes", "dali"] = "threads"
    gpu: bool = False
    communication_pct: float = 0.0

    @property
    def ideal_s(self) -> float:
        """Seconds of a step if loading and training overlapped perfectly."""
        return max(self.data_s, self.model_s)

    @property
    def overlap(self) -> float:
        """Overlap efficiency: ideal over observed time."""
        return self.ideal_s / self.end_s

    @property
    def interference(self) -> float:
        """Factor by which a step of the model is slower while batches are loaded."""
        return self.beside_s / self.model_s


@dataclass(frozen=True, slots=True)
class Bound:
    """The bottleneck.

    Attributes:
        what: Its name.
        why: The measurements that show it.
        knob: The settings to change.
    """

    what: str
    why: str
    knob: str

    def __str__(self) -> str:
        return f"bottleneck: {self.what} ({self.why}); try: {self.knob}"


def bound(parts: Parts) -> Bound:
    """Returns the bottleneck: the slower one of loader and model, or their interference."""
    if parts.end_s <= MARGIN * parts.ideal_s:
        return _data(parts) if parts.data_s > parts.model_s else _model(parts)
    together = max(parts.beside_s, parts.data_beside_s or parts.data_s)
    disturbed = together > MARGIN * parts.ideal_s or (not parts.gpu and parts.interference > MARGIN)
    return _interference(parts) if disturbed else _hand_over(parts)


def _sides(parts: Parts) -> str:
    return f"batches {parts.data_s * 1e3:.1f} ms, model {parts.model_s * 1e3:.1f} ms, both {parts.end_s * 1e3:.1f} ms"


def _data(parts: Parts) -> Bound:
    """Returns the bottleneck within the loader."""
    sides, fewer = _sides(parts), "fewer or smaller frames (sampling.frames, sampling.image_size)"
    if parts.nvdec_pct is not None and parts.nvdec_pct >= FULL_PCT:
        knob = f"pack with a shorter GOP (fastav pack --preset fast), sampling.repeat = 2, or {fewer}"
        return Bound("decoding (NVDEC)", f"{parts.nvdec_pct:.0f} % busy; {sides}", knob)
    if parts.cpu_pct is not None and parts.cpu_pct >= FULL_PCT:
        decoder = "" if parts.gpu else " or decode on a GPU"
        knob = f"pack the clips (fastav pack), sampling.repeat = 2, more cores{decoder}, or {fewer}"
        return Bound("host CPU", f"its cores {parts.cpu_pct:.0f} % busy; {sides}", knob)
    if parts.copy_pct is not None and parts.copy_pct >= FULL_PCT:
        knob = f"{fewer}; `fastav preflight` measures the link to the device"
        return Bound("copying to the device", f"{parts.copy_pct:.0f} % of the time; {sides}", knob)
    stage, busy = max(parts.stages.items(), key=lambda pair: pair[1], default=("", 0.0))
    if busy < FULL_PCT:
        knob = 'a faster or local disk, loading.shards.cache, sampling.order = "blocked", or more loading.workers'
        return Bound("waiting for files", f"no stage of the loader is busy; {sides}", knob)
    what, knob = {
        ("decode", "threads"): ("decoding threads", 'loading.worker = "process", or more loading.workers: threads wait '
                                "for Python's GIL, or for files"),
        ("decode", "processes"): ("decoding", "more loading.workers"),
        ("decode", "dali"): ("decoding (DALI)", "decode.pipelines, decode.threads, a larger train.micro_batch"),
        ("prepare", "dali"): ("reading what DALI decodes", "more loading.workers, a local disk"),
    }.get((stage, parts.decodes), (f"the loader's {stage} stage", fewer))  # fmt: skip
    return Bound(what, f"{busy:.0f} % busy; {sides}", knob)


def _interference(parts: Parts) -> Bound:
    """Returns the bottleneck if loader and model compete for the same resources."""
    why = f"the model takes {parts.interference:.2f} times as long while batches are loaded"
    if parts.data_beside_s is not None:
        why += f", loading takes {parts.data_beside_s / parts.data_s:.2f} times as long while the model runs"
    why += f"; {_sides(parts)}"
    if parts.gpu:
        knob = "fewer loading.workers or decode.pipelines, train.compile (fewer launches), or packed clips"
    else:
        knob = "more cores, which both use; or packed clips, fewer loading.workers, train.threads"
    return Bound("sharing the machine", why, knob)


def _hand_over(parts: Parts) -> Bound:
    """Returns the bottleneck if both are fast enough and do not interfere: batches arrive unevenly."""
    why = f"overlap {parts.overlap:.2f}; {_sides(parts)}"
    return Bound("handing batches over", why, "a larger loading.prefetch: batches take unequal times")


def _model(parts: Parts) -> Bound:
    sides = _sides(parts)
    if parts.communication_pct >= 15:
        knob = 'larger train.micro_batch, train.reduce_dtype = "bf16", train.bucket_mb; or fewer, faster nodes'
        return Bound("communication", f"{parts.communication_pct:.0f} % of a step; {sides}", knob)
    if parts.sm_pct is not None and parts.sm_pct < FULL_PCT:
        knob = "train.compile, a larger train.micro_batch: the GPU waits for the host to launch kernels"
        return Bound("launching kernels", f"a kernel runs in {parts.sm_pct:.0f} % of the time; {sides}", knob)
    knob = 'train.compile, train.precision = "bf16", a larger train.batch (the loader keeps up)'
    return Bound("the model", sides, knob if parts.gpu else f"{knob}, a GPU")
