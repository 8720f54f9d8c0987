"""`fastav recipe show FILE`: the recipe with all defaults as TOML. `fastav recipe explain KEY`: what a key means."""

from __future__ import annotations

import argparse
import sys

from fastav.core.errors import UserError
from fastav.recipe.explain import explain
from fastav.recipe.parse import load_recipe, show_recipe

OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    parser.add_argument(
        "action",
        choices=["show", "explain"],
        help="show [FILE]: print the resolved recipe, what differs from the defaults marked; else the defaults\n"
        "explain [KEY ...]: values, default and meaning of keys (optim.lr), tables (optim), last words (lr), or of all",
    )
    parser.add_argument("words", nargs="*", metavar="FILE | KEY", help="what to show or explain")


def main(args: argparse.Namespace) -> int:
    """Prints the recipe, or what its keys mean.

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
