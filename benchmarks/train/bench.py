"""Times one recipe with the trainer's own step and loader: each alone, both together, and both side by side."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import msgspec
import torch

from benchmarks.nvml import Gpu, Watch
from benchmarks.timing import Turn
from fastav.core.machine import cores_each
from fastav.loader.batch import Batch
from fastav.loader.threads import StageStats
from fastav.recipe.schema import Recipe
from fastav.train import Trainer
from fastav.training.inputs import choose_pin_memory, make_loader
from fastav.training.signals import StopSignals
from fastav.training.throughput import peak_memory_gib

MODES = ("data", "model", "end to end", "model beside data")
APART = "model, not sending"
_FOREVER = 1_000_000  # steps: more than any benchmark runs


def event(device: torch.device) -> Any:
    """Records a CUDA event on the current stream; None on a CPU, whose operations are synchronous."""
    if device.type != "cuda":
        return None
    recorded = torch.cuda.Event(enable_timing=True)
    recorded.record()
    return recorded


class Waits:
    """Measures how long host and device wait for batches.

    Args:
        device: Device of the model.

    Attributes:
        host_s: Seconds for which the host has waited for the loader.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, None
        self.restart()

    def restart(self) -> None:
        """Resets all times to zero."""
        self.host_s, self._pairs = 0.0, list[tuple[Any, Any]]()

    def watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the same batches; the device's wait starts when it has finished its previous work."""
        while True:
            self._before, begun = event(self._device), time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.host_s += time.perf_counter() - begun
            yield batch

    def forward(self) -> None:
        """Ends the device's wait: the batch is on the device and the forward pass starts."""
        if self._before is not None:
            self._pairs.append((self._before, event(self._device)))
            self._before = None

    def device_s(self) -> float | None:
        """Returns the seconds for which the device was idle or copied the batch; None on a CPU."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize(self._device)
        return sum(float(before.elapsed_time(after)) for before, after in self._pairs) / 1e3


class Bench:
    """A trainer that runs in timed turns of a few steps each and never saves.

    Args:
        recipe: Recipe of the run; its length is ignored.
        steps: Timed optimizer steps per turn, after those in which the loader reaches its steady state.

    Attributes:
        lead: Batches before a turn is timed: the prefetched ones, and one more.
        start_s: Seconds from the start to the end of the first step.
    """

    def __init__(self, recipe: Recipe, steps: int) -> None:
        begun = time.perf_counter()
        endless = msgspec.structs.replace(recipe.train, epochs=float(_FOREVER))
        logged = msgspec.structs.replace(recipe.log, trackers=())
        self.trainer = Trainer(msgspec.structs.replace(recipe, train=endless, log=logged), StopSignals())
        self.state, self.steps = self.trainer.state, steps
        self.device = self.state.ranks.device
        self.gpu = Gpu.of(self.device)
        self.state.model.train()
        self.loader = make_loader(
            self.state.recipe, self.state.source, self.state.skip, pin_memory=choose_pin_memory(self.device)
        )
        self.lead = recipe.loading.prefetch + 1
        self._at, self._waits = 0, Waits(self.device)
        self._steps_s: list[float] = []
        with self.batches() as batches:
            self._resident = next(batches).to(self.device)
        self.trainer.step(itertools.repeat(self._resident))
        self.wait()
        self.start_s = time.perf_counter() - begun

    def modes(self) -> dict[str, Callable[[], Turn]]:
        """Returns the turns of `MODES`, and of `APART` if ranks send gradients."""
        turns = dict(zip(MODES, (self.data, self.model, self.end_to_end, self.beside), strict=True))
        return turns | ({APART: self.apart} if self.sends else {})

    def close(self) -> None:
        """Ends the loader's threads and the run."""
        self.loader.close()
        self.state.ranks.end()

    def wait(self) -> None:
        """Waits for the device and for all ranks, so that they start a turn together."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.state.ranks.accelerator.wait_for_everyone()

    def data(self) -> Turn:
        """Times batches from the files to the device, without the model."""
        copies: list[tuple[Any, Any]] = []
        stages: dict[str, float] = {}
        with self.batches() as batches:
            for _ in range(self.lead):
                next(batches).to(self.device)

            def work() -> None:
                before = self.loader.stats()
                for _ in range(self.steps * self._parts):
                    batch, begun = next(batches), event(self.device)
                    batch.to(self.device)
                    copies.append((begun, event(self.device)))
                stages.update(busy_pct(before, self.loader.stats()))

            turn = self._timed(work)
        turn.facts["stages"] = stages
        if self.device.type == "cuda":
            copied_s = sum(float(before.elapsed_time(after)) for before, after in copies) / 1e3
            turn.facts["copy_pct"] = 100 * copied_s / turn.wall_s
        return turn

    def model(self) -> Turn:
        """Times optimizer steps on a batch that stays on the device."""
        resident = itertools.repeat(self._resident)
        return self._timed(lambda: self._train(resident))

    def apart(self) -> Turn:
        """Times steps as `model`, but without the gradient all-reduce (DDP); losses are still reduced."""
        with self._parted(lambda joined, last: joined(last=False)):
            return self.model()

    @property
    def sends(self) -> bool:
        """Whether `apart` differs from `model`."""
        return self.state.strategy.name == "ddp"

    def end_to_end(self) -> Turn:
        """Times optimizer steps on the loader's batches, as in a run."""
        waits = self._waits

        def noted(joined: Any, last: bool) -> Any:
            waits.forward()
            return joined(last=last)

        with self.batches() as batches, self._parted(noted):
            watched = waits.watched(batches)
            for _ in range(self.lead):
                self.trainer.step(watched)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            waits.restart()
            turn = self._timed(lambda: self._train(watched))
        idle_s, meter = waits.device_s(), self.state.meter
        flops_per_s = turn.clips / turn.wall_s * meter.flops_per_clip
        turn.facts.update(
            host_wait_pct=100 * waits.host_s / turn.wall_s,
            device_idle_pct=None if idle_s is None else 100 * idle_s / turn.wall_s,
            mfu_pct=100 * flops_per_s / meter.peak_flops if flops_per_s and meter.peak_flops else None,
            peak_mem_gib=peak_memory_gib(),
        )
        return turn

    def beside(self) -> Turn:
        """Times optimizer steps on the resident batch, while a thread loads batches and discards them."""
        resident, end, failed, thrown = itertools.repeat(self._resident), threading.Event(), list[BaseException](), [0]
        with self.batches() as batches:
            for _ in range(self.lead):
                next(batches)

            def throw_away() -> None:
                try:
                    while not end.is_set():
                        next(batches).to(self.device)
                        thrown[0] += 1
                except BaseException as error:  # raised below: without its load the measurement is wrong
                    failed.append(error)

            thread = threading.Thread(target=throw_away, name="thrown away", daemon=True)
            thread.start()
            try:
                turn = self._timed(lambda: self._train(resident))
            finally:
                end.set()
                thread.join()
        if failed:
            raise failed[0]
        turn.facts["data_step_ms"] = 1e3 * turn.wall_s * self._parts / max(thrown[0], 1)
        return turn

    @property
    def _parts(self) -> int:
        return self.state.batch_split.accumulation

    @contextlib.contextmanager
    def _parted(self, around: Callable[[Any, bool], Any]) -> Iterator[None]:
        """Replaces the context of each micro-batch's forward and backward pass by `around(original, last)`."""
        strategy: Any = self.state.strategy
        joined = strategy.micro_batch
        strategy.micro_batch = lambda *, last: around(joined, last)
        try:
            yield
        finally:
            strategy.micro_batch = joined

    @contextlib.contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """Yields an endless iterator over this rank's micro-batches of the plan; every turn gets other ones."""
        first, self._at = self._at, self._at + self.lead + self.steps
        requests = self.state.batch_split.requests(first, first + _FOREVER)
        with contextlib.closing(self.loader.batches(requests)) as batches:
            yield batches

    def _train(self, batches: Iterator[Batch]) -> None:
        self._steps_s = []
        for _ in range(self.steps):
            begun = time.perf_counter()
            self.trainer.step(batches)  # it ends with reading the loss, so the device has finished
            self._steps_s.append(time.perf_counter() - begun)

    def _timed(self, work: Callable[[], None]) -> Turn:
        """Measures wall time, CPU time and the GPU while `work` runs; the turn's time is that of the slowest rank."""
        self.wait()
        self._steps_s = []
        with Watch(self.gpu) as watch:
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            spent, took = time.process_time() - cpu, time.perf_counter() - wall
        gpu = watch.found
        every = self.state.ranks.gather((took, gpu.joules, gpu.throttled))
        slowest = max(range(len(every)), key=lambda rank: every[rank][0])
        joules = [math.nan if spent_j is None else spent_j for _, spent_j, _ in every]
        reasons = [why for _, _, why in every]
        took, clips = every[slowest][0], self.steps * self.state.recipe.train.batch
        inside = self.state.recipe.loading.worker == "thread"  # CPU time of worker processes is unknown here
        return Turn(clips, spent, took, {
            "step_ms": 1e3 * took / self.steps, "steps_ms": [round(1e3 * one, 3) for one in self._steps_s],
            "clips_per_s": clips / took, "slowest_rank": slowest,
            "cpu_pct": 100 * spent / took / cores_each() if inside else None,
            "joules_per_clip": None if math.isnan(sum(joules)) else sum(joules) / clips,
            "sm_pct": gpu.sm_pct, "nvdec_pct": gpu.nvdec_pct,
            "throttled": None if None in reasons else sorted({one for why in reasons for one in why or ()}),
            "clocks_mhz": {"sm": gpu.sm_mhz, "memory": gpu.memory_mhz},
        })  # fmt: skip


def busy_pct(before: dict[str, StageStats], after: dict[str, StageStats]) -> dict[str, float]:
    """Returns for each stage of the loader the percentage of the time in which its threads were busy.

    Args:
        before: Statistics of the loader at the start.
        after: Statistics of the loader at the end.
    """
    found = {}
    for name in after.keys() - {"wait"}:
        spent = {key: value - asdict(before[name])[key] for key, value in asdict(after[name]).items()}
        total = spent["busy_s"] + spent["put_wait_s"] + spent["get_wait_s"]
        found[name] = 100 * spent["busy_s"] / max(total, 1e-9)
    return found
