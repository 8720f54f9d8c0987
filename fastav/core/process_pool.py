"""Runs a function on many jobs in worker processes. A job that kills its process or hangs is reported as a result."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

from fastav.core.errors import FastavError

PATIENCE_S = 900.0
"""Seconds without a finished job after which running jobs count as hanging; longer than any clip takes to pack."""

JobT = TypeVar("JobT")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class JobResult(Generic[JobT, Result]):
    """A finished job.

    Attributes:
        number: Index of the job in the input, from 0.
        job: The job.
        result: Return value of the function; None if `died`.
        died: True if the job killed its process, or hung and was killed.
    """

    number: int
    job: JobT
    result: Result | None
    died: bool = False


def run_jobs(
    jobs: Iterable[JobT],
    do: Callable[[JobT], Result],
    workers: int,
    *,
    ahead: int | None = None,
    patience_s: float = PATIENCE_S,
) -> Iterator[JobResult[JobT, Result]]:
    """Yields each job with its result, in the order in which the jobs finish.

    Args:
        jobs: Jobs, read lazily. Jobs and results must be picklable.
        do: A function at module level, or a `functools.partial` of one. An exception that it raises is raised here
            and ends the iteration.
        workers: Number of processes.
        ahead: Maximum distance between the newest started and the oldest unfinished job; None for no limit. It bounds
            the number of results that a caller has to hold to restore the order.
        patience_s: Seconds without any finished job after which the running jobs count as hanging.

    Example:
        >>> for done in run_jobs(files, probe, workers=4):
        ...     print(done.job, "killed its process" if done.died else done.result)
    """
    remaining, pool_works = enumerate(jobs), False
    while suspects := (yield from _run_together(remaining, do, workers, ahead, patience_s)):
        pool_works = pool_works or _check_processes_start(do)
        # It is unknown which running job killed its process or hangs, so each is repeated in a process of its own.
        for number, job in suspects:
            yield _run_alone(number, job, do, patience_s)


def _run_together(
    remaining: Iterator[tuple[int, JobT]],
    do: Callable[[JobT], Result],
    workers: int,
    ahead: int | None,
    patience_s: float,
) -> Generator[JobResult[JobT, Result], None, list[tuple[int, JobT]]]:
    """Runs jobs until none remain (returns []), or until a process dies or hangs (returns the unfinished jobs)."""
    running: dict[Future[Result], tuple[int, JobT]] = {}
    submitting: list[tuple[int, JobT]] = []
    with _pool(workers, do) as pool:
        try:
            while True:
                while len(running) < 2 * workers:
                    oldest = min((number for number, _ in running.values()), default=None)
                    newest = max((number for number, _ in running.values()), default=0)
                    if ahead is not None and oldest is not None and newest - oldest >= ahead:
                        break
                    job = next(remaining, None)
                    if job is None:
                        break
                    submitting = [job]
                    running[pool.submit(do, job[1])] = job
                    submitting = []
                if not running:
                    return []
                done = wait(running, timeout=patience_s, return_when=FIRST_COMPLETED).done
                if not done:
                    _kill(pool)
                    return list(running.values())
                for future in done:
                    result = future.result()
                    number, finished = running.pop(future)
                    yield JobResult(number, finished, result)
        except BrokenProcessPool:
            return [*running.values(), *submitting]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _check_processes_start(do: Callable[..., Any]) -> bool:
    """Returns True if a worker process can be started.

    Raises:
        FastavError: It cannot be started, so no job is to blame.
    """
    with _pool(1, do) as pool:
        try:
            return bool(pool.submit(os.getpid).result())
        except BrokenProcessPool:
            raise FastavError(
                "worker processes exit at start; worker processes import the calling script, so put its code under "
                'if __name__ == "__main__":'
            ) from None


def _run_alone(number: int, job: JobT, do: Callable[[JobT], Result], patience_s: float) -> JobResult[JobT, Result]:
    with _pool(1, do) as pool:
        try:
            return JobResult(number, job, pool.submit(do, job).result(timeout=patience_s))
        except (BrokenProcessPool, TimeoutError):
            _kill(pool)
            return JobResult(number, job, None, died=True)


def _kill(pool: ProcessPoolExecutor) -> None:
    """Kills the processes of a pool. Leaving the pool's context would wait for them."""
    for process in list((pool._processes or {}).values()):  # no public API before Python 3.14
        process.kill()


def _pool(workers: int, do: Callable[..., Any]) -> ProcessPoolExecutor:
    function = do.func if isinstance(do, functools.partial) else do
    return ProcessPoolExecutor(workers, mp_context=worker_context(function.__module__), initializer=start_worker)


def worker_context(module: str) -> BaseContext:
    """Returns the multiprocessing context for workers that run functions of `module`.

    Forking this process may hang, because it has threads (torch, Arrow). So workers are forked from a server process
    without threads that has imported the module once (forkserver), or spawned where forkserver is not available.
    """
    has_forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_forkserver else "spawn")
    context.set_forkserver_preload(["__main__", module])
    return context


def start_worker() -> None:
    """Initialises a worker process: ignore Ctrl-C, which the parent handles, and exit when the parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, name="fastav-parent", daemon=True).start()
