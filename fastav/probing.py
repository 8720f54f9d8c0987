"""Probes many media files at once, in processes that may die of one."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from fastav.decode.probe import MediaInfo, probe, probe_image, probe_mel
from fastav.errors import MediaError
from fastav.meter import num_cores

Job = tuple[Path, tuple[str, ...]]
"""A file, and what is wanted of it: "video", "audio" or both, or "image", or "mel"."""
Found = tuple[Path, "MediaInfo | MediaError"]


def probe_all(jobs: Sequence[Job], workers: int = 0) -> Iterator[Found]:
    """Yields what each file holds, or why it cannot be read, in the order in which they are done.

    A file that kills its process (a crash inside FFmpeg, out of memory) is found and named like any other fault.

    Args:
        jobs: Each file once.
        workers: Processes; 0 for one a core.
    """
    rest = iter(jobs)
    workers = max(1, min(workers or num_cores(), len(jobs)))
    while suspects := (yield from _together(rest, workers)):
        # Nobody knows which of the files in work killed its process: each of them gets a process of its own.
        for job in suspects:
            yield job[0], _alone(job)


def _together(rest: Iterator[Job], workers: int) -> Generator[Found, None, list[Job]]:
    """Probes files until there are no more, or until a process dies: then returns the files that were in work."""
    running: dict[Future[Any], Job] = {}
    waiting: list[Job] = []
    with _pool(workers) as pool:
        try:
            while True:
                while len(running) < 2 * workers and (job := next(rest, None)) is not None:
                    waiting = [job]
                    running[pool.submit(_look, job)] = job
                    waiting = []
                if not running:
                    return []
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    found = future.result()
                    path = running.pop(future)[0]
                    yield path, _named(path, found)
        except BrokenProcessPool:
            return [*running.values(), *waiting]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _alone(job: Job) -> MediaInfo | MediaError:
    with _pool(1) as pool:
        try:
            return _named(job[0], pool.submit(_look, job).result())
        except BrokenProcessPool:
            return MediaError(job[0], "the decoder crashed on it", "probe")


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not forked from here: a fork of a process with threads (torch's, Arrow's) may hang. Forked from a server that has
    # imported this module once and has none; or spawned, where there is no such thing.
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    context.set_forkserver_preload(["__main__", __name__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts)


def _ignore_interrupts() -> None:
    """Leaves Ctrl-C to the parent, which then stops giving out files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _look(job: Job) -> MediaInfo | tuple[str, str]:
    """Probes one file; returns reason and stage where it cannot be read (an error with three arguments is not sent)."""
    path, wanted = job
    try:
        if "image" in wanted:
            return probe_image(path)
        return probe_mel(path) if "mel" in wanted else probe(path, wanted)
    except MediaError as error:
        return error.reason, error.stage
    except Exception as error:  # whatever it is, it is about this file, and the others must go on
        return f"{type(error).__name__}: {error}", "probe"


def _named(path: Path, found: MediaInfo | tuple[str, str]) -> MediaInfo | MediaError:
    return MediaError(path, *found) if isinstance(found, tuple) else found
