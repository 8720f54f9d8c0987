"""fastav trains audiovisual classifiers on video clips. This file is the index of what is public.

Each name is imported when it is first used, so that `fastav --help` need not wait for torch.
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

_WHERE = {
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

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fastav' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastav.{_WHERE[name]}"), name)
