# ruff: noqa: N802  (NVML's names)
"""The suites `train` and `scale`: they measure what they say, name what binds, and the paper's sums are right."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import nvml, result, scale
from benchmarks import train as suite
from benchmarks.__main__ import main
from benchmarks.nvml import Gpu, Watch, integral
from benchmarks.plot import bars
from benchmarks.scale import KINDS, paper_table, rank
from benchmarks.scale.paper import Cluster, Link, Work, all_reduce_s, fitted, fitted_between, step, strong, weak
from benchmarks.timing import MedianInterval, Turn, grouped_ratio, ratio, verdict
from benchmarks.train.bench import MODES, Bench, Waits, busy_pct
from benchmarks.train.bound import Parts, bound
from fastav.core.errors import FastavError, UserError
from fastav.loader.threads import StageStats
from fastav.recipe.parse import load_recipe
from fastav.training.process_setup import shutdown
from tests import ROOT


@pytest.fixture
def bench(tiny_packed, tmp_path):
    """A bench of a tiny recipe, two steps a turn."""
    recipe = load_recipe(
        None, tiny_packed("bottleneck", tmp_path / "run", "--data.test", "", "--train.micro_batch", "4")
    )
    made = Bench(recipe, 2)
    yield made
    made.close()
    shutdown()


def test_turns_take_what_they_say(bench, monkeypatch):
    accumulation = bench.state.batch_split.accumulation
    assert accumulation == 2
    taken = []
    real = bench.loader.batches
    monkeypatch.setattr(bench.loader, "batches", lambda requests: real(taken.append(r) or r for r in requests))
    steps = itertools.count()
    stepped = bench.trainer.step
    monkeypatch.setattr(bench.trainer, "step", lambda batches: (next(steps), stepped(batches))[1])

    turn = bench.data()
    assert next(steps) == 0
    assert len(taken) >= bench.lead + 2 * accumulation
    assert turn.clips == 2 * bench.state.recipe.train.batch
    assert 0 < turn.facts["stages"]["decode"] <= 100
    assert "wait" not in turn.facts["stages"]
    assert "copy_pct" not in turn.facts, "copying to where it is already takes no time that anyone could tell"

    taken.clear()
    before = bench.state.step
    turn = bench.model()
    assert not taken, "the model alone reads nothing"
    assert bench.state.step == before + 2
    assert len(turn.facts["steps_ms"]) == 2
    assert sum(turn.facts["steps_ms"]) == pytest.approx(1e3 * turn.wall_s, rel=0.1)

    turn = bench.end_to_end()
    assert bench.state.step == before + 2 + bench.lead + 2
    assert len(taken) > (bench.lead + 2) * accumulation, "the loader works on to the end of the turn, as in a run"
    assert 0 < turn.facts["host_wait_pct"] <= 100
    assert turn.facts["device_idle_pct"] is None, "a CPU is host and device"

    taken.clear()
    turn = bench.beside()
    assert len(taken) > bench.lead, "batches were made meanwhile"
    assert turn.facts["data_step_ms"] > 0
    assert not list(bench.state.run.checkpoints.glob("*"))
    samples = [sample for _, sample, _ in taken]
    assert len(set(samples)) == len(samples)


def test_a_loader_that_dies_beside_the_model_ends_the_turn(bench, monkeypatch):
    real = bench.loader.batches

    def short(requests):
        yield from itertools.islice(real(requests), bench.lead + 1)
        raise FastavError("the disk is gone")

    monkeypatch.setattr(bench.loader, "batches", short)
    with pytest.raises(FastavError, match="the disk is gone"):
        bench.beside()


def test_waits_of_host_and_device(monkeypatch):
    """On a device whose clock is the host's: it is without work from the last kernel to the next forward pass."""
    monkeypatch.setattr("benchmarks.train.bench.event", lambda device: Moment())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def slow():
        for number in range(2):
            time.sleep(0.05)
            yield number

    waits = Waits(SimpleNamespace(type="cuda"))
    for _ in waits.watched(slow()):
        time.sleep(0.02)  # the batch is copied
        waits.forward()
        time.sleep(0.03)  # a step
    assert 0.1 <= waits.host_s < waits.device_s()
    assert waits.device_s() >= 0.14
    waits.restart()
    assert waits.host_s == waits.device_s() == 0
    assert Waits(torch.device("cpu")).device_s() is None


class Moment:
    """A CUDA event."""

    def __init__(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_how_busy_stages_are():
    before = {"decode": StageStats(1.0, 1.0, 1.0, 5), "wait": StageStats()}
    after = {"decode": StageStats(4.0, 1.5, 1.5, 9), "wait": StageStats(9.0)}
    assert busy_pct(before, after) == {"decode": pytest.approx(75.0)}


def test_turns_read_other_samples_each_time(bench):
    seen = []
    for _ in range(2):
        with bench.batches() as batches:
            seen.append({id for _ in range(3) for id in next(batches).ids})
    assert seen[0] != seen[1]


def test_the_suite_runs_with_variants(tiny_packed, tmp_path, capsys):
    words = tiny_packed("bottleneck", tmp_path / "ignored")
    keep = [w for pair in zip(words[::2], words[1::2], strict=True) if pair[0] != "--out" for w in pair]
    out = tmp_path / "r.json"
    quick = ["--quick", "--folder", str(tmp_path), "--out", str(out), "--vary", "train.micro_batch=4,8"]
    assert main(["train", "launch/recipes/small.toml", *quick, *keep]) == 0
    found = json.loads(out.read_text())
    result.check(found)
    labels = {f"train.micro_batch={n}: {mode}" for n in (4, 8) for mode in MODES}
    assert {row["variant"] for row in found["summary"]} == labels
    assert {row["metric"] for row in found["summary"]} >= {
        "clips_per_s",
        "overlap_efficiency",
        "interference",
        "host_wait_pct",
    }
    assert {row["b"].split(":")[0] for row in found["verdicts"]} == {"train.micro_batch=4"}
    assert len(found["verdicts"]) == len(MODES)
    assert [one["variant"] for one in found["bound"]] == ["train.micro_batch=4", "train.micro_batch=8"]
    assert all(one["knob"] for one in found["bound"])
    assert found["recipe"]["train"]["micro_batch"] == 4
    assert out.with_suffix(".png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "bottleneck: " in shown
    assert "overlap efficiency" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "optim.lr"], "expected KEY=A,B"),
        (["--rounds", "0"], "expected 1 or more"),
        (["--vary", "optim.lrr=1,2"], "lrr"),
        (["--optim.lrr", "1"], "lrr"),
        (["--rouns", "1"], "--rounds"),
        (["--vary", "train.threads=1,2"], "holds for the whole process"),
    ],
)
def test_wrong_words_are_told(words, message, capsys, tmp_path, made):
    assert main(["train", *words, "--folder", str(tmp_path), "--data.manifest", str(made)]) == 2
    assert message in capsys.readouterr().err


def test_several_ranks_need_a_place_that_they_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several ranks need --folder"):
        suite.arguments([])


FAST = Parts(data_s=0.1, model_s=0.2, end_s=0.2, beside_s=0.2)
STARVED = replace(FAST, data_s=0.4, end_s=0.4)


@pytest.mark.parametrize(
    ("parts", "what", "knob"),
    [
        (FAST, "the model", "train.compile"),
        (replace(FAST, communication_pct=30.0, gpu=True), "communication", "train.reduce_dtype"),
        (replace(FAST, sm_pct=40.0, gpu=True), "launching kernels", "train.compile"),
        (replace(FAST, sm_pct=97.0, gpu=True), "the model", "bf16"),
        (replace(STARVED, cpu_pct=97.0), "host CPU", "fastav pack"),
        (replace(STARVED, cpu_pct=20.0, nvdec_pct=96.0, gpu=True), "decoding (NVDEC)", "--preset fast"),
        (replace(STARVED, cpu_pct=20.0, copy_pct=93.0, gpu=True), "copying to the device", "sampling.frames"),
        (replace(STARVED, cpu_pct=50.0, stages={"decode": 99.0, "plan": 3.0}), "decoding threads",
         'loading.worker = "process"'),
        (replace(STARVED, stages={"decode": 99.0}, decodes="processes"), "decoding", "loading.workers"),
        (replace(STARVED, stages={"decode": 99.0, "prepare": 9.0}, decodes="dali"), "decoding (DALI)", "pipelines"),
        (replace(STARVED, stages={"decode": 20.0, "prepare": 99.0}, decodes="dali"), "reading what DALI decodes",
         "loading.workers"),
        (replace(STARVED, stages={"plan": 99.0, "decode": 9.0}), "the loader's plan stage", "sampling.frames"),
        (replace(STARVED, cpu_pct=10.0, stages={"decode": 30.0}), "waiting for files", "faster"),
        (replace(FAST, end_s=0.3, beside_s=0.4), "sharing the machine", "more cores"),
        (replace(FAST, end_s=0.3, beside_s=0.3, gpu=True), "sharing the machine", "decode.pipelines"),
        (replace(FAST, end_s=0.3, data_beside_s=0.3, gpu=True), "sharing the machine", "decode.pipelines"),
        (replace(FAST, end_s=0.3, beside_s=0.205, data_beside_s=0.12, gpu=True), "handing batches over", "prefetch"),
        (replace(FAST, end_s=0.3), "handing batches over", "loading.prefetch"),
    ],
)  # fmt: skip
def test_what_binds_is_named_with_its_knob(parts, what, knob):
    found = bound(parts)
    assert found.what == what
    assert knob in found.knob
    assert " ms" in found.why
    assert str(found).startswith(f"bottleneck: {what} (")


def test_the_parts_are_medians_of_the_turns():
    def turn(step_ms, **facts):
        return Turn(8, 1.0, step_ms / 1e3, {"step_ms": step_ms, "cpu_pct": 50.0, "nvdec_pct": None, **facts})

    stages = [{"decode": 90.0, "prepare": 10.0}, {"decode": 94.0, "prepare": 20.0}, {"decode": 98.0, "prepare": 30.0}]
    turns = {
        "data": [turn(100, stages=one, copy_pct=5.0) for one in stages],
        "model": [turn(ms, sm_pct=96.0) for ms in (190, 200, 500)],
        "end to end": [turn(210)] * 3,
        "model beside data": [turn(220, data_step_ms=130.0)] * 3,
        "model, not sending": [turn(150)] * 3,
    }
    loading = SimpleNamespace(worker="thread")
    bench = SimpleNamespace(state=SimpleNamespace(recipe=SimpleNamespace(loading=loading)), device=torch.device("cuda"))
    found = suite.parts(bench, turns)
    assert found == Parts(
        0.1, 0.2, 0.21, 0.22, cpu_pct=50.0, copy_pct=5.0, sm_pct=96.0, data_beside_s=0.13,
        stages={"decode": 94.0, "prepare": 20.0}, decodes="dali", gpu=True, communication_pct=pytest.approx(25.0),
    )  # fmt: skip
    assert bound(found).what == "communication"


def test_values_that_are_given_twice_are_two_variants():
    choices = suite.choices("optim.lr=1,1,2")
    assert [name for name, _ in choices] == ["optim.lr=1", "optim.lr=1 (2)", "optim.lr=2"]


def test_few_turns_are_no_verdict():
    assert verdict(MedianInterval(2.0, 1.9, 2.1, 6)) == "too few turns"
    assert verdict(MedianInterval(2.0, 1.9, 2.1, 7)) == "faster"
    assert verdict(MedianInterval(2.0, 1.9, 2.1)) == "faster"


def test_starts_that_differ_widen_the_interval():
    draw = np.random.default_rng(1)
    missed = {"grouped": 0, "pooled": 0}
    for _ in range(60):
        one, other = ([1 + draw.normal(0, 0.03) + draw.normal(0, 0.01, 5) for _ in range(5)] for _ in range(2))
        grouped = grouped_ratio(one, other)
        pooled = ratio(np.concatenate(one), np.concatenate(other))
        missed["grouped"] += not grouped.low <= 1 <= grouped.high
        missed["pooled"] += not pooled.low <= 1 <= pooled.high
    assert missed["grouped"] <= 9
    assert missed["pooled"] > missed["grouped"]


def test_overlap_and_interference():
    parts = Parts(data_s=0.3, model_s=0.2, end_s=0.4, beside_s=0.5)
    assert parts.overlap == pytest.approx(0.75)
    assert parts.interference == pytest.approx(2.5)


class Fake:
    """NVML of a GPU that draws a power that rises, and has a counter or none."""

    def __init__(self, counter):
        self.counter, self.begun = counter, time.perf_counter()
        self.reasons = itertools.cycle([0x1, 0x4, 0x0])  # idle, power cap, nothing

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counter:
            raise RuntimeError("not supported")
        return (time.perf_counter() - self.begun) * 1e3 * 100  # mJ at 100 W

    def nvmlDeviceGetPowerUsage(self, handle):
        return 200_000  # mW

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=80)

    def nvmlDeviceGetDecoderUtilization(self, handle):
        return [40, 1000]

    def nvmlDeviceGetClockInfo(self, handle, which):
        return {1: 1500, 2: 2600}[which]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return next(self.reasons)

    def nvmlDeviceGetEccMode(self, handle):
        return [1, 1]


@pytest.mark.parametrize(("counter", "watts"), [(True, 100), (False, 200)])
def test_energy_by_the_counter_or_by_the_power(counter, watts):
    begun = time.perf_counter()
    with Watch(Gpu(Fake(counter), 0), every_s=0.01) as watch:
        time.sleep(0.1)
        slept = time.perf_counter() - begun
    found = watch.found
    assert watts * 0.05 <= found.joules <= watts * (time.perf_counter() - begun)
    assert slept >= 0.1
    assert found.sm_mhz == (1500, 1500)
    assert found.memory_mhz == (2600, 2600)
    assert found.throttled == ["power cap"]
    assert (found.sm_pct, found.nvdec_pct) == (80, 40)


def test_what_nvml_cannot_say_is_none():
    assert Gpu(Fake(True), 0).facts() == {
        "ecc": True, "persistence": None, "power_limit_w": None, "processes": None, "temperature_c": None,
    }  # fmt: skip
    assert nvml.Gpu.of(torch.device("cpu")) is None
    with Watch(None) as watch:
        pass
    assert watch.found.joules is None
    mute = Fake(True)
    mute.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 1 / 0
    with Watch(Gpu(mute, 0)) as watch:
        pass
    assert watch.found.throttled is None, "not known is not the same as never"


def test_the_integral_of_power():
    assert integral([(0.0, 100.0), (1.0, 100.0), (3.0, 200.0)]) == pytest.approx(100 + 300)
    assert integral([(0.0, 100.0)]) is None


def test_pictures_show_every_metric_that_there_is(tmp_path):
    made = result.new("nvdec", [], {})
    made["runs"] = [{"variant": "a", "repeat": 0, "clips_per_s": 3.0}]
    one = bars(made, {"clips_per_s": "clips/s", "other": "nothing of it"}, tmp_path / "one.png")
    made["summary"] = [{"variant": "a", "metric": "other", "median": 1.0, "ci95": [0.9, 1.1]}]
    two = bars(made, {"clips_per_s": "clips/s", "other": "something"}, tmp_path / "two.png")
    import matplotlib.image

    heights = [matplotlib.image.imread(path).shape[0] for path in (one, two)]
    assert heights[1] > 1.5 * heights[0]
    made["runs"], made["summary"], made["notes"] = [], [], ["no GPU"]
    assert bars(made, {"clips_per_s": "clips/s"}, tmp_path / "none.png").exists()


NODE = Cluster(Link(100.0, 0.0), Link(10.0, 0.0), per_node=8)


def test_an_all_reduce_on_paper():
    assert all_reduce_s(100, 1, NODE) == 0
    assert all_reduce_s(100, 8, NODE) == pytest.approx(2 * 7 / 8 * 100e6 / 100e9)
    inside = all_reduce_s(100, 8, NODE)
    assert all_reduce_s(100, 16, NODE) - inside == pytest.approx(2 * (1 / 2) * (100e6 / 8) / 10e9)
    # Latency: a ring of 128 nodes has 254 of them, two trees have 14, and these are taken.
    slow = replace(NODE, between=Link(10.0, 1000.0))
    assert all_reduce_s(1e-9, 1024, slow) == pytest.approx(14 * 1e-3, rel=1e-3)


def test_buckets_hide_behind_the_backward_pass():
    work = Work(compute_s=0.1, gradient_mb=100, bucket_mb=10, backward=0.6)
    each = all_reduce_s(10, 8, NODE)
    assert each < 0.006
    found = step(work, 8, NODE)
    assert found.exposed_s == pytest.approx(each), "only the last bucket is waited for"
    assert found.communication_s == pytest.approx(10 * each)
    whole = step(replace(work, bucket_mb=100), 8, NODE)
    assert whole.exposed_s == pytest.approx(all_reduce_s(100, 8, NODE)), "one bucket hides behind nothing"
    assert step(replace(work, hidden=0.0), 8, NODE).exposed_s == pytest.approx(10 * each)
    slow = Cluster(Link(1.0, 0.0), Link(1.0, 0.0))
    bound = step(work, 8, slow)
    assert bound.exposed_s == pytest.approx(10 * all_reduce_s(10, 8, slow) - 0.06 * 9 / 10), "the link never rests"
    assert step(replace(work, passes=1.5), 8, NODE).communication_s == pytest.approx(15 * each)


def test_efficiency_on_paper():
    work = Work(compute_s=0.1, gradient_mb=100, fixed_s=0.01, jitter_s=0.001)
    counts = (1, 8, 64, 1024)
    weaks, strongs = weak(work, counts, NODE), strong(work, counts, NODE)
    assert weaks[0][1] == strongs[0][1] == 1
    assert [e for _, e in weaks] == sorted((e for _, e in weaks), reverse=True)
    assert [e for _, e in strongs] == sorted((e for _, e in strongs), reverse=True)
    assert all(s < w for (_, w), (_, s) in zip(weaks[1:], strongs[1:], strict=True))
    assert weaks[-1][0].straggling_s == pytest.approx(0.001 * math.sqrt(2 * math.log(1024)))
    assert strongs[-1][0].seconds > 0.01, "what does not shrink stays"
    crowded = replace(NODE, cores=2.0)
    alone = Work(compute_s=0.1, gradient_mb=0.001)
    assert [round(e, 2) for _, e in weak(alone, (1, 2, 4), crowded)] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_link_is_found_again(ranks):
    cluster = Cluster(Link(2.5, 40.0), Link(1.0, 1.0), per_node=8)
    times = [(mb, all_reduce_s(mb, ranks, cluster)) for mb in (0.004, 0.25, 1.0, 4.0, 30.0)]
    found = fitted(times, ranks)
    assert found.gb_per_s == pytest.approx(2.5)
    assert found.latency_us == pytest.approx(40.0)
    flat = fitted([(1.0, 0.0011), (2.0, 0.001)], ranks)  # large ones are no slower: all of it is latency
    assert flat.gb_per_s == math.inf
    assert all_reduce_s(1.0, ranks, Cluster(flat, flat)) == pytest.approx(0.00105, rel=0.02)
    steep = fitted([(1.0, 0.001), (2.0, 0.003)], ranks)
    assert steep.latency_us == 0
    assert steep.gb_per_s > 0


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 8), (2, 1), (3, 4)])
def test_the_link_between_nodes_is_found_again(nodes, per_node):
    inside, between = Link(100.0, 4.0), Link(12.5, 15.0)
    cluster = Cluster(inside, between, per_node)
    times = [(mb, all_reduce_s(mb, nodes * per_node, cluster)) for mb in (0.004, 0.25, 1.0, 4.0, 30.0)]
    found = fitted_between(times, nodes, per_node, inside)
    assert found.gb_per_s == pytest.approx(12.5)
    assert found.latency_us == pytest.approx(15.0)
    no_cost = [(mb, all_reduce_s(mb, per_node, cluster)) for mb in (1.0, 4.0)]
    assert fitted_between(no_cost, nodes, per_node, inside) == inside


def testlinks_are_those_that_the_smallest_groups_show():
    cluster, sizes = Cluster(Link(100.0, 4.0), Link(12.5, 15.0), 8), (0.004, 0.25, 1.0, 4.0, 30.0)
    files = [
        {"world": world, "all_reduce_s": [(mb, [all_reduce_s(mb, world, cluster)]) for mb in sizes]}
        for world in (8, 16, 64)
    ]
    inside, between = scale.links(files, [1, 8, 16, 64], 8, "0,0")
    assert (inside.gb_per_s, between.gb_per_s) == pytest.approx((100.0, 12.5))
    assert scale.links(files, [1, 8, 16, 64], 8, "40,10")[1] == Link(40.0, 10.0)
    assert scale.links(files, [1, 8], 8, "0,0") == (inside, inside), "one node shows nothing of others"
    blend, same = scale.links(files, [1, 16, 64], 8, "0,0")
    assert blend == same, "no run on one node tells the two apart"


def test_the_page_shows_what_the_model_makes():
    page = (ROOT / "benchmarks" / "scaling.md").read_text()
    work = Work(0.128, 700.0, jitter_s=1e-3)
    lines = paper_table(work, Cluster(Link(300.0, 5.0), Link(40.0, 10.0), 8), 64)
    assert "\n".join(lines) in page
    assert lines[-1].startswith("| 1024 |")


def test_a_row_of_the_page_by_hand():
    """1,024 ranks, 28 buckets of 25 MB: a ring in each node, two trees between 128 of them."""
    inside = 14 * (25e6 / 8 / 300e9 + 5e-6)
    ring = 2 * 127 * (25e6 / 8 / 128 / 40e9 + 10e-6)
    trees = 2 * (25e6 / 8) / 40e9 + 2 * 7 * 10e-6
    assert trees < ring
    each = inside + trees
    assert each < 0.6 * 0.128 / 28, "each bucket is through before the next is full"
    straggling = 1e-3 * math.sqrt(2 * math.log(1024))
    found = step(Work(0.128, 700.0, jitter_s=1e-3), 1024, Cluster(Link(300.0, 5.0), Link(40.0, 10.0), 8))
    assert found.seconds == pytest.approx(0.128 + each + straggling, rel=1e-9)
    assert found.communication_s == pytest.approx(28 * each)


def test_paper_on_the_command_line(capsys):
    words = ["scale", "--paper", "--step-ms", "128", "--gradient-mb", "700"]
    links = ["--inside", "300,5", "--between", "40,10", "--jitter-ms", "1"]
    assert main([*words, *links]) == 0
    assert "| 1024 | 132.2 |" in capsys.readouterr().out
    assert main(["scale", "--paper"]) == 2
    assert main([*words, "--inside", "fast"]) == 2
    assert "--inside fast: expected GB/S,US" in capsys.readouterr().err
    assert main([*words, "--inside", "300,5"]) == 2
    assert "--between 0,0: expected a bandwidth above 0" in capsys.readouterr().err


def test_scaling_is_measured_and_held_against_paper(tiny_packed, tmp_path, capsys):
    words = tiny_packed("bottleneck", tmp_path / "ignored")
    keep = [w for pair in zip(words[::2], words[1::2], strict=True) if pair[0] != "--out" for w in pair]
    out, folder = tmp_path / "r.json", tmp_path / "files"
    folder.mkdir()
    few = ["--quick", "--folder", str(folder), "--out", str(out)]
    assert main(["scale", "launch/recipes/small.toml", *few, *keep]) == 0
    found = json.loads(out.read_text())
    result.check(found)
    assert found["varied"]["ranks"] == [1, 2]
    assert {row["variant"] for row in found["summary"]} == {f"{kind}, {n} ranks" for kind in KINDS for n in (1, 2)}
    alone = {row["metric"]: row["median"] for row in found["summary"] if row["variant"] == "weak, 1 ranks"}
    assert alone["efficiency"] == alone["loop_efficiency"] == 1
    shared = {row["metric"]: row["median"] for row in found["summary"] if row["variant"] == "strong, 2 ranks"}
    assert {"efficiency", "loop_efficiency", "all_reduce_pct", "clips_per_s", "step_ms"} == set(shared)
    assert found["paper"]["link_gb_per_s"] > 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    two = json.loads((folder / "ranks_2_0.json").read_text())
    assert (two["world"], two["strategy"]) == (2, "ddp")
    sizes = [mb for mb, _ in two["all_reduce_s"]]
    assert any(mb == pytest.approx(two["gradient_mb"], rel=0.01) for mb in sizes)
    assert sizes == sorted(sizes)
    # The same figures from the files alone, as one takes them from a cluster.
    again = tmp_path / "again.json"
    files = [str(file) for file in sorted(folder.glob("ranks_*.json"))]
    assert main(["scale", "--files", *files, "--out", str(again)]) == 0
    assert json.loads(again.read_text())["summary"] == found["summary"]
    assert main(["scale", "--files", files[1], "--out", str(again)]) == 2
    assert "no file of a single rank" in capsys.readouterr().err
    other = json.loads(Path(files[1]).read_text()) | {"batch": 1}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert main(["scale", "--files", files[0], str(tmp_path / "other.json"), "--out", str(again)]) == 2
    assert "differ in their batch: 8, 1" in capsys.readouterr().err
    assert main(["scale", "--files", str(out), "--out", str(again)]) == 2
    assert "not a file written by benchmarks.scale.rank" in capsys.readouterr().err


def test_ranks_that_fail_are_told(tmp_path, made, capsys):
    few = ["scale", "launch/recipes/small.toml", "--folder", str(tmp_path), "--data.manifest", str(made)]
    assert main([*few, "--ranks", "1", "--train.num_processes", "2"]) == 2
    assert "1 ranks: train.num_processes = 2, but the launcher started 1" in capsys.readouterr().err
    assert main([*few, "--ranks", "1,2", "--train.batch", "5"]) == 2
    assert "train.batch = 5: expected an even multiple of all --ranks 1,2" in capsys.readouterr().err
    assert main(["scale", "launch/recipes/small.toml", "--ranks", "2,4"]) == 2
    assert "expected 1 among them" in capsys.readouterr().err


def test_tasks_of_srun_that_do_not_know_each_other_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(UserError, match="srun started 16 tasks, but WORLD_SIZE is not set"):
        rank.measure(load_recipe(None, []), tmp_path, 1, 1)


def test_unsent_gradients_stay_on_their_rank(tiny_packed, tmp_path):
    """The steps that tell what sending costs: without it ranks drift apart, with it they stay together."""
    words = tiny_packed("bottleneck", tmp_path / "run", "--data.test", "")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*ranks, "-m", "tests.ranks.drifting", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["joined"] == 0
    assert told["apart"] > 0
