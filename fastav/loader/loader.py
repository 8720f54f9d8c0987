"""Loader: plan -> decode -> batch, in threads, ahead of the consumer.

A planning thread turns requests into plans and clips. Decoding threads take one clip at a time and write it into its
rows of the batch. The consumer finishes batches in the order of the requests and replaces broken clips by placeholders
there. So the content of a batch depends on the plan only, never on the number of workers.

Workers are threads by default: PyAV and torch release the GIL while they work, and no frame is copied between
processes. Threads were as fast as processes and delivered the first batch 17 times sooner, without memory of their own.
Decoding raw files holds the GIL for a part of the time, so threads do not scale beyond two or three cores. For more
workers per GPU, `loading.worker = "process"` lets every thread hand its clips to a process
(`fastav.loader.processes`), with the same results. The measurements are in docs/loader.md; `fastav doctor` measures
both kinds of worker on your machine.

torch uses one core in each worker, because whole clips run in parallel. The consumer's own number of threads is left
unchanged.
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

__all__ = ["MIN_SAMPLES", "Batches", "ClipDecoder", "Loader", "Loading", "Request", "StageStats", "Worker"]

Worker = Literal["thread", "process"]

MIN_SAMPLES = 50
"""Number of samples below which the share of broken samples is not checked."""


class Loading(Config, frozen=True):
    """How batches are made ahead of the training step.

    Attributes:
        workers: Number of decoding workers per training process; 0 shares the machine's CPU cores evenly among its
            training processes.
        worker: Kind of worker: `thread`, or `process`. Results are the same. Processes pay off with more than two or
            three workers per training process; they use more memory and need Linux.
        prefetch: Maximum number of batches per training process that are loaded ahead of the training step.
        watchdog_s: Seconds without a batch after which a warning names the stage and the files that are waited for. The
            warning repeats.
        max_broken: Largest allowed share of samples that cannot be read. Above it the run ends with exit code 3. It is
            checked from 50 samples on.
        shards: How shards of packed clips are read.
    """

    workers: NonNegativeInt = 0
    worker: Worker = "thread"
    prefetch: PositiveInt = 2
    watchdog_s: PositiveFloat = 60.0
    max_broken: Fraction = 0.05
    shards: ShardReading = ShardReading()

    def num_workers(self) -> int:
        """Returns the number of decoding workers, with 0 resolved to the share of the machine's cores."""
        if self.workers:
            return self.workers
        return max(1, int(cores_each()))


class Loader:
    """Makes the batches of a plan.

    A clip that cannot be read is replaced by a copy of a good row, with weight 0 and without mixup. The copy comes from
    the same batch, from the batch before, or, at the start, from a prefetched one. Padding rows of an evaluation are
    filled in the same way.

    Args:
        plan: Which clip, frames and windows are at each position of the sample stream.
        decoder: Decodes clips or whole batches; called from several threads at once.
        config: Workers, prefetch and limits.
        modalities: `video`, `audio` or both; tensors of a missing modality are None in the batches.
        classes: Class names, in the order of the columns of the targets.
        aliases: Label in the manifest -> class name.
        on_broken: Called in the consumer's thread, once for each clip that cannot be read.
        pin_memory: Whether batches are in page-locked memory, from which copies to a GPU are asynchronous.

    Example:
        with Loader(plan, decoder, Loading(workers=4), modalities=("video", "audio"), classes=classes,
                    on_broken=lambda clip, error: print(error)) as loader:
            for batch in loader.batches([("train", 0, 32), ("train", 32, 32)]):
                print(batch.frames_BTCHW.shape)
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
        self._collator = Collator(
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
        """Number of samples delivered as placeholders because their clip could not be read."""
        return self._collator.broken

    @property
    def seen(self) -> int:
        """Number of samples delivered, without padding."""
        return self._collator.seen

    def batches(self, requests: Iterable[Request]) -> Batches:
        """Starts to make the requested batches.

        Args:
            requests: (kind, first sample, count) of each batch, with kind `train` or `evaluate`. The iterable may be
                endless; it is read in another thread.

        Returns:
            An iterator over the batches in the order of the requests. Work stops when it is exhausted, closed with
            `close()` or garbage-collected. An exception of a worker is raised by the iterator, with the worker's
            traceback. The iterator raises `TooManyBroken` if none of the first clips can be read.
        """
        stream = BatchStream(
            self._collator,
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
        """Returns a copy of the statistics of each stage: `plan`, `decode` (sum over all workers), `collate`, `wait`.

        With a `BatchDecoder` there is a stage `prepare` for clips, and `decode` counts batches over its pipelines.

        `wait` is the consumer: `get_wait_s` is the time it waited for batches, `busy_s` the time between batches.
        """
        return {name: replace(stats) for name, stats in self._stats.items()}

    def check_broken(self, broken: int | None = None, seen: int | None = None) -> None:
        """Raises an error if too large a share of the samples could not be read.

        Args:
            broken: Number of broken samples over all ranks; by default those of this loader.
            seen: Number of samples over all ranks; by default those of this loader.

        Raises:
            TooManyBroken: The share is above `max_broken` after at least 50 samples.
        """
        broken, seen = self.broken if broken is None else broken, self.seen if seen is None else seen
        if seen >= MIN_SAMPLES and broken > self.config.max_broken * seen:
            raise TooManyBroken(
                f"{broken} of {seen} clips could not be read, more than loading.max_broken = "
                f"{self.config.max_broken:g} allows{self._collator.first_reasons()}"
            )

    def close(self) -> None:
        """Ends all threads and processes, and closes a `BatchDecoder`."""
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
    """Iterator over the batches of one call of `Loader.batches`. Closing or garbage-collecting it ends the threads."""

    def __init__(self, stream: BatchStream) -> None:
        self._stream = stream
        # The threads refer to the stream, not to this object: they end when the consumer drops it.
        self._close = weakref.finalize(self, stream.close)

    def __next__(self) -> Batch:
        return self._stream.next_batch()

    def close(self) -> None:
        """Ends the threads; prefetched batches are dropped."""
        self._close()
