"""A straightforward version of the model: unchanged timm blocks, with the bottleneck concatenated by `torch.cat`.

It uses the parameters of a fastav model, so both give the same logits; tests compare them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastav.model.av_model import AVModel
from fastav.model.fusion import Bottleneck
from fastav.model.transforms import normalise_frames, normalise_mel


class Literal(nn.Module):
    """SSW60's mid-fusion (section 4.1, equations 3 and 4), with the parameters of a model of kind `bottleneck`.

    Clips must have both modalities and one audio window.

    Args:
        model: The model whose blocks and heads are used.
    """

    def __init__(self, model: AVModel) -> None:
        super().__init__()
        config = model.config.fusion
        assert isinstance(config, Bottleneck), "only fusion kind bottleneck is supported"
        assert config.update == "sequential", "only update = sequential is supported (equations 3 and 4)"
        assert config.head == "mean", "only head = mean is supported"
        assert config.frames in ("mean", "shared"), "frames = joint is not supported"
        self.model, self.config = model, config
        self.mask: Tensor | None = None

    def forward(self, frames_BTCHW: Tensor, mel_BWCML: Tensor) -> Tensor:
        """Returns logits [B, K] of uint8 frames and log-mel spectrograms."""
        model, start = self.model, self.config.start
        assert model.video is not None
        assert model.audio is not None
        assert model.frontend.mean is not None
        assert model.frontend.std is not None
        clips, frames = frames_BTCHW.shape[:2]
        pictures = normalise_frames(frames_BTCHW, model.video_mean_C, model.video_std_C)
        mel = normalise_mel(mel_BWCML, model.frontend.mean, model.frontend.std).expand(-1, -1, 3, -1, -1)
        x, a = model.video.embed(pictures.flatten(0, 1)), model.audio.embed(mel.flatten(0, 1))
        for video_block, audio_block in zip(model.video.blocks[:start], model.audio.blocks[:start], strict=True):
            x, a = video_block(x), audio_block(a)
        z = model.fusion.bottleneck.expand(clips, -1, -1)
        for video_block, audio_block in zip(model.video.blocks[start:], model.audio.blocks[start:], strict=True):
            x, z = self._frames(video_block, x, z, frames)
            joined = _block(audio_block, torch.cat([a, z], dim=1))
            a, z = joined[:, : a.shape[1]], joined[:, a.shape[1] :]
        features = model.video.pool(x).unflatten(0, (clips, frames)).mean(1)
        return ((model.video.head(features) + model.audio.head(model.audio.pool(a))) / 2).float()

    def _frames(self, block: Any, x: Tensor, z: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Runs a video layer: each frame with a copy of the bottleneck, or all frames with one and a mask."""
        tokens = x.shape[1]
        if self.config.frames == "mean":
            joined = _block(block, torch.cat([x, z.repeat_interleave(frames, dim=0)], dim=1))
            return joined[:, :tokens], joined[:, tokens:].unflatten(0, (-1, frames)).mean(1)
        joined = torch.cat([x.unflatten(0, (-1, frames)).flatten(1, 2), z], dim=1)
        if self.mask is None:
            self.mask = _mask(frames, tokens, z.shape[1], x.device)
        joined = _block(block, joined, self.mask)
        return joined[:, : frames * tokens].reshape(x.shape), joined[:, frames * tokens :]


def _block(block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Runs a pre-norm block of timm."""
    x = x + block.ls1(block.attn(block.norm1(x), attn_mask=mask))
    return x + block.ls2(block.mlp(block.norm2(x)))


def _mask(frames: int, tokens: int, bottleneck: int, device: torch.device) -> Tensor:
    """Returns the attention mask, bool [rows, rows]: a frame attends to itself and the bottleneck, that to all."""
    shared = torch.full((bottleneck,), -1, device=device)
    frame_of = torch.cat([torch.arange(frames, device=device).repeat_interleave(tokens), shared])
    return (frame_of[:, None] == frame_of) | (frame_of < 0) | (frame_of < 0)[:, None]
