"""Fusions from outside this project, named `module:attribute`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import nn
from typing_extensions import override

from fastav.core.errors import UserError
from fastav.core.plugin import make_external
from fastav.data.clip import Modality
from fastav.model.fusion.base import FusionKind
from fastav.model.tower import TowerConfig


class ExternalFusion(FusionKind, frozen=True, tag="external"):
    """A fusion from outside this project. `kind = "module:attribute"` in a recipe is short for this kind.

    Attributes:
        factory: `module:attribute` of a subclass of `fastav.model.fusion.base.FusionKind`, or of a function that
            returns an instance of one.
        args: Settings of that fusion. A recipe may also write them directly beside `kind`.
    """

    factory: str = ""
    args: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it

    def make(self) -> FusionKind:
        """Imports the factory, calls it with `args` and returns the fusion config that it makes.

        Raises:
            UserError: The factory cannot be imported, does not take these arguments, or does not return a `FusionKind`.
        """
        kind = make_external(self.factory, self.args, "model.fusion")
        if not isinstance(kind, FusionKind):
            raise UserError(
                f'model.fusion.kind: "{self.factory}" returns a {type(kind).__name__}, expected a subclass of '
                "fastav.model.fusion.base.FusionKind"
            )
        return kind

    @property
    @override
    def modalities(self) -> tuple[Modality, ...]:
        return self.make().modalities

    @property
    @override
    def tower_heads(self) -> bool:
        return self.make().tower_heads

    @override
    def build(self, video: Any, audio: Any, num_classes: int, num_frames: int) -> nn.Module:
        return self.make().build(video, audio, num_classes, num_frames)

    @override
    def check(self, towers: Mapping[Modality, TowerConfig], classes: Sequence[str]) -> None:
        self.make().check(towers, classes)

    @override
    def without_sources(self) -> Self:
        # The meaning of `args` is known only to the factory: files that they name are read whenever the model is built.
        return self

    @override
    def describe_attention(self, fusion: Any, video: Any, num_frames: int, device: str, dtype: str) -> str:
        return self.make().describe_attention(fusion, video, num_frames, device, dtype)
