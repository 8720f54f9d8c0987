"""The threads and queues between requests and batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastav.clip import Batch, Clip
from fastav.loader.assemble import Assembler, Job, Request, Task

JOIN_S = 5.0
"""Seconds that closing waits for the threads."""

log = logging.getLogger("fastav.loader")


@dataclass(slots=True)
class StageStats:
    """What a stage did with its time, summed over its threads since the loader was made.

    Attributes:
        busy_s: Working.
        put_wait_s: Done, but no room to put it.
        get_wait_s: Idle, nothing to work on.
        items: Clips (of the threads that take clips) or batches (of all others).
    """

    busy_s: float = 0.0
    put_wait_s: float = 0.0
    get_wait_s: float = 0.0
    items: int = 0


class Stream:
    """One planning thread, some decoding threads, and the consumer's side of them.

    One lock guards everything; three conditions on it say who may go on: `_room` the planner, `_work` the
    decoders, `_ready` the consumer.

    Args:
        assembler: Makes jobs and batches.
        requests: What is asked for; read in the planning thread.
        stats: Of the stages, added to.
        workers: Decoding threads.
        prefetch: Batches that may be on their way.
        watchdog_s: Seconds without a batch after which a warning is logged.
    """

    def __init__(
        self,
        assembler: Assembler,
        requests: Iterator[Request],
        stats: dict[str, StageStats],
        *,
        workers: int,
        prefetch: int,
        watchdog_s: float,
    ) -> None:
        self._assembler, self._requests, self._stats = assembler, requests, stats
        self._prefetch, self._watchdog_s = prefetch, watchdog_s
        # Re-entrant, as the garbage collector may close a stream in one of its own threads.
        self._lock = threading.RLock()
        self._room, self._work, self._ready, self._gathered = (threading.Condition(self._lock) for _ in range(4))
        self._jobs: deque[Job] = deque()  # planned, not yet handed over
        self._tasks: deque[Task] = deque()  # to be decoded, or prepared
        self._whole: deque[Job] = deque()  # prepared, for a decoder of whole batches
        self._decoding: dict[int, tuple[Clip, float]] = {}  # by thread: what, since when
        self._planned_all = self._closed = False
        self._failure: BaseException | None = None
        self._planning_since = self._handed_over = time.perf_counter()
        # Page-locked memory is allocated by the planner, in the context of the consumer's device.
        self._device = torch.cuda.current_device() if assembler.pin_memory else None
        self._started = threading.Barrier(workers + 1)
        targets = [("plan", self._plan_all), *((f"decode-{i}", self._decode_all) for i in range(workers))]
        decoder = assembler.batch_decoder
        self._per_clip = stats["decode" if decoder is None else "prepare"]
        targets += [(f"batch-{i}", self._decode_batches) for i in range(decoder.batches_at_once if decoder else 0)]
        self._threads = [
            threading.Thread(target=self._guarded, args=(target,), name=f"fastav-{name}", daemon=True)
            for name, target in targets
        ]

    def start(self) -> None:
        """Starts the threads; torch runs on one core in each of them and as before in the caller."""
        before = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        self._started.wait()
        # torch's count is each thread's own, but the last one set is what new threads start with: put it back.
        torch.set_num_threads(before)

    def close(self) -> None:
        """Ends the threads; waits for clips in the middle of their decode, but not for ever."""
        with self._lock:
            self._closed = True
            self._tasks.clear()
            self._jobs.clear()
            self._whole.clear()
            for condition in (self._room, self._work, self._ready, self._gathered):
                condition.notify_all()
        if threading.current_thread() in self._threads:
            return
        deadline = time.perf_counter() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.perf_counter()))
        if any(thread.is_alive() for thread in self._threads):
            with self._lock:
                left = self._being_decoded() or "the planning of a batch"
            log.warning("loader: left behind at its end: %s", left)

    def next_batch(self) -> Batch:
        """Waits for the next batch of the requests and finishes it.

        Raises:
            StopIteration: There are no more.
        """
        asked = time.perf_counter()
        wait, collate = self._stats["wait"], self._stats["collate"]
        wait.busy_s += asked - self._handed_over
        try:
            job = self._wait_for(0)
            arrived = time.perf_counter()
            wait.get_wait_s += arrived - asked
            if job is None:
                raise StopIteration
            batch = self._assembler.batch(job, self._later())
        except BaseException:
            self.close()
            raise
        with self._lock:
            if self._jobs:  # not closed meanwhile
                self._jobs.popleft()
            self._room.notify()
        self._handed_over = time.perf_counter()
        collate.busy_s += self._handed_over - arrived
        collate.items += 1
        wait.items += 1
        return batch

    def _later(self) -> Iterator[Job]:
        """Yields the jobs behind the first one as they are done: as many as there is room for, so always the same."""
        for place in range(1, self._prefetch):
            job = self._wait_for(place)
            if job is None:
                return
            yield job

    def _wait_for(self, place: int) -> Job | None:
        """Returns the job at this place once it is decoded; None when there will be none."""
        since = time.perf_counter()
        with self._lock:
            while True:
                if self._failure is not None:
                    raise self._failure
                if len(self._jobs) > place and self._jobs[place].pending == 0:
                    return self._jobs[place]
                if self._closed or (self._planned_all and len(self._jobs) <= place):
                    return None
                if not self._ready.wait(self._watchdog_s):
                    log.warning("%s", self._explain(place, time.perf_counter() - since))

    def _explain(self, place: int, waited_s: float) -> str:
        """Says what a consumer that waits is waiting for (with the lock held)."""
        if len(self._jobs) <= place:
            stage = f"plan, at work on a batch for {time.perf_counter() - self._planning_since:.1f} s"
        else:
            job = self._jobs[place]
            batches = self._assembler.batch_decoder is not None
            missing = job.pending - batches
            stage = f"decode, {missing} of the {len(job.tasks)} clips of the next batch are missing"
            if not missing:
                stage = "decode, the next batch is prepared"
        return (
            f"loader: no batch for {waited_s:.0f} s; stage: {stage}; "
            f"being decoded: {self._being_decoded() or 'nothing'}; "
            f"queued: {len(self._tasks)} clips; on their way: {len(self._jobs)} of {self._prefetch} batches"
        )

    def _being_decoded(self) -> str:
        """Returns files and for how long, the longest first (with the lock held)."""
        now = time.perf_counter()
        longest_first = sorted(self._decoding.values(), key=lambda entry: entry[1])
        return ", ".join(f"{clip.source} ({now - since:.1f} s)" for clip, since in longest_first)

    def _guarded(self, target: Callable[[], None]) -> None:
        """Runs a thread; what it raises is raised again in the consumer, with the thread's traceback."""
        try:
            target()
        except BaseException as error:
            with self._lock:
                if self._failure is None:
                    self._failure = error
                self._ready.notify_all()

    def _plan_all(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        stats = self._stats["plan"]
        while True:
            finished = time.perf_counter()
            with self._lock:
                while len(self._jobs) >= self._prefetch and not self._closed:
                    self._room.wait()
                if self._closed:
                    return
                self._planning_since = roomy = time.perf_counter()
            request = next(self._requests, None)
            asked = time.perf_counter()
            if request is None:
                break
            job = self._assembler.job(request)
            with self._lock:
                if self._closed:
                    return
                self._jobs.append(job)
                self._tasks.extend(job.tasks)
                self._work.notify(len(job.tasks))
                if not job.tasks and job.pending:
                    self._gather(job)
                self._ready.notify_all()  # a batch of padding alone is ready at once
                stats.put_wait_s += roomy - finished
                stats.get_wait_s += asked - roomy
                stats.busy_s += time.perf_counter() - asked
                stats.items += 1
        with self._lock:
            self._planned_all = True
            self._work.notify_all()
            self._ready.notify_all()

    def _decode_all(self) -> None:
        torch.set_num_threads(1)
        # A thread that has not looked at the count yet takes over the global one when it does: look before the
        # caller puts that back.
        torch.get_num_threads()
        self._started.wait()
        stats, me = self._per_clip, threading.get_ident()
        while True:
            idle = time.perf_counter()
            with self._lock:
                while not self._tasks and not self._closed and not self._planned_all:
                    self._work.wait()
                if self._closed or not self._tasks:
                    return
                task = self._tasks.popleft()
                begun = time.perf_counter()
                self._decoding[me] = (task.clip, begun)
                stats.get_wait_s += begun - idle
            self._assembler.decode(task)
            with self._lock:
                del self._decoding[me]
                stats.busy_s += time.perf_counter() - begun
                stats.items += 1
                task.job.pending -= 1
                if task.job.pending == 0:
                    self._ready.notify_all()
                elif task.job.pending == 1 and self._assembler.batch_decoder is not None:
                    self._gather(task.job)

    def _gather(self, job: Job) -> None:
        """Hands a batch whose clips are prepared to the threads of the batch decoder (with the lock held)."""
        self._whole.append(job)
        self._gathered.notify()

    def _decode_batches(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        stats = self._stats["decode"]
        while True:
            idle = time.perf_counter()
            with self._lock:
                while not self._whole and not self._closed:
                    self._gathered.wait()
                if self._closed:
                    return
                job = self._whole.popleft()
                begun = time.perf_counter()
                stats.get_wait_s += begun - idle
            self._assembler.decode_batch(job)
            with self._lock:
                stats.busy_s += time.perf_counter() - begun
                stats.items += 1
                job.pending -= 1
                self._ready.notify_all()
