"""Checkpoints: atomic folders of safetensors and JSON with checksums. Nothing in them is unpickled.

    checkpoints/step_00000120/{shard-00001-...,shard-00002-...}.safetensors, state.json, checksums.json

Each rank writes its part of the tensors (`checkpoint_writer.py`): `model/NAME`, `optimizer/NAME:KEY` and `ema/NAME`.
Tensors are whole, or pieces that hold their position (torch.distributed.checkpoint in safetensors), so any number of
ranks can read them under any strategy.

A checkpoint is written to a temporary folder, flushed, checksummed and renamed: a folder with its final name is
complete. If the newest one is damaged anyway (disk error, truncated copy), the one before it is loaded with a warning.
The random numbers of a step are derived from (seed, step, rank), so no generator state is saved.

Format 1 (a single rank) is also read: {model,optimizer,ema}.safetensors, one file for each kind.
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
from fastav.distributed.gloo_group import GlooGroup
from fastav.recipe.parse import Table, differences, parse_recipe, with_renamed_keys
from fastav.recipe.schema import Recipe

# torch warns about every run of a single process, although `no_dist` is set.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

FORMAT = 2
STATE, SUMS = "state.json", "checksums.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete and verified checkpoint.

    Attributes:
        step: Optimizer steps done when it was written.
        state: Content of `state.json`.
        path: Folder of the checkpoint.
    """

    step: int
    state: dict[str, Any]
    path: Path

    def sizes(self, kind: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Returns name -> (size, dtype) of all saved tensors of a kind: `model`, `optimizer` or `ema`."""
        prefix = f"{kind}/"
        return {name.removeprefix(prefix): size for name, size in self._all_sizes.items() if name.startswith(prefix)}

    @functools.cached_property
    def _all_sizes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """`KIND/NAME` -> (size, dtype), read without loading the tensors in format 2."""
        if self.state["format"] == 1:
            return {name: (value.shape, value.dtype) for name, value in self._format_1_tensors.items()}
        metadata = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
        return {name: (one.size, one.properties.dtype) for name, one in metadata.items()}  # type: ignore[union-attr]

    @functools.cached_property
    def _format_1_tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint of format 1."""
        return {
            f"{file.stem}/{name}": value
            for file in self.path.glob("*.safetensors")
            for name, value in load_file(file).items()
        }

    def load(self, kind: str, targets: Mapping[str, Tensor]) -> None:
        """Fills tensors in place with the saved values of the same names. Each rank reads only what it needs.

        Args:
            kind: `model`, `optimizer` or `ema`.
            targets: Name -> tensor or DTensor of the saved size.

        Raises:
            FastavError: A tensor is missing or has another size.
        """
        saved = self.sizes(kind)
        for name, target in targets.items():
            if name not in saved or saved[name][0] != target.shape:
                got = f"size {tuple(saved[name][0])}" if name in saved else "nothing"
                raise FastavError(
                    f"{self.path}: {kind} {name}: expected size {tuple(target.shape)}, checkpoint has {got}"
                )
        full_names = {f"{kind}/{name}": target for name, target in targets.items()}
        if self.state["format"] == 1:
            for name, target in full_names.items():
                _fill(target, self._format_1_tensors[name])
        elif full_names:
            dcp.load(full_names, storage_reader=HuggingFaceStorageReader(str(self.path)), no_dist=True)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Reads all tensors of a kind (`model`, `optimizer` or `ema`) unsharded on the CPU."""
        tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in self.sizes(kind).items()}
        self.load(kind, tensors)
        return tensors


@torch.no_grad()
def _fill(target: Tensor, value: Tensor) -> None:
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


class Checkpoints:
    """The checkpoint folder of a run.

    Args:
        folder: Folder that holds one folder per checkpoint.
        keep: Number of newest checkpoints to keep, in addition to the best one.
        gloo_group: Processes that read and write together; None for a single process.

    Example:
        checkpoint = Checkpoints(Path("runs/a/checkpoints")).newest()
        weights = checkpoint.tensors("model")
    """

    def __init__(self, folder: Path, keep: int = 2, gloo_group: GlooGroup | None = None) -> None:
        self.folder, self.keep, self.gloo_group = folder, keep, gloo_group or GlooGroup()

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, ascending."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*") if path.name[5:].isdigit())

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint of a step."""
        return self.folder / f"step_{step:08d}"

    def newest(self) -> Checkpoint | None:
        """Returns the newest undamaged checkpoint, or None if there are none. Collective: every rank must call it.

        Issues a Python warning for each damaged checkpoint that it skips.

        Raises:
            FastavError: All checkpoints are damaged.
        """
        # The list of rank 0 counts: other ranks may have an older view of a shared folder.
        steps = self.gloo_group.gather(self.steps())[0]
        for step in reversed(steps):
            try:
                return self.read(step)
            except FastavError as error:
                warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
        if steps:
            raise FastavError(
                f"{self.folder}: every checkpoint is damaged ({len(steps)} tried); move the folder away to start from "
                "step 0"
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """Verifies the checkpoint of one step; each rank checks a part of the files. Collective.

        Raises:
            FastavError: The checkpoint is missing, damaged, or of a newer format.
        """
        path = self.path(step)
        errors = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
        checkpoint, reason = self.gloo_group.run_all(lambda: self._verify(path, step), errors)
        if checkpoint is None or reason:
            raise FastavError(f"{path}: damaged checkpoint: {reason}")
        if checkpoint.state["format"] > FORMAT:
            raise FastavError(
                f"{path}: checkpoint format {checkpoint.state['format']} is newer than this version can read "
                f"({FORMAT}); update fastav"
            )
        return checkpoint

    def _verify(self, path: Path, step: int) -> Checkpoint:
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
        for name in sums:
            if Path(name).name != name:
                raise ValueError(f"{name} is outside the checkpoint")
        for name in self.gloo_group.own_part(sorted(sums)):
            if sha256(path / name) != sums[name]:
                raise ValueError(f"{name} does not match its checksum")
            if name.endswith(".safetensors"):
                with safe_open(path / name, framework="pt"):
                    pass  # the header can be read
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not isinstance(state["format"], int):
            raise ValueError(f"format {state['format']!r}")
        return Checkpoint(step=step, state=state, path=path)

    def remove_old(self, newest: int, best: int | None) -> None:
        """Removes all but the `keep` newest checkpoints up to step `newest`, and the best one.

        Checkpoints after `newest` are damaged ones that `newest()` skipped, so they do not count.
        """
        for step in [step for step in self.steps() if step <= newest][: -self.keep]:
            if step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)


def check_resumable(saved: Table, recipe: Recipe, path: Path) -> None:
    """Checks that a recipe gives the same numbers as the recipe of the checkpoint.

    Args:
        saved: Recipe in the checkpoint, as a table.
        recipe: Recipe of this start.
        path: Run folder, for the error message.

    Raises:
        UserError: A key outside `recipe.parse.CHANGEABLE` differs; the message names each with both values.
    """
    changed = differences(parse_recipe(with_renamed_keys(saved), {}, str(path)), recipe)
    if changed:
        text = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise UserError(
            f"{path}: cannot resume, the recipe differs in {text}; restore the old values or choose another --out"
        )


def write_best(folder: Path, step: int, metric: str, value: float) -> None:
    """Writes step, metric and value of the best checkpoint to `best.json` in the folder of checkpoints."""
    write_text(folder / "best.json", json.dumps({"step": step, "metric": metric, "value": value}))
