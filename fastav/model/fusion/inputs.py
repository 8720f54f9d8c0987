"""What a fusion is fed, and what several of them do with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastav.model.tower import Tower


class FusionInputs(NamedTuple):
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


def video_features(video: Tower, streams: FusionInputs) -> Tensor:
    """Returns the mean of the features of each clip's frames, [B, F] (TSN)."""
    frames_BTCHW = streams.frames_BTCHW
    assert frames_BTCHW is not None
    clips, frames = frames_BTCHW.shape[:2]
    return video.features(frames_BTCHW.flatten(0, 1), frames).unflatten(0, (clips, frames)).mean(1)


def audio_features(audio: Tower, streams: FusionInputs) -> Tensor:
    """Returns the features of each window, [B, W, F]."""
    mel_BWCML = streams.mel_BWCML
    assert mel_BWCML is not None
    clips, windows = mel_BWCML.shape[:2]
    return audio.features(mel_BWCML.flatten(0, 1), windows).unflatten(0, (clips, windows))


def clip_sequence(video: Tower, frames_BTCHW: Tensor, time_T1D: Tensor) -> Tensor:
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


def present(streams: FusionInputs) -> tuple[Tensor, Tensor] | None:
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
    streams: FusionInputs, video_share: float, dtype: torch.dtype = torch.float32
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


def over_present(video_BF: Tensor, audio_BF: Tensor, streams: FusionInputs) -> Tensor:
    """Returns the mean over the modalities that a clip has, [B, F]."""
    shares = present_shares(streams, 0.5, video_BF.dtype)
    if shares is None:
        return (video_BF + audio_BF) / 2
    video_B1, audio_B1 = shares
    return torch.where(video_B1 > 0, video_BF, 0) * video_B1 + torch.where(audio_B1 > 0, audio_BF, 0) * audio_B1


def side_by_side(video_BF: Tensor, audio_BF: Tensor, streams: FusionInputs) -> Tensor:
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


def both(streams: FusionInputs) -> tuple[Tensor, Tensor]:
    """Returns the frames and the spectrogram."""
    assert streams.frames_BTCHW is not None
    assert streams.mel_BWCML is not None
    return streams.frames_BTCHW, streams.mel_BWCML


def key_mask(streams: FusionInputs, seen: int, heard: int) -> Tensor | None:
    """Returns which keys may be attended, bool [B, 1, 1, seen + heard]; None for all."""
    shares = present_shares(streams, 0.5)
    if shares is None:
        return None
    parts = [(share > 0).expand(-1, length) for share, length in zip(shares, (seen, heard), strict=True)]
    return torch.cat(parts, dim=1)[:, None, None]
