"""Kinetics and Kinetics-Sounds: their tables, classes, and clips from a made tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastav.core.command_runner import Parser
from fastav.core.errors import UserError
from fastav.datasets import kinetics
from tests.helpers.dataset_trees import indexed, kinds, listed, media, table, tree

HEADER = "label,youtube_id,time_start,time_end,split,is_cc"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    table(
        tmp_path / "train.csv",
        HEADER,
        "mowing lawn,--a_b-c_dEf,84,94,train,0",
        '"petting animal (not cat)",_00000000_1,5,15,train,1',
        "playing drums,goneGONEgo_,0,10,train,0",
        "mowing lawn,third-video,7,17,train,0",
    )
    table(tmp_path / "validate.csv", HEADER, "stomping,val-video_1,0,10,validate,0")
    table(tmp_path / "test.csv", "youtube_id,time_start,time_end,split", "test_video1,1,11,test")
    return tree(
        tmp_path,
        "train/mowing lawn/--a_b-c_dEf_000084_000094.mp4",
        "train/petting_animal_(not_cat)/_00000000_1_000005_000015.MKV",
        "train/mowing lawn/third-video_7_17.webm",
        "val/stomping grapes/val-video_1_000000_000010.mp4",
        "test/test_video1_000001_000011.mp4",
    )


def test_the_tables(root: Path) -> None:
    made = listed(kinetics, root)
    assert [(c.id, c.labels, c.split, c.group) for c in made.clips] == [
        ("--a_b-c_dEf_000084_000094", ("mowing lawn",), "train", "--a_b-c_dEf"),
        ("_00000000_1_000005_000015", ("petting animal (not cat)",), "train", "_00000000_1"),
        ("third-video_000007_000017", ("mowing lawn",), "train", "third-video"),
        ("val-video_1_000000_000010", ("stomping grapes",), "val", "val-video_1"),
    ]
    assert made.clips[0].video == root / "train/mowing lawn/--a_b-c_dEf_000084_000094.mp4"
    assert kinds(made.problems) == [("missing_file", "goneGONEgo__000000_000010")]
    assert made.notes == [
        f"{root}/test.csv: 1 clips without a label are left out",
        f"1 of 5 clips have no file in {root}",
    ]
    assert made.metadata["metric"].startswith("one label a clip: top-1")
    assert made.metadata["classes"] == "all"


def test_other_names_of_tables(tmp_path: Path) -> None:
    table(tmp_path / "annotations/kinetics_400_train.csv", HEADER, "bowling,abcdefghijk,0,10,train,0")
    made = listed(kinetics, tree(tmp_path, "abcdefghijk_000000_000010.mp4"))
    assert [c.split for c in made.clips] == ["train"]
    assert made.notes == [
        f"{tmp_path}: no val.csv, so there is no val split",
        f"{tmp_path}: no test.csv, so there is no test split",
    ]


def test_sounds(root: Path) -> None:
    made = listed(kinetics, root, "--sounds")
    assert [(c.labels, c.split) for c in made.clips] == [
        (("mowing lawn",), "train"), (("mowing lawn",), "train"), (("stomping grapes",), "val"),
    ]  # fmt: skip
    assert [p.clip_id for p in made.problems] == ["goneGONEgo__000000_000010"]
    assert made.metadata["classes"] == "Kinetics-Sounds"
    (note,) = [note for note in made.notes if "Kinetics-Sounds" in note]
    assert note.startswith("31 of the 34 classes of Kinetics-Sounds are not in the tables: blowing nose, blowing out")
    assert "patting" in note


def test_the_classes_of_kinetics_sounds() -> None:
    assert len(kinetics.SOUNDS) == len(set(kinetics.SOUNDS)) == 34
    assert set(kinetics.ALIASES.values()) < set(kinetics.SOUNDS)
    assert not set(kinetics.ALIASES) & set(kinetics.SOUNDS)


@pytest.mark.parametrize("old", list(kinetics.ALIASES))
def test_a_renamed_class_is_one_class(tmp_path: Path, old: str) -> None:
    new = kinetics.ALIASES[old]
    table(tmp_path / "train.csv", HEADER, f"{old},aaaaaaaaaaa,0,10,train,0", f"{new},bbbbbbbbbbb,0,10,train,0")
    tree(tmp_path, "aaaaaaaaaaa_000000_000010.mp4", "bbbbbbbbbbb_000000_000010.mp4")
    assert [c.labels for c in listed(kinetics, tmp_path, "--sounds").clips] == [(new,)] * 2


def test_a_list_of_classes(root: Path) -> None:
    names = table(root / "list.txt", "# mine", "", "stomping", "  petting_animal_(not_cat) ", end="\r\n")
    made = listed(kinetics, root, "--classes", str(names))
    assert [c.labels[0] for c in made.clips] == ["petting animal (not cat)", "stomping grapes"]
    assert made.metadata["classes"] == str(names)
    table(names, "stomping", "playing drum")
    with pytest.raises(UserError) as error:
        listed(kinetics, root, "--classes", str(names))
    assert str(error.value) == (
        f'--classes {names}, line 2: the tables have no class "playing drum"; did you mean "playing drums"?'
    )
    table(names, "# nothing")
    with pytest.raises(UserError, match=r"list.txt: contains no class; expected one per line"):
        listed(kinetics, root, "--classes", str(names))
    with pytest.raises(UserError, match=r"absent.txt: cannot be read \(No such file or directory\)"):
        listed(kinetics, root, "--classes", str(root / "absent.txt"))
    names.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"list.txt: cannot be read \('utf-8' codec"):
        listed(kinetics, root, "--classes", str(names))


def test_one_choice_of_classes() -> None:
    parser = Parser("index kinetics")
    kinetics.add_arguments(parser)
    with pytest.raises(UserError, match=r"--classes: not allowed with argument --sounds"):
        parser.parse_args(["root", "--sounds", "--classes", "list.txt"])


def test_tables_without_these_sounds(tmp_path: Path) -> None:
    table(tmp_path / "val.csv", HEADER, "abseiling,aaaaaaaaaaa,0,10,val,0")
    with pytest.raises(UserError, match=r"--sounds: the tables have none of the classes of Kinetics-Sounds"):
        listed(kinetics, tmp_path, "--sounds")


def test_malformed_and_absent_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no table of Kinetics \(train.csv, val.csv or test.csv\); expected train.csv"):
        listed(kinetics, tmp_path)
    table(tmp_path / "train.csv", "youtube_id,time_start,time_end", "aaaaaaaaaaa,0,10")
    with pytest.raises(UserError, match=r'train.csv, line 1: no column "label"'):
        listed(kinetics, tmp_path)
    table(tmp_path / "train.csv", HEADER, "bowling,aaaaaaaaaaa,zero,10,train,0")
    with pytest.raises(UserError, match=r'train.csv, line 2: time_start = "zero": expected a number'):
        listed(kinetics, tmp_path)


def test_a_manifest_of_untrimmed_videos(tmp_path: Path) -> None:
    rows = ("bowling,one-video_1,1,3,train,0", "singing,one-video_1,3,5,train,0", "singing,gone_video1,0,2,train,0")
    table(tmp_path / "train.csv", HEADER, *rows)
    media(tmp_path / "one-video_1.mp4", 4)
    made = listed(kinetics, tmp_path, "--sounds", "--media", "whole")
    manifest, clips, problems = indexed(made, tmp_path / "m.parquet")
    first, second = clips["one-video_1_000001_000003"], clips["one-video_1_000003_000005"]
    assert (first.start_frame, first.num_frames, first.labels) == (10, 20, ("bowling",))
    assert (second.start_frame, second.num_frames, second.has_audio) == (30, 10, True)
    assert (problems["missing_file"], problems["bad_span"]) == (1, 1)
    assert manifest.metadata["media"] == "whole"
