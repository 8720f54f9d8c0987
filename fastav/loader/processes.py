"""Decoding in worker processes: threads send clips and receive the samples in shared memory.

A loader thread then holds the GIL for one message each way instead of for parts of a decode, so many workers scale. A
codec that crashes costs one clip and not the run. The price is memory and start-up time of each process, and one more
copy of every sample. `benchmarks.loader_workers` and `python -m benchmarks data` measure both kinds of worker.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastav.core.errors import FastavError, MediaError, UserError
from fastav.core.process_pool import start_worker, worker_context
from fastav.data.clip import Clip, ClipPlan
from fastav.media.decoder import ClipDecoder, Sample

# Schedulers send these to all processes of a job. Workers ignore them, so that the parent can finish its step.
_IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class DecoderProcesses:
    """A `ClipDecoder` that decodes in worker processes. Any number of threads may call it; `count` decode at a time.

    The returned tensors are views of memory shared with the worker process. It decodes no other clip until the last of
    them is freed.

    Args:
        decoder: Decoder that each process gets a copy of.
        count: Number of processes; each is started when it is first needed.

    Raises:
        UserError: The operating system is not Linux.
    """

    def __init__(self, decoder: ClipDecoder, count: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise UserError('loading.worker = "process" needs Linux; use "thread"')
        self.name, self.spec = decoder.name, decoder.spec
        self._decoder = decoder
        # SimpleQueue is re-entrant: the garbage collector may return a process in the middle of another call.
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)
        self._processes = _ProcessSet()
        # At interpreter exit this runs before multiprocessing waits for its children.
        self._end = Finalize(self, self._processes.end, exitpriority=10)

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        """Decodes a clip in a worker process, see `ClipDecoder.decode`.

        Raises:
            MediaError: Raised by the decoder, or the process crashed on the clip; the next clip gets a new process.
        """
        process = self._idle.get()
        try:
            process = process or self._processes.add(_Process(self._decoder))
            decoded = process.decode(clip, plans)
        except BaseException as error:
            if process is not None:
                self._processes.drop(process)
            self._idle.put(None)
            if isinstance(error, _ProcessDied):
                raise MediaError(clip.source, f"the decoder crashed ({error})", "decode") from None
            raise
        if isinstance(decoded, Exception):
            self._idle.put(process)
            raise decoded
        memory_N = np.frombuffer(process.memory, np.uint8)
        # The tensors below are views of this array and keep it alive. The process is idle again when all are freed.
        weakref.finalize(memory_N, self._idle.put, process).atexit = False
        return [Sample(_tensor_at(memory_N, frames), _tensor_at(memory_N, mel)) for frames, mel in decoded.samples]

    def close(self) -> None:
        """Ends the processes."""
        self._end()


class _ProcessSet:
    """The running processes. After `end`, no process can be added."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[_Process] = []
        self._ended = False

    def add(self, process: _Process) -> _Process:
        """Adds a process, or ends it if the set is already closed.

        Raises:
            FastavError: The set is closed.
        """
        with self._lock:
            if not self._ended:
                self._processes.append(process)
                return process
        process.end()
        raise FastavError("the loader is closed")

    def drop(self, process: _Process) -> None:
        """Removes and ends one process."""
        with self._lock:
            known = process in self._processes
            if known:
                self._processes.remove(process)
        if known:
            process.end()

    def end(self) -> None:
        """Ends all processes and closes the set."""
        with self._lock:
            self._ended = True
            processes, self._processes = self._processes, []
        for process in processes:
            process.end()


@dataclass(frozen=True, slots=True)
class _TensorPlace:
    """Location of a tensor in the shared memory; `offset` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class _DecodedClip:
    """Locations of a clip's samples in the shared memory.

    Attributes:
        new_size: Bytes of a new memory block, whose file descriptor is sent next; 0 if the old block is still used.
        samples: (frames, spectrogram) of each sample.
    """

    new_size: int
    samples: list[tuple[_TensorPlace | None, _TensorPlace | None]]


class _ProcessDied(Exception):
    """A process ended while it decoded a clip; the message is the signal or exit code."""


class _Process:
    """The parent's side of one worker process; not thread-safe."""

    def __init__(self, decoder: ClipDecoder) -> None:
        context: Any = worker_context(__name__)
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(
            target=_worker_main, args=(child_pipe, decoder), name="fastav-decode", daemon=True
        )
        self._process.start()
        child_pipe.close()
        self.memory: mmap.mmap | bytes = b""

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> _DecodedClip | Exception:
        """Returns the locations of the samples in `memory`, or the exception that the decoder raised.

        Raises:
            _ProcessDied: The process ended.
        """
        try:
            self._pipe.send((clip, list(plans)))
            decoded: _DecodedClip | Exception = self._pipe.recv()
            if isinstance(decoded, _DecodedClip) and decoded.new_size:
                descriptor = recv_handle(self._pipe)
                self.memory = mmap.mmap(descriptor, decoded.new_size)
                os.close(descriptor)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            raise _ProcessDied(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
        return decoded

    def end(self) -> None:
        """Kills the process, also in the middle of a decode."""
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _tensor_at(memory_N: NDArray[np.uint8], place: _TensorPlace | None) -> Tensor | None:
    """Returns the tensor at a location of the shared memory, as a view."""
    if place is None:
        return None
    dtype = np.dtype(place.dtype)
    size = int(np.prod(place.shape)) * dtype.itemsize
    return torch.from_numpy(memory_N[place.offset : place.offset + size].view(dtype).reshape(place.shape))


def _worker_main(pipe: Connection, decoder: ClipDecoder) -> None:
    """Main function of a worker process: decodes clips until the parent closes the pipe."""
    start_worker()
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    memory = _SharedMemory()
    while True:
        try:
            clip, plans = pipe.recv()
        except EOFError:
            return
        try:
            decoded, descriptor = memory.put(decoder.decode(clip, plans))
        except MediaError as error:
            pipe.send(error)
            continue
        except Exception as error:
            error.add_note(f"in a loader process:\n{traceback.format_exc()}")
            pipe.send(error)
            continue
        pipe.send(decoded)
        if descriptor is not None:
            parent = multiprocessing.parent_process()
            send_handle(pipe, descriptor, getattr(parent, "pid", None))
            os.close(descriptor)


class _SharedMemory:
    """The worker's side of the shared memory. It has no name in the file system, so it ends with the processes."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def put(self, samples: Sequence[Sample]) -> tuple[_DecodedClip, int | None]:
        """Copies samples into the shared memory. Tensors that several samples share are copied once.

        Returns:
            The locations, and the file descriptor of a new memory block if the old one was too small, else None.
        """
        parts: dict[int, tuple[_TensorPlace, NDArray[Any]]] = {}
        size = 0
        for tensor in (t for sample in samples for t in (sample.frames_TCHW, sample.mel_WCML) if t is not None):
            if id(tensor) not in parts:
                array = tensor.numpy()
                parts[id(tensor)] = (_TensorPlace(size, array.shape, array.dtype.str), array)
                size += -(-array.nbytes // 64) * 64
        descriptor = self._grow(size) if size > len(self._bytes) else None
        for part, array in parts.values():
            target = self._bytes[part.offset : part.offset + array.nbytes]
            target.view(array.dtype).reshape(array.shape)[...] = array

        def place(tensor: Tensor | None) -> _TensorPlace | None:
            return None if tensor is None else parts[id(tensor)][0]

        places = [(place(sample.frames_TCHW), place(sample.mel_WCML)) for sample in samples]
        return _DecodedClip(0 if descriptor is None else size, places), descriptor

    def _grow(self, size: int) -> int:
        """Allocates a new memory block and returns its file descriptor."""
        descriptor = os.memfd_create("fastav-samples", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        self._bytes = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        return descriptor
