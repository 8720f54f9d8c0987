"""Loads code from outside this project that a recipe or a command names as `module:attribute`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import msgspec

from fastav.core.errors import UserError, did_you_mean, reason_of

SEPARATOR = ":"


def is_external(name: str) -> bool:
    """Returns True if a name has the form `module:attribute` and is not a built-in kind."""
    return SEPARATOR in name


def load_external(name: str, where: str) -> Any:
    """Imports the object that `module:attribute` names.

    Importing a module runs its code. Call this only with names that the user gave or allowed.

    Args:
        name: `module:attribute`, such as `my_birds.fusion:GatedFusion`.
        where: Recipe key or option that names it, for error messages.

    Raises:
        UserError: The module cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = name.partition(SEPARATOR)
    if not module_name or not attribute:
        raise UserError(f'{where}: "{name}" is not of the form module:attribute')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing external code may raise anything
        raise UserError(
            f'{where}: cannot import "{module_name}": {reason_of(error)}; install it, or add its folder to PYTHONPATH'
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f'{where}: module "{module_name}" has no "{attribute}"{did_you_mean(attribute, dir(module))}')
    return getattr(module, attribute)


def make_external(name: str, args: Mapping[str, Any], where: str) -> Any:
    """Imports `module:attribute` and calls it with keyword arguments.

    The arguments of a `Config` class are also checked against its field types.

    Args:
        name: `module:attribute` of a config class (a subclass of `Config`), another class, or a function.
        args: Keyword arguments.
        where: Recipe table that holds `kind` and `args`, for error messages.

    Raises:
        UserError: The name cannot be imported, or the arguments do not fit.
    """
    factory = load_external(name, f"{where}.kind")
    try:
        if isinstance(factory, type) and issubclass(factory, msgspec.Struct):
            return msgspec.convert(dict(args), factory)
        return factory(**args)
    except (TypeError, ValueError) as error:  # msgspec.ValidationError is a ValueError
        raise UserError(f"{where}.args: {name}: {reason_of(error)}") from error
