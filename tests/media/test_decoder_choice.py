"""Which decoder `auto` becomes, and what the first log line says."""

from __future__ import annotations

from collections import Counter

import pytest

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.data.manifest import Manifest
from fastav.media.dali.decoder import Dali
from fastav.media.decoder_choice import Auto, ClipStats, choose_decoder, sample_clips
from fastav.media.pyav import PyAV
from fastav.recipe.parse import load_recipe
from fastav.training.inputs import describe_decoder, training_source


def video(codec, width=448, height=256, shard=""):
    return Clip(id=codec, num_frames=5, width=width, height=height, video_codec=codec, shard=shard)


def test_a_census():
    clips = [video("h264", shard="a.tar"), video("h264"), video("av1"), Clip(id="s", num_samples=5)]
    clip_stats = ClipStats.of(clips)
    assert clip_stats.codecs == Counter({"h264 packed": 1, "h264": 1, "av1": 1, "": 1})
    assert clip_stats.describe() == "h264 packed 25 %, h264 25 %, av1 25 %, no video 25 %"
    assert ClipStats.of([]).describe() == "no clips"


def test_without_a_gpu_it_is_pyav_and_says_why(monkeypatch):
    monkeypatch.setattr(
        "fastav.media.decoder_choice.missing_requirement", lambda device: "PyTorch finds no CUDA device"
    )
    choice = choose_decoder(Auto(), ClipStats.of([video("h264")]), True)
    assert isinstance(choice.config, PyAV)
    assert choice.reason == "DALI cannot be used: PyTorch finds no CUDA device"


@pytest.mark.parametrize(
    ("clips", "looks", "kind", "reason"),
    [
        ([video("h264")] * 10, True, Dali, "can decode 100 % of the clips (h264 100 %)"),
        ([video("h264")] * 8 + [video("av1")] * 2, True, PyAV, "can decode 80 % of the clips"),
        ([video("vp9", 96, 96)] * 4, True, PyAV, "can decode 0 % of the clips"),
        ([video("h264")] * 4, False, PyAV, "no video to decode"),
        ([Clip(id="s", num_samples=5)], True, PyAV, "no video to decode"),
    ],
)
def test_with_a_gpu_it_goes_by_codec_and_size(monkeypatch, clips, looks, kind, reason):
    monkeypatch.setattr("fastav.media.decoder_choice.missing_requirement", lambda device: "")
    monkeypatch.setattr("fastav.media.decoder_choice.self_test_failure", lambda device: "")
    choice = choose_decoder(Auto(), ClipStats.of(clips), looks)
    assert isinstance(choice.config, kind)
    assert reason in choice.reason


def test_a_gpu_that_shows_other_pictures_is_left_alone(monkeypatch):
    monkeypatch.setattr("fastav.media.decoder_choice.missing_requirement", lambda device: "")
    monkeypatch.setattr("fastav.media.decoder_choice.self_test_failure", lambda device: "spliced groups come out grey")
    choice = choose_decoder(Auto(), ClipStats.of([video("h264")]), True)
    assert isinstance(choice.config, PyAV)
    assert choice.reason == "DALI does not work on this machine: spliced groups come out grey"


def test_dali_that_could_decode_nothing_is_refused():
    with pytest.raises(UserError, match=r'"dali" on the cpu can decode none .*MJPEG pack'):
        choose_decoder(Dali(device="cpu"), ClipStats.of([video("h264")] * 3), True)
    half = choose_decoder(Dali(device="cpu"), ClipStats.of([video("h264"), video("mjpeg")]), True)
    assert half.reason == "requested; PyAV decodes 50 % of the clips"
    assert choose_decoder(Dali(device="cpu"), ClipStats.of([video("mjpeg")]), True).reason == "requested"
    assert choose_decoder(Dali(device="cpu"), ClipStats.of([video("h264")]), False).reason == "requested"


def test_what_is_asked_for_is_taken(monkeypatch):
    assert choose_decoder(PyAV(threads_per_clip=3), ClipStats.of([]), True).config == PyAV(threads_per_clip=3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    forced = choose_decoder(Dali(device="gpu"), ClipStats.of([video("h264")]), True).config
    from fastav.media.decoder import DecodeSpec

    with pytest.raises(UserError, match=r'decode.kind "dali" with device "gpu": (PyTorch finds no CUDA|the package)'):
        forced.build(DecodeSpec())


def test_rows_are_evenly_spaced(made):
    manifest = Manifest.open(made)
    assert len(sample_clips([manifest])) == len(manifest)
    assert len(sample_clips([manifest, manifest])) == 2 * len(manifest)


def test_the_first_log_line(made, tiny, tmp_path):
    recipe = load_recipe(None, tiny("late", tmp_path / "r"))
    line = describe_decoder(recipe, training_source(recipe))
    assert line.startswith("pyav (DALI cannot be used: ") or line.startswith("dali (")
    assert "threads; clips: h264 " in line
