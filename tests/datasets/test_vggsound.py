"""VGGSound: its tables, and clips from a made tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastav.core.errors import UserError
from fastav.datasets import vggsound
from tests.helpers.dataset_trees import indexed, kinds, listed, media, table, tree

LINES = (
    '---g-f_I2yQ,1,"male speech, man speaking",test',
    "--0PQM4-hqg,30,waterfall burbling,train",
    '_B5KE_79I2A,188,"bee, wasp, etc. buzzing",train',
    '_B5KE_79I2A,220,"bee, wasp, etc. buzzing",train',
    "gone_gone_1,0,playing timpani,train",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    table(tmp_path / "vggsound.csv", *LINES)
    return tree(
        tmp_path,
        "video/---g-f_I2yQ_000001.MP4",
        "video/--0PQM4-hqg_30000_40000.mkv",
        "video/_B5KE_79I2A_000188.mp4",
        "video/_B5KE_79I2A_000220.mp4",
    )


def test_the_one_table(root: Path) -> None:
    made = listed(vggsound, root)
    assert [(c.id, c.labels, c.split, c.group) for c in made.clips] == [
        ("---g-f_I2yQ_000001", ("male speech, man speaking",), "test", "---g-f_I2yQ"),
        ("--0PQM4-hqg_000030", ("waterfall burbling",), "train", "--0PQM4-hqg"),
        ("_B5KE_79I2A_000188", ("bee, wasp, etc. buzzing",), "train", "_B5KE_79I2A"),
        ("_B5KE_79I2A_000220", ("bee, wasp, etc. buzzing",), "train", "_B5KE_79I2A"),
    ]
    assert made.clips[1].video == root / "video/--0PQM4-hqg_30000_40000.mkv"
    assert {(c.start_s, c.duration_s) for c in made.clips} == {(0, 0)}
    assert kinds(made.problems) == [("missing_file", "gone_gone_1_000000")]
    assert made.problems[0].message == f"{root}/vggsound.csv, line 5: no such file: {root}/gone_gone_1_000000.*"
    assert made.notes == [f"1 of 5 clips have no file in {root}"]
    assert made.metadata["source"] == "fastav index vggsound"
    assert "top-1" in made.metadata["metric"]
    assert json.loads(made.metadata["class_order"]) == [
        "bee, wasp, etc. buzzing", "male speech, man speaking", "playing timpani", "waterfall burbling",
    ]  # fmt: skip


def test_the_two_tables(tmp_path: Path) -> None:
    table(tmp_path / "data/test.csv", '0_8-g2rof7E_000049.mp4,"heart sounds, heartbeat"', "-XxUW9gW6mc_000060.mp4,hail")
    root = tree(tmp_path, "media/0_8-g2rof7E_49000_59000.WebM", "media/-XxUW9gW6mc_000060_000070.mp4")
    made = listed(vggsound, root)
    assert [(c.id, c.labels, c.split) for c in made.clips] == [
        ("0_8-g2rof7E_000049", ("heart sounds, heartbeat",), "test"),
        ("-XxUW9gW6mc_000060", ("hail",), "test"),
    ]
    assert made.notes == [f"{root}: no train.csv, so there is no train split"]
    table(root / "data/train.csv", "cRlp5v9BHeE_000011.mp4,car passing by", end="\r\n")
    tree(root, "media/cRlp5v9BHeE_000011.mp4")
    made = listed(vggsound, root)
    assert next((c.id, c.split) for c in made.clips) == ("cRlp5v9BHeE_000011", "train")
    assert made.notes == []
    table(root / "vggsound.csv", "-XxUW9gW6mc,60,hail,test")
    assert [c.id for c in listed(vggsound, root).clips] == ["-XxUW9gW6mc_000060"]


def test_untrimmed_videos_elsewhere(root: Path, tmp_path: Path) -> None:
    videos = tree(tmp_path / "elsewhere", "_B5KE_79I2A.mp4")
    made = listed(vggsound, root, "--media", "whole", "--media-root", str(videos))
    assert [(c.id, c.video, c.start_s, c.duration_s) for c in made.clips] == [
        ("_B5KE_79I2A_000188", videos / "_B5KE_79I2A.mp4", 188, 10),
        ("_B5KE_79I2A_000220", videos / "_B5KE_79I2A.mp4", 220, 10),
    ]
    assert made.metadata["media"] == "whole"


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("vggsound.csv", "a,1,b,tran", 'line 1: unknown split "tran"; did you mean "train"?'),
        ("vggsound.csv", "a,one,b,train", 'line 1: start_seconds = "one": expected a number'),
        ("vggsound.csv", "a,1,,train", "line 1: label is empty; expected a class name"),
        ("vggsound.csv", "a,1,label, may contain,train", "line 1: found 5 values, expected 4"),
        ("train.csv", "a.mp4,b", 'line 1: file = "a.mp4": expected a name such as glLQrEijrKg_000300.mp4'),
    ],
)
def test_malformed_tables(tmp_path: Path, name: str, line: str, message: str) -> None:
    table(tmp_path / name, line)
    with pytest.raises(UserError) as error:
        listed(vggsound, tmp_path)
    assert f"{tmp_path}/{name}, {message}" in str(error.value)


def test_no_table(tmp_path: Path) -> None:
    tree(tmp_path, "vgsound.csv")
    with pytest.raises(UserError, match=r'no table of VGGSound .*; did you mean "vgsound.csv"\?'):
        listed(vggsound, tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no such folder; expected a folder with the table of VGGSound"):
        listed(vggsound, tmp_path / "nowhere")


def test_a_manifest(tmp_path: Path) -> None:
    table(tmp_path / "vggsound.csv", *LINES)
    media(tmp_path / "---g-f_I2yQ_000001.mp4")
    media(tmp_path / "--0PQM4-hqg_30000_40000.mp4", sound=False)
    media(tmp_path / "_B5KE_79I2A_000188.mp4", 1)
    manifest, clips, problems = indexed(listed(vggsound, tmp_path), tmp_path / "m.parquet")
    assert manifest.splits == {"train": 2, "test": 1}
    assert (clips["---g-f_I2yQ_000001"].num_frames, clips["---g-f_I2yQ_000001"].has_audio) == (20, True)
    silent = clips["--0PQM4-hqg_000030"]
    assert (silent.num_frames, silent.audio, silent.num_samples) == (20, None, 0)
    assert problems["missing_file"] == 2
    assert manifest.metadata["metric"] == vggsound.METRIC


def test_a_video_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    table(tmp_path / "vggsound.csv", "same_video1,0,hail,train", "same_video1,50,hail,test")
    media(tmp_path / "same_video1_000000.mp4", 1)
    media(tmp_path / "same_video1_000050.mp4", 2)
    _, _, problems = indexed(listed(vggsound, tmp_path), tmp_path / "m.parquet")
    assert problems["split_leak"] == 1
