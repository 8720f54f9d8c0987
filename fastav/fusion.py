"""How the towers meet: one modality alone, late, score, early and bottleneck fusion.

Each kind is a config whose `build` prepares the towers (it may take blocks over or remove what it does not
use) and returns a module with the fusion's own parameters and

    forward(video, audio, streams) -> logits [B, K]        flops(video, audio, frames, windows) -> int

Evaluation gives W windows of sound for one clip: what only depends on the frames runs once per clip, the rest
once per window, and the logits are averaged over the real windows. A missing modality is a mask, never a
branch: with both present in all clips the masks may be None.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from fastav.bottleneck import BottleneckBlock, enter_blocks
from fastav.config import Kind, NonNegativeInt
from fastav.errors import UserError, did_you_mean
from fastav.towers import Modality, TimmTower, block_flops, linear_flops
from fastav_kernels.bottleneck_attention import IMPLEMENTATIONS


class Streams(NamedTuple):
    """What a fusion is fed: normalised and mixed inputs of B clips.

    Attributes:
        frames_BTCHW: float; None for kind `audio`.
        mel_BWCML: float, three channels; None for kind `video`.
        window_BW: bool, which windows are real; None: all. A clip without any counts with its first.
        has_video_B: bool; None: all have.
        has_audio_B: bool; None: all have.
    """

    frames_BTCHW: Tensor | None
    mel_BWCML: Tensor | None
    window_BW: Tensor | None = None
    has_video_B: Tensor | None = None
    has_audio_B: Tensor | None = None


class Video(Kind, frozen=True, tag="video"):
    """Frames alone (TSN, SSW60 section 4.1): the features of a clip's frames are averaged, then the head."""

    modalities: ClassVar[tuple[Modality, ...]] = ("video",)
    tower_heads: ClassVar[bool] = True

    def build(self, video: TimmTower, audio: None, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module; the head is the tower's."""
        return VideoOnly()


class Audio(Kind, frozen=True, tag="audio"):
    """Sound alone (SSW60 section 4.1): logits of each window, averaged over the real ones."""

    modalities: ClassVar[tuple[Modality, ...]] = ("audio",)
    tower_heads: ClassVar[bool] = True

    def build(self, video: None, audio: TimmTower, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module; the head is the tower's."""
        return AudioOnly()


class Late(Kind, frozen=True, tag="late"):
    """A linear layer on both towers' features side by side (SSW60 section 4.1), zeros for a missing modality."""

    modalities: ClassVar[tuple[Modality, ...]] = ("video", "audio")
    tower_heads: ClassVar[bool] = False

    def build(self, video: TimmTower, audio: TimmTower, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module with its linear head; the towers need none."""
        return LateFusion(video.width + audio.width, num_classes)


class Score(Kind, frozen=True, tag="score"):
    """A weighted sum of two finished models' predictions (SSW60 section 4.1). It trains nothing.

    Attributes:
        weight: Share of the video tower; the audio tower has the rest. A missing modality has none.
        of: What is summed: `probabilities` (softmax, for one label a clip), `sigmoids` (for many labels) or
            `logits`. The sum of probabilities or sigmoids is returned as the logits that softmax, or sigmoid,
            turns into it.
    """

    weight: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    of: Literal["probabilities", "sigmoids", "logits"] = "probabilities"
    modalities: ClassVar[tuple[Modality, ...]] = ("video", "audio")
    tower_heads: ClassVar[bool] = True

    def build(self, video: TimmTower, audio: TimmTower, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module and freezes both towers."""
        for tower in (video, audio):
            tower.requires_grad_(False)
            tower.settle()
        return ScoreFusion(self)


class Early(Kind, frozen=True, tag="early"):
    """Joint self-attention of all tokens from the first layer, in one encoder (MBT's vanilla self-attention).

    Each modality has its own patch, class-token and position embedding, the frames a learned one of their
    time besides; blocks, final norm and head are the video tower's, and the audio tower keeps nothing else.
    The head sees the mean of what is pooled of each modality's tokens.
    """

    modalities: ClassVar[tuple[Modality, ...]] = ("video", "audio")
    tower_heads: ClassVar[bool] = True

    def build(self, video: TimmTower, audio: TimmTower, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module and removes the audio tower's blocks.

        Raises:
            UserError: where a tower is no plain ViT or the two do not fit together.
        """
        for tower in (video, audio):
            tower.require_blocks("early")
        if video.width != audio.width or video.num_prefix != audio.num_prefix:
            raise UserError(
                f"{audio.where}: width {audio.width} and {audio.num_prefix} class and register tokens given, "
                f'the video tower\'s {video.width} and {video.num_prefix} expected by fusion kind "early"'
            )
        audio.keep_embedding()
        return EarlyFusion(video.width, num_frames)


class Bottleneck(Kind, frozen=True, tag="bottleneck"):
    """Mid-fusion through bottleneck tokens (MBT; SSW60 section 4.1, equations 3 and 4).

    Attributes:
        start: First layer with fusion, counted from 0; the towers' depth for none.
        tokens: Bottleneck tokens Z.
        update: `sequential`: the video layer updates the bottleneck, the audio layer reads that and updates
            it again (SSW60). `mean`: both read the old one, the new one is the mean of theirs (MBT).
        frames: `mean`: frames pass each layer one by one with a copy of the bottleneck each, and the copies
            are averaged (the literal reading of SSW60). `shared`: a frame sees itself and the bottleneck, the
            bottleneck sees all frames. `joint`: one sequence of all frames from the first layer on, with one
            set of class tokens and a learned embedding of the frames' time (MBT).
        head: `mean` of both towers' logits, or `concat`: a linear layer on both towers' features side by
        side.
        project: Joins towers of different width by a linear layer for the bottleneck, to the audio tower's
            width and back.
        attention: Implementation of the attention in fusion layers, `auto` for the best one here.
    """

    start: NonNegativeInt = 8
    tokens: NonNegativeInt = 4
    update: Literal["sequential", "mean"] = "sequential"
    frames: Literal["mean", "shared", "joint"] = "mean"
    head: Literal["mean", "concat"] = "mean"
    project: bool = False
    attention: str = "auto"
    modalities: ClassVar[tuple[Modality, ...]] = ("video", "audio")

    @property
    def tower_heads(self) -> bool:
        """Whether each tower has a head of its own."""
        return self.head == "mean"

    def build(self, video: TimmTower, audio: TimmTower, num_classes: int, num_frames: int) -> nn.Module:
        """Returns the module and replaces the towers' blocks from `start` on.

        Raises:
            UserError: where a tower is no plain ViT or the two do not fit together.
        """
        for tower in (video, audio):
            tower.require_blocks("bottleneck")
        depths = len(video.blocks), len(audio.blocks)
        if depths[0] != depths[1]:
            raise UserError(f"model.fusion: towers of {depths[0]} and {depths[1]} layers given, equal expected")
        if self.start > depths[0]:
            raise UserError(f"model.fusion.start: {self.start} given, at most the towers' {depths[0]} layers expected")
        if video.width != audio.width and not self.project:
            raise UserError(
                f"model.fusion.project: towers of width {video.width} and {audio.width} need project = true, "
                "a linear layer between them for the bottleneck"
            )
        if self.attention not in ("auto", *IMPLEMENTATIONS):
            near = did_you_mean(self.attention, ["auto", *IMPLEMENTATIONS])
            raise UserError(f'model.fusion.attention: "{self.attention}" is unknown{near}')
        # Behind the last layer nobody reads the bottleneck, but its audio half reads what the video half made of it.
        enter_blocks(video, self.start, self.frames, self.attention, last_asks=self.update == "sequential")
        enter_blocks(audio, self.start, "joint", self.attention, last_asks=False)
        layers = depths[0] - self.start
        return BottleneckFusion(self, (video.width, audio.width), layers, num_classes, num_frames)


Fusion = Video | Audio | Late | Score | Early | Bottleneck


class VideoOnly(nn.Module):
    """Kind `video`."""

    def forward(self, video: TimmTower, audio: None, streams: Streams) -> Tensor:
        """Returns logits [B, K]."""
        return video.head(video_features(video, streams))

    def flops(self, video: TimmTower, audio: None, frames: int, windows: int) -> int:
        """Operations of one clip."""
        return frames * video.feature_flops() + video.head_flops()


class AudioOnly(nn.Module):
    """Kind `audio`."""

    def forward(self, video: None, audio: TimmTower, streams: Streams) -> Tensor:
        """Returns logits [B, K]."""
        return over_windows(audio.head(audio_features(audio, streams)), streams.window_BW)

    def flops(self, video: None, audio: TimmTower, frames: int, windows: int) -> int:
        """Operations of one clip."""
        return windows * (audio.feature_flops() + audio.head_flops())


class LateFusion(nn.Module):
    """Kind `late`. The layer is linear, so that features are averaged over the windows, not logits."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.head = new_linear(width, num_classes)

    def forward(self, video: TimmTower, audio: TimmTower, streams: Streams) -> Tensor:
        """Returns logits [B, K]."""
        video_BF = video_features(video, streams)
        audio_BF = over_windows(audio_features(audio, streams), streams.window_BW)
        return self.head(side_by_side(video_BF, audio_BF, streams))

    def flops(self, video: TimmTower, audio: TimmTower, frames: int, windows: int) -> int:
        """Operations of one clip."""
        return frames * video.feature_flops() + windows * audio.feature_flops() + linear_flops(self.head)


class ScoreFusion(nn.Module):
    """Kind `score`."""

    def __init__(self, config: Score) -> None:
        super().__init__()
        self.config = config

    def forward(self, video: TimmTower, audio: TimmTower, streams: Streams) -> Tensor:
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

    def flops(self, video: TimmTower, audio: TimmTower, frames: int, windows: int) -> int:
        """Operations of one clip."""
        heads = video.head_flops() + windows * audio.head_flops()
        return frames * video.feature_flops() + windows * audio.feature_flops() + heads


class EarlyFusion(nn.Module):
    """Kind `early`."""

    def __init__(self, width: int, num_frames: int) -> None:
        super().__init__()
        self.time_embed = nn.Parameter(torch.zeros(num_frames, 1, width))

    def forward(self, video: TimmTower, audio: TimmTower, streams: Streams) -> Tensor:
        """Returns logits [B, K]."""
        frames_BTCHW, mel_BWCML = _both(streams)
        windows = mel_BWCML.shape[1]
        seen = each_window(clip_sequence(video, frames_BTCHW, self.time_embed), windows)
        heard = audio.embed(mel_BWCML.flatten(0, 1))
        split = seen.shape[1]
        mask = _key_mask(streams, split, heard.shape[1])
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

    def flops(self, video: TimmTower, audio: TimmTower, frames: int, windows: int) -> int:
        """Operations of one clip."""
        seen = video.num_prefix + frames * video.num_patches
        heard = audio.num_prefix + audio.num_patches
        length = seen + heard
        blocks = sum(block_flops(block, length, length, length * length) for block in video.blocks)
        window = audio.embed_flops() + blocks + video.pool_flops(seen) + video.pool_flops(heard)
        return frames * video.embed_flops() + windows * window + video.head_flops()


class BottleneckFusion(nn.Module):
    """Kind `bottleneck`.

    Attributes:
        bottleneck: [1, Z, D] of the video tower's width, drawn from N(0, 0.02) as in MBT.
        to_audio, to_video: The linear layers of `project`, where widths differ.
        time_embed: [T, 1, D], zero at first; with `frames = "joint"`.
        head: With `head = "concat"`.

    Args:
        config: Settings.
        widths: Of the video and the audio tower.
        layers: Layers with fusion.
        num_classes: K.
        num_frames: T.
    """

    def __init__(
        self, config: Bottleneck, widths: tuple[int, int], layers: int, num_classes: int, num_frames: int
    ) -> None:
        super().__init__()
        self.config = config
        self.tokens = config.tokens if layers else 0
        empty = torch.empty(1, self.tokens, widths[0])
        # No parameter without use: distributed training waits for the gradient of each.
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

    def forward(self, video: TimmTower, audio: TimmTower, streams: Streams) -> Tensor:
        """Returns logits [B, K]."""
        frames_BTCHW, mel_BWCML = _both(streams)
        clips, windows = mel_BWCML.shape[:2]
        x_v = each_window(self._seen(video, frames_BTCHW), windows)
        x_a = self._heard(audio, mel_BWCML)
        z = self.bottleneck.expand(clips * windows, -1, -1)
        has = present(streams)
        if has is not None:
            has = each_window(has[0].view(-1, 1, 1), windows), each_window(has[1].view(-1, 1, 1), windows)
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
        return self._logits(video, audio, video_BWF, audio_BWF, streams)

    def _updated(self, z: Tensor, read: Tensor, z_v: Tensor, z_a: Tensor, has: tuple[Tensor, Tensor] | None) -> Tensor:
        """Returns the next layer's bottleneck; a missing modality has no part in it."""
        if self.config.update == "sequential":
            return z_a if has is None else torch.where(has[1], z_a, read)
        mean = (z_v + z_a) / 2
        if has is None:
            return mean
        one = torch.where(has[0], z_v, torch.where(has[1], z_a, z))
        return torch.where(has[0] & has[1], mean, one)

    def _heard(self, audio: TimmTower, mel_BWCML: Tensor) -> Tensor:
        """Returns the windows' tokens before the first fusion layer, [B * W, 1, L, D]."""
        x = audio.embed(mel_BWCML.flatten(0, 1))
        audio.rows_per_clip(mel_BWCML.shape[1])
        for block in audio.blocks[: self.config.start]:
            x = block(x)
        return x.unsqueeze(1)

    def _seen(self, video: TimmTower, frames_BTCHW: Tensor) -> Tensor:
        """Returns the frames' tokens before the first fusion layer, [B, T, N, D]; with `joint` T is 1."""
        clips, frames = frames_BTCHW.shape[:2]
        if self.config.frames == "joint":
            x, frames = clip_sequence(video, frames_BTCHW, self.time_embed), 1
        else:
            x = video.embed(frames_BTCHW.flatten(0, 1))
        video.rows_per_clip(frames)
        for block in video.blocks[: self.config.start]:
            x = block(x)
        return x.unflatten(0, (clips, frames))

    def _logits(
        self, video: TimmTower, audio: TimmTower, video_BWF: Tensor, audio_BWF: Tensor, streams: Streams
    ) -> Tensor:
        """Returns logits [B, K] of each window's features."""
        video_BF = over_windows(video_BWF, streams.window_BW)  # the heads are linear
        audio_BF = over_windows(audio_BWF, streams.window_BW)
        if self.config.head == "concat":
            return self.head(side_by_side(video_BF, audio_BF, streams))
        return over_present(video.head(video_BF), audio.head(audio_BF), streams)

    def flops(self, video: TimmTower, audio: TimmTower, frames: int, windows: int) -> int:
        """Operations of one clip."""
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


def video_features(video: TimmTower, streams: Streams) -> Tensor:
    """Returns the mean of the features of each clip's frames, [B, F] (TSN)."""
    frames_BTCHW = streams.frames_BTCHW
    assert frames_BTCHW is not None
    clips, frames = frames_BTCHW.shape[:2]
    return video.features(frames_BTCHW.flatten(0, 1), frames).unflatten(0, (clips, frames)).mean(1)


def audio_features(audio: TimmTower, streams: Streams) -> Tensor:
    """Returns the features of each window, [B, W, F]."""
    mel_BWCML = streams.mel_BWCML
    assert mel_BWCML is not None
    clips, windows = mel_BWCML.shape[:2]
    return audio.features(mel_BWCML.flatten(0, 1), windows).unflatten(0, (clips, windows))


def clip_sequence(video: TimmTower, frames_BTCHW: Tensor, time_T1D: Tensor) -> Tensor:
    """Returns all frames' patches as one sequence behind one set of class tokens, [B, P + T*N, D]."""
    clips, frames = frames_BTCHW.shape[:2]
    tokens_BTND = video.embed(frames_BTCHW.flatten(0, 1)).unflatten(0, (clips, frames))
    prefix = video.num_prefix
    patches = tokens_BTND[:, :, prefix:] + time_T1D
    return torch.cat([tokens_BTND[:, 0, :prefix], patches.flatten(1, 2)], dim=1)


def each_window(x: Tensor, windows: int) -> Tensor:
    """Repeats each clip's row for each of its windows: [B, ...] -> [B * W, ...]; no copy for one window."""
    return x.unsqueeze(1).expand(-1, windows, *[-1] * (x.ndim - 1)).flatten(0, 1)


def over_windows(values_BWF: Tensor, window_BW: Tensor | None) -> Tensor:
    """Returns the mean over the real windows, [B, F]."""
    if window_BW is None:
        return values_BWF.mean(1)
    none_B1 = ~window_BW.any(1, keepdim=True)
    real_BW = torch.cat([window_BW[:, :1] | none_B1, window_BW[:, 1:]], dim=1)
    weight_BW1 = real_BW.to(values_BWF.dtype).unsqueeze(2)
    return (values_BWF * weight_BW1).sum(1) / weight_BW1.sum(1)


def present(streams: Streams) -> tuple[Tensor, Tensor] | None:
    """Returns which clips have video and audio, bool [B] each; None where all have both."""
    has_video_B, has_audio_B = streams.has_video_B, streams.has_audio_B
    if has_video_B is not None and has_audio_B is not None:
        return has_video_B, has_audio_B
    if has_video_B is not None:
        return has_video_B, torch.ones_like(has_video_B)
    if has_audio_B is not None:
        return torch.ones_like(has_audio_B), has_audio_B
    return None


def present_shares(
    streams: Streams, video_share: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor] | None:
    """Returns each modality's share [B, 1] among those that a clip has (both where it has neither); None: all have."""
    has = present(streams)
    if has is None:
        return None
    neither_B = ~(has[0] | has[1])
    video_B1 = (has[0] | neither_B).to(dtype).unsqueeze(1) * video_share
    audio_B1 = (has[1] | neither_B).to(dtype).unsqueeze(1) * (1 - video_share)
    total_B1 = video_B1 + audio_B1
    return video_B1 / total_B1, audio_B1 / total_B1


def over_present(video_BF: Tensor, audio_BF: Tensor, streams: Streams) -> Tensor:
    """Returns the mean over the modalities that a clip has, [B, F]."""
    shares = present_shares(streams, 0.5, video_BF.dtype)
    if shares is None:
        return (video_BF + audio_BF) / 2
    video_B1, audio_B1 = shares
    return torch.where(video_B1 > 0, video_BF, 0) * video_B1 + torch.where(audio_B1 > 0, audio_BF, 0) * audio_B1


def side_by_side(video_BF: Tensor, audio_BF: Tensor, streams: Streams) -> Tensor:
    """Returns both features, zeros for a missing modality, [B, F + F']."""
    if streams.has_video_B is not None:
        video_BF = torch.where(streams.has_video_B.unsqueeze(1), video_BF, 0)
    if streams.has_audio_B is not None:
        audio_BF = torch.where(streams.has_audio_B.unsqueeze(1), audio_BF, 0)
    return torch.cat([video_BF, audio_BF], dim=1)


def new_linear(width: int, outputs: int) -> nn.Linear:
    """Makes a linear layer, initialised as timm's ViT initialises its own."""
    linear = nn.Linear(width, outputs)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _both(streams: Streams) -> tuple[Tensor, Tensor]:
    """Returns the frames and the spectrogram."""
    assert streams.frames_BTCHW is not None
    assert streams.mel_BWCML is not None
    return streams.frames_BTCHW, streams.mel_BWCML


def _key_mask(streams: Streams, seen: int, heard: int) -> Tensor | None:
    """Returns which keys may be attended, bool [B, 1, 1, seen + heard]; None for all."""
    shares = present_shares(streams, 0.5)
    if shares is None:
        return None
    parts = [(share > 0).expand(-1, length) for share, length in zip(shares, (seen, heard), strict=True)]
    return torch.cat(parts, dim=1)[:, None, None]


def _log_sum(log_shares: tuple[Tensor, Tensor], video: Tensor, audio: Tensor) -> Tensor:
    """Returns the logarithm of the weighted sum of two exponentials."""
    return torch.logaddexp(log_shares[0] + video, log_shares[1] + audio)
