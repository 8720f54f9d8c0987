"""Fusion kind `early`: joint self-attention of all tokens from the first layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from fastav.core.errors import UserError
from fastav.model.fusion.base import FusionKind
from fastav.model.fusion.inputs import (
    FusionInputs,
    clip_sequence,
    key_mask,
    mean_over_modalities,
    mean_over_windows,
    repeat_for_windows,
    require_both,
)
from fastav.model.tower import Tower, block_flops


class Early(FusionKind, frozen=True, tag="early"):
    """Joint self-attention of all tokens from the first layer, in one encoder (MBT's vanilla self-attention).

    Each modality has its own patch, class-token and position embeddings; the frames also have a learned time embedding.
    Blocks, final norm and head are the video tower's. The audio tower keeps only its embeddings.
    The features of both modalities are pooled separately, and their mean is classified.
    """

    @override
    def build(self, video: Tower, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        for tower in (video, audio):
            tower.require_blocks("early")
        if video.width != audio.width or video.num_prefix != audio.num_prefix:
            raise UserError(
                f"{audio.where}: width {audio.width} and {audio.num_prefix} class and register tokens, the video tower "
                f'has {video.width} and {video.num_prefix}; fusion "early" needs them equal'
            )
        audio.keep_embedding()
        return EarlyFusion(video.width, num_frames)


class EarlyFusion(nn.Module):
    """Module of kind `early`.

    Attributes:
        time_embed: Learned embedding of the frames' positions in time [T, 1, D], initially zero.
    """

    def __init__(self, width: int, num_frames: int) -> None:
        super().__init__()
        self.time_embed = nn.Parameter(torch.zeros(num_frames, 1, width))

    def forward(self, video: Tower, audio: Tower, inputs: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        frames_BTCHW, mel_BWCML = require_both(inputs)
        windows = mel_BWCML.shape[1]
        video_tokens = repeat_for_windows(clip_sequence(video, frames_BTCHW, self.time_embed), windows)
        audio_tokens = audio.embed(mel_BWCML.flatten(0, 1))
        split = video_tokens.shape[1]
        mask = key_mask(inputs, split, audio_tokens.shape[1])
        if mask is not None:
            mask = repeat_for_windows(mask, windows)
        x = torch.cat([video_tokens, audio_tokens], dim=1)
        video.rows_per_clip(windows)
        for block in video.blocks:
            x = block(x, attn_mask=mask)
        video_BWF = video.pool(x[:, :split]).unflatten(0, (-1, windows))
        audio_BWF = video.pool(x[:, split:]).unflatten(0, (-1, windows))
        pooled_BF = mean_over_modalities(
            mean_over_windows(video_BWF, inputs.window_BW), mean_over_windows(audio_BWF, inputs.window_BW), inputs
        )
        return video.head(pooled_BF)

    def flops(self, video: Tower, audio: Tower, frames: int, windows: int) -> int:
        """Returns the floating point operations of one clip."""
        video_length = video.num_prefix + frames * video.num_patches
        audio_length = audio.num_prefix + audio.num_patches
        length = video_length + audio_length
        blocks = sum(block_flops(block, length, length, length * length) for block in video.blocks)
        window = audio.embed_flops() + blocks + video.pool_flops(video_length) + video.pool_flops(audio_length)
        return frames * video.embed_flops() + windows * window + video.head_flops()
