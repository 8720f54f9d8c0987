"""Decoding in processes: threads hand clips over and find the samples in shared memory.

What a thread of the loader holds Python's lock for is then a message each way instead of a decode, so that many workers
scale, and a codec that crashes costs its clip and not the run. What it costs: memory and a start for each process, and
one more copy of every sample. `benchmarks.loader_workers` and `python -m benchmarks data` measure both kinds.
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
from fastav.core.process_pool import server, start_worker
from fastav.data.clip import Clip, ClipPlan
from fastav.media.decoder import ClipDecoder, Sample

_LEFT_TO_THE_PARENT = (signal.SIGTERM, signal.SIGUSR1)  # sent to all processes of a job, whose steps want to end well


class DecoderProcesses:
    """A decoder whose work is done elsewhere; for any number of threads, of which `count` decode at a time.

    What it returns lies in the memory of the process that made it, which decodes no other clip until the last of the
    tensors is let go of.

    Args:
        decoder: What each process gets a copy of.
        count: Processes, each started when it is first needed.

    Raises:
        UserError: Not on Linux.
    """

    def __init__(self, decoder: ClipDecoder, count: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise UserError('loading.worker: "process" given, which needs Linux; "thread" works here')
        self.name, self.read = decoder.name, decoder.read
        self._decoder = decoder
        # A simple queue, as the garbage collector may give a process back in the middle of another call.
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)
        self._there = _ProcessSet()
        # At the end of the program this runs before multiprocessing waits for its children.
        self._end = Finalize(self, self._there.end, exitpriority=10)

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        """See `Decoder.decode`.

        Raises:
            MediaError: As the decoder says; or its process died of the clip, and the next one gets a new process.
        """
        process = self._idle.get()
        try:
            process = process or self._there.add(_Process(self._decoder))
            made = process.decode(clip, plans)
        except BaseException as error:
            if process is not None:
                self._there.drop(process)
            self._idle.put(None)
            if isinstance(error, _Died):
                raise MediaError(clip.source, f"the decoder crashed ({error})", "decode") from None
            raise
        if isinstance(made, Exception):
            self._idle.put(process)
            raise made
        room_N = np.frombuffer(process.room, np.uint8)
        # All tensors below are views of this array, and hold it.
        weakref.finalize(room_N, self._idle.put, process).atexit = False
        return [Sample(_look(room_N, frames), _look(room_N, mel)) for frames, mel in made.samples]

    def close(self) -> None:
        """Ends the processes."""
        self._end()


class _ProcessSet:
    """The processes that there are; once they have been ended, none is added."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[_Process] = []
        self._ended = False

    def add(self, process: _Process) -> _Process:
        """Notes a process, or ends it where it is too late.

        Raises:
            FastavError: It is.
        """
        with self._lock:
            if not self._ended:
                self._processes.append(process)
                return process
        process.end()
        raise FastavError("the loader is closed")

    def drop(self, process: _Process) -> None:
        """Ends one."""
        with self._lock:
            here = process in self._processes
            if here:
                self._processes.remove(process)
        if here:
            process.end()

    def end(self) -> None:
        """Ends all."""
        with self._lock:
            self._ended = True
            processes, self._processes = self._processes, []
        for process in processes:
            process.end()


@dataclass(frozen=True, slots=True)
class _TensorPlace:
    """Where a tensor lies in the room."""

    at: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class _DecodedClip:
    """A clip's samples, as places in the room.

    Attributes:
        grown: Size of a new room whose descriptor follows; 0 where the old one does.
        samples: Frames and spectrogram of each.
    """

    grown: int
    samples: list[tuple[_TensorPlace | None, _TensorPlace | None]]


class _Died(Exception):
    """A process ended in the middle of a clip; says how."""


class _Process:
    """The parent's side of one process; for one thread at a time."""

    def __init__(self, decoder: ClipDecoder) -> None:
        context: Any = server(__name__)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, decoder), name="fastav-decode", daemon=True)
        self._process.start()
        theirs.close()
        self.room: mmap.mmap | bytes = b""

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> _DecodedClip | Exception:
        """Returns where in `room` the samples are, or what the decoder raised.

        Raises:
            _Died: The process ended.
        """
        try:
            self._pipe.send((clip, list(plans)))
            made: _DecodedClip | Exception = self._pipe.recv()
            if isinstance(made, _DecodedClip) and made.grown:
                descriptor = recv_handle(self._pipe)
                self.room = mmap.mmap(descriptor, made.grown)
                os.close(descriptor)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            raise _Died(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
        return made

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _look(room_N: NDArray[np.uint8], part: _TensorPlace | None) -> Tensor | None:
    """Returns a tensor of the room."""
    if part is None:
        return None
    dtype = np.dtype(part.dtype)
    size = int(np.prod(part.shape)) * dtype.itemsize
    return torch.from_numpy(room_N[part.at : part.at + size].view(dtype).reshape(part.shape))


def _serve(pipe: Connection, decoder: ClipDecoder) -> None:
    """What a process does: decodes clip after clip until the parent is gone."""
    start_worker()
    for number in _LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    room = _SharedMemory()
    while True:
        try:
            clip, plans = pipe.recv()
        except EOFError:
            return
        try:
            made, descriptor = room.put(decoder.decode(clip, plans))
        except MediaError as error:
            pipe.send(error)
            continue
        except Exception as error:
            error.add_note(f"in a process of the loader:\n{traceback.format_exc()}")
            pipe.send(error)
            continue
        pipe.send(made)
        if descriptor is not None:
            parent = multiprocessing.parent_process()
            send_handle(pipe, descriptor, getattr(parent, "pid", None))
            os.close(descriptor)


class _SharedMemory:
    """The process's side of the memory that it shares with the parent; it has no name, so nothing outlives them."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def put(self, samples: Sequence[Sample]) -> tuple[_DecodedClip, int | None]:
        """Copies samples into the room, and returns where, and the descriptor of a new room where the old is too small.

        Tensors that several samples share are copied once.
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
            room = self._bytes[part.at : part.at + array.nbytes]
            room.view(array.dtype).reshape(array.shape)[...] = array

        def place(tensor: Tensor | None) -> _TensorPlace | None:
            return None if tensor is None else parts[id(tensor)][0]

        places = [(place(sample.frames_TCHW), place(sample.mel_WCML)) for sample in samples]
        return _DecodedClip(0 if descriptor is None else size, places), descriptor

    def _grow(self, size: int) -> int:
        """Makes a new room and returns its descriptor."""
        descriptor = os.memfd_create("fastav-samples", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        self._bytes = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        return descriptor
