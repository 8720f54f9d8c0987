"""Score fusion: a weighted sum of two finished models' predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from fastav.core.errors import UserError
from fastav.data.clip import Modality
from fastav.model.fusion.inputs import FusionInputs, audio_features, over_windows, present_shares, video_features
from fastav.model.fusion.kind import FusionKind
from fastav.model.tower import Tower, TowerConfig
from fastav.model.weights import model_folder, read_description


class Score(FusionKind, frozen=True, tag="score"):
    """A weighted sum of two finished models' predictions (SSW60 section 4.1). It trains nothing.

    Attributes:
        weight: Share of the video tower; the audio tower has the rest. A missing modality has none.
        of: What is summed: `probabilities` (softmax, for one label a clip), `sigmoids` (for many labels) or
            `logits`. The sum of probabilities or sigmoids is returned as the logits that softmax, or sigmoid,
            turns into it.
    """

    weight: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    of: Literal["probabilities", "sigmoids", "logits"] = "probabilities"

    def build(self, video: Tower, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module and freezes both towers."""
        for tower in (video, audio):
            tower.requires_grad_(False)
            tower.settle()
        return ScoreFusion(self)

    def check(self, towers: Mapping[Modality, TowerConfig], classes: Sequence[str]) -> None:
        """Refuses a tower that starts from nothing, or from a run of other classes: this fusion trains nothing."""
        for modality in self.modalities:
            tower = towers[modality]
            if not tower.init_from and tower.weights in ("", "timm"):
                raise UserError(
                    f'model.{modality}.init_from: absent; a finished run expected by fusion kind "score", which trains '
                    "nothing"
                )
            if tower.init_from:
                where = f"model.{modality}.init_from"
                given = tuple(read_description(model_folder(Path(tower.init_from)), where).get("classes", ()))
                if given != tuple(classes):
                    raise UserError(
                        f'{where}: the model in "{tower.init_from}" was trained on {len(given)} classes other than '
                        f'these {len(classes)} (or in another order); the same expected by fusion kind "score"'
                    )


class ScoreFusion(nn.Module):
    """Kind `score`."""

    def __init__(self, config: Score) -> None:
        super().__init__()
        self.config = config

    def forward(self, video: Tower, audio: Tower, streams: FusionInputs) -> Tensor:
        """Returns logits [B, K]; see `Score.of`."""
        video_BK = video.head(video_features(video, streams))
        audio_BK = over_windows(audio.head(audio_features(audio, streams)), streams.window_BW)
        weights = self.config.weight, 1 - self.config.weight
        shares = present_shares(streams, self.config.weight, video_BK.dtype)
        if shares is None:
            shares = video_BK.new_full((1, 1), weights[0]), video_BK.new_full((1, 1), weights[1])
        video_share, audio_share = shares
        if self.config.of == "logits":
            return video_share * video_BK + audio_share * audio_BK
        log_shares = video_share.log(), audio_share.log()  # -inf, and out of the sum, where missing
        if self.config.of == "probabilities":
            return _log_sum(log_shares, log_softmax(video_BK, -1), log_softmax(audio_BK, -1))
        yes = _log_sum(log_shares, logsigmoid(video_BK), logsigmoid(audio_BK))
        return yes - _log_sum(log_shares, logsigmoid(-video_BK), logsigmoid(-audio_BK))

    def flops(self, video: Tower, audio: Tower, frames: int, windows: int) -> int:
        """Operations of one clip."""
        heads = video.head_flops() + windows * audio.head_flops()
        return frames * video.feature_flops() + windows * audio.feature_flops() + heads


def _log_sum(log_shares: tuple[Tensor, Tensor], video: Tensor, audio: Tensor) -> Tensor:
    """Returns the logarithm of the weighted sum of two exponentials."""
    return torch.logaddexp(log_shares[0] + video, log_shares[1] + audio)
