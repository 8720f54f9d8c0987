"""Display matrices: all eight ways to turn and mirror, against the mapping of pixels that the standard defines."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from fastav.core.errors import MediaError
from fastav.datasets import folder
from fastav.datasets.build_manifest import build_manifest
from fastav.media.decoder import DecodeSpec
from fastav.media.probe import probe
from fastav.media.pyav import PyAV
from fastav.pack.build import build_pack
from fastav.pack.settings import PackSettings
from tests.helpers.dataset_trees import listed
from tests.helpers.media import write_media
from tests.helpers.plans import clip_of, pictures, plan_of

# (a, b, c, d): the pixel (x, y) is shown at (a x + c y, b x + d y), y downwards.
MATRICES = {
    "identity": (1, 0, 0, 1), "90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1), "upside down": (1, 0, 0, -1), "transposed": (0, 1, 1, 0),
    "transversed": (0, -1, -1, 0),
}  # fmt: skip


def corners(number, width, height):
    """Four patches that no turn or mirror exchanges, a little darker in each frame."""
    rgb_HWC = np.zeros((height, width, 3), np.uint8)
    rgb_HWC[: height // 2, : width // 2] = 220 - 5 * number
    rgb_HWC[: height // 2, width // 2 :] = 160 - 5 * number
    rgb_HWC[height // 2 :, : width // 2] = 100 - 5 * number
    return rgb_HWC


def shown(rgb_HWC, matrix):
    """Where each pixel is shown, moved to start at 0: the definition, pixel by pixel."""
    a, b, c, d = matrix
    y, x = np.mgrid[: rgb_HWC.shape[0], : rgb_HWC.shape[1]]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    upright = np.zeros((down.max() + 1, right.max() + 1, 3), np.uint8)
    upright[down, right] = rgb_HWC
    return upright


def whole(clip, frames):
    """The planned frames, stretched to a square of the clip's shorter side."""
    side = min(clip.width, clip.height)
    plan = plan_of(frames, crop=(0, 0, clip.width, clip.height))
    return PyAV().build(DecodeSpec(("video",), side)).decode(clip, [plan])[0].frames_TCHW.permute(0, 2, 3, 1).numpy()


def levels(rgb_HWC):
    """The grey level in the middle of each quarter of a picture."""
    height, width = rgb_HWC.shape[:2]
    rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
    return [[int(rgb_HWC[y, x].mean()) for x in columns] for y in rows]


@pytest.mark.parametrize("name", list(MATRICES))
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (66, 50)])
def test_frames_are_upright_after_every_matrix(tmp_path, name, size):
    matrix = MATRICES[name]
    path = write_media(tmp_path / "a.mp4", frames=4, size=size, matrix=matrix, picture=corners)
    clip = clip_of(path)
    expected = shown(corners(3, *size), matrix)
    assert (clip.height, clip.width) == expected.shape[:2]
    assert np.abs(np.array(levels(whole(clip, [3])[0])) - levels(expected)).max() <= 3


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", list(MATRICES))
def test_crops_are_those_of_the_upright_frame(tmp_path, name, flip):
    """To the bit: the decoded frame is cropped and turned, and so is the reference, in the other order."""
    path = write_media(tmp_path / "a.mp4", frames=2, matrix=MATRICES[name])
    clip = clip_of(path)
    with av.open(str(path)) as container:
        decoded = next(container.decode(video=0)).to_ndarray(format="rgb24")
    upright = shown(decoded, MATRICES[name])
    x, y = clip.width - 42, 10
    expected = upright[y : y + 32, x : x + 32]
    found = PyAV().build(DecodeSpec(("video",), 32)).decode(clip, [plan_of((0,), (x, y, 32, 32), flip=flip)])
    assert np.array_equal(found[0].frames_TCHW[0].permute(1, 2, 0).numpy(), expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("name", list(MATRICES))
def test_packs_hold_upright_frames(tmp_path, name):
    media = tmp_path / "media" / "bird"
    media.mkdir(parents=True)
    write_media(media / "a.mp4", frames=8, matrix=MATRICES[name], picture=corners)
    clips = listed(folder, tmp_path / "media").clips
    manifest, _ = build_manifest(clips, tmp_path / "m.parquet")
    (raw,) = manifest.clips([0])
    (packed,) = build_pack(manifest, tmp_path / "pack", PackSettings(), workers=1).clips([0])
    assert (packed.rotation, packed.mirrored) == (0, 0)
    expected = levels(shown(corners(5, 96, 64), MATRICES[name]))
    for clip in (raw, packed):
        assert np.abs(np.array(levels(whole(clip, [5])[0])) - expected).max() <= 4


@pytest.mark.parametrize("degrees", [1.5, 30, 45, 89.5, 135, -60])
@pytest.mark.parametrize("mirror", [1, -1])
def test_other_angles_are_named(tmp_path, degrees, mirror):
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    matrix = (mirror * cosine, sine, -mirror * sine, cosine)
    path = write_media(tmp_path / "a.mp4", frames=2, matrix=matrix)
    if degrees == 89.5:  # within a degree, such as a rounded matrix
        assert probe(path).rotation == 90
        return
    with pytest.raises(MediaError, match=r"video: its display matrix turns the picture by -?\d+ degrees, expected"):
        probe(path)


def test_scales_are_ignored_and_flat_matrices_named(tmp_path):
    assert probe(write_media(tmp_path / "a.mp4", frames=2, matrix=(2, 0, 0, 1))).rotation == 0
    assert probe(write_media(tmp_path / "b.mp4", frames=2, matrix=(0, 1.5, -0.5, 0))).rotation == 90
    with pytest.raises(MediaError, match="its display matrix is not invertible"):
        probe(write_media(tmp_path / "c.mp4", frames=2, matrix=(1, 1, 1, 1)))


def test_files_from_the_field(shared_field):
    paths = {path.stem: path for path in (shared_field / "media/01_mirrored/x").glob("*.mp4")}
    plain = pictures(clip_of(paths["plain"]), [0], 32)[0]
    clips = {name: clip_of(path) for name, path in paths.items()}
    found = {name: (clip.rotation, clip.mirrored) for name, clip in clips.items()}
    assert found == {"plain": (0, 0), "hflip": (0, 1), "vflip": (180, 1), "transpose": (90, 1)}
    width, height = clips["plain"].width, clips["plain"].height
    square = {n: whole(replace(c), [0])[0].astype(int) for n, c in clips.items()}
    assert plain.shape == (32, 32, 3)
    assert np.abs(square["hflip"] - square["plain"][:, ::-1]).mean() < 1
    assert np.abs(square["vflip"] - square["plain"][::-1]).mean() < 1
    assert (clips["transpose"].width, clips["transpose"].height) == (height, width)
    assert Path(paths["transpose"]).exists()
