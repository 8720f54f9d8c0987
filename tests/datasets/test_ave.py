"""AVE: its annotations, both kinds of splits, and clips and seconds from a made tree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fastav.__main__ import main
from fastav.core.errors import UserError
from fastav.datasets import ave
from tests.helpers.dataset_trees import indexed, kinds, listed, media, table, tree

HEADER = "Category&VideoID&Quality&StartTime&EndTime"
LINES = (
    "Church bell&RUhOCu3LNXM&good&0&10",
    "Male speech, man speaking&-hChcJAh5N0&good&5&8",
    "Church bell&1_4j6VRHZAw&good&0&0",
    "Bark&_QQP43H56TA&good&7&10",
    "Male speech, man speaking&_QQP43H56TA&good&0&2",
    "Bark&gone-video1&good&0&10",
)
TEXTS = {"train": LINES[2:5], "val": LINES[1:2], "test": (LINES[0], LINES[5])}
CLIPS = [
    ("0002-1_4j6VRHZAw", "Church bell", "train", "1_4j6VRHZAw"),
    ("0003-_QQP43H56TA", "Bark", "train", "_QQP43H56TA"),
    ("0004-_QQP43H56TA", "Male speech, man speaking", "train", "_QQP43H56TA"),
    ("0001--hChcJAh5N0", "Male speech, man speaking", "val", "-hChcJAh5N0"),
    ("0000-RUhOCu3LNXM", "Church bell", "test", "RUhOCu3LNXM"),
]
CLASSES = ["Church bell", "Male speech, man speaking", "Bark"]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The annotations and media, without splits."""
    table(tmp_path / "Annotations.txt", *LINES)
    return tree(tmp_path, "AVE/RUhOCu3LNXM.mp4", "AVE/-hChcJAh5N0.MP4", "AVE/1_4j6VRHZAw.mkv", "AVE/_QQP43H56TA.mp4")


@pytest.fixture
def root(bare: Path) -> Path:
    for split, lines in TEXTS.items():
        table(bare / f"{split}Set.txt", HEADER, *lines)
    return bare


def orders(root: Path, **splits: list[int]) -> Path:
    h5py = pytest.importorskip("h5py")
    for split, numbers in splits.items():
        with h5py.File(root / f"{split}_order.h5", "w") as file:
            file["order"] = np.array(numbers)
    return root


def test_splits_of_text(root: Path) -> None:
    made = listed(ave, root)
    assert [(c.id, c.labels[0], c.split, c.group) for c in made.clips] == CLIPS
    assert made.clips[1].video == made.clips[2].video == root / "AVE/_QQP43H56TA.mp4"
    assert {(c.start_s, c.duration_s) for c in made.clips} == {(0, 0)}
    assert kinds(made.problems) == [("missing_file", "0005-gone-video1")]
    assert made.problems[0].message == f"{root}/Annotations.txt, line 6: no such file: {root}/gone-video1.*"
    assert json.loads(made.metadata["class_order"]) == CLASSES
    assert "28 classes" in made.metadata["metric"]


@pytest.mark.parametrize("header", [(), (HEADER,), ("category&videoid&Quality&Start&End",)])
def test_splits_of_row_numbers(bare: Path, header: tuple[str, ...]) -> None:
    table(bare / "Annotations.txt", *header, *LINES)
    made = listed(ave, orders(bare, train=[2, 3, 4], val=[1], test=[0, 5]))
    assert [(c.id, c.labels[0], c.split, c.group) for c in made.clips] == CLIPS
    assert made.notes == [f"1 of 6 clips have no file in {bare}"]


def test_splits_of_text_need_no_h5py(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders(root, train=[0], val=[1], test=[2])
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert [c.id for c in listed(ave, root).clips] == [clip_id for clip_id, *_ in CLIPS]
    for split in TEXTS:
        (root / f"{split}Set.txt").unlink()
    with pytest.raises(UserError) as error:
        listed(ave, root)
    assert str(error.value) == (
        f"{root}/train_order.h5: needs h5py (pip install h5py); or put trainSet.txt, valSet.txt and "
        "testSet.txt in the same folder"
    )


def test_malformed_row_numbers(bare: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with pytest.raises(
        UserError, match=r"train_order.h5: row number 6: expected 0 to 5, the rows of .*Annotations.txt"
    ):
        listed(ave, orders(bare, train=[0, 6]))
    with h5py.File(bare / "train_order.h5", "w") as file:
        file["ordre"] = [0]
    with pytest.raises(
        UserError, match=r'train_order.h5: no HDF5 data set "order" with row numbers; the file contains ordre$'
    ):
        listed(ave, bare)
    (bare / "train_order.h5").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"train_order.h5: cannot be read as HDF5"):
        listed(ave, bare)


def test_a_split_of_rows_that_are_not_annotated(root: Path) -> None:
    table(root / "testSet.txt", LINES[0], "Bark&RUhOCu3LNXM&good&0&10", LINES[0])
    made = listed(ave, root)
    assert [c.id for c in made.clips if c.split == "test"] == ["0000-RUhOCu3LNXM"]
    assert [p.kind for p in made.problems] == ["unknown_row"] * 2
    assert made.problems[0].message == (
        f'{root}/testSet.txt, line 2: "RUhOCu3LNXM" is not in Annotations.txt, or already used; left out'
    )


def test_a_split_that_is_not_there(root: Path) -> None:
    (root / "valSet.txt").unlink()
    assert listed(ave, root).notes == [
        f"{root}: no file lists the val split",
        f"1 rows of {root}/Annotations.txt are in no split; left out",
        f"1 of 5 clips have no file in {root}",
    ]


def test_seconds(root: Path) -> None:
    made = listed(ave, root, "--unit", "second")
    assert len(made.clips) == 50
    labels: dict[str, list[str]] = {}
    for number, clip in enumerate(made.clips):
        clip_id, _, second = clip.id.partition("@")
        labels.setdefault(clip_id, []).append(clip.labels[0])
        assert (int(second), clip.start_s, clip.duration_s) == (number % 10, number % 10, 1)
    speech, silence = "Male speech, man speaking", "Background"
    assert labels == {
        "0002-1_4j6VRHZAw": [silence] * 10,
        "0003-_QQP43H56TA": [silence] * 7 + ["Bark"] * 3,
        "0004-_QQP43H56TA": [speech] * 2 + [silence] * 8,
        "0001--hChcJAh5N0": [silence] * 5 + [speech] * 3 + [silence] * 2,
        "0000-RUhOCu3LNXM": ["Church bell"] * 10,
    }
    assert json.loads(made.metadata["class_order"]) == [*CLASSES, "Background"]
    assert "29 classes" in made.metadata["metric"]


def test_videos_named_by_their_lines(root: Path) -> None:
    for path in (root / "AVE").iterdir():
        path.unlink()
    tree(root, f"AVE/{LINES[3]}.mp4", f"AVE/{LINES[4]}.mp4")
    made = listed(ave, root)
    assert [c.video for c in made.clips] == [root / f"AVE/{LINES[3]}.mp4", root / f"AVE/{LINES[4]}.mp4"]


def test_no_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no annotations of AVE; expected Annotations.txt or data/Annotations.txt in"):
        listed(ave, tree(tmp_path, "a.mp4"))
    table(tmp_path / "Annotations.txt", "Bark&RUhOCu3LNXM&good&zero&10")
    with pytest.raises(UserError, match=r'Annotations.txt, line 1: StartTime = "zero": expected a number'):
        listed(ave, tmp_path)
    table(tmp_path / "Annotations.txt", *LINES)
    tree(tmp_path, "trainset.text")
    with pytest.raises(UserError, match=r'no splits of AVE; expected trainSet.txt or .*did you mean "trainset.text"'):
        listed(ave, tmp_path)


def test_a_manifest(tmp_path: Path) -> None:
    table(tmp_path / "data/Annotations.txt", *LINES)
    for split, lines in TEXTS.items():
        table(tmp_path / f"data/{split}Set.txt", *lines)
    media(tmp_path / "AVE/-hChcJAh5N0.mp4", 10)
    media(tmp_path / "AVE/_QQP43H56TA.mp4", 10, sound=False)
    made = listed(ave, tmp_path, "--unit", "second")
    manifest, clips, problems = indexed(made, tmp_path / "m.parquet")
    assert manifest.splits == {"train": 20, "val": 10}
    assert manifest.classes == ("Background", "Bark", "Male speech, man speaking")
    piece = clips["0001--hChcJAh5N0@6"]
    assert (piece.start_frame, piece.num_frames, piece.labels[0]) == (60, 10, "Male speech, man speaking")
    assert piece.num_samples == pytest.approx(8000, abs=1)
    assert clips["0003-_QQP43H56TA@9"].audio is None
    assert problems["missing_file"] == 3
    assert problems["split_leak"] == 0


def test_a_video_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    table(tmp_path / "Annotations.txt", *LINES[3:5])
    table(tmp_path / "trainSet.txt", LINES[4])
    table(tmp_path / "testSet.txt", LINES[3])
    media(tmp_path / "_QQP43H56TA.mp4", 1)
    _, _, problems = indexed(listed(ave, tmp_path), tmp_path / "m.parquet")
    assert problems["split_leak"] == 1
    # Told, but the splits are the publishers': it ends no script.
    assert main(["index", "ave", str(tmp_path), "--out", str(tmp_path / "again.parquet")]) == 0
