"""A fusion from outside this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import nn

from fastav.core.errors import UserError
from fastav.core.external import make_external
from fastav.data.clip import Modality
from fastav.model.fusion.kind import FusionKind
from fastav.model.tower import TowerConfig


class ExternalFusion(FusionKind, frozen=True, tag="external"):
    """A fusion from outside this project; `kind = "module:attribute"` is short for it.

    Attributes:
        factory: `module:attribute` of a subclass of `fastav.model.fusion.kind.FusionKind`, or of a function that
            returns one of its objects.
        args: Its settings; a recipe may also write them beside `kind`.
    """

    factory: str = ""
    args: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it

    def made(self) -> FusionKind:
        """Returns the config that the factory makes.

        Raises:
            UserError: It cannot be imported, does not take the arguments, or makes something else.
        """
        made = make_external(self.factory, self.args, "model.fusion")
        if not isinstance(made, FusionKind):
            raise UserError(
                f'model.fusion.kind: "{self.factory}" makes a {type(made).__name__}, expected a subclass of FusionKind'
            )
        return made

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Those of the made config."""
        return self.made().modalities

    @property
    def tower_heads(self) -> bool:
        """That of the made config."""
        return self.made().tower_heads

    def build(self, video: Any, audio: Any, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module of the made config."""
        return self.made().build(video, audio, num_classes, num_frames)

    def check(self, towers: Mapping[Modality, TowerConfig], classes: Sequence[str]) -> None:
        """Has the made config check the towers."""
        self.made().check(towers, classes)

    def without_sources(self) -> Self:
        """Returns the same config: the factory's arguments are its own; a file to start from is read again."""
        return self

    def describe_attention(self, fusion: Any, video: Any, num_frames: int, device: str, dtype: str) -> str:
        """Has the made config describe it."""
        return self.made().describe_attention(fusion, video, num_frames, device, dtype)
