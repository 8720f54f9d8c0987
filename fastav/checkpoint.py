"""Checkpoints: atomic, checksummed folders of safetensors and JSON; nothing in them is ever unpickled.

    checkpoints/step_00000120/{model,optimizer,ema}.safetensors, state.json, checksums.json

A checkpoint is written into a temporary folder beside, flushed, checksummed and renamed, so a name that exists is
whole. Should the newest be damaged all the same (a bad disk, a copy cut short), the one before it is taken, with a
warning. All randomness of a step is drawn from (seed, step, rank), so no generator state is saved.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastav.errors import FastavError, UserError
from fastav.files import flush, sha256, write_text
from fastav.recipe import Recipe, Table, differences, parse

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint read back.

    Attributes:
        step: Optimizer steps done when it was written.
        tensors: File stem (`model`, `optimizer`, `ema`) -> named tensors, on the CPU.
        state: The JSON state, as given to `save`.
        path: Its folder.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they are.
        keep: How many of the newest stay; the best one stays beside them.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*") if path.name[5:].isdigit())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of that step."""
        return self.folder / f"step_{step:08d}"

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        best: int | None = None,
    ) -> Path:
        """Writes one checkpoint, then removes those that are no longer kept.

        Args:
            step: Optimizer steps done.
            tensors: File stem -> named tensors; tensors that share memory must not be given twice.
            state: Anything JSON can hold.
            best: Step of the best checkpoint, which is not removed.

        Returns:
            The checkpoint's folder.

        Raises:
            FastavError: The disk is full or not writable; older checkpoints are untouched.
        """
        beside = self.folder / f".step_{step:08d}.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            beside.mkdir()
            for stem, named in tensors.items():
                save_file(
                    {name: t.detach().cpu().contiguous() for name, t in named.items()},
                    beside / f"{stem}.safetensors",
                )
            state_text = json.dumps({"format": FORMAT, "step": step, **state})
            (beside / "state.json").write_text(state_text, encoding="utf-8")
            files = sorted(beside.iterdir())
            sums = {file.name: sha256(file) for file in files}
            (beside / "checksums.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
            for file in (*files, beside / "checksums.json", beside):
                flush(file)
            if self.path(step).exists():  # the same step, made again after a fall-back: the bits are the same
                shutil.rmtree(self.path(step))
            os.replace(beside, self.path(step))
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            kept = self.steps()
            safe = f"the checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
            raise FastavError(f"{self.folder}: cannot save the checkpoint of step {step}: {reason}; {safe}") from None
        self._remove_old(step, best)
        return self.path(step)

    def newest(self) -> Checkpoint | None:
        """Reads the newest checkpoint that is whole; None without any.

        Warns of each damaged one that it passes over.

        Raises:
            FastavError: There are checkpoints, but every one of them is damaged.
        """
        steps = self.steps()
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
        """Reads and verifies the checkpoint of one step.

        Raises:
            FastavError: It is missing, damaged, or of a newer format.
        """
        path = self.path(step)
        try:
            sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
            for name, digest in sums.items():
                if Path(name).name != name or sha256(path / name) != digest:
                    raise FastavError(f"{path}: {name} does not match its checksum")
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if state["format"] > FORMAT:
                raise FastavError(f"{path}: format {state['format']} is newer than this version reads ({FORMAT})")
            stems = [Path(name).stem for name in sums if name.endswith(".safetensors")]
            tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in stems}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise FastavError(f"{path}: damaged checkpoint: {error}") from None
        return Checkpoint(step=step, tensors=tensors, state=state, path=path)

    def _remove_old(self, newest: int, best: int | None) -> None:
        """Keeps the newest; later ones are damaged and were passed over, so they do not count."""
        for step in [step for step in self.steps() if step <= newest][: -self.keep]:
            if step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Removes what a kill inside a save left behind."""
        for leftover in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


def check_resumable(saved: Table, recipe: Recipe, path: Path) -> None:
    """Refuses to resume under a recipe whose numbers would differ.

    Args:
        saved: The recipe in the checkpoint, as a table.
        recipe: The recipe of this start.
        path: The run folder, for the message.

    Raises:
        UserError: A key outside `recipe.CHANGEABLE` differs; the message names each with both values.
    """
    found = differences(parse(saved, {}, str(path)), recipe)
    if found:
        told = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in found.items())
        raise UserError(f"{path}: cannot resume, the recipe differs in {told}; put it back or choose another --out")


def write_best(folder: Path, step: int, metric: str, value: float) -> None:
    """Notes which checkpoint is the best, in `best.json` beside them."""
    write_text(folder / "best.json", json.dumps({"step": step, "metric": metric, "value": value}))
