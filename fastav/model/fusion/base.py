"""`FusionKind`, the base of all fusion configs; `fastav.model.fusion` describes how to write a fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import nn

from fastav.core.config import Kind
from fastav.data.clip import Modality
from fastav.model.tower import TowerConfig


class FusionKind(Kind, frozen=True):
    """Base of all fusion configs. A new kind implements `build` and overrides other methods only where it needs them.

    A config is a frozen msgspec struct: its fields, with types and defaults, are the keys that a recipe may set beside
    `kind`. The types are checked, and `Attributes:` entries in the docstring are what `fastav recipe explain` prints.

    Example:
        A complete fusion in a file `my_birds/fusion.py`. A recipe selects it with
        `kind = "my_birds.fusion:GatedSum"` and may set `gate`, both under `[model.fusion]`:

            import torch
            from torch import nn

            from fastav.model.fusion.inputs import audio_features, mean_over_windows, video_features
            from fastav.model.fusion.base import FusionKind
            from fastav.model.tower import linear_flops


            class GatedSum(FusionKind, frozen=True):
                '''A learned sum of both towers' features, then one linear layer.'''

                gate: float = 1.0  # initial weight of the audio features, relative to the video features

                @property
                def tower_heads(self):
                    return False  # GatedSumFusion has its own head

                def build(self, video, audio, num_classes, num_frames):
                    return GatedSumFusion(video.width, num_classes, self.gate)


            class GatedSumFusion(nn.Module):
                def __init__(self, width, num_classes, gate):
                    super().__init__()
                    self.gate = nn.Parameter(torch.tensor(gate))
                    self.head = nn.Linear(width, num_classes)

                def forward(self, video, audio, inputs):
                    video_BF = video_features(video, inputs)
                    audio_BF = mean_over_windows(audio_features(audio, inputs), inputs.window_BW)
                    if inputs.has_video_B is not None:
                        video_BF = video_BF * inputs.has_video_B.unsqueeze(1)
                    if inputs.has_audio_B is not None:
                        audio_BF = audio_BF * inputs.has_audio_B.unsqueeze(1)
                    return self.head(video_BF + self.gate * audio_BF)

                def flops(self, video, audio, frames, windows):
                    towers = frames * video.feature_flops() + windows * audio.feature_flops()
                    return towers + linear_flops(self.head)
    """

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities that the fusion uses, of `video` and `audio`. Others are not decoded and get no tower."""
        return ("video", "audio")

    @property
    def tower_heads(self) -> bool:
        """Whether each tower has a classification head (K outputs). False: `Tower.head` is the identity."""
        return True

    def build(self, video: Any, audio: Any, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module with the fusion's own parameters; `fastav.model.fusion` describes its methods.

        Called once, with the towers on the CPU and already loaded from their `weights` or `init_from`.

        Args:
            video: The `Tower` of the frames; None if `modalities` leaves the video out. It may be changed:
                `replace_block` exchanges a block, `keep_embedding` and `keep_blocks` remove parts. Useful attributes:
                `width` (features F, or the token width of a ViT), `blocks`, `num_prefix` (class and register tokens),
                `num_patches`.
            audio: The `Tower` of the spectrogram; None if `modalities` leaves the audio out. It may be changed, too.
            num_classes: Number of classes K.
            num_frames: Frames per clip T.

        Raises:
            UserError: The towers do not fit this fusion or each other. (`Tower.require_blocks` raises it for a tower
                that is not a ViT.)
        """
        raise NotImplementedError

    def check(self, towers: Mapping[Modality, TowerConfig], classes: Sequence[str]) -> None:
        """Rejects tower settings that contradict this fusion. A new run calls it before the towers are built.

        Args:
            towers: Settings of both towers, keyed `video` and `audio`.
            classes: Class names of the run, in the order of the logits.

        Raises:
            UserError: A setting contradicts the fusion; the message names its key.
        """

    def without_sources(self) -> Self:
        """Returns the config without the files that `build` loads, for a model whose weights are loaded afterwards.

        Override it if the config has a field that names a file of weights: return a copy with that field empty.
        """
        return self

    def describe_attention(self, fusion: Any, video: Any, num_frames: int, device: str, dtype: str) -> str:
        """Names the attention implementation that the fusion layers use, for the log and the report.

        Args:
            fusion: The module that `build` returned.
            video: The video tower, as `build` left it.
            num_frames: Frames per clip T.
            device: Device of the model, such as `cuda:0`.
            dtype: Compute type: `float32` or `bfloat16`.
        """
        return "PyTorch's"
