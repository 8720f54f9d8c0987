"""What every kind of fusion tells the model about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import nn

from fastav.core.config import Kind
from fastav.data.clip import Modality
from fastav.model.tower import TowerConfig


class FusionKind(Kind, frozen=True):
    """Base of all fusion configs. A new kind implements `build` and overrides what else it needs.

    Example:
        A complete kind, which a recipe picks by `kind = "my_birds.fusion:Sum"`:

            class Sum(FusionKind, frozen=True):
                \"\"\"The sum of both towers' logits.\"\"\"

                def build(self, video, audio, num_classes, num_frames):
                    return SumFusion()
    """

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities that it uses; towers of others are not built and their streams not decoded."""
        return ("video", "audio")

    @property
    def tower_heads(self) -> bool:
        """Whether each tower keeps a classification head of its own."""
        return True

    def build(self, video: Any, audio: Any, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module with the fusion's own parameters; see `fastav.model.fusion` for its methods.

        Args:
            video: Tower of the frames; None where `modalities` lacks it. It may be changed: blocks replaced,
                parts removed.
            audio: Tower of the spectrogram, likewise.
            num_classes: K.
            num_frames: Frames per clip T.

        Raises:
            UserError: The towers do not fit together.
        """
        raise NotImplementedError

    def check(self, towers: Mapping[Modality, TowerConfig], classes: Sequence[str]) -> None:
        """Refuses settings of the towers that contradict this fusion, before anything is built for a new run.

        Args:
            towers: Settings of the video and the audio tower.
            classes: Class names of the run.

        Raises:
            UserError: Naming the key.
        """

    def without_sources(self) -> Self:
        """Returns the config without files to start from, for a model whose weights are loaded afterwards."""
        return self

    def describe_attention(self, fusion: Any, video: Any, num_frames: int, device: str, dtype: str) -> str:
        """Names the attention implementation that the fusion layers use.

        Args:
            fusion: What `build` returned.
            video: The video tower, as `build` left it.
            num_frames: Frames per clip T.
            device: Where the model is, such as `cuda:0`.
            dtype: `float32` or `bfloat16`.
        """
        return "PyTorch's"
