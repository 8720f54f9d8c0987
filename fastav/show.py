"""`fastav recipe show FILE`: the resolved recipe as TOML, what differs from the defaults marked."""

from __future__ import annotations

import argparse
import sys

from fastav import recipe

OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    parser.add_argument("action", choices=["show"], help="show: print the resolved recipe")
    parser.add_argument("file", nargs="?", help="recipe file; the defaults alone without one")


def main(args: argparse.Namespace) -> int:
    """Prints the recipe."""
    sys.stdout.write(recipe.show(recipe.load(args.file, args.overrides)))
    return 0
