"""AudioSet: weak and strong labels, and clips and seconds from a made tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastav.core.errors import UserError
from fastav.datasets import audioset
from tests.helpers.dataset_trees import indexed, kinds, listed, media, table, tree

COMMENTS = (
    "# Segments csv created Sun Mar  5 10:54:31 2017",
    "# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882",
    "# YTID, start_seconds, end_seconds, positive_labels",
)
CLASSES = (
    "index,mid,display_name",
    "0,/m/09x0r,Speech",
    '2,/m/02zsn,"Female speech, woman speaking"',
    '1,/m/05zppz,"Male speech, man speaking"',
    "3,/t/dd00003,Hail",
)
NAMES = ["Speech", "Male speech, man speaking", "Female speech, woman speaking", "Hail"]
ALONE = (
    "1 files are named by the YouTube id alone and treated as trimmed clips; if they are whole videos, "
    "use --media whole"
)
STRONG = "segment_id\tstart_time_seconds\tend_time_seconds\tlabel"


def segments(path: Path, *lines: str) -> Path:
    return table(path, *COMMENTS, *lines)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    table(tmp_path / "class_labels_indices.csv", *CLASSES)
    segments(
        tmp_path / "balanced_train_segments.csv",
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00003"',
        '-_a_B_cD_30, 50.500, 60.500, "/m/05zppz"',
        'gone_video1, 0.000, 10.000, "/m/09x0r"',
    )
    segments(tmp_path / "unbalanced_train_segments.csv", '_unbalanced, 10.000, 18.000, "/t/dd00003,/m/09x0r"')
    segments(tmp_path / "eval_segments.csv", '-eval_video, 0.000, 10.000, "/m/02zsn,/m/unknown"')
    return tree(
        tmp_path,
        "train/Y--PJHxphWEs.wav",
        "train/-_a_B_cD_30_50500_60500.FLAC",
        "train/_unbalanced_10.000_18.000.mp4",
        "eval/-eval_video_0.MKV",
    )


def test_weak_labels(root: Path) -> None:
    made = listed(audioset, root)
    assert [(c.id, c.labels, c.split, c.group) for c in made.clips] == [
        ("--PJHxphWEs_30000", ("Speech", "Hail"), "train", "--PJHxphWEs"),
        ("-_a_B_cD_30_50500", ("Male speech, man speaking",), "train", "-_a_B_cD_30"),
        ("-eval_video_0", ("Female speech, woman speaking", "/m/unknown"), "test", "-eval_video"),
    ]
    sound, _, video = made.clips
    assert (sound.video, sound.audio) == (None, root / "train/Y--PJHxphWEs.wav")
    assert (video.video, video.audio) == (root / "eval/-eval_video_0.MKV",) * 2
    assert kinds(made.problems) == [("missing_file", "gone_video1_0")]
    assert made.problems[0].message.startswith(f"{root}/balanced_train_segments.csv, line 6: ")
    assert made.notes == [
        f"{root}/class_labels_indices.csv: has no name for 1 classes; they are named by their ids: /m/unknown",
        f"1 of 4 clips have no file in {root}",
        ALONE,
    ]
    assert json.loads(made.metadata["class_order"]) == NAMES
    assert "mAP" in made.metadata["metric"]
    assert made.metadata["train"] == "balanced"


@pytest.mark.parametrize(
    ("train", "clips"),
    [("unbalanced", ["_unbalanced"]), ("full", ["--PJHxphWEs", "-_a_B_cD_30", "_unbalanced"]), ("none", [])],
)
def test_parts_of_the_training_set(root: Path, train: str, clips: list[str]) -> None:
    made = listed(audioset, root, "--train", train)
    assert [c.group for c in made.clips if c.split == "train"] == clips
    assert [c.group for c in made.clips if c.split == "test"] == ["-eval_video"]


def test_untrimmed_videos(root: Path) -> None:
    videos = tree(root / "whole", "_unbalanced.mp4", "-eval_video.webm")
    made = listed(audioset, root, "--train", "unbalanced", "--media", "whole", "--media-root", str(videos))
    assert [(c.start_s, c.duration_s) for c in made.clips] == [(10, 8), (0, 10)]


def test_classes_of_one_name(root: Path) -> None:
    table(root / "class_labels_indices.csv", *CLASSES, "4,/m/0hail,Hail")
    assert listed(audioset, root).clips[0].labels == ("Speech", "Hail (/t/dd00003)")


@pytest.fixture
def strong(root: Path) -> Path:
    table(
        root / "strong/audioset_train_strong.tsv",
        STRONG,
        "--PJHxphWEs_30000\t2.627\t4.100\t/m/09x0r",
        "-_a_B_cD_30_50500\t0.000\t10.000\t/m/strong",
        "--PJHxphWEs_30000\t4.000\t4.000\t/t/dd00003",
        "--PJHxphWEs_30000\t9.500\t10.000\t/m/09x0r",
    )
    table(root / "strong/mid_to_display_name.tsv", "/m/09x0r\tSpeech", '/t/dd00003\tHail, "big"', "/m/strong\tStrong")
    return root


def test_strong_labels(strong: Path) -> None:
    made = listed(audioset, strong, "--labels", "strong")
    assert [(c.id, c.labels, c.split) for c in made.clips] == [
        ("--PJHxphWEs_30000", ("Speech", 'Hail, "big"'), "train"),
        ("-_a_B_cD_30_50500", ("Strong",), "train"),
    ]
    assert made.clips[1].audio == strong / "train/-_a_B_cD_30_50500_60500.FLAC"
    assert made.notes == [f"{strong}: no audioset_eval_strong.tsv, so there is no test split", ALONE]
    assert "class_order" not in made.metadata
    assert "train" not in made.metadata
    table(strong / "strong/audioset_eval_strong.tsv", STRONG, "-eval_video_0\t0.5\t1.5\t/m/09x0r")
    made = listed(audioset, strong, "--labels", "strong")
    assert [(c.id, c.split) for c in made.clips][2:] == [("-eval_video_0", "test")]
    assert made.notes == [ALONE]


def test_strong_labels_by_the_names_of_the_weak_ones(strong: Path) -> None:
    (strong / "strong/mid_to_display_name.tsv").unlink()
    made = listed(audioset, strong, "--labels", "strong")
    assert [c.labels for c in made.clips] == [("Speech", "Hail"), ("/m/strong",)]
    assert "they are named by their ids: /m/strong" in made.notes[1]


def test_strong_labels_with_shorter_names_of_columns(strong: Path) -> None:
    table(
        strong / "strong/audioset_train_strong.tsv", "segment_id\tstart\tend\tlabel", "-eval_video_0\t2\t3\t/m/strong"
    )
    made = listed(audioset, strong, "--labels", "strong", "--unit", "second")
    assert [c.labels for c in made.clips] == [()] * 2 + [("Strong",)] + [()] * 7


def test_seconds(strong: Path) -> None:
    made = listed(audioset, strong, "--labels", "strong", "--unit", "second")
    labels = [c.labels for c in made.clips[:10]]
    speech, hail = "Speech", 'Hail, "big"'
    assert labels == [(), (), (speech,), (speech,), (speech, hail), (), (), (), (), (speech,)]
    assert [c.id for c in made.clips[:10]] == [f"--PJHxphWEs_30000@{k}" for k in range(10)]
    assert [(c.start_s, c.duration_s) for c in made.clips[10:]] == [(k, 1) for k in range(10)]
    assert {c.labels for c in made.clips[10:]} == {("Strong",)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unit", "second"], "--unit second: needs the times of events; use --labels strong"),
        (
            ["--labels", "strong", "--train", "full"],
            "--train full: applies to --labels weak only",
        ),
        (["--labels", "strong"], "no strong labels of AudioSet; expected audioset_train_strong.tsv or strong/audioset"),
    ],
)
def test_options_that_make_no_sense(root: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        listed(audioset, root, *words)
    assert message in str(error.value)


def test_absent_tables(root: Path) -> None:
    (root / "balanced_train_segments.csv").unlink()
    with pytest.raises(UserError, match=r"for --train balanced; expected .*mean \"unbalanced_train_segments.csv\"\?"):
        listed(audioset, root)
    (root / "eval_segments.csv").unlink()
    assert (
        listed(audioset, root, "--train", "unbalanced").notes[0]
        == f"{root}: no eval_segments.csv, so there is no test split"
    )
    with pytest.raises(UserError, match=r"no table of AudioSet; expected eval_segments.csv in this folder"):
        listed(audioset, root, "--train", "none")
    (root / "class_labels_indices.csv").unlink()
    with pytest.raises(
        UserError, match=r"no class names of AudioSet; expected class_labels_indices.csv in this folder"
    ):
        listed(audioset, root)


def test_malformed_tables(strong: Path) -> None:
    segments(strong / "balanced_train_segments.csv", '--PJHxphWEs, thirty, 40.000, "/m/09x0r,/t/dd00003"')
    with pytest.raises(UserError, match=r'segments.csv, line 4: start_seconds = "thirty": expected a number'):
        listed(audioset, strong)
    table(strong / "strong/audioset_train_strong.tsv", STRONG, "--PJHxphWEs\t0\t1\t/m/09x0r")
    with pytest.raises(
        UserError, match=r'line 2: segment_id = "--PJHxphWEs": expected a name such as s9d-2nhuJCQ_30000'
    ):
        listed(audioset, strong, "--labels", "strong")
    table(strong / "class_labels_indices.csv", "index,mid,name", "0,/m/09x0r,Speech")
    with pytest.raises(UserError, match=r'class_labels_indices.csv, line 1: no column "display_name"'):
        listed(audioset, strong)


def test_a_manifest(tmp_path: Path, root: Path) -> None:
    for path in [*(root / "train").iterdir(), *(root / "eval").iterdir()]:
        path.unlink()
    media(root / "train/--PJHxphWEs_30.mp4", 2, sound=False)
    media(root / "train/-_a_B_cD_30_50500.mp4", 1)
    media(root / "train/_unbalanced.mp4", 1.5)
    media(root / "eval/-eval_video_0.000_10.000.mp4", 1.2)
    manifest, clips, problems = indexed(listed(audioset, root, "--train", "full"), tmp_path / "m.parquet")
    assert manifest.splits == {"train": 3, "test": 1}
    assert clips["--PJHxphWEs_30000"].labels == ("Speech", "Hail")
    assert (clips["--PJHxphWEs_30000"].audio, clips["--PJHxphWEs_30000"].num_frames) == (None, 20)
    assert clips["_unbalanced_10000"].has_audio
    assert problems["missing_file"] == 1
    assert problems["split_leak"] == 0
