"""What of tuning needs no GPU: the candidates, the file, and the ranges of tokens that win."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources

import pytest

from benchmarks.kernels import tune
from fastav_kernels.bottleneck_attention.plans import ARCHITECTURES, Chip, Win, read_plans


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_written_file_of_plans_is_the_one_that_was_read(architecture, tmp_path):
    found = read_plans(architecture)
    win = Win("shared", 64, "bfloat16", 8, 4, True, 65, 197, 1.07)
    tune.write_plans(tmp_path / "again.json", "a GPU", found.plans, [win])
    told = json.loads((tmp_path / "again.json").read_text())
    shipped = resources.files("fastav_kernels.bottleneck_attention").joinpath(f"plans/{architecture}.json")
    assert told["plans"] == json.loads(shipped.read_text())["plans"]
    assert told["wins"] == [
        {
            "frames": "shared",
            "head_dim": 64,
            "dtype": "bfloat16",
            "num_frames": 8,
            "num_bottleneck": 4,
            "need_bottleneck": True,
            "min_tokens": 65,
            "max_tokens": 197,
            "ratio": 1.07,
        }
    ]
    assert told["measured"] == "a GPU"


def test_every_plan_has_candidates_on_sequences_that_it_takes():
    for plan in read_plans("sm_90").plans:
        segments = tune.stage_of(plan).segments
        assert segments.num_tokens + segments.num_bottleneck <= plan.max_keys
        others = list(tune.candidates(plan))
        assert len(others) >= 20
        assert all(one.kernel == plan.kernel and one.max_keys == plan.max_keys for one in others)
        if plan.kernel == "backward_whole":
            assert {one.block_n for one in others} == {plan.block_n}


def test_wins_are_ranges_of_neighbouring_shapes():
    ratios = [(50, 0.9, 0.95), (65, 1.01, 1.08), (101, 1.02, 1.0599), (145, 1.0, 1.2), (197, 1.1, 1.15)]
    assert list(tune.winning_ranges("shared", 64, True, ratios)) == [
        Win("shared", 64, "bfloat16", 8, 4, True, 65, 101, 1.05),
        Win("shared", 64, "bfloat16", 8, 4, True, 197, 197, 1.15),
    ]
    assert list(tune.winning_ranges("shared", 64, True, [(50, 0.5, 0.9)])) == []


def test_a_tuned_plan_leaves_what_smaller_chips_need():
    plan = next(p for p in read_plans("sm_90").plans if p.kernel == "forward" and p.head_dim == 128)
    larger = replace(plan, block_m=128, shared_bytes=plan.shared_bytes + 4096)
    same = replace(plan, block_m=32)
    assert tune.reachable([larger, plan]) == [larger, plan]
    assert tune.reachable([plan, larger]) == [plan]
    assert tune.reachable([same, plan]) == [same]
    small = Chip("sm_90", plan.shared_bytes)
    assert tune.plan_among([larger, plan], "forward", small, 128, 2, 1000) == plan
    assert tune.plan_among([larger, plan], "forward", Chip("sm_90"), 128, 2, 1000) == larger


def test_what_the_gate_refuses_is_no_candidate():
    plan = next(p for p in read_plans("sm_90").plans if p.kernel == "forward" and (p.head_dim, p.num_bytes) == (64, 2))
    case = tune.stage_of(plan)
    small = replace(plan, block_m=32)  # too few rows for a warp group: other instructions
    kept = tune.tried((plan, "sm_90", case.segments, case.heads))
    assert kept is not None
    assert kept.shared_bytes <= plan.shared_bytes
    assert tune.tried((small, "sm_90", case.segments, case.heads)) is None
