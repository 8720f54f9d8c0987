"""Fusion kinds `video` and `audio`: a single modality, without fusion."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from fastav.data.clip import Modality
from fastav.model.fusion.base import FusionKind
from fastav.model.fusion.inputs import FusionInputs, audio_features, mean_over_windows, video_features
from fastav.model.tower import Tower


class Video(FusionKind, frozen=True, tag="video"):
    """Video only (TSN, SSW60 section 4.1): the features of a clip's frames are averaged and classified."""

    @property
    @override
    def modalities(self) -> tuple[Modality, ...]:
        return ("video",)

    @override
    def build(self, video: Tower, audio: None, num_classes: int, num_frames: int) -> nn.Module:
        return VideoOnly()


class Audio(FusionKind, frozen=True, tag="audio"):
    """Audio only (SSW60 section 4.1): each window is classified, and the logits are averaged over the windows."""

    @property
    @override
    def modalities(self) -> tuple[Modality, ...]:
        return ("audio",)

    @override
    def build(self, video: None, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        return AudioOnly()


class VideoOnly(nn.Module):
    """Module of kind `video`; the classification head is the tower's."""

    def forward(self, video: Tower, audio: None, inputs: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        return video.head(video_features(video, inputs))

    def flops(self, video: Tower, audio: None, frames: int, windows: int) -> int:
        """Returns the floating point operations of one clip."""
        return frames * video.feature_flops() + video.head_flops()


class AudioOnly(nn.Module):
    """Module of kind `audio`; the classification head is the tower's."""

    def forward(self, video: None, audio: Tower, inputs: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        return mean_over_windows(audio.head(audio_features(audio, inputs)), inputs.window_BW)

    def flops(self, video: None, audio: Tower, frames: int, windows: int) -> int:
        """Returns the floating point operations of one clip."""
        return windows * (audio.feature_flops() + audio.head_flops())
