"""Still pictures of any sample format as 8-bit RGB: 1 to 32 bits, integers and floats, grey, palette, CMYK and alpha.

Samples are scaled by the range of their format, never by the values that occur: an integer of n bits is divided by its
largest value (of 16 bits the high byte is kept, as for 16-bit PNG), floats count from 0 (black) to 1 (white). A picture
that uses a part of its range only, such as 12-bit samples stored in 16 bits, therefore looks dark; nothing in such a
file states another range, except the TIFF tag MaxSampleValue, which is used where it exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastav.core.errors import MediaError
from fastav.core.regular_file import check_regular
from fastav.media.open_file import explain_error

_BITS, _PHOTOMETRIC, _MAX_VALUE, _SAMPLE_FORMAT = 258, 262, 281, 339  # TIFF tags
_WHITE_IS_ZERO, _SIGNED = 0, 2


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Opens and decodes a still picture; the first one of a file with several.

    Raises:
        MediaError: The file is missing, truncated, not a picture, or in a format that cannot be converted to RGB.
    """
    try:
        check_regular(path)
        # An open file, not a path: from a path, Pillow 13 maps uncompressed TIFFs into memory with width and height
        # exchanged, where their orientation is a quarter turn, and returns a scrambled picture.
        with path.open("rb") as file, Image.open(file) as image:
            image.load()
            yield image

    except UnidentifiedImageError as error:
        raise MediaError(path, "is not a picture in a supported format", "image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(path, explain_error(error, path), "image") from error


def rgb_of(image: Image.Image) -> NDArray[np.uint8]:
    """Converts a decoded picture to upright RGB (EXIF orientation). Transparency is dropped.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: The sample format has no conversion, or float samples are not within 0 to 1.
    """
    if image.mode[0] in "IF":  # single-channel integers of more than 8 bits, or floats
        grey_HW = _grey(image)
        image = _with_exif(Image.fromarray(grey_HW), image)
    elif image.mode == "LAB":
        raise ValueError("is a picture in LAB colours, expected grey, RGB, CMYK or a palette")
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _with_exif(image: Image.Image, source: Image.Image) -> Image.Image:
    """Gives a converted picture the orientation of its source."""
    image.info["exif"] = source.getexif().tobytes()
    return image


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    """Scales one channel of integers of more than 8 bits, or of floats, to 8 bits."""
    values_HW: NDArray[Any] = np.array(image)
    tags: Any = getattr(image, "tag_v2", {})
    if values_HW.dtype.kind == "f":
        low, high = float(values_HW.min()), float(values_HW.max())
        if not 0 <= low <= high <= 1:  # also false for NaN
            raise ValueError(f"has float samples from {low:g} to {high:g}, expected 0 (black) to 1 (white)")
        grey_HW = np.rint(values_HW * 255).astype(np.uint8)
    else:
        grey_HW = _scaled(values_HW, tags)
    return 255 - grey_HW if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey_HW


def _scaled(values_HW: NDArray[Any], tags: Any) -> NDArray[np.uint8]:
    """Scales integers by the range that the file states, by default that of 16 bits; signed ones from their minimum."""
    bits = _first(tags.get(_BITS), 16)
    wide_HW = values_HW.astype(np.int64)
    if _first(tags.get(_SAMPLE_FORMAT), 1) == _SIGNED:
        wide_HW = wide_HW + (1 << bits - 1)
    elif bits == 32:
        wide_HW = wide_HW & 0xFFFFFFFF  # Pillow reads unsigned numbers as signed ones
    largest = _first(tags.get(_MAX_VALUE), 0)
    if 0 < largest < (1 << bits) - 1:
        return np.rint(np.clip(wide_HW, 0, largest) * (255 / largest)).astype(np.uint8)
    return (np.clip(wide_HW, 0, (1 << bits) - 1) >> bits - 8).astype(np.uint8)


def _first(value: Any, default: int) -> int:
    """Returns the first number of a TIFF tag."""
    if value is None:
        return default
    return int(value[0] if isinstance(value, tuple) else value)
