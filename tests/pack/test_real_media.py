"""Real media through index, pack and load: each file right, against a straight PyAV decode, or named."""

from __future__ import annotations

import csv

import av
import numpy as np
import pytest
import torch
from torch.nn import functional

from fastav.__main__ import main
from fastav.data.manifest import Manifest
from fastav.media.decoder import DecodeSpec
from fastav.media.packed_clip_decoder import decode_audio
from fastav.media.pyav import PyAV
from fastav.media.shards import ShardReader, ShardReading
from tests.helpers.plans import plan_of

SIZE = 64


@pytest.fixture(scope="module")
def packed(realdata, tmp_path_factory):
    out = tmp_path_factory.mktemp("real")
    for kind in ("video", "audio"):
        main(["index", "folder", str(realdata / kind), "--classes", "file", "--out", str(out / f"{kind}.parquet")])
        assert main(["pack", str(out / f"{kind}.parquet"), str(out / kind), "--workers", "2"]) == 0
    return out


def by_id(path):
    manifest = Manifest.open(path)
    return {clip.id: clip for clip in manifest.clips(range(len(manifest)))}


def straight_frames(clip, numbers):
    """Frames of the raw file, upright, resized whole, float [T, 3, size, size]."""
    wanted, found = set(numbers), {}
    with av.open(str(clip.video)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i in wanted:
                rgb = np.rot90(frame.to_ndarray(format="rgb24"), -clip.rotation // 90)
                chw = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].float()
                found[i] = functional.interpolate(chw, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0]
    return torch.stack([found[n] for n in numbers])


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_every_file_is_packed_or_named(realdata, packed, kind):
    files = {path.name for path in (realdata / kind).iterdir()}
    manifest = Manifest.open(packed / kind / "manifest.parquet")
    there = {clip.id.rsplit("/", 1)[-1] for clip in manifest.clips(range(len(manifest)))}
    named = set()
    for report in (packed / f"{kind}.problems.csv", packed / kind / "skipped.csv"):
        with report.open(newline="") as file:
            named |= {row["path"].rsplit("/", 1)[-1] for row in csv.DictReader(file)}
    assert files - there <= named
    assert len(there) > len(files) / 2


def test_packed_pictures_are_those_of_the_files(packed):
    raw = by_id(packed / "video.parquet")
    made = Manifest.open(packed / "video" / "manifest.parquet")
    decoder = PyAV().build(DecodeSpec(("video",), image_size=SIZE))
    compared = 0
    for clip in made.clips(range(len(made))):
        source = raw[clip.id]
        if not clip.has_video:
            continue
        numbers = sorted({0, clip.num_frames // 3, clip.num_frames // 2, clip.num_frames - 1})
        seen = decoder.decode(clip, [plan_of(numbers, (0, 0, clip.width, clip.height))])[0].frames_TCHW.float()
        if source.num_frames != clip.num_frames or "slow_motion" in clip.id:  # its rate varies: ticks are not frames
            continue
        off = (seen - straight_frames(source, numbers)).abs().mean()
        assert off < 6, (clip.id, float(off))
        compared += 1
    assert compared >= 14


def test_packed_sound_is_that_of_the_files(packed):
    shards = ShardReader(ShardReading())
    for kind in ("video", "audio"):
        raw = by_id(packed / f"{kind}.parquet")
        made = Manifest.open(packed / kind / "manifest.parquet")
        for clip in made.clips(range(len(made))):
            if not clip.num_samples:
                continue
            source = raw[clip.id]
            wave_S = decode_audio(shards.fetch(clip, None, (0, clip.num_samples)).audio, clip)
            assert clip.num_samples == round(source.num_samples * 16_000 / source.sample_rate)
            spec = DecodeSpec(("audio",), window=60)
            one, two = (PyAV().build(spec).decode(c, [plan_of(windows=(5,))])[0].mel_WCML for c in (source, clip))
            loud = one > max(float(one.max()) - 40, -35)
            assert ((one - two)[loud].abs() < 1).all(), clip.id
            assert np.isfinite(wave_S).all()


def test_a_real_pack_passes_its_check(packed, capsys):
    assert main(["pack", "--verify", str(packed / "video"), "--workers", "2"]) == 0
    assert "all checksums and frames are correct" in capsys.readouterr().out
