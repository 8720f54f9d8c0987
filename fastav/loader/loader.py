"""The loader: plan -> decode -> batch, by threads, ahead of the consumer.

A planning thread turns requests into plans and clips, decoding threads take one clip at a time straight into the
rows of its batch, and the consumer finishes batches in the order of the requests: broken clips get placeholders
there, so that what a batch holds depends on the plan alone, never on the number of workers.

Why threads and not processes: PyAV and torch release Python's lock where they work, and no frame crosses from one
process to another. Measured by `benchmarks.loader_workers` (60 mp4 files of 4 s, 96 x 96, H.264 and AAC; 2 workers
on 2 cores that were busy otherwise; 12 interleaved rounds, median and quartiles), against a pool of processes that
write into shared memory:

    |                                          | threads             | processes           |
    |------------------------------------------|---------------------|---------------------|
    | first batch of 16 from a standing start  | 1.2 s (1.1-1.3)     | 19.9 s (17.6-25.2)  |
    | clips/s, nothing else in the program     | 15.6 (13.3-18.9)    | 16.4 (14.1-18.2)    |
    | CPU per clip                             | 25.0 ms (23.4-25.9) | 26.8 ms (23.4-29.6) |
    | clips/s beside a training step           | 10.4 (9.3-10.8)     | 9.4 (8.3-11.6)      |
    | that step                                | 1029 ms (985-1190)  | 1171 ms (951-1416)  |
    | 4000 tiny torch calls in the main thread | 181 ms (131-195)    | 166 ms (154-191)    |
    | memory of the workers' own               | 0                   | 374 MiB each        |

So they are equally fast, start 17 times sooner, and need no memory and no shared memory, which containers are short
of. What they cost: a decode of such a file holds Python's lock for 40 % of its time (sampled; 174 audio packets, one
call each), so that threads of one process cannot decode raw files like these on more than two or three cores' worth,
and six of them lengthened the 4000 tiny calls to 382 ms against 264 ms with six processes. Several training processes
on a machine have a loader each; larger pictures hold the lock for a smaller share, and clips of a pack for 15 %
(sampled; 448 x 256, eight frames, no sound).

With more workers than that for each GPU, `loading.worker = "process"` has every thread hand its clips over to a
process (`fastav.loader.processes`): what it makes is the same, the lock is held for a message each way, and a codec
that crashes costs its clip. Its copies take 1.0 ms a clip (10.6 against 9.6 ms, no sound), so that frames alone gain
nothing on two cores; with sound, whose many short steps hold the lock, two processes made 132 clips/s (122 to 146) of a
`balanced` pack, two threads 114 (108 to 122) (`python -m benchmarks data --sweep`). `fastav doctor` measures both.

torch runs on one core in each worker, as whole clips run in parallel; the consumer's own count is left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from fastav.core.config import Config, Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from fastav.core.errors import MediaError, TooManyBroken
from fastav.core.machine import cores_each
from fastav.data.clip import Clip
from fastav.loader.batch import Batch
from fastav.loader.collate import Collator, Request
from fastav.loader.processes import DecoderProcesses
from fastav.loader.threads import BatchStream, StageStats
from fastav.media.decoder import BatchDecoder, ClipDecoder
from fastav.media.shards import ShardReading

if TYPE_CHECKING:
    from fastav.data.plan import Plan

__all__ = ["JUDGED_AFTER", "Batches", "ClipDecoder", "Loader", "Loading", "Request", "StageStats", "Worker"]

Worker = Literal["thread", "process"]

JUDGED_AFTER = 50
"""Samples that must have been seen before the share of broken ones means anything."""


class Loading(Config, frozen=True):
    """How batches are made ahead of the training step.

    Attributes:
        workers: Decoding threads; 0 shares the machine's cores among its training processes.
        worker: What a worker is: `thread`, or `process`: the threads have their clips decoded by a process each, which
            pays above two or three of them (see `fastav.loader.loader`).
        prefetch: Batches that may be on their way.
        watchdog_s: Seconds without a batch after which a warning names what is being waited for; it repeats.
        max_broken: Share of broken samples above which `Loader.check_broken` raises.
        shards: How shards of packed clips are read.
    """

    workers: NonNegativeInt = 0
    worker: Worker = "thread"
    prefetch: PositiveInt = 2
    watchdog_s: PositiveFloat = 60.0
    max_broken: Fraction = 0.05
    shards: ShardReading = ShardReading()

    def num_workers(self) -> int:
        """Returns the number of decoding threads in force."""
        if self.workers:
            return self.workers
        return max(1, int(cores_each()))


class Loader:
    """Makes batches of a plan.

    A clip that cannot be read is replaced, with weight 0, by a copy of a good row of its batch, or of the batch
    before, or (at the start) of one on its way; nobody is mixed with it. So is the padding of an evaluation.

    Args:
        plan: What is at each position.
        decoder: Reads one clip, and says what it reads; called from several threads at once.
        config: Workers, prefetch, limits.
        modalities: `video`, `audio` or both; what is left out is None in the batches.
        classes: Columns of the targets.
        aliases: Other names of classes.
        on_broken: Called in the consumer's thread, once for each clip that cannot be read.
        pin_memory: Batches in page-locked memory, which a GPU fetches asynchronously.
    """

    def __init__(
        self,
        plan: Plan,
        decoder: ClipDecoder | BatchDecoder,
        config: Loading,
        *,
        modalities: Sequence[str],
        classes: Sequence[str],
        aliases: Mapping[str, str] | None = None,
        on_broken: Callable[[Clip, MediaError], None],
        pin_memory: bool = False,
    ) -> None:
        self.config = config
        self._processes: DecoderProcesses | None = None
        if config.worker == "process" and not isinstance(decoder, BatchDecoder):
            decoder = self._processes = DecoderProcesses(decoder, config.num_workers())
        self._assembler = Collator(
            plan,
            decoder,
            modalities=modalities,
            classes=classes,
            aliases=aliases,
            on_broken=on_broken,
            pin_memory=pin_memory,
        )
        self._decoder = decoder
        names = ("plan", "prepare", "decode", "collate", "wait")
        batches = isinstance(decoder, BatchDecoder)
        self._stats = {name: StageStats() for name in names if batches or name != "prepare"}
        self._streams: weakref.WeakSet[BatchStream] = weakref.WeakSet()

    @property
    def broken(self) -> int:
        """Samples delivered as placeholders because their clip could not be read."""
        return self._assembler.broken

    @property
    def seen(self) -> int:
        """Samples delivered, padding apart."""
        return self._assembler.seen

    def batches(self, requests: Iterable[Request]) -> Batches:
        """Starts to make the requested batches, and returns them one by one in the order of the requests.

        Args:
            requests: Kind (`train` or `evaluate`), first sample and count of each batch; may be endless; read in
                another thread.

        Returns:
            An iterator with `close()`; work stops when it is closed, used up or forgotten. An error of a worker
            is raised in it, with the worker's traceback. It raises `TooManyBroken` where none of the first clips
            could be read.
        """
        stream = BatchStream(
            self._assembler,
            iter(requests),
            self._stats,
            workers=self.config.num_workers(),
            prefetch=self.config.prefetch,
            watchdog_s=self.config.watchdog_s,
        )
        self._streams.add(stream)
        stream.start()
        return Batches(stream)

    def stats(self) -> dict[str, StageStats]:
        """Returns what each stage did so far: `plan`, `decode` (over all workers), `collate`, `wait`.

        With a decoder of whole batches the workers `prepare` clips, and `decode` is of batches, over its pipelines.

        `wait` is the consumer: `get_wait_s` while it waited for a batch, `busy_s` between two batches.
        """
        return {name: replace(stats) for name, stats in self._stats.items()}

    def check_broken(self, broken: int | None = None, seen: int | None = None) -> None:
        """Stops a run that reads too little of its data.

        Args:
            broken: Broken samples so far, over all ranks; this loader's own by default.
            seen: Samples so far, likewise.

        Raises:
            TooManyBroken: The share is above `max_broken`, once 50 samples have been seen.
        """
        broken, seen = self.broken if broken is None else broken, self.seen if seen is None else seen
        if seen >= JUDGED_AFTER and broken > self.config.max_broken * seen:
            raise TooManyBroken(
                f"{broken} of {seen} clips could not be read, more than loading.max_broken = "
                f"{self.config.max_broken:g} allows{self._assembler.named()}"
            )

    def close(self) -> None:
        """Ends all threads and processes, and closes the decoder of whole batches, if that is what there is."""
        for stream in list(self._streams):
            stream.close()
        if self._processes is not None:
            self._processes.close()
        if isinstance(self._decoder, BatchDecoder):
            self._decoder.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Batches(Iterator[Batch]):
    """The batches of one call of `Loader.batches`; `close()` ends its threads, and so does forgetting it."""

    def __init__(self, stream: BatchStream) -> None:
        self._stream = stream
        # The threads hold the stream, not this: when the consumer lets go of it, the threads end.
        self._close = weakref.finalize(self, stream.close)

    def __next__(self) -> Batch:
        return self._stream.next_batch()

    def close(self) -> None:
        """Ends the threads; batches on their way are dropped."""
        self._close()
