"""Loads weights into a network that differs slightly: other classes, another image size.

Only safetensors files are read. A warning lists every parameter that does not fit; only the head may differ silently.
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
        state: Parameters and buffers, by their names in the network.
        classes: Class names of the run.
        grid: Number of patches (rows, columns) of a ViT; None for another network.
    """

    state: dict[str, Tensor]
    classes: tuple[str, ...]
    grid: tuple[int, int] | None


def read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file.

    Args:
        path: File to read.
        where: Recipe key that names the file, for messages.

    Raises:
        UserError: There is no such file, or it is not a valid safetensors file.
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

    Args:
        folder: Folder of the saved model.
        where: Recipe key that names the folder, for messages.

    Raises:
        UserError: There is no such file, or it is not valid JSON.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f'{where}: "{folder}" has no {DESCRIPTION}; expected the folder of a run, or its model/')
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description, dict):
            raise ValueError("expected a JSON object")
        return description
    except ValueError as error:
        raise UserError(f"{where}: {path} is broken: {error}") from error


def model_folder(folder: Path) -> Path:
    """Returns the folder of the saved model: `folder/model` for a run, otherwise `folder` itself."""
    return folder / "model" if (folder / "model" / DESCRIPTION).is_file() else folder


def read_run(run: Path, modality: str, where: str) -> RunTower:
    """Reads the tower of one modality from the folder of a run or of a saved model.

    Args:
        run: Folder of the run or of the saved model.
        modality: `video` or `audio`.
        where: Recipe key that names the folder, for messages.

    Raises:
        UserError: There is no saved model, or it has no tower of this modality.
    """
    folder = model_folder(run)
    description = read_description(folder, where)
    state = read_safetensors(folder / WEIGHTS, where)
    prefix = f"{modality}.net."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not own:
        towers = sorted({name.split(".")[0] for name in state} & {"video", "audio"})
        raise UserError(f'{where}: the model in "{folder}" has no {modality} tower; it has: {", ".join(towers)}')
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
    """Loads the tensors that fit into a network; a ViT's position and patch embeddings are resampled.

    One warning lists what does not fit. A head that differs keeps its initial values, without a warning.

    Args:
        net: Network with `get_classifier()`.
        state: Tensors, by their names in the network.
        where: Recipe key that names the source, for messages.
        grid: Number of patches (rows, columns) of the position embedding in `state`. None: it is taken as square, or
            else as that of `net`.
        head: Whether to load the head.

    Raises:
        UserError: No tensor fits.
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
        raise UserError(f"{where}: none of its {len(state)} tensors fits this tower")
    net.load_state_dict(fitting, strict=False)
    unknown = [name for name in state if name not in own and name not in heads]
    reasons = (("missing", missing), ("different shape", other_shape), ("not in this tower", unknown))
    text = "; ".join(f"{reason}: {listed(names)}" for reason, names in reasons if names)
    if text:
        log.warning("%s: some parameters were not loaded: %s", where, text)


def _head_names(net: Any, names: Collection[str]) -> set[str]:
    """Returns which of the names belong to the classification head."""
    classifier = net.get_classifier()
    prefixes = [name for name, module in net.named_modules() if module is classifier]
    listed = (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
    prefixes += [listed] if isinstance(listed, str) else list(listed)
    return {name for name in names if any(name.startswith(f"{p}.") for p in prefixes if p)}


def _adapted(
    name: str, state: Mapping[str, Tensor], net: Any, own: Tensor, grid: tuple[int, int] | None
) -> Tensor | None:
    """Returns the tensor for a parameter of `net`, resampled if it is an embedding of a ViT; None if it is missing."""
    value = state.get(name)
    if value is None:
        return None
    if name == "patch_embed.proj.weight" and value.ndim == own.ndim == 4 and value.shape[:2] == own.shape[:2]:
        return resample_patch_embed(value, list(own.shape[2:]))
    if name == "pos_embed" and value.ndim == own.ndim == 3 and hasattr(net, "num_prefix_tokens"):
        return _positions(value, state, net, grid)
    return value


def _positions(value: Tensor, state: Mapping[str, Tensor], net: Any, grid: tuple[int, int] | None) -> Tensor:
    """Resamples a position embedding [1, P + N, D] to the grid and to the class and register tokens of `net`."""
    no_prefix = bool(getattr(net, "no_embed_class", False))
    given = 0 if no_prefix else sum(state[k].shape[1] for k in ("cls_token", "reg_token") if k in state)
    wanted = 0 if no_prefix else net.num_prefix_tokens
    patches = value.shape[1] - given
    new_grid = tuple(net.patch_embed.grid_size)
    if grid is None or math.prod(grid) != patches:
        side = math.isqrt(max(patches, 0))
        grid = (side, side) if side * side == patches else new_grid
    if math.prod(grid) != patches or wanted not in (0, given):
        return value  # `fill` reports the different shape
    resampled = resample_abs_pos_embed(value, list(new_grid), list(grid), num_prefix_tokens=given)
    return resampled if wanted == given else resampled[:, given:]
