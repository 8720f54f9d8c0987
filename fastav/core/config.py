"""The base of every config: frozen, typed, spell-checked structs that are read from and written to TOML tables.

A component's config sits beside its implementation and has a `build()`; where there are several kinds, each struct
has a `kind` tag and the union at the bottom of the file is the registry:

    class Late(Config, tag="late"): ...
    Fusion = Late | Score
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen struct of settings with defaults; unknown keys are errors."""


class Kind(Config, frozen=True, tag_field="kind", tag=str.lower):
    """A config that is one of several kinds; its tag (the class name in lower case unless given) is the `kind` key."""


PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
