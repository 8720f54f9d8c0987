"""The benchmark harness: intervals, verdicts, the schema of results; and that the data baselines show equal frames."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import result
from benchmarks.__main__ import main
from benchmarks.console import open_console
from benchmarks.data import peers, planner
from benchmarks.data.clips import PACKS, make
from benchmarks.data.peers import Dump, Ours, PyAVLinear, peers_of
from benchmarks.timing import (
    MedianInterval,
    Turn,
    interleave,
    median,
    paired_ratio,
    per_cpu_second,
    per_second,
    ratio,
    verdict,
)
from fastav.core.errors import UserError


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return make(tmp_path_factory.mktemp("media"), None, frames=50, size=(320, 192))


BASELINES = ("torchcodec exact", "torchcodec approximate", "PyAV by hand", "SPDL", "decord", "PyAV linear")


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("pack", ["balanced", "fast", "mjpeg"])
def test_baselines_show_what_ours_shows(media, name, pack):
    clip = media.packed[pack]
    readers = peers_of(media.remuxed[pack], clip)
    if name not in readers:
        pytest.skip(f"{name} cannot be loaded here")
    peer, ours, draw = readers[name](), Ours(clip), planner(clip, 7)
    for _ in range(6):
        plan = draw()
        one, two = ours.frames(plan).float(), peer.frames(plan).float()
        assert one.shape == two.shape == (8, 3, 224, 224)
        assert (one - two).abs().mean() <= 2.5


def test_readers_that_cannot_be_loaded_are_left_out(media, monkeypatch):
    def fail(name):
        if name.startswith("torchcodec"):
            raise RuntimeError("Could not load libtorchcodec")
        return SimpleNamespace(decode_config=lost) if name == "spdl.io" else real(name)

    def lost():
        raise RuntimeError("Failed to import libspdl")

    real = peers.importlib.import_module
    peers.loads.cache_clear()
    monkeypatch.setattr(peers.importlib, "import_module", fail)
    found = peers_of(media.remuxed["fast"], media.packed["fast"])
    assert not {"torchcodec exact", "SPDL"} & set(found)
    assert "PyAV by hand" in found
    peers.loads.cache_clear()


def test_raw_readers_agree(media):
    draw = planner(media.raw, 3)
    ours, linear = Ours(media.raw), PyAVLinear(media.raw.video)
    for _ in range(3):
        plan = draw()
        assert (ours.frames(plan).float() - linear.frames(plan).float()).abs().mean() <= 2.5


def test_the_dump_shows_the_nearest_of_its_ten_frames(media):
    clip = media.packed["balanced"]
    stored = np.array([(2 * i + 1) * 50 // 20 for i in range(8)], np.int32)
    plan = replace(planner(clip)(), frames_T=stored, crop=(0.0, 0.0, 320.0, 192.0))
    whole = replace(plan, crop=(0.0, 0.0, 448.0, 256.0))  # the dump's own size
    seen = Dump(media.dump, media.raw.num_frames).frames(whole)
    assert (seen.float() - Ours(clip).frames(plan).float()).abs().mean() < 8
    assert len(list(media.dump.glob("*.jpg"))) == 10
    assert (media.dump / "sound.wav").stat().st_size > 2 * 16_000


def test_media_are_what_they_claim(media):
    assert set(media.packed) == set(PACKS)
    assert all(quality > 30 for quality in media.quality.values())
    assert media.footage.startswith("procedural")


def test_turns_are_interleaved_and_counted():
    order: list[str] = []

    def variant(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)
            return 2

        return run

    turns = interleave({"a": variant("a", 0.0), "b": variant("b", 0.01)}, 3)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(rounds) for rounds in turns.values()] == [3, 3]
    assert all(turn.clips == 2 and turn.wall_s >= 0.01 for turn in turns["b"])


def test_intervals_and_verdicts():
    rng = np.random.default_rng(0)
    slow, fast = 100 + rng.normal(0, 3, 20), 150 + rng.normal(0, 3, 20)
    found = ratio(fast, slow)
    assert found.low < 1.5 < found.high or abs(found.median - 1.5) < 0.05
    assert verdict(found) == "faster"
    assert verdict(ratio(slow, fast)) == "slower"
    assert verdict(ratio(slow, slow)) == "no difference"
    drift = np.linspace(1, 3, 20)  # of the machine, which both feel
    paired = paired_ratio(fast * drift, slow * drift)
    assert paired.high - paired.low < 0.1
    assert abs(paired.median - 1.5) < 0.05
    whole = median(slow)
    assert whole.low <= whole.median <= whole.high
    assert str(MedianInterval(12.34, 11.0, 13.0)) == "12.3 (11.0 to 13.0)"
    assert per_second([Turn(10, 1.0, 2.0)])[0] == 5
    assert per_cpu_second([Turn(10, 1.0, 2.0)])[0] == 10


def test_results_follow_their_schema(tmp_path):
    made = result.new("data", ["--quick"], {"workers": [1]})
    path = result.write(made, tmp_path / "r.json")
    assert json.loads(path.read_text())["command"] == "python -m benchmarks data --quick"
    assert made["machine"]["cores"] >= 1
    assert made["versions"]["av"]
    with pytest.raises(UserError, match='"suite" is 3, expected type str'):
        result.check(made | {"suite": 3})
    with pytest.raises(UserError, match="schema is 99"):
        result.check(made | {"schema": 99})
    with pytest.raises(UserError, match='an entry of "summary" has no ci95'):
        result.check(made | {"summary": [{"variant": "a", "metric": "m", "median": 1.0}]})


def test_the_suite_runs(media, tmp_path, capsys):
    out, folder = tmp_path / "r.json", str(media.dump.parent)
    assert main(["data", "--quick", "--workers", "1", "--folder", folder, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    result.check(found)
    assert {row["variant"] for row in found["summary"]} >= {"balanced through ours", "ten JPEGs", "raw", "balanced"}
    assert out.with_suffix(".png").stat().st_size > 10_000
    described = [run for run in found["runs"] if "frames_decoded_per_used" in run]
    assert {run["variant"] for run in described} == set(PACKS)
    fast = next(run for run in described if run["variant"] == "fast")
    assert fast["frames_decoded_per_used"] <= 1
    assert "too few turns" in capsys.readouterr().out


def test_the_nvdec_suite_checks_its_graph_without_a_gpu(capsys, monkeypatch):
    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["nvdec"]) == 0
    shown = capsys.readouterr().out
    assert "DALI's frames equal PyAV's" in shown
    assert "nothing is timed: PyTorch finds no CUDA device" in shown


def test_wrong_words(capsys):
    assert main(["dta"]) == 2
    assert 'did you mean "data"' in capsys.readouterr().err
    assert main([]) == 2
    assert main(["data", "--rouns", "3"]) == 2
    assert "--rouns" in capsys.readouterr().err


def test_tables_are_not_cut_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    open_console().print("clips per second " * 8, soft_wrap=False)
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setenv("COLUMNS", "40")
    assert open_console().width == 40
