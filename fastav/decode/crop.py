"""Crop, conversion to RGB, resize and mirror of decoded frames in one pass over the crop alone.

FFmpeg's scaler takes the crop's planes as they were decoded and writes planar RGB of the wanted size (bilinear, widened
when it shrinks, so antialiased). Against converting the whole frame and resizing its crop, as people do, this saves a
quarter to a half of the time of these steps, and it is nearer to the exact result: mean error 0.3 to 0.4 levels against
1.1 to 1.2, which FFmpeg's fast conversion alone costs (448 x 256 H.264 to 224 x 224, against float64).

The crop is cut at whole chroma samples (`augment.crop_box`), so that no plane is shifted against another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from fastav.augment import crop_box

# Formats that can be cut: how many pixels a chroma sample spans, across and down. Others become RGB first.
_CHROMA = {
    "yuv420p": (2, 2), "yuvj420p": (2, 2), "yuv422p": (2, 1), "yuvj422p": (2, 1), "yuv444p": (1, 1),
    "yuvj444p": (1, 1), "gbrp": (1, 1), "rgb24": (1, 1),
}  # fmt: skip
_RGB_OF_GBRP = (2, 0, 1)


class Cropper:
    """Cuts the crops of one plan out of its frames; for one thread.

    Args:
        size: Height and width of the result, pixels.
    """

    def __init__(self, size: int) -> None:
        self._size, self._scaler, self._converter = size, VideoReformatter(), VideoReformatter()

    def cuttable(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Returns the frame itself where its planes can be cut, or a converted one."""
        return frame if frame.format.name in _CHROMA else self._converter.reformat(frame, format="rgb24", threads=1)

    def cut(
        self, out_CHW: NDArray[np.uint8], frame: av.VideoFrame, crop: tuple[float, ...], flip: bool, rotation: int = 0
    ) -> None:
        """Writes a crop of a frame, upright, mirrored and resized.

        Args:
            out_CHW: uint8 [3, size, size], is written.
            frame: From `cuttable`.
            crop: x, y, width, height in upright pixels.
            flip: Mirror left to right in the end.
            rotation: Degrees by which the frame is turned clockwise to stand upright.
        """
        turned = rotation % 180 != 0
        height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
        box = _unturned(crop_box(crop, height, width), height, width, rotation)
        part = _part(frame, *box)
        for colour, made_HW in enumerate(self._scaled(part)):
            upright_HW = np.rot90(made_HW, -rotation // 90) if rotation else made_HW
            out_CHW[colour] = upright_HW[:, ::-1] if flip else upright_HW

    def _scaled(self, part: av.VideoFrame) -> Iterator[NDArray[np.uint8]]:
        """Red, green and blue [size, size] of a rectangle."""
        size = self._size
        if part.width == size == part.height:
            # With nothing to scale FFmpeg takes a short cut that is wrong for planar RGB whose width is no multiple
            # of 16, but not for packed.
            packed: Any = self._scaler.reformat(part, format="rgb24", threads=1).planes[0]
            packed_HWC = np.frombuffer(packed, np.uint8).reshape(size, -1)[:, : 3 * size].reshape(size, size, 3)
            yield from packed_HWC.transpose(2, 0, 1)
            return
        planar = self._scaler.reformat(part, size, size, "gbrp", interpolation="BILINEAR", threads=1).planes
        for place in _RGB_OF_GBRP:
            plane: Any = planar[place]
            yield np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:size, :size]


def _unturned(box: tuple[int, int, int, int], height: int, width: int, rotation: int) -> tuple[int, int, int, int]:
    """The box left, top, right, bottom of an upright picture in the frame as it was decoded."""
    left, top, right, bottom = box
    if rotation == 90:  # the frame's left edge is the upright one's top
        return top, width - right, bottom, width - left
    if rotation == 180:
        return width - right, height - bottom, width - left, height - top
    if rotation == 270:
        return height - bottom, left, height - top, right
    return box


def _part(frame: av.VideoFrame, left: int, top: int, right: int, bottom: int) -> av.VideoFrame:
    """A copy of a rectangle of a frame; its left and top are multiples of a chroma sample."""
    if (left, top, right, bottom) == (0, 0, frame.width, frame.height):
        return frame
    across, down = _CHROMA[frame.format.name]
    left, top = left // across * across, top // down * down
    step = 3 if frame.format.name == "rgb24" else 1  # bytes a sample
    part = av.VideoFrame(right - left, bottom - top, frame.format.name)
    for i, (source, target) in enumerate(zip(frame.planes, part.planes, strict=True)):
        x, y = (across, down) if i else (1, 1)
        source_HW = np.frombuffer(source, np.uint8).reshape(-1, source.line_size)
        target_HW: NDArray[Any] = np.frombuffer(target, np.uint8).reshape(-1, target.line_size)
        rows, columns, begin = target.height, target.width * step, left // x * step
        target_HW[:rows, :columns] = source_HW[top // y : top // y + rows, begin : begin + columns]
    part.colorspace, part.color_range = frame.colorspace, frame.color_range
    return part
