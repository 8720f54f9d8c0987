"""State of an optimizer as named tensors and JSON, without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastav.core.errors import FastavError


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the state of an optimizer as named tensors and JSON.

    Args:
        optimizer: Optimizer of `Optim.build`, whose groups hold the names of their parameters.

    Returns:
        `parameter:key` -> tensor (not a copy), and a JSON-serialisable dict with the class of the optimizer, the names
        of its parameters, and state that is not a tensor.
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
    """Restores the result of `optimizer_tensors`. Learning rate, decay etc. of the groups are not changed.

    Raises:
        FastavError: The state belongs to another kind of optimizer or to other parameters.
    """
    if meta["optimizer"] != type(optimizer).__name__:
        raise FastavError(f"the saved optimizer is {meta['optimizer']}, expected {type(optimizer).__name__}")
    named = _named(optimizer)
    check_names(named.keys(), meta["parameters"], "optimizer")
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in meta["others"].items()}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(":")
        state.setdefault(name, {})[key] = tensor.clone()
    # torch's load_state_dict moves tensors to the parameter's device, except those such as step counts that stay.
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


def check_names(own: Any, saved: Any, what: str) -> None:
    """Checks that the names of saved tensors are those of this run.

    Args:
        own: Names of this run.
        saved: Names in the saved state.
        what: Owner of the state, for the error message.

    Raises:
        FastavError: Names are missing or unknown; the message gives the first one.
    """
    missing, unknown = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or unknown:
        first = f'"{missing[0]}" is missing' if missing else f'"{unknown[0]}" is unknown to the model'
        raise FastavError(f"the saved state of the {what} is of another model: {first}")
