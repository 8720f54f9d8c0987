"""The data sets by their word on the command line; others are named `module:attribute`."""

from __future__ import annotations

import argparse
from typing import Protocol, cast

from fastav.core.errors import UserError
from fastav.core.external import load_external
from fastav.datasets import annotated, audioset, ave, birdclef, folder, inatsounds, kinetics, llp, ssw60, tau, vggsound
from fastav.datasets.listing import Listing


class Dataset(Protocol):
    """What a data set's module has. Its docstring is the help on the command line."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the data set's own options."""
        ...

    def listing(self, args: argparse.Namespace) -> Listing:
        """Reads its published files; no media are opened.

        Raises:
            UserError: A file is missing or is not what its publishers describe.
        """
        ...


DATASETS: dict[str, Dataset] = {
    "folder": folder,
    "annotations": annotated,
    "audioset": audioset,
    "ave": ave,
    "birdclef": birdclef,
    "inatsounds": inatsounds,
    "kinetics": kinetics,
    "llp": llp,
    "ssw60": ssw60,
    "tau": tau,
    "vggsound": vggsound,
}
"""Word on the command line -> module of `fastav.datasets`."""


def external_dataset(name: str) -> Dataset:
    """Imports a data set from outside this project: `module:attribute` names an object with the two functions.

    Raises:
        UserError: It cannot be imported, or lacks one of them.
    """
    found = load_external(name, "fastav index")
    for function in ("add_arguments", "listing"):
        if not hasattr(found, function):
            raise UserError(f'fastav index: "{name}" has no {function}(), which a data set needs')
    return cast(Dataset, found)
