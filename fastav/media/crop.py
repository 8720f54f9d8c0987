"""Crops, converts to RGB, resizes and flips decoded frames in one pass over the crop.

FFmpeg's scaler reads the planes of the crop as they were decoded and writes planar RGB of the requested size (bilinear,
with a wider filter when shrinking, which is antialiasing). The usual way is to convert the whole frame to RGB and then
to resize the crop. Compared to that, this takes a quarter to a half less time and is closer to the exact result: the
mean error is 0.3 to 0.4 levels instead of 1.1 to 1.2, most of which is caused by FFmpeg's fast conversion (448 x 256
H.264 to 224 x 224, compared to float64).

Crops start and end at whole chroma samples (`crop_box`), so planes are not shifted relative to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Pixel formats that can be cropped, and the pixels per chroma sample, horizontally and vertically. Frames in other
# formats are first converted to RGB.
_CHROMA = {
    "yuv420p": (2, 2), "yuvj420p": (2, 2), "yuv422p": (2, 1), "yuvj422p": (2, 1), "yuv444p": (1, 1),
    "yuvj444p": (1, 1), "gbrp": (1, 1), "rgb24": (1, 1),
}  # fmt: skip
_RGB_OF_GBRP = (2, 0, 1)


class Cropper:
    """Crops the frames of a clip for one plan. Used by one thread at a time.

    Args:
        size: Height and width of the result, pixels.
        crop: x, y, width and height in the upright frame, pixels.
        flip: Whether to mirror the result left to right.
        rotation: Clockwise rotation that makes the frames upright, degrees: 0, 90, 180 or 270.
        mirrored: Whether the frames must also be mirrored left to right, after the rotation, to be upright.
    """

    def __init__(
        self, size: int, crop: tuple[float, ...], flip: bool, rotation: int = 0, *, mirrored: bool = False
    ) -> None:
        self._size, self._crop, self._flip, self._rotation = size, crop, flip, rotation
        self._mirrored = mirrored
        self._scaler = VideoReformatter()  # reuses its filters while the sizes stay the same
        self._copier: _Copier | None = None

    def cut(self, out_CHW: NDArray[np.uint8], frame: av.VideoFrame) -> None:
        """Writes the crop of a frame, upright, flipped and resized.

        Args:
            out_CHW: Output, uint8 [3, size, size].
            frame: Frame returned by `cuttable`. All frames of a clip must have the same size and format.
        """
        if self._copier is None:
            turned = self._rotation % 180 != 0
            height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
            left, top, right, bottom = crop_box(self._crop, height, width)
            if self._mirrored:
                left, right = width - right, width - left
            box = _to_decoded((left, top, right, bottom), height, width, self._rotation)
            self._copier = _Copier(frame, *box)
        rgb = self._scaled(self._copier.copy(frame))
        if self._rotation:
            rgb = [np.rot90(plane_HW, -self._rotation // 90) for plane_HW in rgb]
        target_CHW = out_CHW[:, :, ::-1] if self._flip != self._mirrored else out_CHW
        for target_HW, plane_HW in zip(target_CHW, rgb, strict=True):
            target_HW[...] = plane_HW

    def _scaled(self, part: av.VideoFrame) -> list[NDArray[np.uint8]]:
        """Returns the red, green and blue planes [size, size] of a crop."""
        size = self._size
        if part.width == size == part.height:
            # Without scaling, FFmpeg uses a fast path that is wrong for planar RGB if the width is not a multiple of
            # 16. It is right for packed RGB.
            packed: Any = self._scaler.reformat(part, format="rgb24", threads=1).planes[0]
            packed_HWC = np.frombuffer(packed, np.uint8).reshape(size, -1)[:, : 3 * size].reshape(size, size, 3)
            return list(packed_HWC.transpose(2, 0, 1))
        planar = self._scaler.reformat(part, size, size, "gbrp", interpolation="BILINEAR", threads=1).planes
        return [_window(planar[place], 0, 0, size, size) for place in _RGB_OF_GBRP]


class _Copier:
    """Copies one rectangle of each frame into the same memory.

    Args:
        frame: The first frame.
        left: Left edge, pixels, at a whole chroma sample.
        top: Top edge, pixels, at a whole chroma sample.
        right: Right edge, pixels, exclusive.
        bottom: Bottom edge, pixels, exclusive.
    """

    def __init__(self, frame: av.VideoFrame, left: int, top: int, right: int, bottom: int) -> None:
        self._whole = (left, top, right, bottom) == (0, 0, frame.width, frame.height)
        if self._whole:
            return
        across, down = _CHROMA[frame.format.name]
        left, top = left // across * across, top // down * down
        step = 3 if frame.format.name == "rgb24" else 1  # bytes per sample
        self._part = av.VideoFrame(right - left, bottom - top, frame.format.name)
        self._part.colorspace, self._part.color_range = frame.colorspace, frame.color_range
        self._targets: list[NDArray[np.uint8]] = []
        self._windows: list[tuple[int, int, int, int]] = []
        for i, plane in enumerate(self._part.planes):
            x, y = (across, down) if i else (1, 1)
            rows, columns, begin = plane.height, plane.width * step, left // x * step
            self._targets.append(_window(plane, 0, 0, rows, columns))
            self._windows.append((top // y, begin, rows, columns))

    def copy(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Returns the rectangle of a frame, valid until the next call. If it is the whole frame, returns the frame."""
        if self._whole:
            return frame
        for plane, target_HW, window in zip(frame.planes, self._targets, self._windows, strict=True):
            target_HW[...] = _window(plane, *window)
        return self._part


def _window(plane: Any, top: int, left: int, rows: int, columns: int) -> NDArray[np.uint8]:
    """Returns a view of a rectangle of a plane's bytes."""
    line = plane.line_size
    return np.ndarray((rows, columns), np.uint8, plane, top * line + left, (line, 1))


def cuttable(frame: av.VideoFrame, converter: VideoReformatter) -> av.VideoFrame:
    """Returns the frame if its pixel format can be cropped, otherwise the frame converted to RGB."""
    return frame if frame.format.name in _CHROMA else converter.reformat(frame, format="rgb24", threads=1)


def _to_decoded(box: tuple[int, int, int, int], height: int, width: int, rotation: int) -> tuple[int, int, int, int]:
    """Converts a box (left, top, right, bottom) in the rotated picture to the frame as it was decoded."""
    left, top, right, bottom = box
    if rotation == 90:  # the left edge of the frame is the top of the upright picture
        return top, width - right, bottom, width - left
    if rotation == 180:
        return width - right, height - bottom, width - left, height - top
    if rotation == 270:
        return height - bottom, left, height - top, right
    return box


def crop_box(crop: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Rounds a planned crop to whole chroma samples of 4:2:0 (pairs of pixels) inside the frame.

    So planes can be cropped as they were decoded. Every decoder uses the same box for every pixel format.

    Args:
        crop: x, y, width and height in the upright frame, pixels.
        height: Height of the upright frame, pixels.
        width: Width of the upright frame, pixels.

    Returns:
        left, top, right and bottom, pixels; right and bottom are exclusive.
    """
    x, y, w, h = crop
    left, right = _pairs(x, x + w, width)
    top, bottom = _pairs(y, y + h, height)
    return left, top, right, bottom


def _pairs(begin: float, end: float, size: int) -> tuple[int, int]:
    """Rounds a span to whole pairs of pixels. It may end with a single pixel at the edge of the picture."""
    first = min(max(2 * round(begin / 2), 0), max((size - 1) // 2 * 2, 0))
    last = size if end > size - 1 else 2 * round(end / 2)
    return first, min(max(last, first + 2), size)


def resize_crop(frames_THWC: Tensor | NDArray[np.uint8], crop: Sequence[float], flip: bool, size: int) -> Tensor:
    """Crops, resizes (bilinear, antialiased) and flips the frames of a clip.

    PyTorch's uint8 kernel reads the interleaved pixels in place. It takes about 4 ms for eight crops of 400 x 300 to
    224 x 224 on one core (AVX2), like torchvision, which calls it; in float it takes 39 ms. It rounds its weights to 16
    bits, which changes a value by at most 1.

    Args:
        frames_THWC: Upright frames, uint8.
        crop: x, y, width and height, pixels; rounded by `crop_box`.
        flip: Whether to mirror the result left to right.
        size: Height and width of the result, pixels.

    Returns:
        uint8 [T, 3, size, size], contiguous.
    """
    if not isinstance(frames_THWC, Tensor):
        frames_THWC = torch.from_numpy(np.ascontiguousarray(frames_THWC))
    out_TCHW = torch.empty(len(frames_THWC), 3, size, size, dtype=torch.uint8)
    resize_crop_into(out_TCHW, frames_THWC, crop, flip)
    return out_TCHW


def resize_crop_into(out_TCHW: Tensor, frames_THWC: Tensor, crop: Sequence[float], flip: bool) -> None:
    """Crops, resizes and flips frames as `resize_crop` does, and writes them into `out_TCHW` in its size."""
    _, height, width, _ = frames_THWC.shape
    left, top, right, bottom = crop_box(crop, height, width)
    view_TCHW = frames_THWC[:, top:bottom, left:right].permute(0, 3, 1, 2)
    resized_TCHW = functional.interpolate(view_TCHW, size=out_TCHW.shape[2:], mode="bilinear", antialias=True)
    out_TCHW.copy_(resized_TCHW.flip(-1) if flip else resized_TCHW)
