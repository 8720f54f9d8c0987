"""Clips, plans and comparisons that the tests of the DALI decoder share."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from fastav.media.dali.decoder import Dali, missing_requirement
from fastav.media.decoder import DecodeSpec
from fastav.media.pyav import PyAV
from fastav.media.shards.format import ShardWriter
from fastav.media.spectrogram import Frontend
from fastav.pack.settings import PackSettings
from fastav.pack.transcode import PackJob, pack_clip
from tests.helpers.media import numbered, write_media
from tests.helpers.plans import clip_of

needs_dali = pytest.mark.skipif(bool(missing_requirement("cpu")), reason=missing_requirement("cpu"))

RATE = 16_000
SIZE = 64
LEVELS = 2.0  # mean difference of frames
DB = 2e-3


def smooth(number, width, height):
    """A coloured picture without sharp edges, another for each number."""
    y, x = np.mgrid[:height, :width]
    waves = (np.sin(x / 17 + number), np.sin(y / 23 + number / 2), np.cos((x + y) / 29 + number / 3))
    return np.stack([128 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def noise(seconds, rate=RATE, channels=1):
    return (np.random.default_rng(3).standard_normal((channels, round(seconds * rate))) * 0.1).astype(np.float32)


def pack(clip, path, settings=None):
    """One clip packed behind another one."""
    settings = settings or PackSettings(codec="mjpeg")
    packed = pack_clip(PackJob(clip, settings, path.parent, False))
    assert not isinstance(packed, tuple), packed
    with path.open("wb") as file:
        writer = ShardWriter(file)
        writer.add("0", packed.members)
        at, size = writer.add("1", packed.members)
        writer.close()
    return replace(packed.clip, id=path.stem, shard=str(path), shard_at=at, shard_size=size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dali")


@pytest.fixture(scope="module")
def wide(folder):
    """MJPEG and FLAC, 3 s."""
    path = folder / "wide.mp4"
    write_media(path, frames=75, size=(160, 96), picture=smooth, wave=noise(3, 44_100), rate=44_100, layout="mono")
    return pack(clip_of(path), folder / "wide.tar")


@pytest.fixture(scope="module")
def tall(folder):
    """MJPEG without sound, in another size, whose frames tell their numbers."""
    path = folder / "tall.mp4"
    write_media(path, frames=40, size=(96, 128), picture=numbered)
    return pack(clip_of(path), folder / "tall.tar")


@pytest.fixture(scope="module")
def spoken(folder):
    """FLAC alone, 6 s."""
    path = folder / "spoken.wav"
    write_media(path, wave=noise(6), rate=RATE, layout="mono", audio_codec="pcm_s16le")
    return pack(clip_of(path), folder / "spoken.tar")


@pytest.fixture(scope="module")
def webm(folder):
    path = folder / "raw.webm"
    options = {"deadline": "realtime", "cpu-used": "8", "g": "16"}
    write_media(path, frames=60, size=(160, 96), codec="libvpx-vp9", options=options, picture=smooth)
    return clip_of(path)


def reading(modalities=("video", "audio"), size=SIZE, window=100, **settings):
    return DecodeSpec(
        modalities, image_size=size, window=window, frontend=msgspec.structs.replace(Frontend(), **settings)
    )


def cpu(spec, **settings):
    return Dali(device="cpu", threads=2, **{"pipelines": 1} | settings).build(spec)


def both(spec, clips, plans, decoder=None):
    """A batch of one plan a clip by DALI, and the same clips by PyAV."""
    decoder = decoder or cpu(spec)
    prepared = [decoder.prepare(clip, [plan]) for clip, plan in zip(clips, plans, strict=True)]
    shape = {"size": len(clips), "frames": len(plans[0].frames_T), "windows": len(plans[0].windows_W)}
    made = decoder.decode(prepared, [[i] for i in range(len(clips))], **shape)
    reference = PyAV().build(spec)
    return prepared, made, [reference.decode(clip, [plan])[0] for clip, plan in zip(clips, plans, strict=True)]


def distance(frames, expected):
    return float((frames.to(torch.int16) - expected.to(torch.int16)).abs().float().mean())
