"""Base classes of all configs: frozen, typed structs that are read from and written to TOML tables.

The config of a component is defined beside its implementation and builds it with `build()`. If there are several kinds
of a component, each config has a `kind` tag, and their union is the registry:

    class Late(Kind, frozen=True): ...
    Fusion = Late | Score
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen struct of settings with defaults. Unknown keys are errors."""


class Kind(Config, frozen=True, tag_field="kind", tag=str.lower):
    """A config of one of several kinds. Its `kind` key is the tag, by default the class name in lower case."""


PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
