"""Clips from YouTube: how their files may be named, and what becomes of rows whose files are not there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fastav.core.errors import UserError
from fastav.datasets.youtube import YoutubeRow, file_names, find, one_second, table_in
from tests.helpers.dataset_trees import kinds, tree

ODD = "-a_B-c_30_4"  # ids may start with "-", and hold "_" and what looks like a time


def row(video_id: str = ODD, start_s: float = 30, end_s: float = 40, **given: object) -> YoutubeRow:
    fields = {"labels": ("owl",), "split": "train", "table": Path("t.csv"), "line": 3, **given}
    return YoutubeRow(str(fields.pop("id", f"{video_id}_{start_s:g}")), video_id, start_s, end_s, **fields)  # type: ignore[arg-type]


CONVENTIONS = [
    "000030", "000030_000040", "30000_40000", "30_40", "30.000_40.000", "30.0_40.0", "30000", "30", "30.000", "30.0",
]  # fmt: skip


@pytest.mark.parametrize("tail", CONVENTIONS)
@pytest.mark.parametrize("prefix", ["", "Y"])
def test_each_convention_is_found(tmp_path: Path, prefix: str, tail: str) -> None:
    root = tree(tmp_path, f"deep/er/{prefix}{ODD}_{tail}.mp4", f"deep/{ODD}_000031.mp4", f"{ODD[1:]}_{tail}.mp4")
    found = find([row(start_s=30.0, end_s=40.0)], root)
    assert [c.video for c in found.clips] == [root / f"deep/er/{prefix}{ODD}_{tail}.mp4"]
    assert found.problems == []


def test_times_that_are_no_whole_seconds() -> None:
    names = file_names(row(start_s=2.5, end_s=12.5), "trimmed", alone=False)
    assert f"{ODD}_2500_12500" in names
    assert f"{ODD}_2.500_12.500" in names
    assert not [name for name in names if name.endswith(("_000002", "_2_12", "_2"))]


@pytest.mark.parametrize("suffix", [".mp4", ".MP4", ".webm", ".MKV", ".Avi", ".mov"])
def test_videos_with_any_suffix(tmp_path: Path, suffix: str) -> None:
    root = tree(tmp_path, f"{ODD}_000030{suffix}")
    (clip,) = find([row()], root).clips
    assert clip.video == clip.audio == root / f"{ODD}_000030{suffix}"
    assert (clip.start_s, clip.duration_s, clip.group) == (0, 0, ODD)


@pytest.mark.parametrize("suffix", [".wav", ".FLAC", ".m4a", ".Opus"])
def test_sounds_with_any_suffix(tmp_path: Path, suffix: str) -> None:
    root = tree(tmp_path, f"{ODD}_000030{suffix}")
    (clip,) = find([row()], root).clips
    assert (clip.video, clip.audio) == (None, root / f"{ODD}_000030{suffix}")


def test_a_sound_file_is_the_sound_of_the_video_of_its_name(tmp_path: Path) -> None:
    root = tree(tmp_path, f"video/{ODD}_000030.mp4", f"audio/{ODD}_000030.wav")
    (clip,) = find([row()], root).clips
    assert (clip.video, clip.audio) == (root / f"video/{ODD}_000030.mp4", root / f"audio/{ODD}_000030.wav")


def test_what_is_no_medium(tmp_path: Path) -> None:
    names = [f"{ODD}_000030{suffix}" for suffix in (".jpg", ".npy", ".json", ".mp4.part", "")]
    root = tree(tmp_path, *names, f".hidden/{ODD}_000030.mp4", f".{ODD}_000030.mp4", "other_000000.mp4")
    other = row("other", 0, 10)
    found = find([row(), other], root)
    assert [c.id for c in found.clips] == [other.id]
    assert [r.id for r in found.rows] == [other.id]
    assert kinds(found.problems) == [("missing_file", row().id)]
    assert found.problems[0].message == f"t.csv, line 3: no such file: {root}/{ODD}_000030.*"
    assert not found.problems[0].fatal
    assert found.notes == [f"1 of 2 clips have no file in {root}"]


def test_the_whole_video(tmp_path: Path) -> None:
    root = tree(tmp_path, f"{ODD}.mp4", f"{ODD}_000030.mp4")
    rows = [row(names=(f"{ODD}_000030",)), row(start_s=50.0, end_s=57.5)]
    found = find(rows, root, "whole")
    assert {c.video for c in found.clips} == {root / f"{ODD}.mp4"}
    assert [(c.start_s, c.duration_s) for c in found.clips] == [(30, 10), (50, 7.5)]


def test_an_id_alone_names_the_only_clip_of_a_video(tmp_path: Path) -> None:
    root = tree(tmp_path, f"{ODD}.mp4", "x.mp4")
    (clip,) = find([row()], root).clips
    assert (clip.video, clip.start_s, clip.duration_s) == (root / f"{ODD}.mp4", 0, 0)
    alone = "1 files are named by the YouTube id alone and treated as trimmed clips; if they are whole videos, "
    assert find([row()], root).notes == [f"{alone}use --media whole"]
    assert find([row(names=(ODD,))], root).notes == [], "where the data set itself names them so"
    assert find([row()], root, "whole").notes == []
    found = find([row(), row(start_s=50, end_s=60), row("x")], root)
    assert [c.group for c in found.clips] == ["x"]
    assert [p.kind for p in found.problems] == ["missing_file"] * 2
    assert "could be any of the 2 clips of this video; expected a name such as " in found.problems[0].message


def test_two_files_of_a_name(tmp_path: Path) -> None:
    root = tree(tmp_path, f"b/{ODD}_000030.mp4", f"a/{ODD}_000030.webm", f"c/{ODD}_000030.MP4", "c/unlisted.mp4")
    found = find([row()], root)
    assert found.clips[0].video == root / f"a/{ODD}_000030.webm"
    assert kinds(found.problems) == [("several_files", row().id)] * 2
    assert found.problems[0].message == (
        f"{root}/b/{ODD}_000030.mp4: left out, as {root}/a/{ODD}_000030.webm has the same name"
    )


def test_rows_of_one_id(tmp_path: Path) -> None:
    root = tree(tmp_path, f"{ODD}_000030.mp4")
    rows = [row(line=1), row(line=2), row(line=3, labels=("crow",)), row(line=4, split="test")]
    found = find(rows, root)
    assert [(c.id, c.labels[0], c.split) for c in found.clips] == [
        (f"{ODD}_30", "owl", "train"),
        (f"{ODD}_30#1", "crow", "train"),
        (f"{ODD}_30#2", "owl", "test"),
    ]
    assert kinds(found.problems) == [("duplicate_row", f"{ODD}_30")]
    assert found.problems[0].message == f't.csv, line 2: clip "{ODD}_30" is already listed; left out'


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a.txt")
    tree(tmp_path / "other", f"{ODD}_000030.mp4")
    (root / "link").symlink_to(tmp_path / "other")
    (root / "again").symlink_to(tmp_path / "other")
    (root / "loop").symlink_to(root)
    found = find([row()], root)
    assert [c.video for c in found.clips] == [root / f"again/{ODD}_000030.mp4"]
    assert found.problems == []


def test_seconds(tmp_path: Path) -> None:
    (clip,) = find([row()], tree(tmp_path, f"{ODD}.mp4"), "whole").clips
    made = one_second(clip, 4, ["crow", "owl"])
    assert (made.id, made.start_s, made.duration_s) == (f"{clip.id}@4", 34, 1)
    assert (made.labels, made.group, made.video) == (("crow", "owl"), ODD, clip.video)


def test_nothing_found(tmp_path: Path) -> None:
    root = tree(tmp_path / "media", "notes.txt")
    with pytest.raises(
        UserError, match=r"media: no media file of any of the 1 clips; expected names such as .*no media files$"
    ):
        find([row()], root)
    tree(root, "b.mp4", "a.mp4")
    with pytest.raises(UserError) as error:
        find([row()], root)
    assert str(error.value) == (
        f"{root}: no media file of any of the 1 clips; expected names such as {ODD}_000030, {ODD}_000030_000040, "
        f'{ODD}_30000_40000, {ODD}_30.000_40.000 for "{ODD}_30"; it has 2 media files, such as "a"'
    )
    tree(root, f"{ODD}.mp4")
    with pytest.raises(UserError, match=r"for untrimmed videos use --media whole$"):
        find([row(), row(start_s=50, end_s=60)], root)
    with pytest.raises(UserError, match=r"the tables list no clips; expected at least one"):
        find([], root)
    with pytest.raises(
        UserError, match=r'medai: no such folder; expected a folder with media files; did you mean "media"\?'
    ):
        find([row()], tmp_path / "medai")
    with pytest.raises(UserError, match=r"notes.txt: not a folder; expected a folder with media files"):
        find([row()], root / "notes.txt")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_can_be_told(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).touch()
    with pytest.raises(UserError) as error:
        find([row()], tmp_path)
    str(error.value).encode()
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    tree(folder, f"{ODD}_000030.mp4")
    tree(tmp_path, "x_000030.mp4")
    found = find([row(), row("x")], tmp_path)
    assert [c.group for c in found.clips] == ["x"]
    assert [p.kind for p in found.problems] == ["bad_name", "missing_file"]
    assert found.problems[0].message.endswith("the name is not UTF-8; rename it")
    found.problems[0].message.encode()


def test_the_first_table_there(tmp_path: Path) -> None:
    tree(tmp_path, "data/b.csv", "c.csv")
    assert table_in(tmp_path, ("a.csv", "data/b.csv", "c.csv")) == tmp_path / "data/b.csv"
    assert table_in(tmp_path, ("a.csv", "data")) is None
