"""Fusion kind `late`: a linear layer on both towers' features."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from fastav.model.fusion.base import FusionKind
from fastav.model.fusion.inputs import (
    FusionInputs,
    audio_features,
    concat_features,
    mean_over_windows,
    new_linear,
    video_features,
)
from fastav.model.tower import Tower, linear_flops


class Late(FusionKind, frozen=True, tag="late"):
    """A linear layer on both towers' concatenated features (SSW60 section 4.1); zeros for a missing modality."""

    @property
    @override
    def tower_heads(self) -> bool:
        return False

    @override
    def build(self, video: Tower, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        return LateFusion(video.width + audio.width, num_classes)


class LateFusion(nn.Module):
    """Module of kind `late`.

    Features are averaged over the windows before the head: it is linear, so the logits are the same as their average.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.head = new_linear(width, num_classes)

    def forward(self, video: Tower, audio: Tower, inputs: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        video_BF = video_features(video, inputs)
        audio_BF = mean_over_windows(audio_features(audio, inputs), inputs.window_BW)
        return self.head(concat_features(video_BF, audio_BF, inputs))

    def flops(self, video: Tower, audio: Tower, frames: int, windows: int) -> int:
        """Returns the floating point operations of one clip."""
        return frames * video.feature_flops() + windows * audio.feature_flops() + linear_flops(self.head)
