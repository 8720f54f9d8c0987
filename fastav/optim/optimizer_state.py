"""An optimizer's state as named tensors and JSON, never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastav.core.errors import FastavError


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and JSON.

    Args:
        optimizer: Made by `Optim.build`, whose groups know their parameters' names.

    Returns:
        `parameter:key` -> tensor (not copies), and the rest: the optimizer's class, the parameters that have a
        state, and what of it is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for name, parameter in _named(optimizer).items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                tensors[f"{name}:{key}"] = value.detach()
            else:
                others.setdefault(name, {})[key] = value
    meta = {"optimizer": type(optimizer).__name__, "parameters": list(_named(optimizer)), "others": others}
    return tensors, meta


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_tensors` gave; learning rate, decay and the like stay those of the groups.

    Raises:
        FastavError: The state is another optimizer's, or of other parameters.
    """
    if meta["optimizer"] != type(optimizer).__name__:
        raise FastavError(f"the saved optimizer is {meta['optimizer']}, not {type(optimizer).__name__}")
    named = _named(optimizer)
    check_names(named.keys(), meta["parameters"], "optimizer")
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in meta["others"].items()}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(":")
        state.setdefault(name, {})[key] = tensor.clone()
    # torch's own loading knows which tensors go to the parameter's device and which, as step counts, do not.
    content = optimizer.state_dict()
    number = {
        name: n
        for saved, group in zip(content["param_groups"], optimizer.param_groups, strict=True)
        for name, n in zip(group["param_names"], saved["params"], strict=True)
    }
    content["state"] = {number[name]: values for name, values in state.items()}
    optimizer.load_state_dict(content)


def _named(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def check_names(own: Any, given: Any, what: str) -> None:
    """Refuses saved tensors whose names are not those of this run.

    Raises:
        FastavError: Names that are missing or unknown.
    """
    missing, strange = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or strange:
        first = f'"{missing[0]}" is missing' if missing else f'"{strange[0]}" is unknown to the model'
        raise FastavError(f"the saved state of the {what} is of another model: {first}")
