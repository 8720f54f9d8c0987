"""`fastav doctor`: what it finds, what it measures, what it advises, and that something wrong is an exit code."""

from __future__ import annotations

import ctypes
import json
from types import SimpleNamespace

import pytest
import torch

from fastav.__main__ import main
from fastav.commands import doctor
from fastav.commands.doctor import Speed
from fastav.data.clip import Clip
from fastav.diagnostics import machine as examine
from fastav.diagnostics.machine import Disk
from fastav.media.decoder_choice import ClipStats
from fastav.recipe.parse import load_recipe

TOWER = "{patch_size = 16, embed_dim = 16, depth = 2, num_heads = 2}"


def test_without_a_manifest(capsys):
    code = main(["doctor", "--no-gpu"])
    shown = capsys.readouterr().out
    assert code == 0
    for text in ("torch", "fastav", "cores", "memory"):
        assert text in shown
    assert "GPU" not in shown


def test_what_cannot_be_imported_is_wrong(monkeypatch, capsys):
    monkeypatch.setitem(examine.REQUIRED, "torchmetrics", "no_such_module_at_all")
    assert main(["doctor", "--no-gpu"]) == 1
    assert "torchmetrics" in capsys.readouterr().out.split("wrong:")[1]


def test_no_gpu_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(examine, "nvml_state", lambda: None)
    assert [fact.verdict for fact in examine.gpus()] == ["note"]
    monkeypatch.setattr(examine, "nvml_state", lambda: "driver 470, 1 devices")
    (fact,) = examine.gpus()
    assert fact.verdict == "bad"
    assert "is the driver too old?" in fact.text


def test_a_gpu_without_its_video_decoder(monkeypatch):
    told = SimpleNamespace(name="NVIDIA H200", total_memory=150 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: told)
    monkeypatch.setenv("NVIDIA_DRIVER_CAPABILITIES", "compute,utility")

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    facts = {fact.topic: fact for fact in examine.gpus()}
    assert "NVIDIA H200, 150 GiB, sm_90, 7 NVDEC engines" in facts["GPU"].text
    assert facts["NVDEC"].verdict == "bad"
    assert "'compute,utility', a container needs compute,video,utility" in facts["NVDEC"].text
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    assert next(fact for fact in examine.gpus() if fact.topic == "NVDEC").verdict == "good"


def test_limits_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(examine, "cpu_quota", lambda: 0.5)
    monkeypatch.setattr(examine, "in_container", lambda: True)
    facts = {fact.topic: fact for fact in examine.host(tmp_path)}
    assert "the container may use 0.5 of them" in facts["cores"].text
    assert "container" in facts
    assert "GiB at" in facts["free disk"].text


def test_the_disk_is_measured_on_the_users_files(tmp_path):
    assert examine.disk([]) is None
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    found = examine.disk([tmp_path / "a", tmp_path / "missing"])
    assert found is not None
    assert found.mb_per_s > 0
    assert found.splices_per_s > 0


def test_on_clips(made, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        "sampling = {frames = 2, image_size = 32, eval_windows = [0]}\ntrain = {batch = 4}\n"
        f'[model.video]\nname = "vit_tiny_patch16_224"\nargs = {TOWER}\n'
        f'[model.audio]\nname = "vit_tiny_patch16_224"\nargs = {TOWER}\n[model.fusion]\nkind = "late"\n'
    )
    out = tmp_path / "found.json"
    words = [str(made), "--recipe", str(recipe), "--seconds", "0.3", "--json", str(out), "--no-gpu"]
    assert main(["doctor", *words]) == 0
    shown = capsys.readouterr().out
    assert "h264 100 %" in shown
    assert "bottleneck: " in shown
    assert "fastav pack MANIFEST OUT" in shown
    found = json.loads(out.read_text())
    stages = [speed["stage"] for speed in found["speeds"]]
    assert stages[:2] == ["decode video, PyAV, one thread", "decode audio, PyAV, one thread"]
    assert any(stage.startswith("loader, PyAV") for stage in stages)
    assert all(speed["clips_per_s"] > 0 for speed in [*found["speeds"], found["model"]])
    assert found["clip_stats"] == {"h264": 64}


def advice(clips, loader, model, processes=None):
    speeds = [Speed("loader, PyAV, 2 threads", loader, loader / 2)]
    speeds += [Speed("loader, PyAV, 2 processes", processes)] if processes else []
    disk = Disk(100.0, 50.0)
    return list(doctor.advice(clips, ClipStats.of(clips), speeds, Speed("model", model), disk, load_recipe(None, [])))


def test_advice():
    raw = Clip(id="a", num_frames=5, width=64, height=64, video_codec="h264", num_samples=5, sample_rate=44_100)
    packed = Clip(id="b", num_frames=5, width=64, height=64, video_codec="h264", shard="a.tar")
    slow = " ".join(advice([raw], 10.0, 100.0))
    assert "bottleneck: the loader;" in slow
    assert "takes 26 cores" in slow
    assert "100 % of the clips are raw" in slow
    assert "audio is at 44100 Hz and resampled to 16000 Hz" in slow
    fast = " ".join(advice([packed], 400.0, 100.0))
    assert "bottleneck: the model;" in fast
    assert "raw" not in fast.replace("the clips are raw", "")
    assert 'sampling.order = "blocked"' in fast
    assert "loading.worker =" not in slow + fast
    assert "bottleneck: loader and model alike;" in " ".join(advice([packed], 110.0, 100.0))


def test_processes_are_advised_where_they_pay():
    packed = Clip(id="b", num_frames=5, width=64, height=64, video_codec="h264", shard="a.tar")
    found = " ".join(advice([packed], 100.0, 300.0, processes=150.0))
    assert 'loading.worker = "process" is 1.50 times as fast' in found
    assert "loader, PyAV, 2 processes delivers 0.50 times" in found
    assert "takes 8 cores" in found  # by the threads' CPU time
    assert "loading.worker =" not in " ".join(advice([packed], 100.0, 300.0, processes=105.0))


def test_a_recipe_needs_clips(capsys):
    assert main(["doctor", "--no-gpu", "--recipe", "x.toml"]) == 2
    assert "--recipe needs a MANIFEST" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
