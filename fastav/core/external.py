"""Code outside this project that a recipe or a command names as `module:attribute`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import msgspec

from fastav.core.errors import UserError, did_you_mean, reason_of

SEPARATOR = ":"


def is_external(name: str) -> bool:
    """Whether a name is `module:attribute` and not a word of this project."""
    return SEPARATOR in name


def load_external(name: str, where: str) -> Any:
    """Imports what `module:attribute` names.

    Importing runs code, so call it only with names that the user gave or has allowed.

    Args:
        name: Such as `my_birds.fusion:GatedFusion`.
        where: The key or option that names it, for messages.

    Raises:
        UserError: The module cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = name.partition(SEPARATOR)
    if not module_name or not attribute:
        raise UserError(f'{where}: "{name}" is not of the form module:attribute')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the code of others raises when it is imported
        raise UserError(
            f'{where}: cannot import "{module_name}": {reason_of(error)}; install it, or add its folder to PYTHONPATH'
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f'{where}: module "{module_name}" has no "{attribute}"{did_you_mean(attribute, dir(module))}')
    return getattr(module, attribute)


def make_external(name: str, args: Mapping[str, Any], where: str) -> Any:
    """Calls what `module:attribute` names with keyword arguments; a config class checks their types as well.

    Args:
        name: A config class (a subclass of `Config`), any other class, or a function.
        args: Its keyword arguments.
        where: The table of the recipe that holds `kind` and `args`, for messages.

    Raises:
        UserError: It cannot be imported, or does not take these arguments.
    """
    make = load_external(name, f"{where}.kind")
    try:
        if isinstance(make, type) and issubclass(make, msgspec.Struct):
            return msgspec.convert(dict(args), make)
        return make(**args)
    except (TypeError, ValueError) as error:  # msgspec.ValidationError is a ValueError
        raise UserError(f"{where}.args: {name}: {reason_of(error)}") from error
