"""Fusion kind `score`: a weighted sum of the predictions of two trained models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid
from typing_extensions import override

from fastav.core.errors import UserError
from fastav.data.clip import Modality
from fastav.model.fusion.base import FusionKind
from fastav.model.fusion.inputs import FusionInputs, audio_features, mean_over_windows, modality_shares, video_features
from fastav.model.tower import Tower, TowerConfig
from fastav.model.weights import model_folder, read_description


class Score(FusionKind, frozen=True, tag="score"):
    """A weighted sum of the predictions of two trained models (SSW60 section 4.1). Nothing is trained.

    Attributes:
        weight: Weight of the video tower's prediction, between 0 and 1; the audio tower has the rest. A clip with one
            modality is predicted from that one alone.
        of: What is summed: `probabilities` (softmax; for one label per clip), `sigmoids` (for several labels per clip)
            or `logits`. A sum of probabilities or sigmoids is converted back to logits.
    """

    weight: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    of: Literal["probabilities", "sigmoids", "logits"] = "probabilities"

    @override
    def build(self, video: Tower, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        for tower in (video, audio):
            tower.requires_grad_(False)
            tower.update_frozen()
        return ScoreFusion(self)

    @override
    def check(self, towers: Mapping[Modality, TowerConfig], classes: Sequence[str]) -> None:
        for modality in self.modalities:
            tower = towers[modality]
            if not tower.init_from and tower.weights in ("", "timm"):
                raise UserError(
                    f'model.{modality}.init_from is not set; fusion "score" trains nothing and needs the folder of a '
                    "finished run here"
                )
            if tower.init_from:
                where = f"model.{modality}.init_from"
                given = tuple(read_description(model_folder(Path(tower.init_from)), where).get("classes", ()))
                if given != tuple(classes):
                    raise UserError(
                        f'{where}: the model in "{tower.init_from}" was trained on {len(given)} classes that differ '
                        f'from the {len(classes)} of this data (or in their order); fusion "score" needs the same'
                    )


class ScoreFusion(nn.Module):
    """Module of kind `score`; it has no parameters."""

    def __init__(self, config: Score) -> None:
        super().__init__()
        self.config = config

    def forward(self, video: Tower, audio: Tower, inputs: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        video_BK = video.head(video_features(video, inputs))
        audio_BK = mean_over_windows(audio.head(audio_features(audio, inputs)), inputs.window_BW)
        weights = self.config.weight, 1 - self.config.weight
        shares = modality_shares(inputs, self.config.weight, video_BK.dtype)
        if shares is None:
            shares = video_BK.new_full((1, 1), weights[0]), video_BK.new_full((1, 1), weights[1])
        video_share, audio_share = shares
        if self.config.of == "logits":
            return video_share * video_BK + audio_share * audio_BK
        log_shares = video_share.log(), audio_share.log()  # -inf for a missing modality: it drops out of the sum
        if self.config.of == "probabilities":
            return _log_sum(log_shares, log_softmax(video_BK, -1), log_softmax(audio_BK, -1))
        log_positive = _log_sum(log_shares, logsigmoid(video_BK), logsigmoid(audio_BK))
        return log_positive - _log_sum(log_shares, logsigmoid(-video_BK), logsigmoid(-audio_BK))

    def flops(self, video: Tower, audio: Tower, frames: int, windows: int) -> int:
        """Returns the floating point operations of one clip."""
        heads = video.head_flops() + windows * audio.head_flops()
        return frames * video.feature_flops() + windows * audio.feature_flops() + heads


def _log_sum(log_shares: tuple[Tensor, Tensor], video: Tensor, audio: Tensor) -> Tensor:
    """Returns log(share_video * exp(video) + share_audio * exp(audio))."""
    return torch.logaddexp(log_shares[0] + video, log_shares[1] + audio)
