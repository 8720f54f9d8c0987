"""LLP: its tables of clips and events, and clips and seconds from a made tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastav.core.errors import UserError
from fastav.datasets import llp
from tests.helpers.dataset_trees import indexed, kinds, listed, media, table, tree

HEADER, EVENTS = "filename\tevent_labels", "filename\tonset\toffset\tevent_labels"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    table(
        tmp_path / "data/AVVP_train.csv",
        HEADER,
        "-_aB_cD_eF0_30_40\tSpeech,Frying_(food)",
        "gone-video1_0_10\tBanjo",
    )
    table(tmp_path / "data/AVVP_val_pd.csv", HEADER, "4Ydb_NYcIyE_23_33\tSpeech,Dog,Speech")
    table(tmp_path / "data/AVVP_test_pd.csv", HEADER, "P7x4FV4lg_570_580\tCar")
    table(
        tmp_path / "data/AVVP_eval_audio.csv",
        EVENTS,
        "4Ydb_NYcIyE_23_33\t0\t4\tSpeech",
        "4Ydb_NYcIyE_23_33\t3\t5\tDog",
        "4Ydb_NYcIyE_23_33\t9\t9\tDog",
        "4Ydb_NYcIyE_23_33\t9\t10\tSpeech",
        "P7x4FV4lg_570_580\t0\t2\tCar",
    )
    table(
        tmp_path / "data/AVVP_eval_visual.csv",
        EVENTS,
        "4Ydb_NYcIyE_23_33\t3\t6\tDog",
        "4Ydb_NYcIyE_23_33\t3\t4\tSpeech",
    )
    return tree(tmp_path, "video/-_aB_cD_eF0.mp4", "video/4Ydb_NYcIyE_23_33.MP4", "video/P7x4FV4lg_5.mkv")


def test_clips(root: Path) -> None:
    made = listed(llp, root)
    assert [(c.id, c.labels, c.split, c.group) for c in made.clips] == [
        ("-_aB_cD_eF0_30_40", ("Speech", "Frying_(food)"), "train", "-_aB_cD_eF0"),
        ("4Ydb_NYcIyE_23_33", ("Speech", "Dog"), "val", "4Ydb_NYcIyE"),
        ("P7x4FV4lg_570_580", ("Car",), "test", "P7x4FV4lg"),
    ]
    assert [c.video.name for c in made.clips if c.video] == [
        "-_aB_cD_eF0.mp4", "4Ydb_NYcIyE_23_33.MP4", "P7x4FV4lg_5.mkv",
    ]  # fmt: skip
    assert {(c.start_s, c.duration_s) for c in made.clips} == {(0, 0)}
    assert kinds(made.problems) == [("missing_file", "gone-video1_0_10")]
    assert made.notes[0] == f"1 of 4 clips have no file in {root}"
    assert made.notes[1].startswith("1 files are named by the YouTube id alone")
    assert json.loads(made.metadata["class_order"]) == list(llp.CLASSES)
    assert "Type@AV" in made.metadata["metric"]
    assert made.metadata["label"] == "weak"


def test_the_published_order_of_classes() -> None:
    assert len(set(llp.CLASSES)) == 25
    assert (llp.CLASSES[0], llp.CLASSES[5], llp.CLASSES[24]) == ("Speech", "Frying_(food)", "Clapping")


SPEECH, DOG, BOTH = ("Speech",), ("Dog",), ("Speech", "Dog")
NONE: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("words", "val"),
    [
        (["--label", "audio"], [SPEECH, SPEECH, SPEECH, BOTH, DOG, NONE, NONE, NONE, NONE, SPEECH]),
        (["--label", "visual"], [NONE, NONE, NONE, BOTH, DOG, DOG, NONE, NONE, NONE, NONE]),
        (["--label", "both"], [NONE, NONE, NONE, BOTH, DOG, NONE, NONE, NONE, NONE, NONE]),
        (["--label", "either"], [SPEECH, SPEECH, SPEECH, BOTH, DOG, DOG, NONE, NONE, NONE, SPEECH]),
        ([], [SPEECH, SPEECH, SPEECH, BOTH, DOG, DOG, NONE, NONE, NONE, SPEECH]),
    ],
)
def test_seconds(root: Path, words: list[str], val: list[tuple[str, ...]]) -> None:
    made = listed(llp, root, "--unit", "second", *words)
    (train,) = [c for c in made.clips if c.split == "train"]
    assert (train.id, train.labels, train.duration_s) == ("-_aB_cD_eF0_30_40", ("Speech", "Frying_(food)"), 0)
    seconds = [c for c in made.clips if c.split == "val"]
    assert [c.id for c in seconds] == [f"4Ydb_NYcIyE_23_33@{k}" for k in range(10)]
    assert [(c.start_s, c.duration_s) for c in seconds] == [(k, 1) for k in range(10)]
    assert [c.labels for c in seconds] == val
    assert len([c for c in made.clips if c.split == "test"]) == 10
    assert made.metadata["label"] == (words[1] if words else "either")


def test_seconds_of_untrimmed_videos(root: Path) -> None:
    tree(root, "whole/4Ydb_NYcIyE.mp4", "whole/P7x4FV4lg.mp4")
    made = listed(llp, root, "--unit", "second", "--media", "whole", "--media-root", str(root / "whole"))
    assert [c.start_s for c in made.clips] == [*range(23, 33), *range(570, 580)]
    assert {c.duration_s for c in made.clips} == {1}


def test_clips_without_events(root: Path) -> None:
    table(root / "data/AVVP_eval_audio.csv", EVENTS)
    made = listed(llp, root, "--unit", "second")
    assert made.notes[0] == (
        '1 clips, such as "P7x4FV4lg_570_580", are neither in AVVP_eval_audio.csv nor in AVVP_eval_visual.csv'
    )
    assert {c.labels for c in made.clips if c.split == "test"} == {()}


def test_a_table_that_is_not_there(root: Path) -> None:
    (root / "data/AVVP_val_pd.csv").unlink()
    assert listed(llp, root).notes[0] == f"{root}: no AVVP_val_pd.csv, so there is no val split"
    (root / "data/AVVP_eval_visual.csv").unlink()
    with pytest.raises(UserError, match=r"no table of LLP; expected AVVP_eval_visual.csv or data/AVVP_eval_visual.csv"):
        listed(llp, root, "--unit", "second")
    with pytest.raises(UserError, match=r"video: no table of LLP; expected AVVP_train.csv or data/AVVP_train.csv"):
        listed(llp, root / "video")


def test_options_that_make_no_sense(root: Path) -> None:
    with pytest.raises(UserError, match=r"--label audio: applies to --unit second only"):
        listed(llp, root, "--label", "audio")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["filename,event_labels"], 'line 1: no column "filename"'),
        ([HEADER, "4YdbENYcIyE\tDog"], 'line 2: filename = "4YdbENYcIyE": expected a name such as 4YdbENYcIyE_23_33'),
        ([HEADER, "4YdbENYcIyE_0_10\tDog,Violin"], 'line 2: unknown event "Violin"; did you mean'),
    ],
)
def test_malformed_tables(tmp_path: Path, lines: list[str], message: str) -> None:
    table(tmp_path / "AVVP_train.csv", *lines)
    with pytest.raises(UserError) as error:
        listed(llp, tmp_path)
    assert f"{tmp_path}/AVVP_train.csv, {message}" in str(error.value)


def test_a_manifest(root: Path, tmp_path: Path) -> None:
    for path in (root / "video").iterdir():
        path.unlink()
    media(root / "video/-_aB_cD_eF0.mp4", 10)
    media(root / "video/4Ydb_NYcIyE.mp4", 9.5, sound=False)
    manifest, clips, problems = indexed(listed(llp, root, "--unit", "second"), tmp_path / "m.parquet")
    assert manifest.splits == {"train": 1, "val": 10}
    assert clips["-_aB_cD_eF0_30_40"].labels == ("Speech", "Frying_(food)")
    assert clips["4Ydb_NYcIyE_23_33@3"].labels == BOTH
    assert clips["4Ydb_NYcIyE_23_33@6"].labels == ()
    assert (clips["4Ydb_NYcIyE_23_33@9"].num_frames, clips["4Ydb_NYcIyE_23_33@9"].audio) == (5, None)
    rows = [clips["4Ydb_NYcIyE_23_33@6"].row, clips["4Ydb_NYcIyE_23_33@3"].row]
    assert manifest.label_matrix(rows).sum(axis=1).tolist() == [0, 2]
    assert (problems["missing_file"], problems["bad_span"]) == (2, 1)
