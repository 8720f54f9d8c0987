"""Late fusion: a linear layer on both towers' features."""

from __future__ import annotations

from torch import Tensor, nn

from fastav.model.fusion.inputs import (
    FusionInputs,
    audio_features,
    new_linear,
    over_windows,
    side_by_side,
    video_features,
)
from fastav.model.fusion.kind import FusionKind
from fastav.model.tower import Tower, linear_flops


class Late(FusionKind, frozen=True, tag="late"):
    """A linear layer on both towers' features side by side (SSW60 section 4.1), zeros for a missing modality."""

    @property
    def tower_heads(self) -> bool:
        """None: the linear layer is the head."""
        return False

    def build(self, video: Tower, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module with its linear head; the towers need none."""
        return LateFusion(video.width + audio.width, num_classes)


class LateFusion(nn.Module):
    """Kind `late`. The layer is linear, so that features are averaged over the windows, not logits."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.head = new_linear(width, num_classes)

    def forward(self, video: Tower, audio: Tower, streams: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        video_BF = video_features(video, streams)
        audio_BF = over_windows(audio_features(audio, streams), streams.window_BW)
        return self.head(side_by_side(video_BF, audio_BF, streams))

    def flops(self, video: Tower, audio: Tower, frames: int, windows: int) -> int:
        """Operations of one clip."""
        return frames * video.feature_flops() + windows * audio.feature_flops() + linear_flops(self.head)
