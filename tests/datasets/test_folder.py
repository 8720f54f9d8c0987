"""Folders as data sets: what is taken for a clip, its class, its split, its pieces."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.datasets import folder
from fastav.datasets.folder import HoldOut, cut, hold_out, rows
from fastav.datasets.listing import Listing
from fastav.media.probe import IMAGE_SUFFIXES, MEL_SUFFIXES


def tree(root: Path, *names: str) -> Path:
    """Makes empty files; listing a folder opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(root: Path, *words: str) -> Listing:
    parser = argparse.ArgumentParser()
    folder.add_arguments(parser)
    return folder.listing(parser.parse_args([str(root), *words]))


def test_class_folders(tmp_path: Path) -> None:
    root = tree(
        tmp_path, "owl/deep/er/b.MP4", "owl/a.wav", "crow/c.JPG", "crow/d.npy", "crow/.hidden.mp4", ".git/e.mp4",
        "crow/._d.mp4", "crow/notes.txt", "crow/more.TXT", "crow/README",
    )  # fmt: skip
    clips, problems, notes = rows(root)
    assert [(c.id, c.labels, c.split, c.group) for c in clips] == [
        ("crow/c.JPG", ("crow",), "train", "crow/c"),
        ("crow/d.npy", ("crow",), "train", "crow/d"),
        ("owl/a.wav", ("owl",), "train", "owl/a"),
        ("owl/deep/er/b.MP4", ("owl",), "train", "owl/deep/er/b"),
    ]
    picture, mel, sound, video = clips
    assert (picture.image, picture.video, picture.audio) == (root / "crow/c.JPG", None, None)
    assert (mel.mel, sound.audio, sound.video) == (root / "crow/d.npy", root / "owl/a.wav", None)
    assert video.video == video.audio == root / "owl/deep/er/b.MP4"
    assert [(p.kind, Path(p.path).name) for p in problems] == [
        ("unknown_suffix", "README"),
        ("unknown_suffix", "more.TXT"),
        ("unknown_suffix", "notes.txt"),
    ]
    assert notes == ["left out, not media: 2 x .txt, 1 x no suffix"]


def test_a_file_a_class(tmp_path: Path) -> None:
    root = tree(tmp_path, "owl.mp4", "owl.wav", "deep/owl.mp4", "crow.v2.mp4")
    clips, problems, _ = rows(root, classes="file")
    assert {c.id: c.labels[0] for c in clips} == {
        "owl.mp4": "owl", "owl.wav": "owl", "deep/owl.mp4": "deep/owl", "crow.v2.mp4": "crow.v2",
    }  # fmt: skip
    assert problems == []
    assert len({c.group for c in clips if c.labels == ("owl",)}) == 1, "a sound beside its video is in its group"


def test_split_folders(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/owl/a.mp4", "Validation/owl/b.mp4", "test/owl/a.mp4", "test/crow/x/c.mp4")
    clips, _, notes = rows(root)
    assert {c.id: (c.split, c.labels[0]) for c in clips} == {
        "train/owl/a.mp4": ("train", "owl"), "Validation/owl/b.mp4": ("val", "owl"),
        "test/owl/a.mp4": ("test", "owl"), "test/crow/x/c.mp4": ("test", "crow"),
    }  # fmt: skip
    assert len({c.group for c in clips}) == 4
    assert notes == []
    by_file, _, _ = rows(root, classes="file")
    assert {c.labels[0] for c in by_file} == {"owl/a", "owl/b", "crow/x/c"}
    with pytest.raises(UserError, match=r"has folders for its splits \(test, val\); expected one or the other"):
        listed(root, "--hold-out", "fraction:0.5")


def test_a_class_called_train(tmp_path: Path) -> None:
    clips, _, notes = rows(tree(tmp_path, "train/a.mp4", "tram/b.mp4"))
    assert [(c.labels[0], c.split) for c in clips] == [("train", "train"), ("tram", "train")]
    assert notes == ["train: taken for ordinary folders, not for splits, as there are others beside"]


def test_what_lies_in_no_class_folder(tmp_path: Path) -> None:
    root = tree(tmp_path, "loose.mp4", "owl/a.mp4")
    clips, problems, _ = rows(root)
    assert [c.id for c in clips] == ["owl/a.mp4"]
    assert [(p.kind, p.path) for p in problems] == [("no_class", str(root / "loose.mp4"))]
    assert "lies in no class folder" in problems[0].message


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    root = tree(tmp_path, "owl/a.mp4")
    (root / "owl" / os.fsdecode(b"caf\xe9.mp4")).touch()
    clips, problems, _ = rows(root)
    assert [c.id for c in clips] == ["owl/a.mp4"]
    assert [p.kind for p in problems] == ["bad_name"]
    assert "is not UTF-8" in problems[0].message
    problems[0].message.encode()


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "owl/a.mp4")
    other = tree(tmp_path / "other", "b.mp4")
    (root / "crow").symlink_to(other)
    (root / "owl" / "loop").symlink_to(root)
    clips, _, _ = rows(root)
    assert [c.id for c in clips] == ["crow/b.mp4", "owl/a.mp4"]


@pytest.mark.parametrize(
    ("names", "where", "message"),
    [
        ([], "", "empty, expected video, recording, picture or .npy"),
        (["a.txt"], "", "1 files, none a video, recording, picture or .npy"),
        (["a.mp4"], "", "no class folders; expected"),
        (["owl/a.mp4"], "owls", 'no such folder; did you mean "owl"?'),
        (["owl/a.mp4"], "owl/a.mp4", "not a folder"),
    ],
)
def test_nothing_to_index(tmp_path: Path, names: Sequence[str], where: str, message: str) -> None:
    tree(tmp_path, *names)
    with pytest.raises(UserError) as error:
        rows(tmp_path / where)
    assert message in str(error.value)
    assert str(tmp_path / where) in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--hold-out", "evry:3"],
            'expected none, every:N with N of 2 or more, or fraction:F with 0 < F < 1; did you mean "every"?',
        ),
        (["--hold-out", "every:1", "--piece-s", "2"], "expected none, every:N with N of 2 or more"),
        (["--hold-out", "every:two", "--piece-s", "2"], "expected none, every:N"),
        (["--hold-out", "fraction:1.5"], "0 < F < 1"),
        (["--hold-out", "fraction:0.0"], "0 < F < 1"),
        (["--hold-out", "none:1"], "expected none"),
        (["--hold-out", "every:3"], '--hold-out "every:3": parts pieces, expected --piece-s with it'),
        (["--piece-s", "0"], "--piece-s 0.0: expected seconds, more than 0"),
        (["--piece-s", "nan"], "--piece-s nan: expected seconds, more than 0"),
        (
            ["--classes", "file", "--hold-out", "fraction:0.2"],
            "every class has one file only",
        ),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        listed(tree(tmp_path, "owl/a.mp4", "owl/b.mp4"), *words)
    assert message in str(error.value)


def test_a_listing(tmp_path: Path) -> None:
    root = tree(tmp_path, "owl/a.mp4", "owl/b.mp4")
    plain = listed(root)
    assert (plain.cut, plain.split) == (None, None)
    made = listed(root, "--piece-s", "2", "--hold-out", "every:3")
    assert made.cut is not None
    assert len(made.cut(Clip("a", video=root / "owl/a.mp4", duration_s=6.0))) == 3
    assert made.split is not None
    assert made.notes == [
        "split by piece: each file gives one piece in 3 to test, so train and test share their recordings"
    ]
    assert made.metadata["hold_out"] == "every:3"


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
    with pytest.raises(UserError, match="the longest file has 2 pieces"):
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


def test_a_sound_goes_with_its_video(tmp_path: Path) -> None:
    names = [f"owl/{i}.{suffix}" for i in range(9) for suffix in ("mp4", "wav")]
    made = listed(tree(tmp_path, *names), "--hold-out", "fraction:0.4")
    assert made.split is not None
    held = Counter(c.group for c in made.split(list(made.clips)) if c.split == "test")
    assert set(held.values()) == {2}
    assert len(held) == 4


def test_the_prober_knows_stills_by_the_same_suffixes() -> None:
    assert (folder.IMAGE_SUFFIXES, folder.MEL_SUFFIXES) == (IMAGE_SUFFIXES, MEL_SUFFIXES)
