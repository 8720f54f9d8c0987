"""The inputs of a fusion, and the steps that several fusions share: features, means, masks, layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastav.model.tower import Tower


class FusionInputs(NamedTuple):
    """Inputs of a fusion for B clips, after normalisation, masking and mixup.

    Attributes:
        frames_BTCHW: Float frames [B, T, 3, H, W]; None if the model uses no video.
        mel_BWCML: Float log-mel spectrogram [B, W, 3, M, L] of W windows; its three channels are equal unless the
            frontend computes three. None if the model uses no audio.
        window_BW: Bool; False marks a window that is padding. None: all are real. A clip without real windows is
            averaged over its first one.
        has_video_B: Bool; whether a clip has video. None: all have.
        has_audio_B: Bool; whether a clip has audio. None: all have.
    """

    frames_BTCHW: Tensor | None
    mel_BWCML: Tensor | None
    window_BW: Tensor | None = None
    has_video_B: Tensor | None = None
    has_audio_B: Tensor | None = None


def video_features(video: Tower, inputs: FusionInputs) -> Tensor:
    """Returns the video features of each clip, [B, F]: the mean over its frames (TSN)."""
    frames_BTCHW = inputs.frames_BTCHW
    assert frames_BTCHW is not None
    clips, frames = frames_BTCHW.shape[:2]
    return video.features(frames_BTCHW.flatten(0, 1), frames).unflatten(0, (clips, frames)).mean(1)


def audio_features(audio: Tower, inputs: FusionInputs) -> Tensor:
    """Returns the audio features of each window, [B, W, F]."""
    mel_BWCML = inputs.mel_BWCML
    assert mel_BWCML is not None
    clips, windows = mel_BWCML.shape[:2]
    return audio.features(mel_BWCML.flatten(0, 1), windows).unflatten(0, (clips, windows))


def clip_sequence(video: Tower, frames_BTCHW: Tensor, time_T1D: Tensor) -> Tensor:
    """Returns the tokens of all frames of a clip as one sequence: P class and register tokens, then T * N patches.

    Args:
        video: A ViT.
        frames_BTCHW: Normalised frames.
        time_T1D: Embedding of the frames' positions in time, added to the patches.

    Returns:
        [B, P + T * N, D].
    """
    clips, frames = frames_BTCHW.shape[:2]
    tokens_BTND = video.embed(frames_BTCHW.flatten(0, 1)).unflatten(0, (clips, frames))
    prefix = video.num_prefix
    patches = tokens_BTND[:, :, prefix:] + time_T1D
    return torch.cat([tokens_BTND[:, 0, :prefix], patches.flatten(1, 2)], dim=1)


def repeat_for_windows(x: Tensor, windows: int) -> Tensor:
    """Repeats each clip's row for each of its windows, [B, ...] -> [B * W, ...], without a copy for one window."""
    return x.unsqueeze(1).expand(-1, windows, *[-1] * (x.ndim - 1)).flatten(0, 1)


def mean_over_windows(values_BWF: Tensor, window_BW: Tensor | None) -> Tensor:
    """Returns the mean over the real windows of each clip, [B, F].

    Args:
        values_BWF: Features or logits of each window.
        window_BW: As in `FusionInputs`.
    """
    if window_BW is None:
        return values_BWF.mean(1)
    none_B1 = ~window_BW.any(1, keepdim=True)
    real_BW = torch.cat([window_BW[:, :1] | none_B1, window_BW[:, 1:]], dim=1)
    weight_BW1 = real_BW.to(values_BWF.dtype).unsqueeze(2)
    return (values_BWF * weight_BW1).sum(1) / weight_BW1.sum(1)


def presence(inputs: FusionInputs) -> tuple[Tensor, Tensor] | None:
    """Returns bool masks [B] of the clips that have video and of those that have audio; None if all have both."""
    has_video_B, has_audio_B = inputs.has_video_B, inputs.has_audio_B
    if has_video_B is not None and has_audio_B is not None:
        return has_video_B, has_audio_B
    if has_video_B is not None:
        return has_video_B, torch.ones_like(has_video_B)
    if has_audio_B is not None:
        return torch.ones_like(has_audio_B), has_audio_B
    return None


def modality_shares(
    inputs: FusionInputs, video_share: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor] | None:
    """Returns the weights [B, 1] of video and audio, renormalised over the modalities that each clip has.

    A clip with neither modality keeps the weights of one with both.

    Args:
        inputs: Inputs of the fusion.
        video_share: Weight of the video where both are present; the audio has the rest.
        dtype: Of the result.

    Returns:
        Weights of the video and of the audio; None if all clips have both.
    """
    has = presence(inputs)
    if has is None:
        return None
    neither_B = ~(has[0] | has[1])
    video_B1 = (has[0] | neither_B).to(dtype).unsqueeze(1) * video_share
    audio_B1 = (has[1] | neither_B).to(dtype).unsqueeze(1) * (1 - video_share)
    total_B1 = video_B1 + audio_B1
    return video_B1 / total_B1, audio_B1 / total_B1


def mean_over_modalities(video_BF: Tensor, audio_BF: Tensor, inputs: FusionInputs) -> Tensor:
    """Returns the mean of both features or logits over the modalities that each clip has, [B, F]."""
    shares = modality_shares(inputs, 0.5, video_BF.dtype)
    if shares is None:
        return (video_BF + audio_BF) / 2
    video_B1, audio_B1 = shares
    return torch.where(video_B1 > 0, video_BF, 0) * video_B1 + torch.where(audio_B1 > 0, audio_BF, 0) * audio_B1


def concat_features(video_BF: Tensor, audio_BF: Tensor, inputs: FusionInputs) -> Tensor:
    """Returns video and audio features concatenated, with zeros for a missing modality, [B, F_video + F_audio]."""
    if inputs.has_video_B is not None:
        video_BF = torch.where(inputs.has_video_B.unsqueeze(1), video_BF, 0)
    if inputs.has_audio_B is not None:
        audio_BF = torch.where(inputs.has_audio_B.unsqueeze(1), audio_BF, 0)
    return torch.cat([video_BF, audio_BF], dim=1)


def new_linear(width: int, outputs: int) -> nn.Linear:
    """Creates a linear layer with the initialisation of timm's ViT (truncated normal, std 0.02; bias 0)."""
    linear = nn.Linear(width, outputs)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def require_both(inputs: FusionInputs) -> tuple[Tensor, Tensor]:
    """Returns frames and spectrogram, for a fusion that always uses both."""
    assert inputs.frames_BTCHW is not None
    assert inputs.mel_BWCML is not None
    return inputs.frames_BTCHW, inputs.mel_BWCML


def key_mask(inputs: FusionInputs, video_length: int, audio_length: int) -> Tensor | None:
    """Returns the attention mask over [video tokens || audio tokens] that leaves out missing modalities.

    Args:
        inputs: Inputs of the fusion.
        video_length: Number of video tokens.
        audio_length: Number of audio tokens.

    Returns:
        Bool [B, 1, 1, video_length + audio_length], True where a key may be attended; None if all may.
    """
    shares = modality_shares(inputs, 0.5)
    if shares is None:
        return None
    lengths = video_length, audio_length
    parts = [(share > 0).expand(-1, length) for share, length in zip(shares, lengths, strict=True)]
    return torch.cat(parts, dim=1)[:, None, None]
