"""Cropping decoded frames: against float64, in every format, turned and mirrored."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from torch.nn import functional

from fastav.media.crop import Cropper, cuttable, resize_crop

WIDTH, HEIGHT = 128, 96


def scene(width=WIDTH, height=HEIGHT):
    """A smooth picture without symmetry, RGB [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / 16
    return np.stack([127 + 100 * np.sin(x + y), 60 + 120 * y / 6, 200 - 150 * x / 8], -1).clip(0, 255).astype(np.uint8)


def frame_of(rgb_HWC, name):
    frame = av.VideoFrame.from_ndarray(rgb_HWC, "rgb24")
    return frame if name == "rgb24" else frame.reformat(format=name)


def cut(frame, crop, flip=False, rotation=0, size=32):
    out = np.zeros((3, size, size), np.uint8)
    Cropper(size, crop, flip, rotation).cut(out, cuttable(frame, VideoReformatter()))
    return out


def exact(frame, crop, size):
    """The same in float64: chroma and luma by BT.601, bilinear chroma, antialiased bilinear resize."""
    planes, height, width = frame.to_ndarray().astype(np.float64), frame.height, frame.width
    luma, chroma = planes[:height], planes[height:].reshape(2, height // 2, width // 2)
    wide = functional.interpolate(torch.from_numpy(chroma)[None], scale_factor=2, mode="bilinear")[0].numpy() - 128
    y, (u, v) = (luma - 16) * 255 / 219, wide * 255 / 224
    rgb = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u]).clip(0, 255)
    left, top, w, h = crop
    part = torch.from_numpy(rgb[None, :, top : top + h, left : left + w])
    return functional.interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0].numpy()


@pytest.mark.parametrize("crop", [(0, 0, 128, 96), (20, 10, 90, 80), (40, 30, 24, 22)])
def test_nearer_to_the_exact_result_than_resizing_whole_conversions(crop):
    frame = frame_of(scene(), "yuv420p")
    for size in (32, 48):
        truth = exact(frame, crop, size)
        ours = np.abs(cut(frame, crop, size=size) - truth).mean()
        usual = resize_crop(frame.to_ndarray(format="rgb24")[None], crop, False, size)[0].numpy()
        assert ours < 1.2
        assert ours < np.abs(usual - truth).mean() + 0.05


@pytest.mark.parametrize(
    "name", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "gbrp", "rgb24", "nv12", "yuv420p10le", "rgba", "gray"]
)
def test_every_format(name):
    frame = frame_of(scene(), name)
    expected = resize_crop(frame.to_ndarray(format="rgb24")[None], (20, 10, 90, 80), False, 32)[0].numpy()
    assert np.abs(cut(frame, (20, 10, 90, 80)) - expected.astype(int)).mean() < 2


@pytest.mark.parametrize("width", [30, 40, 50, 56])
def test_crops_of_the_wanted_size_and_any_width(width):
    frame = frame_of(scene(), "yuv420p")
    seen = cut(frame, (8, 6, width, width), size=width)
    expected = frame.to_ndarray(format="rgb24")[6 : 6 + width, 8 : 8 + width].transpose(2, 0, 1)
    assert np.abs(seen - expected.astype(int)).mean() < 1.5


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [False, True])
def test_turned_and_mirrored(rotation, flip):
    upright = np.ascontiguousarray(np.rot90(scene(), -rotation // 90))
    crop = (12, 20, 60, 50)
    expected = resize_crop(upright[None], crop, flip, 32)[0].numpy()
    assert np.abs(cut(frame_of(scene(), "yuv420p"), crop, flip, rotation) - expected.astype(int)).mean() < 3


def test_pictures_of_odd_size():
    frame = frame_of(scene(97, 53), "yuv420p")
    for crop in ((0, 0, 97, 53), (60, 30, 37, 23), (96, 52, 1, 1)):
        expected = resize_crop(frame.to_ndarray(format="rgb24")[None], crop, False, 32)[0].numpy()
        assert np.abs(cut(frame, crop) - expected.astype(int)).mean() < 3


def test_frames_one_after_the_other_do_not_disturb_each_other():
    frames = [frame_of(np.roll(scene(), 9 * i, axis=1), "yuv420p") for i in range(3)]
    cropper, alone = Cropper(32, (20, 10, 90, 80), False), []
    for frame in frames:
        out = np.zeros((3, 32, 32), np.uint8)
        cropper.cut(out, frame)
        alone.append(np.array_equal(out, cut(frame, (20, 10, 90, 80))))
    assert all(alone)
