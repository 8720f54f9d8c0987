"""The data sets by their word on the command line."""

from __future__ import annotations

from types import ModuleType

from fastav.datasets import annotated, audioset, ave, birdclef, folder, inatsounds, kinetics, llp, ssw60, tau, vggsound

DATASETS: dict[str, ModuleType] = {
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
