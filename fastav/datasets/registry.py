"""The data sets by their name on the command line; external ones are named `module:attribute`."""

from __future__ import annotations

import argparse
from typing import Protocol, cast

from fastav.core.errors import UserError
from fastav.core.plugin import load_external
from fastav.datasets import (
    annotation_tables,
    audioset,
    ave,
    birdclef,
    folder,
    inatsounds,
    kinetics,
    llp,
    ssw60,
    tau,
    vggsound,
)
from fastav.datasets.clip_list import ClipList


class Dataset(Protocol):
    """The interface of a data set's module; the docstring is its help text on the command line."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the data set's own options."""
        ...

    def list_clips(self, args: argparse.Namespace) -> ClipList:
        """Reads the published files and lists the clips; opens no media.

        Raises:
            UserError: A file is missing or does not have the published format.
        """
        ...


DATASETS: dict[str, Dataset] = {
    "folder": folder,
    "annotations": annotation_tables,
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
"""Name on the command line -> module of `fastav.datasets`."""


def external_dataset(name: str) -> Dataset:
    """Imports an external data set: `module:attribute` names an object with the functions of `Dataset`.

    Raises:
        UserError: The object cannot be imported, or lacks one of the functions.
    """
    found = load_external(name, "fastav index")
    for function in ("add_arguments", "list_clips"):
        if not hasattr(found, function):
            raise UserError(f'fastav index: "{name}" has no function {function}(), which a data set needs')
    return cast(Dataset, found)
