"""Pieces of recordings, and clips held out for the test split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.datasets.splits import HoldOut, cut, hold_out


@pytest.mark.parametrize(
    ("duration_s", "expected"),
    [
        (10.0, [2, 2, 2, 2, 2]),
        (9.9999, [2, 2, 2, 2, 1.9999]),
        (10.0000001, [2, 2, 2, 2, 2]),
        (11.0, [2, 2, 2, 2, 2, 1]),  # half a piece is one
        (10.9, [2, 2, 2, 2, 2]),  # less is left out
        (0.5, [0.5]),  # but no file is lost
    ],
)
def test_cutting(duration_s: float, expected: list[float]) -> None:
    made = cut(Clip("owl/a.mp4", video=Path("a.mp4"), start_s=1.0, duration_s=duration_s), piece_s=2.0)
    assert [c.duration_s for c in made] == pytest.approx(expected)
    assert [c.id for c in made] == [f"owl/a.mp4#{k}" for k in range(len(expected))]
    assert [c.start_s for c in made] == [1.0 + 2 * k for k in range(len(expected))]


def test_stills_are_not_cut() -> None:
    for still in (Clip("a", image=Path("a.png")), Clip("a", mel=Path("a.npy"))):
        assert cut(still, piece_s=2.0) == [still]


@settings(max_examples=50, deadline=None)
@given(st.floats(0.001, 100), st.floats(0.5, 60))
def test_pieces_are_of_one_length_and_follow_each_other(duration_s: float, piece_s: float) -> None:
    made = cut(Clip("a", audio=Path("a.wav"), duration_s=duration_s), piece_s=piece_s)
    assert all(c.duration_s == pytest.approx(piece_s) for c in made[:-1])
    assert all(0 < c.duration_s <= piece_s for c in made)
    end_s = made[-1].start_s + made[-1].duration_s
    assert end_s <= duration_s * (1 + 1e-12)
    assert duration_s - end_s <= piece_s / 2 or len(made) == 1
    assert [c.start_s for c in made] == pytest.approx([k * piece_s for k in range(len(made))])


def files(**counts: int) -> list[Clip]:
    return [
        Clip(f"{name}/{i}.mp4", labels=(name,), group=f"{name}/{i}", video=Path(f"{name}/{i}.mp4"))
        for name, count in counts.items()
        for i in range(count)
    ]


def test_every_third_piece() -> None:
    pieces = [p for c, s in zip(files(owl=3), (9.0, 4.0, 14.0), strict=True) for p in cut_of(c, s)]
    made = hold_out(pieces, rule=HoldOut.parse("every:3"))
    assert [c.id for c in made] == [c.id for c in pieces]
    assert [c.id for c in made if c.split == "test"] == ["owl/0.mp4#2", "owl/2.mp4#2", "owl/2.mp4#5"]
    assert {c.group for c in made} == {""}, "no leak is reported for what was asked for"


def test_a_rule_that_holds_nothing_out_is_refused() -> None:
    pieces = [p for c in files(owl=3) for p in cut_of(c, 4.0)]
    with pytest.raises(UserError, match="no file has more than 2 pieces"):
        hold_out(pieces, rule=HoldOut.parse("every:3"))


def cut_of(clip: Clip, seconds: float) -> list[Clip]:
    return cut(Clip(clip.id, video=clip.video, labels=clip.labels, group=clip.group, duration_s=seconds), piece_s=2.0)


def test_a_fraction_of_the_files_of_each_class() -> None:
    clips = [p for c in files(crow=1, owl=2, wren=10, yak=100) for p in cut_of(c, 4.0)]
    made = hold_out(clips, rule=HoldOut.parse("fraction:0.2"))
    held = Counter(c.labels[0] for c in made if c.split == "test")
    assert held == {"owl": 2, "wren": 4, "yak": 40}, "two pieces a file"
    splits: dict[str, set[str]] = {}
    for c in made:
        splits.setdefault(c.group, set()).add(c.split)
    assert all(len(found) == 1 for found in splits.values()), "a file is never torn"
    assert made == hold_out(clips, rule=HoldOut.parse("fraction:.2"))
    turned = hold_out(clips[::-1], rule=HoldOut.parse("fraction:0.2"))
    assert {c.id for c in turned if c.split == "test"} == {c.id for c in made if c.split == "test"}
    most = hold_out(clips, rule=HoldOut.parse("fraction:0.99"))
    assert {c.labels[0] for c in most if c.split == "train"} == {"crow", "owl", "wren", "yak"}
