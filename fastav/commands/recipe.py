"""Prints a recipe with all defaults as TOML (`show FILE`), or describes recipe keys (`explain KEY`).

Example: `fastav recipe explain optim.schedule train.reduce_dtype`
"""

from __future__ import annotations

import argparse
import sys

from fastav.core.errors import UserError
from fastav.recipe.explain import explain
from fastav.recipe.parse import load_recipe, show_recipe

OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastav recipe`."""
    parser.add_argument(
        "action",
        choices=["show", "explain"],
        help="show [FILE]: print the resolved recipe, with changed values marked; without FILE, the defaults\n"
        "explain [KEY ...]: print values, default and meaning of a key (optim.lr), of a table (optim), of a key in\n"
        "any table (lr), or of all keys",
    )
    parser.add_argument("words", nargs="*", metavar="FILE | KEY", help="recipe file to show, or keys to explain")


def main(args: argparse.Namespace) -> int:
    """Prints the recipe, or the explanation of its keys.

    Raises:
        UserError: More than one file, an unknown key, or a recipe that cannot be read.
    """
    if args.action == "explain":
        sys.stdout.write(explain([*args.words, *args.overrides]))
        return 0
    if len(args.words) > 1:
        raise UserError(f"recipe show: got {len(args.words)} files, expected one")
    sys.stdout.write(show_recipe(load_recipe(args.words[0] if args.words else None, args.overrides)))
    return 0
