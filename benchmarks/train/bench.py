"""One recipe under the clock: the trainer's own step and loader, together, apart, and side by side."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch

from benchmarks.nvml import Gpu, Watch
from benchmarks.timing import Turn
from fastav.clip import Batch
from fastav.meter import num_cores
from fastav.pipeline import choose_pin_memory, make_loader
from fastav.ranks import StopSignals
from fastav.recipe import Recipe
from fastav.train import Trainer

MODES = ("data", "model", "end to end", "model beside data")
APART = "model, not sending"
_FOREVER = 1_000_000  # steps: nobody waits for the end of such a run


@dataclass(slots=True)
class Idle:
    """The device's idle time between the last kernel before a wait for a batch and the first one after it.

    Attributes:
        device: Where the model is; times are of CUDA events, a CPU has none.
        pairs: Events before and after each wait.
    """

    device: torch.device
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches."""
        while True:
            before = self._now()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if before is not None:
                self.pairs.append((before, self._now()))
            yield batch

    def seconds(self) -> float | None:
        """Of all waits so far, which are forgotten; None on a CPU, which is the device and the host."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        found = sum(float(before.elapsed_time(after)) for before, after in self.pairs) / 1e3
        self.pairs.clear()
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Bench:
    """A trainer that is driven by turns of some steps each, and never saves.

    Args:
        recipe: Of the run; its length is made endless.
        steps: Optimizer steps that a turn times, after those in which the loader gets into its stride.

    Attributes:
        start_s: Seconds from nothing to the end of the first step.
    """

    def __init__(self, recipe: Recipe, steps: int) -> None:
        begun = time.perf_counter()
        endless = msgspec.structs.replace(recipe.train, epochs=float(_FOREVER))
        logged = msgspec.structs.replace(recipe.log, trackers=())
        self.trainer = Trainer(msgspec.structs.replace(recipe, train=endless, log=logged), StopSignals())
        self.session, self.steps = self.trainer.session, steps
        self.device = self.session.ranks.device
        self.gpu = Gpu.of(self.device)
        self.session.model.train()
        self.loader = make_loader(
            self.session.recipe, self.session.source, self.session.skip, pin_memory=choose_pin_memory(self.device)
        )
        self._lead = recipe.loading.prefetch + 1  # batches that lie ready, and one to settle
        self._at, self._idle = 0, Idle(self.device)
        with self._batches(1) as batches:
            self._resident = next(batches).to(self.device)
            self.trainer.step(itertools.repeat(self._resident))
        self.wait()
        self.start_s = time.perf_counter() - begun

    def modes(self) -> dict[str, Callable[[], Turn]]:
        """The turns of `MODES`, and of `APART` where ranks send gradients."""
        turns = dict(zip(MODES, (self.data, self.model, self.end_to_end, self.beside), strict=True))
        return turns | ({APART: self.apart} if self.sends else {})

    def close(self) -> None:
        """Ends the loader's threads and the run."""
        self.loader.close()
        self.session.ranks.end()

    def wait(self) -> None:
        """Waits for the device, and for the other ranks, so that all begin a turn together."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.session.ranks.accelerator.wait_for_everyone()

    def data(self) -> Turn:
        """Batches from the files to the device, and no model."""
        before = self._stages()
        with self._batches(self._lead + self.steps * self._parts) as batches:
            for _ in range(self._lead):
                next(batches).to(self.device)

            def work() -> None:
                for _ in range(self.steps * self._parts):
                    next(batches).to(self.device)

            turn = self._timed(work)
        turn.facts["stages"] = {name: self._stages()[name] - busy for name, busy in before.items()}
        return turn

    def model(self) -> Turn:
        """Optimizer steps on a batch that stays on the device."""
        resident = itertools.repeat(self._resident)
        return self._timed(lambda: self._train(resident))

    def apart(self) -> Turn:
        """Like `model`, but no gradient is sent (DDP); the ranks still agree on each step's loss."""
        strategy: Any = self.session.strategy
        joined = strategy.part
        strategy.part = lambda *, last: joined(last=False)
        try:
            return self.model()
        finally:
            strategy.part = joined

    @property
    def sends(self) -> bool:
        """Whether `apart` differs from `model`."""
        return self.session.strategy.name == "ddp"

    def end_to_end(self) -> Turn:
        """Optimizer steps on the loader's batches: what a run does."""
        meter = self.session.meter
        with self._batches((self._lead + self.steps) * self._parts) as batches:
            watched = self._idle.watched(batches)
            for _ in range(self._lead):
                self.trainer.step(watched)
            self._idle.seconds()
            meter.restart()
            turn = self._timed(lambda: self._train(watched))
        rates, idle_s = meter.rates(), self._idle.seconds()
        told = {"host_wait_pct": rates.stall_pct, "peak_mem_gib": rates.peak_mem_gib, "mfu_pct": rates.mfu_pct}
        idle_pct = None if idle_s is None else 100 * idle_s / turn.wall_s
        return replace(turn, facts={**turn.facts, **told, "device_idle_pct": idle_pct})

    def beside(self) -> Turn:
        """Optimizer steps on the resident batch, while a thread takes batches to the device and throws them away."""
        resident, end = itertools.repeat(self._resident), threading.Event()
        with self._batches(_FOREVER) as batches:
            for _ in range(self._lead):
                next(batches)

            def throw_away() -> None:
                while not end.is_set():
                    next(batches).to(self.device)

            thread = threading.Thread(target=throw_away, name="thrown away", daemon=True)
            thread.start()
            try:
                return self._timed(lambda: self._train(resident))
            finally:
                end.set()
                thread.join()

    @property
    def _parts(self) -> int:
        return self.session.shares.accumulation

    @contextlib.contextmanager
    def _batches(self, count: int) -> Iterator[Iterator[Batch]]:
        """So many of this rank's micro-batches of the plan, others in each turn."""
        shares = self.session.shares
        first, self._at = self._at, self._at + min(-(-count // self._parts), self._lead + self.steps)
        requests = itertools.islice(shares.requests(first, first + _FOREVER), count)
        with contextlib.closing(self.loader.batches(requests)) as batches:
            yield batches

    def _train(self, batches: Iterator[Batch]) -> None:
        for _ in range(self.steps):
            self.trainer.step(batches)

    def _stages(self) -> dict[str, float]:
        return {name: stage.busy_s for name, stage in self.loader.stats().items()}

    def _timed(self, work: Callable[[], None]) -> Turn:
        """Does it under the clock, this GPU's meter and the machine's count of CPU time."""
        self.wait()
        with Watch(self.gpu) as watch:
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            spent, took = time.process_time() - cpu, time.perf_counter() - wall
        clips, seen = self.steps * self.session.recipe.train.batch, watch.found
        inside = self.session.recipe.loading.worker == "thread"  # CPU time of other processes is not known here
        unknown = float("nan")
        joules = self.session.ranks.total([unknown if seen.joules is None else seen.joules])[0] / clips
        cores = num_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return Turn(clips, spent, took, {
            "step_ms": 1e3 * took / self.steps, "clips_per_s": clips / took,
            "cpu_pct": 100 * spent / took / cores if inside else None,
            "joules_per_clip": None if math.isnan(joules) else joules,
            "sm_pct": seen.sm_pct, "nvdec_pct": seen.nvdec_pct, "throttled": seen.throttled,
            "clocks_mhz": {"sm": seen.sm_mhz, "memory": seen.memory_mhz},
        })  # fmt: skip
