"""Encodes clips of many sizes with the project's own encoders, prints digests: `python -m tests.helpers.encoded [N]`.

Pictures are made of whole numbers alone, so that they are the same on every CPU, whatever numpy uses there.
"""

from __future__ import annotations

import hashlib
import json
import sys

import av
import numpy as np

from fastav.pack.encode import VideoEncoder
from fastav.pack.settings import SIDE_STEP, PackSettings
from fastav.synth.render import encode_video

SIZES = ((448, 256), (96, 96), (64, 48), (128, 64), (178, 98), (130, 82), (50, 34))
"""Macroblocks a row: 28, 6, 4, 8, 12, 9, 4; of the last three, both sides are no multiples of one."""

KINDS = ("synth", "balanced", "small", "fast")
"""The made data set's settings, and the packs' presets, which take multiples of 16 only."""


def fits(kind, size):
    """Whether clips of that size are encoded with these settings: packs have whole macroblocks only."""
    return kind == "synth" or not any(side % SIDE_STEP for side in size)


def pictures(width, height, count):
    """Noise smoothed a little, going to the left and up, a block going the other way, and a cut: [T, H, W, 3]."""
    rng = np.random.default_rng(width * 1000 + height)
    ground = rng.integers(0, 256, (height + 48, width + 64, 3)).astype(np.int32)
    for _ in range(3):
        ground = sum(np.roll(ground, by, axis) for by in (-1, 0, 1) for axis in (0, 1)) // 6
    ground = np.clip((ground - 128) * 5 + 128, 0, 255)
    made = []
    for number in range(count):
        y, x, at = number * 2 % 48, number * 3 % 64, max(width - 16 - number * 5, 0)
        picture = ground[y : y + height, x : x + width].copy()
        picture[height // 3 : height // 3 + 16, at : at + 16] = (200, 30, 90)
        picture += rng.integers(-4, 5, picture.shape)
        made.append(255 - picture if number > count * 2 // 3 else picture)
    return np.clip(made, 0, 255).astype(np.uint8)


def poisoned(frame, rng):
    """Fills what lies behind the right edge of a frame's planes with anything."""
    for plane in frame.planes:
        rows_HS = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        behind = rows_HS[:, plane.width :]
        behind[:] = rng.integers(0, 256, behind.shape)
    return frame


def encode(kind, pictures_THWC, rng=None):
    """Encodes pictures like the made data set or like a pack's preset; `rng` fills what lies behind the edges."""
    if kind == "synth":
        return encode_video(pictures_THWC)
    height, width = pictures_THWC.shape[1:3]
    encoder = VideoEncoder(PackSettings(preset=kind), width, height, 25.0)
    units = []
    for picture in pictures_THWC:
        frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=encoder.pixel_format)
        units += encoder.add(frame if rng is None else poisoned(frame, rng))
    return b"".join(data for data, _ in (*units, *encoder.finish()))


def allocate(rng):
    """Writes anything into memory and frees it in another order, so that the next buffers lie elsewhere and hold it."""
    pieces = [rng.bytes(int(size)) for size in rng.integers(1 << 10, 1 << 19, 24)]
    return [pieces[i][:1] for i in rng.permutation(len(pieces))]


def digests(times, frames=24, sizes=SIZES, kinds=KINDS):
    """Encodes each clip some times with allocations in between; returns all digests found, by size and kind."""
    rng = np.random.default_rng()
    found = {}
    for width, height in sizes:
        pictures_THWC = pictures(width, height, frames)
        for kind in kinds:
            if not fits(kind, (width, height)):
                continue
            these = found[f"{kind} {width}x{height}"] = set()
            for _ in range(times):
                kept = allocate(rng)
                these.add(hashlib.sha256(encode(kind, pictures_THWC, rng)).hexdigest()[:16])
                del kept
    return {name: sorted(these) for name, these in found.items()}


if __name__ == "__main__":
    print(json.dumps(digests(int(sys.argv[1]) if len(sys.argv) > 1 else 1)))
