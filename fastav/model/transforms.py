"""What happens to tensors on their way to a tower: crop and resize after decode, and the device functions.

`resize_crop` runs once per decoded clip, on the CPU, for every decoder, so that decoders differ only in
decoding. The rest are pure tensor functions without data-dependent Python: they are the first operation of
the model, on the device, inside the compiled graph and inside what is exported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def crop_box(crop: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Rounds a planned crop to whole chroma samples of 4:2:0 inside the frame: to pairs of pixels.

    So that planes can be cropped as they were decoded; every decoder cuts the same box, whatever its picture's format.

    Args:
        crop: x, y, width, height in upright pixels.
        height: Of the upright frame.
        width: Of the upright frame.

    Returns:
        left, top, right, bottom; right and bottom exclusive.
    """
    x, y, w, h = crop
    left, right = _pairs(x, x + w, width)
    top, bottom = _pairs(y, y + h, height)
    return left, top, right, bottom


def _pairs(begin: float, end: float, size: int) -> tuple[int, int]:
    """The span in whole pairs of pixels; it may end with a single one where the picture does."""
    first = min(max(2 * round(begin / 2), 0), max((size - 1) // 2 * 2, 0))
    last = size if end > size - 1 else 2 * round(end / 2)
    return first, min(max(last, first + 2), size)


def resize_crop(frames_THWC: Tensor | NDArray[np.uint8], crop: Sequence[float], flip: bool, size: int) -> Tensor:
    """Crops, resizes (bilinear, antialiased) and mirrors the frames of a clip.

    torch's uint8 kernel reads the decoder's interleaved pixels in place: about 4 ms for eight crops of 400 x
    300 to 224 x 224 on one core (AVX2), the same as torchvision, which calls it, against 39 ms in float. It
    rounds its weights to 16 bits, which moves a value by at most 1.

    Args:
        frames_THWC: uint8, upright.
        crop: x, y, width, height in pixels of the frames; rounded by `crop_box`.
        flip: Mirror left to right after the crop.
        size: Height and width of the result.

    Returns:
        uint8 [T, 3, size, size], contiguous.
    """
    if not isinstance(frames_THWC, Tensor):
        frames_THWC = torch.from_numpy(np.ascontiguousarray(frames_THWC))
    out_TCHW = torch.empty(len(frames_THWC), 3, size, size, dtype=torch.uint8)
    resize_crop_into(out_TCHW, frames_THWC, crop, flip)
    return out_TCHW


def resize_crop_into(out_TCHW: Tensor, frames_THWC: Tensor, crop: Sequence[float], flip: bool) -> None:
    """Does what `resize_crop` does, to the size of `out_TCHW` and straight into it."""
    _, height, width, _ = frames_THWC.shape
    left, top, right, bottom = crop_box(crop, height, width)
    view_TCHW = frames_THWC[:, top:bottom, left:right].permute(0, 3, 1, 2)
    made_TCHW = functional.interpolate(view_TCHW, size=out_TCHW.shape[2:], mode="bilinear", antialias=True)
    out_TCHW.copy_(made_TCHW.flip(-1) if flip else made_TCHW)


def normalise_frames(frames: Tensor, mean_C: Tensor, std_C: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns (frames / 255 - mean) / std per colour channel.

    Args:
        frames: uint8 [..., 3, H, W].
        mean_C: Of the tower's training images, in 0 to 1.
        std_C: As `mean_C`.
        dtype: Of the result; the arithmetic is float32.
    """
    scaled = frames.to(torch.float32) / 255
    return ((scaled - mean_C[:, None, None]) / std_C[:, None, None]).to(dtype)


def normalise_mel(mel: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Returns (mel - mean) / std with the data set's statistics in dB, so that 0 is the data set's mean."""
    return (mel - mean) / std


def mask_bands(mel_BWCML: Tensor, band_B2: Tensor) -> Tensor:
    """Sets the planned band of consecutive mel rows to 0, the data set's mean (SSW60, section 4.1).

    Args:
        mel_BWCML: Normalised log-mel.
        band_B2: int64 first masked row and how many; (0, 0) masks nothing.
    """
    row_M = torch.arange(mel_BWCML.shape[3], device=mel_BWCML.device)
    first_B1, count_B1 = band_B2[:, :1], band_B2[:, 1:]
    masked_BM = (row_M >= first_B1) & (row_M < first_B1 + count_B1)
    return mel_BWCML.masked_fill(masked_BM[:, None, None, :, None], 0.0)


def mix(x: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
    """Mixes every row with its partner: mix * x + (1 - mix) * x[partner] (mixup, equation 1).

    Args:
        x: float [B, ...]: normalised inputs, or targets.
        mix_B: Weight of the row itself; 1 leaves it as it is.
        partner_B: int64 row of the partner.
    """
    weight = mix_B.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return weight * x + (1 - weight) * x[partner_B]
