"""BatchStream: the planning and decoding threads that turn requests into batches, and the queues between them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastav.data.clip import Clip
from fastav.loader.batch import Batch
from fastav.loader.collate import BatchJob, Collator, DecodeTask, Request

JOIN_S = 5.0
"""Seconds that closing waits for the threads."""

log = logging.getLogger("fastav.loader.loader")


@dataclass(slots=True)
class StageStats:
    """Time budget of a loader stage, summed over its threads since the loader was made.

    Attributes:
        busy_s: Seconds spent working.
        put_wait_s: Seconds spent waiting for a free place in the next queue.
        get_wait_s: Seconds spent waiting for input.
        items: Number of processed clips (stages that work on clips) or batches (all other stages).
    """

    busy_s: float = 0.0
    put_wait_s: float = 0.0
    get_wait_s: float = 0.0
    items: int = 0


class BatchStream:
    """One planning thread, several decoding threads, and the consumer's side of them.

    One lock guards all state. Four conditions on it wake the threads: `_slot_free` the planner, `_task_added` the
    decoding threads, `_clips_prepared` the threads of a `BatchDecoder`, and `_batch_ready` the consumer.

    Args:
        collator: Makes jobs from requests and batches from decoded jobs.
        requests: The requested batches; the iterator is read in the planning thread.
        stats: Statistics of each stage, which the threads update.
        workers: Number of decoding threads.
        prefetch: Maximum number of batches planned but not yet delivered.
        watchdog_s: Seconds without a batch after which a warning is logged.
    """

    def __init__(
        self,
        collator: Collator,
        requests: Iterator[Request],
        stats: dict[str, StageStats],
        *,
        workers: int,
        prefetch: int,
        watchdog_s: float,
    ) -> None:
        self._collator, self._requests, self._stats = collator, requests, stats
        self._prefetch, self._watchdog_s = prefetch, watchdog_s
        # Re-entrant, because the garbage collector may call close() in one of the stream's own threads.
        self._lock = threading.RLock()
        self._slot_free = threading.Condition(self._lock)
        self._task_added = threading.Condition(self._lock)
        self._batch_ready = threading.Condition(self._lock)
        self._clips_prepared = threading.Condition(self._lock)
        self._jobs: deque[BatchJob] = deque()  # planned, not yet delivered
        self._tasks: deque[DecodeTask] = deque()  # waiting to be decoded or prepared
        self._prepared: deque[BatchJob] = deque()  # clips prepared, waiting for the BatchDecoder
        self._decoding: dict[int, tuple[Clip, float]] = {}  # thread id -> (clip, start time)
        self._planned_all = self._closed = False
        self._failure: BaseException | None = None
        self._planning_since = self._delivered_at = time.perf_counter()
        # The planner allocates page-locked memory, and must do so in the context of the consumer's device.
        self._device = torch.cuda.current_device() if collator.pin_memory else None
        self._started = threading.Barrier(workers + 1)
        targets = [("plan", self._plan_all), *((f"decode-{i}", self._decode_all) for i in range(workers))]
        decoder = collator.batch_decoder
        self._per_clip = stats["decode" if decoder is None else "prepare"]
        targets += [(f"batch-{i}", self._decode_batches) for i in range(decoder.batches_at_once if decoder else 0)]
        self._threads = [
            threading.Thread(target=self._run, args=(target,), name=f"fastav-{name}", daemon=True)
            for name, target in targets
        ]

    def start(self) -> None:
        """Starts the threads. torch uses one core in each worker; the caller's number of threads is unchanged."""
        before = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        self._started.wait()
        # torch keeps the number of threads per thread, but new threads start with the last value set: restore it.
        torch.set_num_threads(before)

    def close(self) -> None:
        """Ends the threads. Waits up to 5 s for clips that are being decoded."""
        with self._lock:
            self._closed = True
            self._tasks.clear()
            self._jobs.clear()
            self._prepared.clear()
            for condition in (self._slot_free, self._task_added, self._batch_ready, self._clips_prepared):
                condition.notify_all()
        if threading.current_thread() in self._threads:
            return
        deadline = time.perf_counter() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.perf_counter()))
        if any(thread.is_alive() for thread in self._threads):
            with self._lock:
                busy_with = self._being_decoded() or "planning a batch"
            log.warning("loader shutdown: threads still running: %s", busy_with)

    def next_batch(self) -> Batch:
        """Waits for the next batch of the requests and finishes it.

        Raises:
            StopIteration: All requests are delivered.
        """
        called = time.perf_counter()
        wait, collate = self._stats["wait"], self._stats["collate"]
        wait.busy_s += called - self._delivered_at
        try:
            job = self._wait_for(0)
            arrived = time.perf_counter()
            wait.get_wait_s += arrived - called
            if job is None:
                raise StopIteration
            batch = self._collator.batch(job, self._later())
        except BaseException:
            self.close()
            raise
        with self._lock:
            if self._jobs:  # empty if the stream was closed meanwhile
                self._jobs.popleft()
            self._slot_free.notify()
        self._delivered_at = time.perf_counter()
        collate.busy_s += self._delivered_at - arrived
        collate.items += 1
        wait.items += 1
        return batch

    def _later(self) -> Iterator[BatchJob]:
        """Yields the following jobs as they are done. Always up to `prefetch`, so the result is deterministic."""
        for place in range(1, self._prefetch):
            job = self._wait_for(place)
            if job is None:
                return
            yield job

    def _wait_for(self, place: int) -> BatchJob | None:
        """Waits until the job at this place of the queue is decoded; returns None if the requests end before it."""
        since = time.perf_counter()
        with self._lock:
            while True:
                if self._failure is not None:
                    raise self._failure
                if len(self._jobs) > place and self._jobs[place].pending == 0:
                    return self._jobs[place]
                if self._closed or (self._planned_all and len(self._jobs) <= place):
                    return None
                if not self._batch_ready.wait(self._watchdog_s):
                    log.warning("%s", self._describe_wait(place, time.perf_counter() - since))

    def _describe_wait(self, place: int, waited_s: float) -> str:
        """Describes what the consumer is waiting for. Call with the lock held."""
        if len(self._jobs) <= place:
            stage = f"plan, working on a batch for {time.perf_counter() - self._planning_since:.1f} s"
        else:
            job = self._jobs[place]
            batches = self._collator.batch_decoder is not None
            missing = job.pending - batches
            stage = f"decode, {missing} of {len(job.tasks)} clips of the next batch not decoded yet"
            if not missing:
                stage = "decode, all clips of the next batch are prepared, waiting for the batch decoder"
        return (
            f"loader: no batch for {waited_s:.0f} s; stage: {stage}; "
            f"decoding now: {self._being_decoded() or 'nothing'}; "
            f"queue: {len(self._tasks)} clips; prefetching {len(self._jobs)} of {self._prefetch} batches"
        )

    def _being_decoded(self) -> str:
        """Lists the files that are being decoded and their durations, longest first. Call with the lock held."""
        now = time.perf_counter()
        longest_first = sorted(self._decoding.values(), key=lambda entry: entry[1])
        return ", ".join(f"{clip.source} ({now - since:.1f} s)" for clip, since in longest_first)

    def _run(self, target: Callable[[], None]) -> None:
        """Body of each thread. An exception is raised again in the consumer, with the thread's traceback."""
        try:
            target()
        except BaseException as error:
            with self._lock:
                if self._failure is None:
                    self._failure = error
                self._batch_ready.notify_all()

    def _plan_all(self) -> None:
        """Planning thread: request -> job and its decode tasks, until `prefetch` batches are in the queue."""
        if self._device is not None:
            torch.cuda.set_device(self._device)
        stats = self._stats["plan"]
        while True:
            finished = time.perf_counter()
            with self._lock:
                while len(self._jobs) >= self._prefetch and not self._closed:
                    self._slot_free.wait()
                if self._closed:
                    return
                self._planning_since = slot_free = time.perf_counter()
            request = next(self._requests, None)
            requested = time.perf_counter()
            if request is None:
                break
            job = self._collator.job(request)
            with self._lock:
                if self._closed:
                    return
                self._jobs.append(job)
                self._tasks.extend(job.tasks)
                self._task_added.notify(len(job.tasks))
                if not job.tasks and job.pending:
                    self._queue_for_batch_decoder(job)
                self._batch_ready.notify_all()  # a batch of padding only is ready at once
                stats.put_wait_s += slot_free - finished
                stats.get_wait_s += requested - slot_free
                stats.busy_s += time.perf_counter() - requested
                stats.items += 1
        with self._lock:
            self._planned_all = True
            self._task_added.notify_all()
            self._batch_ready.notify_all()

    def _decode_all(self) -> None:
        """Decoding thread: decodes (or prepares) one clip after another."""
        torch.set_num_threads(1)
        # A thread adopts the global number of threads on its first read of it. Read it here, before the caller restores
        # the global value (see `start`).
        torch.get_num_threads()
        self._started.wait()
        stats, me = self._per_clip, threading.get_ident()
        while True:
            idle = time.perf_counter()
            with self._lock:
                while not self._tasks and not self._closed and not self._planned_all:
                    self._task_added.wait()
                if self._closed or not self._tasks:
                    return
                task = self._tasks.popleft()
                begun = time.perf_counter()
                self._decoding[me] = (task.clip, begun)
                stats.get_wait_s += begun - idle
            self._collator.decode(task)
            with self._lock:
                del self._decoding[me]
                stats.busy_s += time.perf_counter() - begun
                stats.items += 1
                task.job.pending -= 1
                if task.job.pending == 0:
                    self._batch_ready.notify_all()
                elif task.job.pending == 1 and self._collator.batch_decoder is not None:
                    self._queue_for_batch_decoder(task.job)

    def _queue_for_batch_decoder(self, job: BatchJob) -> None:
        """Queues a job whose clips are all prepared. Call with the lock held."""
        self._prepared.append(job)
        self._clips_prepared.notify()

    def _decode_batches(self) -> None:
        """Thread of a `BatchDecoder`: decodes one prepared batch after another."""
        if self._device is not None:
            torch.cuda.set_device(self._device)
        stats = self._stats["decode"]
        while True:
            idle = time.perf_counter()
            with self._lock:
                while not self._prepared and not self._closed:
                    self._clips_prepared.wait()
                if self._closed:
                    return
                job = self._prepared.popleft()
                begun = time.perf_counter()
                stats.get_wait_s += begun - idle
            self._collator.decode_batch(job)
            with self._lock:
                stats.busy_s += time.perf_counter() - begun
                stats.items += 1
                job.pending -= 1
                self._batch_ready.notify_all()
