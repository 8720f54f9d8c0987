"""Rates and lines of the meter, on a clock of the test's own."""

from __future__ import annotations

import io

import pytest

from fastav.core import machine
from fastav.core.log_lines import Console, clock_time
from fastav.core.machine import num_cores, peak_flops
from fastav.training.throughput import Meter, tracker_values


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_of_the_interval_since_the_last_report():
    clock = Clock()
    meter = Meter(100, flops_per_clip=1e9, peak_flops=1e12, clock=clock)
    for _ in range(4):
        clock.now += 0.5
        meter.step(clips=64, unique=32, wait_s=0.125)
    rates = meter.rates()
    assert rates.clips_per_s == pytest.approx(128)
    assert rates.unique_clips_per_s == pytest.approx(64)
    assert rates.step_ms == pytest.approx(500)
    assert rates.stall_pct == pytest.approx(25)
    assert rates.mfu_pct == pytest.approx(12.8)
    assert meter.eta_s(40) == pytest.approx(30)
    clock.now += 1
    meter.step(clips=10, unique=10, wait_s=0)
    assert meter.rates().clips_per_s == pytest.approx(10)


def test_restart_leaves_an_evaluation_out_of_the_rate():
    clock = Clock()
    meter = Meter(10, clock=clock)
    clock.now += 60
    meter.restart()
    clock.now += 1
    meter.step(8, 8, 0)
    rates = meter.rates()
    assert rates.clips_per_s == pytest.approx(8)
    assert rates.mfu_pct is None


def test_the_line_has_every_part_and_mfu_only_where_a_peak_is_known():
    clock = Clock()
    meter = Meter(1000, clock=clock)
    clock.now += 2
    meter.step(16, 16, 1)
    line = meter.line(7, 1.23456, meter.rates())
    assert line.startswith("step    7/1000 | loss 1.2346 | 8.0 clips/s | stall 50 % | mem ")
    assert line.endswith("ETA 33:06")
    assert "MFU" not in line


def test_a_pipe_gets_plain_lines_at_intervals_and_the_last():
    stream = io.StringIO()
    console = Console(stream, plain_every_s=1000)
    for i in range(5):
        console.progress(f"step {i}")
    console.progress("step 5", last=True)
    console.log("done")
    assert stream.getvalue() == "step 0\nstep 5\ndone\n"


def test_a_terminal_gets_one_line_rewritten_and_logs_below_it():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(stream)
    console.progress("step 1")
    console.progress("step 2")
    console.log("saved")
    console.progress("step 3", last=True)
    console.log("done")
    lines = "\r\x1b[2Kstep 1\r\x1b[2Kstep 2\nsaved\n\r\x1b[2Kstep 3\ndone\n"
    assert stream.getvalue() == lines


def test_quiet_ranks_print_nothing():
    stream = io.StringIO()
    console = Console(stream, quiet=True)
    console.log("x")
    console.progress("y", last=True)
    assert stream.getvalue() == ""


def test_small_things():
    assert clock_time(59.6) == "1:00"
    assert clock_time(3723) == "1:02:03"
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40") is None
    assert peak_flops("NVIDIA L4") == 121e12
    assert num_cores() >= 1
    assert tracker_values({"step": 3, "eval": {"top1": 0.5, "name": "x", "flag": True}, "mfu": None}) == {
        "step": 3.0,
        "eval/top1": 0.5,
    }


@pytest.mark.parametrize(
    ("mine", "environment", "each"),
    [
        (16, {}, 16),
        (16, {"LOCAL_WORLD_SIZE": "8"}, 2),  # torchrun: all ranks may use all cores
        (16, {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "128"}, 16),  # SLURM has given each task its own
        (128, {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "128"}, 16),  # or has not
        (64, {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "64"}, 8),
    ],
)
def test_cores_of_one_of_a_nodes_ranks(monkeypatch, mine, environment, each):
    monkeypatch.setattr(machine, "num_cores", lambda: mine)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert machine.cores_each() == each
