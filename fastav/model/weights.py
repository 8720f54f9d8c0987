"""Filling a network from weights of a slightly different one: other classes, another image size.

Only safetensors are read. What does not fit is named, never skipped in silence; the head alone may differ.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from fastav.core.errors import UserError, listed

log = logging.getLogger(__name__)

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


@dataclass(frozen=True)
class RunTower:
    """One tower of a finished run.

    Attributes:
        state: Its parameters and buffers by the network's own names.
        classes: The run's classes.
        grid: Its patches (high, wide), None where it is not a ViT.
    """

    state: dict[str, Tensor]
    classes: tuple[str, ...]
    grid: tuple[int, int] | None


def read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    """Reads the tensors of a file.

    Raises:
        UserError: where it is not there or no safetensors file; `where` names the key it came from.
    """
    if not path.is_file():
        raise UserError(f'{where}: "{path}": no such file')
    if path.suffix != ".safetensors":
        raise UserError(
            f'{where}: "{path.name}" is not a .safetensors file (other formats can run code when they are read)'
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f'{where}: "{path}" cannot be read: {" ".join(str(error).split())}') from error


def read_description(folder: Path, where: str) -> dict:
    """Reads the `model.json` of a saved model.

    Raises:
        UserError: where it is not there or broken.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f'{where}: "{folder}" holds no {DESCRIPTION}; the folder of a run or its model/ expected')
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description, dict):
            raise ValueError("a table expected")
        return description
    except ValueError as error:
        raise UserError(f"{where}: {path} is broken: {error}") from error


def model_folder(folder: Path) -> Path:
    """Returns the folder of the saved model: `folder/model` of a run, otherwise `folder` itself."""
    return folder / "model" if (folder / "model" / DESCRIPTION).is_file() else folder


def read_run(run: Path, modality: str, where: str) -> RunTower:
    """Reads the tower of one modality from the folder of a run, or of its model.

    Raises:
        UserError: where there is no such model or it has no such tower.
    """
    folder = model_folder(run)
    description = read_description(folder, where)
    state = read_safetensors(folder / WEIGHTS, where)
    prefix = f"{modality}.net."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not own:
        there = sorted({name.split(".")[0] for name in state} & {"video", "audio"})
        raise UserError(f'{where}: the model in "{folder}" has no {modality} tower; it has: {", ".join(there)}')
    inputs = description.get("inputs", {})
    if modality == "video":
        size = (inputs.get("image_size", 0), inputs.get("image_size", 0))
    else:
        size = (inputs.get("num_mels", 0), inputs.get("window", 0))
    patch = own.get("patch_embed.proj.weight")
    grid = None if patch is None else (size[0] // patch.shape[-2], size[1] // patch.shape[-1])
    return RunTower(own, tuple(description.get("classes", ())), grid)


def fill(
    net: Any,
    state: Mapping[str, Tensor],
    *,
    where: str,
    grid: tuple[int, int] | None = None,
    head: bool = True,
) -> None:
    """Loads what fits into a network, a ViT's position and patch embeddings resampled where sizes differ.

    What does not fit is named in one warning. The head is left as it is where it differs, without a warning.

    Args:
        net: Network with `get_classifier()`.
        state: Tensors by the network's names.
        where: The key they came from, for messages.
        grid: Patches (high, wide) of the position embedding in `state`; unknown: square, or those of `net`.
        head: Whether the head is wanted.

    Raises:
        UserError: where nothing fits.
    """
    own = net.state_dict()
    heads = _head_names(net, [*own, *state])
    missing: list[str] = []
    other_shape: list[str] = []
    fitting = {}
    for name, value in own.items():
        if name in heads and not head:
            continue
        new = _adapted(name, state, net, value, grid)
        if new is not None and new.shape == value.shape:
            fitting[name] = new
        elif name not in heads:
            (missing if new is None else other_shape).append(name)
    if not set(fitting) - heads:
        raise UserError(f"{where}: not one of its {len(state)} tensors fits this tower")
    net.load_state_dict(fitting, strict=False)
    unknown = [name for name in state if name not in own and name not in heads]
    reasons = (("not there", missing), ("of another shape", other_shape), ("not in this tower", unknown))
    text = "; ".join(f"{reason}: {listed(names)}" for reason, names in reasons if names)
    if text:
        log.warning("%s: not everything was loaded. %s", where, text)


def _head_names(net: Any, names: Collection[str]) -> set[str]:
    """Returns which names belong to the head, of this network or of one with other classes."""
    classifier = net.get_classifier()
    prefixes = [name for name, module in net.named_modules() if module is classifier]
    listed = (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
    prefixes += [listed] if isinstance(listed, str) else list(listed)
    return {name for name in names if any(name.startswith(f"{p}.") for p in prefixes if p)}


def _adapted(
    name: str, state: Mapping[str, Tensor], net: Any, own: Tensor, grid: tuple[int, int] | None
) -> Tensor | None:
    """Returns the tensor for a parameter of `net`, resampled where it is one of a ViT's embeddings."""
    value = state.get(name)
    if value is None:
        return None
    if name == "patch_embed.proj.weight" and value.ndim == own.ndim == 4 and value.shape[:2] == own.shape[:2]:
        return resample_patch_embed(value, list(own.shape[2:]))
    if name == "pos_embed" and value.ndim == own.ndim == 3 and hasattr(net, "num_prefix_tokens"):
        return _positions(value, state, net, grid)
    return value


def _positions(value: Tensor, state: Mapping[str, Tensor], net: Any, grid: tuple[int, int] | None) -> Tensor:
    """Fits a position embedding [1, P + N, D] to the grid and to the class and register tokens of `net`."""
    no_prefix = bool(getattr(net, "no_embed_class", False))
    given = 0 if no_prefix else sum(state[k].shape[1] for k in ("cls_token", "reg_token") if k in state)
    wanted = 0 if no_prefix else net.num_prefix_tokens
    patches = value.shape[1] - given
    new_grid = tuple(net.patch_embed.grid_size)
    if grid is None or math.prod(grid) != patches:
        side = math.isqrt(max(patches, 0))
        grid = (side, side) if side * side == patches else new_grid
    if math.prod(grid) != patches or wanted not in (0, given):
        return value  # its shape is wrong, which is reported
    resampled = resample_abs_pos_embed(value, list(new_grid), list(grid), num_prefix_tokens=given)
    return resampled if wanted == given else resampled[:, given:]
