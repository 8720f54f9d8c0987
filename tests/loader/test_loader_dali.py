"""The loader with DALI's graph on the CPU: the same batches as with PyAV, and one bad clip does not end it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from fastav.data.manifest import Manifest
from fastav.data.plan import Plan, Sampling
from fastav.loader.loader import Loader, Loading
from fastav.media.dali.decoder import Dali
from fastav.media.decoder import DecodeSpec
from fastav.media.pyav import PyAV
from fastav.media.shards import ShardReader, ShardReading
from fastav.media.spectrogram import Frontend
from fastav.pack.build import build_pack
from fastav.pack.settings import PackSettings

pytest.importorskip("nvidia.dali")

SIZE, WINDOW = 48, 100


@pytest.fixture(scope="module")
def pack(made, tmp_path_factory):
    return build_pack(
        Manifest.open(made), tmp_path_factory.mktemp("mjpeg") / "p", PackSettings(codec="mjpeg"), workers=2
    )


def loader_of(manifest, config, broken=None, **sampling):
    frontend = Frontend()
    chosen = Sampling(
        frames=4, image_size=SIZE, window=WINDOW, eval_windows=(0, 150), crop_scale=(0.5, 1.0), **sampling
    )
    plan = Plan([(manifest, 1.0)], chosen, seed=3, mel_bands=frontend.num_mels, mel_frames=frontend.num_frames_s)
    spec = DecodeSpec(("video", "audio"), SIZE, frontend, WINDOW)
    named = broken if broken is not None else []
    return Loader(
        plan, config.build(spec), Loading(workers=2), modalities=("video", "audio"), classes=manifest.classes,
        on_broken=lambda clip, error: named.append(clip.id),
    )  # fmt: skip


def batches(manifest, config, requests, broken=None, **sampling):
    with loader_of(manifest, config, broken, **sampling) as loader:
        made = list(loader.batches(requests))
        return made, loader.stats()


def power(mel):
    return 10 ** (mel.double() / 10)


def compare(one, two):
    assert one.ids == two.ids
    assert torch.equal(one.targets_BK, two.targets_BK)
    assert torch.equal(one.weight_B, two.weight_B)
    assert torch.equal(one.has_video_B, two.has_video_B)
    assert torch.equal(one.has_audio_B, two.has_audio_B)
    assert one.frames_BTCHW.shape == two.frames_BTCHW.shape
    assert (one.frames_BTCHW.float() - two.frames_BTCHW.float()).abs().mean() <= 2
    off = (power(one.mel_BWCML) - power(two.mel_BWCML)).abs()
    assert (off.sum() / power(two.mel_BWCML).sum()) <= 1e-4


def test_batches_are_those_of_pyav(pack):
    train = pack.split("train")
    requests = [("train", 0, 6), ("train", 6, 6), ("train", 12, 6), ("evaluate", 0, 7)]
    ours, stats = batches(train, Dali(device="cpu", pipelines=2), requests)
    theirs, _ = batches(train, PyAV(), requests)
    for one, two in zip(ours, theirs, strict=True):
        compare(one, two)
    assert {"plan", "prepare", "decode", "collate", "wait"} == set(stats)
    assert stats["prepare"].items == sum(len(b.ids) for b in ours)
    assert stats["decode"].items == 4
    assert threading.active_count() < 20


def test_replicas_and_padding(pack):
    test = pack.split("test")
    requests = [("train", 0, 8), ("evaluate", len(test) - 2, 6), ("evaluate", len(test), 4)]
    ours, _ = batches(test, Dali(device="cpu", pipelines=1), requests, repeat=2)
    theirs, _ = batches(test, PyAV(), requests, repeat=2)
    for one, two in zip(ours, theirs, strict=True):
        compare(one, two)
    assert ours[0].num_unique == 4
    assert not torch.equal(ours[0].frames_BTCHW[0], ours[0].frames_BTCHW[1])


def test_a_bad_clip_does_not_end_the_run(pack, tmp_path):
    train = pack.split("train")
    clip = train.clip(0)
    copy = tmp_path / "p"
    import shutil

    shutil.copytree(pack.root, copy)
    units = ShardReader(ShardReading()).units(clip)
    shard = copy / "shards" / clip.shard.rsplit("/", 1)[1]
    raw = bytearray(shard.read_bytes())
    for at in units.at_U[: clip.num_frames].tolist():
        raw[at + 40] ^= 0xFF
    shard.write_bytes(raw)
    bad = Manifest.open(copy / "manifest.parquet").split("train")
    broken: list[str] = []
    made, _ = batches(bad, Dali(device="cpu", pipelines=1), [("evaluate", 0, 8), ("evaluate", 8, 8)], broken)
    good, _ = batches(train, Dali(device="cpu", pipelines=1), [("evaluate", 0, 8), ("evaluate", 8, 8)])
    assert broken == [clip.id]
    assert made[0].num_broken == 1
    assert made[0].weight_B[0] == 0
    assert np.array_equal(made[0].frames_BTCHW[1:].numpy(), good[0].frames_BTCHW[1:].numpy())
    assert torch.equal(made[1].frames_BTCHW, good[1].frames_BTCHW)
