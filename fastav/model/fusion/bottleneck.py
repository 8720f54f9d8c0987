"""Fusion kind `bottleneck`: in the last layers both towers exchange information through bottleneck tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fastav.core.config import NonNegativeInt
from fastav.core.errors import UserError
from fastav.model.bottleneck_block import BottleneckBlock, check_attention, describe_attention, use_bottleneck_blocks
from fastav.model.fusion.base import FusionKind
from fastav.model.fusion.inputs import (
    FusionInputs,
    clip_sequence,
    concat_features,
    mean_over_modalities,
    mean_over_windows,
    new_linear,
    presence,
    repeat_for_windows,
    require_both,
)
from fastav.model.tower import Tower, block_flops, linear_flops
from fastav_kernels.bottleneck_attention import Segments


class Bottleneck(FusionKind, frozen=True, tag="bottleneck"):
    """Fusion through bottleneck tokens in the middle and last layers (MBT; SSW60 section 4.1, equations 3 and 4).

    Attributes:
        start: First layer with fusion, counted from 0. The towers' depth means no fusion layer.
        tokens: Number of bottleneck tokens Z.
        update: How a layer updates the bottleneck. `sequential`: the video layer updates it, then the audio layer reads
            the result and updates it again (SSW60). `mean`: both layers read the old bottleneck, and the new one is the
            mean of their two results (MBT).
        frames: How the frames of a clip share the bottleneck. `mean`: each frame passes each layer with its own copy of
            the bottleneck, and the copies are averaged (the literal reading of SSW60). `shared`: a frame attends to
            itself and the bottleneck, the bottleneck attends to all frames. `joint`: the tokens of all frames are one
            sequence from the first layer on, with one set of class tokens and a learned time embedding (MBT).
        head: `mean`: the mean of both towers' logits. `concat`: one linear layer on both towers' concatenated features.
        project: Whether towers of different width are allowed: linear layers then convert the bottleneck from the video
            tower's width to the audio tower's and back.
        attention: Implementation of the attention in fusion layers: `sdpa`, `masked`, `flex`, `reference` or `triton`.
            `auto`: `triton` where it was measured to be faster than `sdpa` for this GPU and shape, otherwise `sdpa`.
    """

    start: NonNegativeInt = 8
    tokens: NonNegativeInt = 4
    update: Literal["sequential", "mean"] = "sequential"
    frames: Literal["mean", "shared", "joint"] = "mean"
    head: Literal["mean", "concat"] = "mean"
    project: bool = False
    attention: str = "auto"

    @property
    @override
    def tower_heads(self) -> bool:
        return self.head == "mean"

    @override
    def build(self, video: Tower, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        for tower in (video, audio):
            tower.require_blocks("bottleneck")
        depths = len(video.blocks), len(audio.blocks)
        if depths[0] != depths[1]:
            raise UserError(
                f"model.fusion: the video tower has {depths[0]} layers, the audio tower {depths[1]}; bottleneck fusion "
                "needs equal depth"
            )
        if self.start > depths[0]:
            raise UserError(f"model.fusion.start = {self.start}: the towers have only {depths[0]} layers")
        if video.width != audio.width and not self.project:
            raise UserError(
                f"model.fusion.project: the video tower has width {video.width}, the audio tower {audio.width}; set "
                "project = true for a linear layer between them"
            )
        check_attention(self.attention)
        # No layer reads the bottleneck after the last one. But with `sequential` the last audio layer reads the last
        # video layer's.
        sequential = self.update == "sequential"
        use_bottleneck_blocks(video, self.start, self.frames, self.attention, last_needs_bottleneck=sequential)
        use_bottleneck_blocks(audio, self.start, "joint", self.attention, last_needs_bottleneck=False)
        layers = depths[0] - self.start
        return BottleneckFusion(self, (video.width, audio.width), layers, num_classes, num_frames)

    @override
    def describe_attention(self, fusion: Any, video: Any, num_frames: int, device: str, dtype: str) -> str:
        num_tokens = video.num_prefix + video.num_patches
        segments = Segments(1, num_frames, num_tokens, fusion.bottleneck.shape[1], self.frames)
        return describe_attention(self.attention, video, segments, device, dtype)


class BottleneckFusion(nn.Module):
    """Module of kind `bottleneck`.

    Attributes:
        bottleneck: Bottleneck tokens [1, Z, D] of the video tower's width, initialised from N(0, 0.02) as in MBT.
        to_audio, to_video: Linear layers that convert the bottleneck where the towers' widths differ, else identities.
        time_embed: Embedding of the frames' positions in time [T, 1, D], initially zero; only with `frames = "joint"`.
        head: Linear layer on both towers' features; only with `head = "concat"`.

    Args:
        config: Settings.
        widths: Token widths of the video and the audio tower.
        layers: Number of layers with fusion.
        num_classes: Number of classes K.
        num_frames: Frames per clip T.
    """

    def __init__(
        self, config: Bottleneck, widths: tuple[int, int], layers: int, num_classes: int, num_frames: int
    ) -> None:
        super().__init__()
        self.config = config
        self.tokens = config.tokens if layers else 0
        empty = torch.empty(1, self.tokens, widths[0])
        # No unused parameters: distributed training waits for the gradient of each.
        if self.tokens:
            self.bottleneck = nn.Parameter(empty.normal_(std=0.02))
        else:
            self.register_buffer("bottleneck", empty, persistent=False)
        project = self.tokens > 0 and widths[0] != widths[1]
        self.to_audio = new_linear(*widths) if project else nn.Identity()
        self.to_video = new_linear(*reversed(widths)) if project and layers > 1 else nn.Identity()
        if config.frames == "joint":
            self.time_embed = nn.Parameter(torch.zeros(num_frames, 1, widths[0]))
        if config.head == "concat":
            self.head = new_linear(sum(widths), num_classes)

    def forward(self, video: Tower, audio: Tower, inputs: FusionInputs) -> Tensor:
        """Returns logits [B, K]."""
        frames_BTCHW, mel_BWCML = require_both(inputs)
        clips, windows = mel_BWCML.shape[:2]
        x_v = repeat_for_windows(self._video_tokens(video, frames_BTCHW), windows)
        x_a = self._audio_tokens(audio, mel_BWCML)
        z = self.bottleneck.expand(clips * windows, -1, -1)
        has = presence(inputs)
        if has is not None:
            has = repeat_for_windows(has[0].view(-1, 1, 1), windows), repeat_for_windows(has[1].view(-1, 1, 1), windows)
        layers = list(zip(video.blocks, audio.blocks, strict=True))[self.config.start :]
        for number, (video_block, audio_block) in enumerate(layers, 1):
            x_v, z_v = video_block(x_v, z, clips)
            read = z
            if self.config.update == "sequential":
                read = z_v if has is None else torch.where(has[0], z_v, z)
            x_a, z_a = audio_block(x_a, self.to_audio(read), clips)
            if number < len(layers):
                z = self._updated(z, read, z_v, self.to_video(z_a), has)
        video_BWF = video.pool(x_v.flatten(0, 1)).unflatten(0, (clips, windows, -1)).mean(2)
        audio_BWF = audio.pool(x_a.squeeze(1)).unflatten(0, (clips, windows))
        return self._logits(video, audio, video_BWF, audio_BWF, inputs)

    def _updated(self, z: Tensor, read: Tensor, z_v: Tensor, z_a: Tensor, has: tuple[Tensor, Tensor] | None) -> Tensor:
        """Returns the bottleneck for the next layer; a missing modality does not contribute to it."""
        if self.config.update == "sequential":
            return z_a if has is None else torch.where(has[1], z_a, read)
        mean = (z_v + z_a) / 2
        if has is None:
            return mean
        one = torch.where(has[0], z_v, torch.where(has[1], z_a, z))
        return torch.where(has[0] & has[1], mean, one)

    def _audio_tokens(self, audio: Tower, mel_BWCML: Tensor) -> Tensor:
        """Returns the tokens of the audio windows before the first fusion layer, [B * W, 1, L, D]."""
        x = audio.embed(mel_BWCML.flatten(0, 1))
        audio.rows_per_clip(mel_BWCML.shape[1])
        for block in audio.blocks[: self.config.start]:
            x = block(x)
        return x.unsqueeze(1)

    def _video_tokens(self, video: Tower, frames_BTCHW: Tensor) -> Tensor:
        """Returns the tokens of the frames before the first fusion layer, [B, T, N, D]; with `joint` T is 1."""
        clips, frames = frames_BTCHW.shape[:2]
        if self.config.frames == "joint":
            x, frames = clip_sequence(video, frames_BTCHW, self.time_embed), 1
        else:
            x = video.embed(frames_BTCHW.flatten(0, 1))
        video.rows_per_clip(frames)
        for block in video.blocks[: self.config.start]:
            x = block(x)
        return x.unflatten(0, (clips, frames))

    def _logits(self, video: Tower, audio: Tower, video_BWF: Tensor, audio_BWF: Tensor, inputs: FusionInputs) -> Tensor:
        """Returns logits [B, K] from the features of each window."""
        video_BF = mean_over_windows(video_BWF, inputs.window_BW)  # heads are linear: averaging before them is the same
        audio_BF = mean_over_windows(audio_BWF, inputs.window_BW)
        if self.config.head == "concat":
            return self.head(concat_features(video_BF, audio_BF, inputs))
        return mean_over_modalities(video.head(video_BF), audio.head(audio_BF), inputs)

    def flops(self, video: Tower, audio: Tower, frames: int, windows: int) -> int:
        """Returns the floating point operations of one clip."""
        start, Z = self.config.start, self.tokens
        rows, N = frames, video.num_prefix + video.num_patches
        if self.config.frames == "joint":
            rows, N = 1, video.num_prefix + frames * video.num_patches
        L = audio.num_prefix + audio.num_patches
        once = frames * video.embed_flops()
        once += sum(rows * block_flops(block, N, N, N * N) for block in video.blocks[:start])
        window = audio.embed_flops() + sum(block_flops(block, L, L, L * L) for block in audio.blocks[:start])
        window += rows * video.pool_flops(N) + audio.pool_flops(L)
        for video_block, audio_block in zip(video.blocks[start:], audio.blocks[start:], strict=True):
            assert isinstance(video_block, BottleneckBlock)
            assert isinstance(audio_block, BottleneckBlock)
            window += video_block.flops(rows, N, Z) + audio_block.flops(1, L, Z)
        layers = len(video.blocks) - start
        window += Z * (layers * linear_flops(self.to_audio) + (layers - 1) * linear_flops(self.to_video))
        heads = video.head_flops() + audio.head_flops()
        return once + windows * window + (linear_flops(self.head) if self.config.head == "concat" else heads)
