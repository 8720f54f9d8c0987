"""The order of runs in a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from fastav.model.fusion import Fusion
from fastav.report.runs import ORDER, SINGLE, RunResults

TAGS = [kind.__struct_config__.tag for kind in get_args(Fusion)]


def run_of(kind: str, name: str = "run") -> RunResults:
    return RunResults(Path(name), name, {"model": {"fusion": {"kind": kind}}}, [], [], None, {}, {}, [])


def test_every_fusion_kind_has_a_place_and_single_modalities_come_first():
    assert sorted(ORDER) == sorted(TAGS)
    assert ORDER[: len(SINGLE)] == SINGLE
    assert {"mbt", "external"} <= set(ORDER)


@pytest.mark.parametrize("kind", TAGS)
def test_an_unknown_kind_sorts_after_the_known_ones(kind):
    assert run_of(kind, "z").rank < run_of("a kind of a later version", "a").rank


def test_runs_of_one_kind_sort_by_name():
    runs = [
        run_of("late", "b"),
        run_of("unknown", "a"),
        run_of("late", "a"),
        run_of("audio", "z"),
        run_of("video", "z"),
    ]
    found = sorted(runs, key=lambda run: run.rank)
    assert [(run.kind, run.name) for run in found] == [
        ("video", "z"), ("audio", "z"), ("late", "a"), ("late", "b"), ("unknown", "a"),
    ]  # fmt: skip
