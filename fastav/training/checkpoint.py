"""Checkpoints: atomic, checksummed folders of safetensors and JSON; nothing in them is ever unpickled.

    checkpoints/step_00000120/{shard-00001-...,shard-00002-...}.safetensors, state.json, checksums.json

Each rank has written its part of the tensors (`checkpoint_writer.py`): `model/NAME`, `optimizer/NAME:KEY` and
`ema/NAME`, whole or in pieces that know their place (torch.distributed.checkpoint in safetensors), so that any number
of ranks reads them under any strategy. A checkpoint is written into a temporary folder beside, flushed, checksummed and
renamed, so a name that exists is whole. Should the newest be damaged all the same (a bad disk, a copy cut short), the
one before it is taken, with a warning. All randomness of a step is drawn from (seed, step, rank), so no generator state
is saved. Format 1, of one rank, is read as well: {model,optimizer,ema}.safetensors, one file for each kind.
"""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor

from fastav.core.atomic_files import sha256, write_text
from fastav.core.errors import FastavError, UserError
from fastav.distributed.host_group import HostGroup
from fastav.recipe.parse import Table, differences, parse_recipe, renewed
from fastav.recipe.schema import Recipe

# It wonders about every single process, which it is told of by `no_dist`.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

FORMAT = 2
STATE, SUMS = "state.json", "checksums.json"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that is whole.

    Attributes:
        step: Optimizer steps done when it was written.
        state: Its JSON state.
        path: Its folder.
    """

    step: int
    state: dict[str, Any]
    path: Path

    def sizes(self, kind: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Name -> size and type of all saved tensors of a kind: `model`, `optimizer` or `ema`."""
        prefix = f"{kind}/"
        return {name.removeprefix(prefix): told for name, told in self._told.items() if name.startswith(prefix)}

    @functools.cached_property
    def _told(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        if self.state["format"] == 1:
            return {name: (value.shape, value.dtype) for name, value in self._whole.items()}
        found = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
        return {name: (one.size, one.properties.dtype) for name, one in found.items()}  # type: ignore[union-attr]

    @functools.cached_property
    def _whole(self) -> dict[str, Tensor]:
        """All tensors of format 1."""
        return {
            f"{file.stem}/{name}": value
            for file in self.path.glob("*.safetensors")
            for name, value in load_file(file).items()
        }

    def load(self, kind: str, targets: Mapping[str, Tensor]) -> None:
        """Fills tensors with what was saved under their names, each rank reading what it needs.

        Args:
            kind: `model`, `optimizer` or `ema`.
            targets: Name -> a tensor or DTensor of the saved size.

        Raises:
            FastavError: A name or size is not there.
        """
        saved = self.sizes(kind)
        for name, target in targets.items():
            if name not in saved or saved[name][0] != target.shape:
                there = tuple(saved[name][0]) if name in saved else "nothing"
                raise FastavError(f"{self.path}: {kind} {name}: {there} saved, {tuple(target.shape)} expected")
        wanted = {f"{kind}/{name}": target for name, target in targets.items()}
        if self.state["format"] == 1:
            for name, target in wanted.items():
                _fill(target, self._whole[name])
        elif wanted:
            dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(self.path)), no_dist=True)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Reads all tensors of a kind, whole, on the CPU."""
        found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in self.sizes(kind).items()}
        self.load(kind, found)
        return found


@torch.no_grad()
def _fill(target: Tensor, value: Tensor) -> None:
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they are.
        keep: How many of the newest stay; the best one stays beside them.
        host_group: The processes that read it together.
    """

    def __init__(self, folder: Path, keep: int = 2, host_group: HostGroup | None = None) -> None:
        self.folder, self.keep, self.host_group = folder, keep, host_group or HostGroup()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*") if path.name[5:].isdigit())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of that step."""
        return self.folder / f"step_{step:08d}"

    def newest(self) -> Checkpoint | None:
        """Finds the newest checkpoint that is whole; None without any. Every rank must call it.

        Warns of each damaged one that it passes over.

        Raises:
            FastavError: There are checkpoints, but every one of them is damaged.
        """
        steps = self.host_group.gather(self.steps())[0]  # of rank 0: another's view of a shared folder may be older
        for step in reversed(steps):
            try:
                return self.read(step)
            except FastavError as error:
                warnings.warn(f"{error}; falling back to the one before", stacklevel=2)
        if steps:
            raise FastavError(
                f"{self.folder}: every checkpoint is damaged ({len(steps)} tried); move the folder away to start anew"
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """Verifies the checkpoint of one step, each rank its share of the files. Every rank must call it.

        Raises:
            FastavError: It is missing, damaged, or of a newer format.
        """
        path = self.path(step)
        wrong = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
        found, reason = self.host_group.together(lambda: self._verified(path, step), wrong)
        if found is None or reason:
            raise FastavError(f"{path}: damaged checkpoint: {reason}")
        if found.state["format"] > FORMAT:
            raise FastavError(f"{path}: format {found.state['format']} is newer than this version reads ({FORMAT})")
        return found

    def _verified(self, path: Path, step: int) -> Checkpoint:
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
        for name in sums:
            if Path(name).name != name:
                raise ValueError(f"{name} is no file of this folder")
        for name in self.host_group.share(sorted(sums)):
            if sha256(path / name) != sums[name]:
                raise ValueError(f"{name} does not match its checksum")
            if name.endswith(".safetensors"):
                with safe_open(path / name, framework="pt"):
                    pass  # it can be read
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not isinstance(state["format"], int):
            raise ValueError(f"format {state['format']!r}")
        return Checkpoint(step=step, state=state, path=path)

    def remove_old(self, newest: int, best: int | None) -> None:
        """Keeps the newest; later ones are damaged and were passed over, so they do not count."""
        for step in [step for step in self.steps() if step <= newest][: -self.keep]:
            if step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)


def check_resumable(saved: Table, recipe: Recipe, path: Path) -> None:
    """Refuses to resume under a recipe whose numbers would differ.

    Args:
        saved: The recipe in the checkpoint, as a table.
        recipe: The recipe of this start.
        path: The run folder, for the message.

    Raises:
        UserError: A key outside `recipe.CHANGEABLE` differs; the message names each with both values.
    """
    found = differences(parse_recipe(renewed(saved), {}, str(path)), recipe)
    if found:
        told = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in found.items())
        raise UserError(f"{path}: cannot resume, the recipe differs in {told}; put it back or choose another --out")


def write_best(folder: Path, step: int, metric: str, value: float) -> None:
    """Notes which checkpoint is the best, in `best.json` beside them."""
    write_text(folder / "best.json", json.dumps({"step": step, "metric": metric, "value": value}))
