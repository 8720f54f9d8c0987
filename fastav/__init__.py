"""fastav trains audiovisual classifiers on video clips. This module lists the public names.

A name is imported when it is first used, so `fastav --help` does not load torch.

Example:
    >>> from fastav import AVModel, Manifest
    >>> manifest = Manifest.open("my/manifest.parquet")
    >>> model = AVModel.from_pretrained("runs/mine/model").eval()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastav.core.errors import FastavError as FastavError
    from fastav.core.errors import MediaError as MediaError
    from fastav.core.errors import UserError as UserError
    from fastav.data.clip import Clip as Clip
    from fastav.data.clip import ClipPlan as ClipPlan
    from fastav.data.manifest import Manifest as Manifest
    from fastav.data.manifest import write_manifest as write_manifest
    from fastav.data.plan import Plan as Plan
    from fastav.loader.batch import Batch as Batch
    from fastav.loader.loader import Loader as Loader
    from fastav.media.spectrogram import Frontend as Frontend
    from fastav.model.av_model import AVModel as AVModel
    from fastav.recipe.schema import Recipe as Recipe

_MODULES = {
    "Batch": "loader.batch",
    "Clip": "data.clip",
    "ClipPlan": "data.clip",
    "FastavError": "core.errors",
    "MediaError": "core.errors",
    "UserError": "core.errors",
    "Frontend": "media.spectrogram",
    "Loader": "loader.loader",
    "Manifest": "data.manifest",
    "write_manifest": "data.manifest",
    "AVModel": "model.av_model",
    "Plan": "data.plan",
    "Recipe": "recipe.schema",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastav' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastav.{_MODULES[name]}"), name)
