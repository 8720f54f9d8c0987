"""What holds a training run up, by the times of its parts alone, together and side by side; and the knob to turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FULL_PCT = 85.0
"""A resource this busy is the one that binds."""
MARGIN = 1.05
"""What is less than so many times something else is as good as equal to it."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Medians of the turns.

    Attributes:
        data_s: Seconds of a step's batches without a model.
        model_s: Seconds of a step on a resident batch.
        end_s: Seconds of a step of the real loop.
        beside_s: Seconds of a step on a resident batch while batches are made and thrown away.
        cpu_pct: This process's share of its cores while it makes batches alone; None where others make them.
        nvdec_pct: Of the video decoder, likewise.
        copy_pct: Share of that time in which batches are copied to the device.
        sm_pct: Share of the time of the model alone in which a kernel runs.
        data_beside_s: Seconds of a step's batches while the model runs on another; None where that is not known.
        stages: Stage of the loader -> share of the time of its threads that they worked, percent.
        decodes: Who decodes: threads, processes, or DALI, which takes whole batches.
        gpu: Whether the model is on one.
        communication_pct: Share of a step that is waiting for other ranks' gradients, percent.
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
        """Seconds of a step if making batches and training never held each other up."""
        return max(self.data_s, self.model_s)

    @property
    def overlap(self) -> float:
        """Overlap efficiency: ideal over observed."""
        return self.ideal_s / self.end_s

    @property
    def interference(self) -> float:
        """How many times as long the model takes while batches are made."""
        return self.beside_s / self.model_s


@dataclass(frozen=True, slots=True)
class Bound:
    """What binds.

    Attributes:
        what: Its name.
        why: The figures that say so.
        knob: What to change.
    """

    what: str
    why: str
    knob: str

    def __str__(self) -> str:
        return f"{self.what} binds ({self.why}): {self.knob}"


def bound(parts: Parts) -> Bound:
    """Names what binds: the slower of the two sides, or that they do not fit together."""
    if parts.end_s <= MARGIN * parts.ideal_s:
        return _data(parts) if parts.data_s > parts.model_s else _model(parts)
    together = max(parts.beside_s, parts.data_beside_s or parts.data_s)
    disturbed = together > MARGIN * parts.ideal_s or (not parts.gpu and parts.interference > MARGIN)
    return _interference(parts) if disturbed else _hand_over(parts)


def _sides(parts: Parts) -> str:
    return f"batches {parts.data_s * 1e3:.1f} ms, model {parts.model_s * 1e3:.1f} ms, both {parts.end_s * 1e3:.1f} ms"


def _data(parts: Parts) -> Bound:
    """The loader is slower than the model: by which of its means."""
    sides, fewer = _sides(parts), "fewer or smaller frames (sampling.frames, sampling.image_size)"
    if parts.nvdec_pct is not None and parts.nvdec_pct >= FULL_PCT:
        knob = f"pack with a shorter distance of keyframes (fastav pack --preset fast), sampling.repeat = 2, or {fewer}"
        return Bound("decoding (NVDEC)", f"{parts.nvdec_pct:.0f} % busy; {sides}", knob)
    if parts.cpu_pct is not None and parts.cpu_pct >= FULL_PCT:
        decoder = "" if parts.gpu else " or decode on a GPU"
        knob = f"pack the clips (fastav pack), sampling.repeat = 2, more cores{decoder}, or {fewer}"
        return Bound("host CPU", f"its cores {parts.cpu_pct:.0f} % busy; {sides}", knob)
    if parts.copy_pct is not None and parts.copy_pct >= FULL_PCT:
        knob = f"{fewer}; `fastav preflight` tells whether the link to the device is slow"
        return Bound("copying to the device", f"{parts.copy_pct:.0f} % of the time; {sides}", knob)
    stage, busy = max(parts.stages.items(), key=lambda pair: pair[1], default=("", 0.0))
    if busy < FULL_PCT:
        knob = 'a faster or nearer disk, loading.shards.cache, sampling.order = "blocked", or more loading.workers'
        return Bound("waiting for files", f"no stage of the loader is busy; {sides}", knob)
    what, knob = {
        ("decode", "threads"): ("decoding threads", 'loading.worker = "process", or more loading.workers: threads wait '
                                "for one lock of Python, or for files"),
        ("decode", "processes"): ("decoding", "more loading.workers"),
        ("decode", "dali"): ("decoding (DALI)", "decode.pipelines, decode.threads, a larger train.micro_batch"),
        ("prepare", "dali"): ("reading what DALI decodes", "more loading.workers, a nearer disk"),
    }.get((stage, parts.decodes), (f"the loader's {stage} stage", fewer))  # fmt: skip
    return Bound(what, f"{busy:.0f} % busy; {sides}", knob)


def _interference(parts: Parts) -> Bound:
    """Both sides want the same means."""
    why = f"the model takes {parts.interference:.2f} times as long while batches are made"
    if parts.data_beside_s is not None:
        why += f", batches {parts.data_beside_s / parts.data_s:.2f} times while it runs"
    why += f"; {_sides(parts)}"
    if parts.gpu:
        knob = "fewer loading.workers or decode.pipelines, train.compile (fewer launches), or clips that are packed"
    else:
        knob = "more cores: both sides compute on them; or clips that are packed, fewer loading.workers, train.threads"
    return Bound("sharing the machine", why, knob)


def _hand_over(parts: Parts) -> Bound:
    """Each side alone is fast enough, and they do not disturb each other: batches come unevenly."""
    why = f"overlap {parts.overlap:.2f}; {_sides(parts)}"
    return Bound("handing batches over", why, "a larger loading.prefetch: batches take unequal times")


def _model(parts: Parts) -> Bound:
    sides = _sides(parts)
    if parts.communication_pct >= 15:
        knob = 'larger train.micro_batch, train.reduce_dtype = "bf16", train.bucket_mb; or fewer, faster nodes'
        return Bound("communication", f"{parts.communication_pct:.0f} % of a step; {sides}", knob)
    if parts.sm_pct is not None and parts.sm_pct < FULL_PCT:
        knob = "train.compile, a larger train.micro_batch: the GPU waits for the host to launch kernels"
        return Bound("launching kernels", f"one runs in {parts.sm_pct:.0f} % of the time; {sides}", knob)
    knob = 'the loader keeps up; faster still: train.compile, train.precision = "bf16", a larger train.batch'
    return Bound("the model", sides, knob if parts.gpu else f"{knob}, a GPU")
