"""Early fusion: joint self-attention of all tokens from the first layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastav.core.errors import UserError
from fastav.model.fusion.inputs import (
    FusionInputs,
    both,
    clip_sequence,
    each_window,
    key_mask,
    over_present,
    over_windows,
)
from fastav.model.fusion.kind import FusionKind
from fastav.model.tower import Tower, block_flops


class Early(FusionKind, frozen=True, tag="early"):
    """Joint self-attention of all tokens from the first layer, in one encoder (MBT's vanilla self-attention).

    Each modality has its own patch, class-token and position embedding, the frames a learned one of their
    time besides; blocks, final norm and head are the video tower's, and the audio tower keeps nothing else.
    The head sees the mean of what is pooled of each modality's tokens.
    """

    def build(self, video: Tower, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module and removes the audio tower's blocks.

        Raises:
            UserError: where a tower is no plain ViT or the two do not fit together.
        """
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
    """Kind `early`."""

    def __init__(self, width: int, num_frames: int) -> None:
        super().__init__()
        self.time_embed = nn.Parameter(torch.zeros(num_frames, 1, width))

    def forward(self, video: Tower, audio: Tower, streams: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        frames_BTCHW, mel_BWCML = both(streams)
        windows = mel_BWCML.shape[1]
        seen = each_window(clip_sequence(video, frames_BTCHW, self.time_embed), windows)
        heard = audio.embed(mel_BWCML.flatten(0, 1))
        split = seen.shape[1]
        mask = key_mask(streams, split, heard.shape[1])
        if mask is not None:
            mask = each_window(mask, windows)
        x = torch.cat([seen, heard], dim=1)
        video.rows_per_clip(windows)
        for block in video.blocks:
            x = block(x, attn_mask=mask)
        video_BWF = video.pool(x[:, :split]).unflatten(0, (-1, windows))
        audio_BWF = video.pool(x[:, split:]).unflatten(0, (-1, windows))
        pooled_BF = over_present(
            over_windows(video_BWF, streams.window_BW), over_windows(audio_BWF, streams.window_BW), streams
        )
        return video.head(pooled_BF)

    def flops(self, video: Tower, audio: Tower, frames: int, windows: int) -> int:
        """Operations of one clip."""
        seen = video.num_prefix + frames * video.num_patches
        heard = audio.num_prefix + audio.num_patches
        length = seen + heard
        blocks = sum(block_flops(block, length, length, length * length) for block in video.blocks)
        window = audio.embed_flops() + blocks + video.pool_flops(seen) + video.pool_flops(heard)
        return frames * video.embed_flops() + windows * window + video.head_flops()
