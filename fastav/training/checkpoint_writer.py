"""Writes checkpoints while the training goes on.

`start` copies what this rank saves to the CPU's memory, which is all that the training waits for; a thread then writes
it (torch.distributed.checkpoint, in the host group's own group), flushes and checksums it, and rank 0 renames the
folder when every rank has done so. What goes wrong there is raised by the next `wait`, on every rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from fastav.core.atomic_files import flush, sha256
from fastav.core.errors import FastavError
from fastav.distributed.host_group import HostGroup
from fastav.training.checkpoint import FORMAT, STATE, SUMS, Checkpoints, write_best

_WRONG = (OSError, SafetensorError, CheckpointException, RuntimeError)


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        checkpoints: Where they go.
        asynchronous: Whether the training goes on while they are written.

    Attributes:
        failed: Whether the last one could not be written; `wait` says why.
    """

    def __init__(self, checkpoints: Checkpoints, *, asynchronous: bool = True) -> None:
        self._checkpoints, self._host_group, self._asynchronous = checkpoints, checkpoints.host_group, asynchronous
        self._thread: threading.Thread | None = None
        self._reason, self._step = "", 0
        self._mesh: DeviceMesh | None = None  # of the copies, made with the first of them
        self._buffers: dict[str, Tensor] = {}  # kept: memory that is new costs more than the copy

    @property
    def failed(self) -> bool:
        """See the class; the thread may still be at work."""
        return bool(self._reason)

    def start(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        best: Mapping[str, Any] | None = None,
        *,
        order: str = "",
    ) -> None:
        """Begins to write a checkpoint, once the one before is done; every rank must call it.

        Args:
            step: Optimizer steps done.
            tensors: `kind/name` -> what this rank writes, see `TensorSplit`; they may change once this returns.
            state: Anything JSON can hold; that of rank 0 is written.
            best: Step, metric and value of the best checkpoint, which is not removed.
            order: `TensorSplit.order`; ranks that differ in it would leave tensors out or mix them up, and
                write nothing.

        Raises:
            FastavError: As `wait`.
        """
        self.wait()
        self._step = step
        if not self._asynchronous:
            self._write(step, dict(tensors), state, best or {}, order)
            self.wait()
            return
        words = (step, self._staged(tensors), state, best or {}, order)
        self._thread = threading.Thread(target=self._write, args=words, name="fastav-checkpoint_writer")
        self._thread.start()

    def _staged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors to buffers on the CPU, from a GPU into page-locked ones."""
        staged: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            staged[name] = buffer.copy_(local, non_blocking=local.is_cuda)
            if isinstance(tensor, DTensor):
                if self._mesh is None:
                    self._mesh = init_device_mesh("cpu", tuple(tensor.device_mesh.shape))
                staged[name] = DTensor.from_local(
                    buffer, self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies do not block, and the next step changes what they copy
        return staged

    def wait(self) -> None:
        """Waits until the last checkpoint is written; every rank must call it.

        Raises:
            FastavError: The disk is full or not writable; older checkpoints are untouched.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._reason:
            reason, self._reason = self._reason, ""
            kept = self._checkpoints.steps()
            safe = f"the checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
            raise FastavError(
                f"{self._checkpoints.folder}: cannot save the checkpoint of step {self._step}: {reason}; {safe}"
            )

    def _write(
        self, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any], best: Mapping[str, Any], order: str
    ) -> None:
        """Writes on every rank, then renames on rank 0; leaves the reason in `_reason` where that fails."""
        try:
            self._reason = self._written(step, tensors, state, best, order)
        except (Exception, CheckpointException) as error:  # another rank is gone; whatever gloo raises then
            self._reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _written(
        self, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any], best: Mapping[str, Any], order: str
    ) -> str:
        host_group, main = self._host_group, self._host_group.rank == 0
        words, orders = zip(*host_group.gather((uuid.uuid4().hex[:12], order)), strict=True)
        if len(set(orders)) > 1:
            return "ranks list its tensors in different orders, which is a mistake of this program"
        beside = self._checkpoints.folder / f".step_{step:08d}.{words[0]}.tmp"

        def finish(sums: Mapping[str, str]) -> None:
            if main:
                self._finish(step, beside, sums, state)

        _, reason = host_group.together(lambda: self._prepare(beside) if main else None, _WRONG)
        sums: list[dict[str, str] | None] = []
        if not reason:
            own, reason = host_group.together(lambda: _write_part(beside, tensors, host_group), _WRONG)
            sums = host_group.gather(own)
        if not reason:
            every = {name: digest for part in sums if part for name, digest in part.items()}
            _, reason = host_group.together(lambda: finish(every), _WRONG)
        if main:
            if reason:
                shutil.rmtree(beside, ignore_errors=True)
            else:
                self._checkpoints.remove_old(step, best.get("step"))
                if best:
                    write_best(self._checkpoints.folder, **best)
        return reason

    def _prepare(self, beside: Path) -> None:
        """Makes the folder, and removes what a kill inside a save left behind."""
        folder = self._checkpoints.folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir()

    def _finish(self, step: int, beside: Path, sums: Mapping[str, str], state: Mapping[str, Any]) -> None:
        """Writes state and checksums, and renames the folder: from here on the checkpoint exists."""
        text = json.dumps({"format": FORMAT, "step": step, **state})
        (beside / STATE).write_text(text, encoding="utf-8")
        sums = {**sums, STATE: sha256(beside / STATE)}
        (beside / SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for path in (beside / STATE, beside / SUMS, beside):
            flush(path)
        there = self._checkpoints.path(step)
        if there.exists():  # the same step, made again after a fall-back: the bits are the same
            shutil.rmtree(there)
        os.replace(beside, there)
        flush(self._checkpoints.folder)


def _write_part(beside: Path, tensors: dict[str, Tensor], host_group: HostGroup) -> dict[str, str]:
    """Writes and flushes this rank's tensors; returns its files with their checksums."""
    writer = HuggingFaceStorageWriter(str(beside), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=host_group.group, no_dist=host_group.world == 1)
    return {file.name: sha256(file) for file in sorted(beside.glob(f"shard-{host_group.rank + 1:05d}-*"))}


class TensorSplit:
    """Who writes what of a checkpoint: every rank counts along, and must see the same names in the same order.

    Args:
        host_group: The processes.
    """

    def __init__(self, host_group: HostGroup) -> None:
        self._rank, self._loads, self._names = host_group.rank, [0] * host_group.world, hashlib.blake2b(digest_size=8)

    def own(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Chooses what this rank writes: its pieces of what is cut, and a fair share of what every rank has whole.

        Args:
            tensors: Name -> tensor, in the same order on every rank; each is dropped at once where another writes it.
        """
        kept = {}
        for name, tensor in tensors:
            self._names.update(name.encode() + b"\0")
            if isinstance(tensor, DTensor):
                kept[name] = tensor.detach()
                continue
            rank = self._loads.index(min(self._loads))
            self._loads[rank] += tensor.numel()
            if rank == self._rank:
                kept[name] = tensor.detach()
        return kept

    @property
    def order(self) -> str:
        """A digest of the names so far."""
        return self._names.hexdigest()
