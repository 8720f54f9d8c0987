"""CheckpointWriter: writes checkpoints in the background while the training continues.

`start` copies the tensors of this rank to host memory; the training waits for nothing else. A thread then writes them
(torch.distributed.checkpoint, over a gloo group of its own), flushes and checksums them. Rank 0 renames the
folder when every rank has finished. The next `wait` raises an error of the thread, on every rank.
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
from fastav.distributed.gloo_group import GlooGroup
from fastav.training.checkpoint import FORMAT, STATE, SUMS, Checkpoints, write_best

_WRITE_ERRORS = (OSError, SafetensorError, CheckpointException, RuntimeError)


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        checkpoints: Checkpoint folder of the run.
        asynchronous: Whether the training continues while a checkpoint is written.

    Attributes:
        failed: Whether the last checkpoint could not be written; `wait` raises the reason.
    """

    def __init__(self, checkpoints: Checkpoints, *, asynchronous: bool = True) -> None:
        self._checkpoints, self._gloo_group, self._asynchronous = checkpoints, checkpoints.gloo_group, asynchronous
        self._thread: threading.Thread | None = None
        self._reason, self._step = "", 0
        self._mesh: DeviceMesh | None = None  # CPU mesh of the copies, made at the first save
        self._buffers: dict[str, Tensor] = {}  # reused: allocating costs more than copying

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written. False while the thread is still writing."""
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
        """Starts to write a checkpoint after the previous one is complete. Collective: every rank must call it.

        Args:
            step: Optimizer steps done.
            tensors: `kind/name` -> tensor that this rank writes, see `TensorSplit`. They may change after the return.
            state: JSON-serialisable state; that of rank 0 is written.
            best: Step, metric and value of the best checkpoint, which is not removed.
            order: `TensorSplit.order` of this rank. If ranks disagree, tensors would be missing or mixed up; then
                nothing is written and `wait` raises an error.

        Raises:
            FastavError: The previous checkpoint could not be written.
        """
        self.wait()
        self._step = step
        if not self._asynchronous:
            self._write(step, dict(tensors), state, best or {}, order)
            self.wait()
            return
        args = (step, self._copy_to_host(tensors), state, best or {}, order)
        self._thread = threading.Thread(target=self._write, args=args, name="fastav-checkpoint_writer")
        self._thread.start()

    def _copy_to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors to buffers in host memory, page-locked if the tensors are on a GPU."""
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
            torch.cuda.synchronize()  # the copies are asynchronous, and the next step changes the tensors
        return staged

    def wait(self) -> None:
        """Waits until the last checkpoint is written. Every rank must call it.

        Raises:
            FastavError: The checkpoint could not be written, for example because the disk is full. Older checkpoints
                are untouched.
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
        """Body of the thread: writes the checkpoint; stores the reason in `_reason` if that fails."""
        try:
            self._reason = self._write_all(step, tensors, state, best, order)
        except (Exception, CheckpointException) as error:  # gloo raises different errors when another rank is gone
            self._reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _write_all(
        self, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any], best: Mapping[str, Any], order: str
    ) -> str:
        """Writes the parts of all ranks, then renames the folder on rank 0. Returns the reason of a failure, or ""."""
        gloo_group, main = self._gloo_group, self._gloo_group.rank == 0
        ids, orders = zip(*gloo_group.gather((uuid.uuid4().hex[:12], order)), strict=True)
        if len(set(orders)) > 1:
            return "internal error: ranks disagree on the order of the tensors; please report it"
        temporary = self._checkpoints.folder / f".step_{step:08d}.{ids[0]}.tmp"

        def finish(sums: Mapping[str, str]) -> None:
            if main:
                self._finish(step, temporary, sums, state)

        _, reason = gloo_group.run_all(lambda: self._prepare(temporary) if main else None, _WRITE_ERRORS)
        sums: list[dict[str, str] | None] = []
        if not reason:
            own_sums, reason = gloo_group.run_all(lambda: _write_part(temporary, tensors, gloo_group), _WRITE_ERRORS)
            sums = gloo_group.gather(own_sums)
        if not reason:
            all_sums = {name: digest for part in sums if part for name, digest in part.items()}
            _, reason = gloo_group.run_all(lambda: finish(all_sums), _WRITE_ERRORS)
        if main:
            if reason:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                self._checkpoints.remove_old(step, best.get("step"))
                if best:
                    write_best(self._checkpoints.folder, **best)
        return reason

    def _prepare(self, temporary: Path) -> None:
        """Makes the temporary folder, and removes those of saves that were killed."""
        folder = self._checkpoints.folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()

    def _finish(self, step: int, temporary: Path, sums: Mapping[str, str], state: Mapping[str, Any]) -> None:
        """Writes state and checksums, and renames the folder. After the rename the checkpoint exists."""
        text = json.dumps({"format": FORMAT, "step": step, **state})
        (temporary / STATE).write_text(text, encoding="utf-8")
        sums = {**sums, STATE: sha256(temporary / STATE)}
        (temporary / SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for path in (temporary / STATE, temporary / SUMS, temporary):
            flush(path)
        final = self._checkpoints.path(step)
        if final.exists():  # the same step was written before a fall-back to an older checkpoint: the bits are the same
            shutil.rmtree(final)
        os.replace(temporary, final)
        flush(self._checkpoints.folder)


def _write_part(folder: Path, tensors: dict[str, Tensor], gloo_group: GlooGroup) -> dict[str, str]:
    """Writes and flushes this rank's tensors; returns file name -> checksum."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=gloo_group.group, no_dist=gloo_group.world == 1)
    return {file.name: sha256(file) for file in sorted(folder.glob(f"shard-{gloo_group.rank + 1:05d}-*"))}


class TensorSplit:
    """Assigns the tensors of a checkpoint to ranks.

    Every rank runs the same greedy assignment without communication, so each must pass the same names in the same
    order. `CheckpointWriter` compares `order` to verify that.

    Args:
        gloo_group: Processes that write the checkpoint.
    """

    def __init__(self, gloo_group: GlooGroup) -> None:
        self._rank, self._loads, self._names = gloo_group.rank, [0] * gloo_group.world, hashlib.blake2b(digest_size=8)

    def select(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Selects the tensors that this rank writes: its pieces of DTensors, and a fair share of the whole tensors.

        Args:
            tensors: (name, tensor) pairs, in the same order on every rank. Tensors that another rank writes are
                released at once.

        Returns:
            Name -> tensor to write.
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
        """Digest of the names so far, in their order."""
        return self._names.hexdigest()
