"""The model's first operations on frames and spectrograms: normalisation, masking and mixup.

These are pure tensor functions without data-dependent Python. They run on the device, and are part of the compiled and
of the exported graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalise_frames(frames: Tensor, mean_C: Tensor, std_C: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns (frames / 255 - mean) / std per colour channel.

    Args:
        frames: uint8 [..., 3, H, W].
        mean_C: Mean of each colour channel, in 0 to 1.
        std_C: Standard deviation of each colour channel, in 0 to 1.
        dtype: Type of the result; the arithmetic is float32.
    """
    scaled = frames.to(torch.float32) / 255
    return ((scaled - mean_C[:, None, None]) / std_C[:, None, None]).to(dtype)


def normalise_mel(mel: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Returns (mel - mean) / std, with the data set's mean and standard deviation in dB."""
    return (mel - mean) / std


def mask_bands(mel_BWCML: Tensor, band_B2: Tensor) -> Tensor:
    """Sets the planned band of consecutive mel rows to 0, the data set's mean (SSW60, section 4.1).

    Args:
        mel_BWCML: Normalised log-mel.
        band_B2: int64 first masked row and number of masked rows; (0, 0) masks nothing.
    """
    row_M = torch.arange(mel_BWCML.shape[3], device=mel_BWCML.device)
    first_B1, count_B1 = band_B2[:, :1], band_B2[:, 1:]
    masked_BM = (row_M >= first_B1) & (row_M < first_B1 + count_B1)
    return mel_BWCML.masked_fill(masked_BM[:, None, None, :, None], 0.0)


def mix(x: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
    """Mixes every row with its partner: mix * x + (1 - mix) * x[partner] (mixup, equation 1).

    Args:
        x: float [B, ...] normalised inputs, or targets.
        mix_B: Weight of the row itself, 0 to 1; 1 leaves the row unchanged.
        partner_B: int64 row number of the partner.
    """
    weight = mix_B.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return weight * x + (1 - weight) * x[partner_B]
