"""Still pictures of every sample format: the grey levels that arithmetic gives, or one line that names the reason."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from fastav.core.errors import MediaError
from fastav.media.probe import probe_image
from fastav.media.pyav import read_image

# What Pillow names as unsupported: bits, sample format, whether 0 is black, byte order.
NOT_IN_PILLOW = {
    *((12, 1, 0, order) for order in "<>"), (12, 1, 1, ">"), (16, 1, 0, ">"), *((32, 1, 0, order) for order in "<>"),
    (32, 1, 1, ">"), *((bits, 2, 0, order) for bits in (16, 32) for order in "<>"),
}  # fmt: skip
RAMP = np.linspace(0, 1, 64)[None].repeat(48, 0)  # black on the left, white on the right


def tiff(path, values_HW, bits, *, kind=1, photometric=1, largest=None, order="<"):
    """Writes one channel as an uncompressed TIFF, by hand: Pillow writes a few of the sample formats only."""
    height, width = values_HW.shape
    if bits == 12:
        flat = values_HW.astype(np.uint16).reshape(-1, 2)
        data = np.stack([flat[:, 0] >> 4, (flat[:, 0] & 15) << 4 | flat[:, 1] >> 8, flat[:, 1] & 255], 1)
        data = data.astype(np.uint8).tobytes()
    else:
        data = values_HW.astype(f"{order}{'_uif'[kind]}{bits // 8}").tobytes()
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 0),
            (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, kind)]  # fmt: skip
    if largest is not None:
        tags.append((281, 3, largest))
    tags.sort()
    at = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, size, value in tags:
        value = at if tag == 273 else value
        packed = struct.pack(f"{order}H2x", value) if size == 3 else struct.pack(f"{order}I", value)
        entries += struct.pack(f"{order}HHI", tag, size, 1) + packed
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    path.write_bytes(head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + data)
    return path


def levels(path):
    info, rgb_HWC = probe_image(path), read_image(path)
    assert rgb_HWC.shape == (info.height, info.width, 3)
    assert rgb_HWC.dtype == np.uint8
    assert (rgb_HWC[..., 0] == rgb_HWC[..., 1]).all()
    assert (rgb_HWC[..., 0] == rgb_HWC[..., 2]).all()
    return rgb_HWC[..., 0].astype(int)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    ("bits", "kind"), [(8, 1), (12, 1), (16, 1), (32, 1), (16, 2), (32, 2), (32, 3)],
    ids=["uint8", "uint12", "uint16", "uint32", "int16", "int32", "float32"],
)  # fmt: skip
def test_one_channel_of_every_depth(tmp_path, bits, kind, photometric, order):
    top = 1.0 if kind == 3 else 2.0**bits - 1
    values = RAMP * top if kind == 3 else np.rint(RAMP * top) - (2 ** (bits - 1) if kind == 2 else 0)
    path = tiff(tmp_path / "a.tif", values, bits, kind=kind, photometric=photometric, order=order)
    if (bits, kind, photometric, order) in NOT_IN_PILLOW:
        with pytest.raises(MediaError, match="is not a picture in a supported format"):
            probe_image(path)
        return
    found = levels(path)
    ramp = RAMP if photometric else 1 - RAMP
    assert np.abs(found - 255 * ramp).max() <= 1


def test_a_stated_largest_value_is_the_range(tmp_path):
    values = np.rint(RAMP * 4095)
    dark = levels(tiff(tmp_path / "a.tif", values, 16))
    assert dark.max() == 15  # 12-bit samples in 16 bits, and nothing says so
    assert np.abs(levels(tiff(tmp_path / "b.tif", values, 16, largest=4095)) - 255 * RAMP).max() <= 1


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1, 1), (0, np.nan), (0, np.inf)])
def test_floats_of_another_range_are_named(tmp_path, low, high):
    values = RAMP * 0 + low
    values[5, 5] = high
    path = tiff(tmp_path / "a.tif", values, 32, kind=3)
    for read in (probe_image, read_image):
        with pytest.raises(MediaError, match=r"has float samples from .* to .*, expected 0 \(black\) to 1 \(white\)"):
            read(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "jpg", "webp"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_that_a_format_takes(tmp_path, mode, suffix):
    grey = np.rint(RAMP).astype(np.uint8) * 255 if mode == "1" else np.rint(RAMP * 255).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey)
    image = image if mode == "I;16" else image.convert(mode)
    path = tmp_path / f"a.{suffix}"
    try:
        image.save(path, **{"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {}))
    except (OSError, KeyError, ValueError):
        return  # this format does not take it
    if (mode, suffix) == ("I;16", "webp"):
        return  # Pillow clips it while it writes
    assert np.abs(levels(path) - grey.astype(int)).max() <= (4 if suffix == "jpg" else 1)


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg", "webp"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_depth(tmp_path, orientation, dtype, suffix):
    """EXIF's eight, from their definition: where the stored picture's row 0 and column 0 are on the upright one."""
    if (dtype, suffix) in {("f4", s) for s in ("png", "jpg", "webp")} | {("u2", "jpg"), ("u2", "webp")}:
        return  # the format does not take it
    stored = np.zeros((48, 64))
    stored[:24, :32], stored[:24, 32:], stored[24:, :32] = 1.0, 0.75, 0.4
    turned = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T, 6: stored.T[:, ::-1],
        7: stored.T[::-1, ::-1], 8: stored.T[::-1],
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    top = {"u1": 255, "u2": 65535, "f4": 1}[dtype]
    options = {"jpg": {"quality": 98}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray((stored * top).astype(dtype)).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    found = levels(tmp_path / f"a.{suffix}")
    assert found.shape == turned[orientation].shape
    assert np.abs(found - 255 * turned[orientation]).max() <= (6 if suffix == "jpg" else 1)


def test_pictures_made_in_the_field(shared_field):
    for name in ("float01.tif", "grey16.tif", "grey16.png", "grey8.tif"):
        assert levels(shared_field / "media/02_tiff/x" / name).max() == 255
