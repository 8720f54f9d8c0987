"""Runs a function on many jobs in processes that may die of one or hang: that is a result like any other."""

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
"""Longer than any one clip takes to be decoded and encoded."""

JobT = TypeVar("JobT")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class JobResult(Generic[JobT, Result]):
    """A job and what became of it.

    Attributes:
        number: Of the job, counted from 0 in the order given.
        job: As given.
        result: What the function returned; None where its process died of it, or was killed as it hung.
        died: Whether it did.
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
    """Yields each job with its result, in the order in which they are done.

    Args:
        jobs: Read as they are needed; both they and the results are sent between processes.
        do: A function of a module, or a `functools.partial` of one; what it raises is raised here and ends it all.
        workers: Processes.
        ahead: No job is begun that is this many behind the oldest unfinished one, so that results which must wait
            for their turn do not pile up.
        patience_s: Seconds without any job getting done after which those in work are taken for hanging.
    """
    rest, proven = enumerate(jobs), False
    while suspects := (yield from _together(rest, do, workers, ahead, patience_s)):
        proven = proven or _processes_start(do)
        # Nobody knows which of the jobs in work killed its process, or hangs: each of them gets a process of its own.
        for number, job in suspects:
            yield _alone(number, job, do, patience_s)


def _together(
    rest: Iterator[tuple[int, JobT]],
    do: Callable[[JobT], Result],
    workers: int,
    ahead: int | None,
    patience_s: float,
) -> Generator[JobResult[JobT, Result], None, list[tuple[int, JobT]]]:
    """Works until there are no more jobs, or until a process dies or hangs: then returns the jobs in work."""
    running: dict[Future[Result], tuple[int, JobT]] = {}
    waiting: list[tuple[int, JobT]] = []
    with _pool(workers, do) as pool:
        try:
            while True:
                while len(running) < 2 * workers:
                    oldest = min((number for number, _ in running.values()), default=None)
                    newest = max((number for number, _ in running.values()), default=0)
                    if ahead is not None and oldest is not None and newest - oldest >= ahead:
                        break
                    job = next(rest, None)
                    if job is None:
                        break
                    waiting = [job]
                    running[pool.submit(do, job[1])] = job
                    waiting = []
                if not running:
                    return []
                done = wait(running, timeout=patience_s, return_when=FIRST_COMPLETED).done
                if not done:
                    _kill(pool)
                    return list(running.values())
                for future in done:
                    result = future.result()
                    number, what = running.pop(future)
                    yield JobResult(number, what, result)
        except BrokenProcessPool:
            return [*running.values(), *waiting]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _processes_start(do: Callable[..., Any]) -> bool:
    """Returns True where a process starts at all, whatever the function.

    Raises:
        FastavError: It cannot: then no job is to blame.
    """
    with _pool(1, do) as pool:
        try:
            return bool(pool.submit(os.getpid).result())
        except BrokenProcessPool:
            raise FastavError(
                "worker processes end as they start; a script that calls this needs its code under "
                'if __name__ == "__main__":, as they import it'
            ) from None


def _alone(number: int, job: JobT, do: Callable[[JobT], Result], patience_s: float) -> JobResult[JobT, Result]:
    with _pool(1, do) as pool:
        try:
            return JobResult(number, job, pool.submit(do, job).result(timeout=patience_s))
        except (BrokenProcessPool, TimeoutError):
            _kill(pool)
            return JobResult(number, job, None, died=True)


def _kill(pool: ProcessPoolExecutor) -> None:
    """Ends the processes of a pool, whatever they are at; leaving a pool would wait for them."""
    for process in list((pool._processes or {}).values()):  # there is no public way before Python 3.14
        process.kill()


def _pool(workers: int, do: Callable[..., Any]) -> ProcessPoolExecutor:
    function = do.func if isinstance(do, functools.partial) else do
    return ProcessPoolExecutor(workers, mp_context=server(function.__module__), initializer=start_worker)


def server(module: str) -> BaseContext:
    """Returns the way in which processes are started that run functions of a module.

    Not forked from here: a fork of a process with threads (torch's, Arrow's) may hang. Forked from a server that has
    imported the module once and has none; or spawned, where there is no such thing.
    """
    there = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if there else "spawn")
    context.set_forkserver_preload(["__main__", module])
    return context


def start_worker() -> None:
    """Leaves Ctrl-C to the parent, which then stops giving out jobs, and ends with the parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="fastav-parent", daemon=True).start()
