"""Folders as data sets: what is taken for a clip, its class, its split, its pieces."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.datasets import folder
from fastav.datasets.clip_list import ClipList
from fastav.datasets.folder import rows


def tree(root: Path, *names: str) -> Path:
    """Makes empty files; listing the clips of a folder opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(root: Path, *words: str) -> ClipList:
    parser = argparse.ArgumentParser()
    folder.add_arguments(parser)
    return folder.list_clips(parser.parse_args([str(root), *words]))


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
    assert notes == ["left out, not media files: 2 x .txt, 1 x no suffix"]


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
    with pytest.raises(UserError, match=r"has folders for splits \(test, val\); drop the option, or move the files"):
        listed(root, "--hold-out", "fraction:0.5")


def test_a_class_called_train(tmp_path: Path) -> None:
    clips, _, notes = rows(tree(tmp_path, "train/a.mp4", "tram/b.mp4"))
    assert [(c.labels[0], c.split) for c in clips] == [("train", "train"), ("tram", "train")]
    assert notes == ["train: treated as ordinary folders, not as splits, as ROOT has other media files or folders"]


def test_what_lies_in_no_class_folder(tmp_path: Path) -> None:
    root = tree(tmp_path, "loose.mp4", "owl/a.mp4")
    clips, problems, _ = rows(root)
    assert [c.id for c in clips] == ["owl/a.mp4"]
    assert [(p.kind, p.path) for p in problems] == [("no_class", str(root / "loose.mp4"))]
    assert "is not in a class folder" in problems[0].message


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
        ([], "", "the folder is empty; expected at least one video, recording, picture or .npy"),
        (["a.txt"], "", "none of its 1 files is a video, recording, picture or .npy file"),
        (["a.mp4"], "", "has no class folders; expected"),
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
        (["--hold-out", "every:3"], '--hold-out "every:3": needs --piece-s S, the length of the pieces'),
        (["--piece-s", "0"], "--piece-s 0.0: expected a number of seconds above 0"),
        (["--piece-s", "nan"], "--piece-s nan: expected a number of seconds above 0"),
        (
            ["--classes", "file", "--hold-out", "fraction:0.2"],
            "each class has only one file",
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
    assert made.notes == ["split by piece: one piece in 3 of each file is in test, so train and test share recordings"]
    assert made.metadata["hold_out"] == "every:3"


def test_a_sound_goes_with_its_video(tmp_path: Path) -> None:
    names = [f"owl/{i}.{suffix}" for i in range(9) for suffix in ("mp4", "wav")]
    made = listed(tree(tmp_path, *names), "--hold-out", "fraction:0.4")
    assert made.split is not None
    held = Counter(c.group for c in made.split(list(made.clips)) if c.split == "test")
    assert set(held.values()) == {2}
    assert len(held) == 4
