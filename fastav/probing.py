"""Probes many media files at once, in processes that may die of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastav.decode.probe import MediaInfo, probe, probe_image, probe_mel
from fastav.errors import MediaError
from fastav.meter import num_cores
from fastav.parallel import each

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
    for done in each(jobs, probe_one, max(1, min(workers or num_cores(), len(jobs)))):
        path, found = done.job[0], done.result
        if done.died or found is None:
            yield path, MediaError(path, "the decoder crashed on it", "probe")
        else:
            yield path, MediaError(path, *found) if isinstance(found, tuple) else found


def probe_one(job: Job) -> MediaInfo | tuple[str, str]:
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
