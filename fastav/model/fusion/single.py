"""One modality alone."""

from __future__ import annotations

from torch import Tensor, nn

from fastav.data.clip import Modality
from fastav.model.fusion.inputs import FusionInputs, audio_features, over_windows, video_features
from fastav.model.fusion.kind import FusionKind
from fastav.model.tower import Tower


class Video(FusionKind, frozen=True, tag="video"):
    """Frames alone (TSN, SSW60 section 4.1): the features of a clip's frames are averaged, then the head."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The video alone."""
        return ("video",)

    def build(self, video: Tower, audio: None, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module; the head is the tower's."""
        return VideoOnly()


class Audio(FusionKind, frozen=True, tag="audio"):
    """Sound alone (SSW60 section 4.1): logits of each window, averaged over the real ones."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The audio alone."""
        return ("audio",)

    def build(self, video: None, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module; the head is the tower's."""
        return AudioOnly()


class VideoOnly(nn.Module):
    """Kind `video`."""

    def forward(self, video: Tower, audio: None, streams: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        return video.head(video_features(video, streams))

    def flops(self, video: Tower, audio: None, frames: int, windows: int) -> int:
        """Operations of one clip."""
        return frames * video.feature_flops() + video.head_flops()


class AudioOnly(nn.Module):
    """Kind `audio`."""

    def forward(self, video: None, audio: Tower, streams: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        return over_windows(audio.head(audio_features(audio, streams)), streams.window_BW)

    def flops(self, video: None, audio: Tower, frames: int, windows: int) -> int:
        """Operations of one clip."""
        return windows * (audio.feature_flops() + audio.head_flops())
