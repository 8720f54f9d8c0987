"""TAU Urban Audio-Visual Scenes 2021: pairs of files, locations, pieces of one second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastav.core.errors import UserError
from fastav.datasets import tau
from fastav.datasets.tau import location
from tests.helpers.dataset_trees import kinds, listed, media, table, tree
from tests.helpers.recordings import probed, wav

HEADER = "filename_audio\tfilename_video\tscene_label"


def row(stem: str) -> str:
    return f"audio/{stem}.wav\tvideo/{stem}.mp4\t{stem.partition('-')[0]}"


TRAIN = ("airport-lisbon-1175-44106", "street_traffic-lyon-1023-40001", "street_traffic-lyon-1023-40002")
TEST = ("airport-lisbon-1180-44200", "street_traffic-prague-1100-41000")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "TAU-urban-audio-visual-scenes-2021-development"
    table(root / "evaluation_setup/fold1_train.csv", HEADER, *map(row, TRAIN), end="\r\n")
    table(root / "evaluation_setup/fold1_evaluate.csv", HEADER, *map(row, TEST), end="\r\n")
    table(root / "evaluation_setup/fold1_test.csv", "filename_audio\tfilename_video")
    return tree(root, *(f"{place}" for stem in (*TRAIN, *TEST) for place in (f"audio/{stem}.wav", f"video/{stem}.mp4")))


def test_the_fold(root: Path) -> None:
    made = listed(tau, root)
    assert [(c.id, c.labels, c.split, c.group) for c in made.clips] == [
        ("airport-lisbon-1175-44106", ("airport",), "train", "lisbon-1175"),
        ("street_traffic-lyon-1023-40001", ("street_traffic",), "train", "lyon-1023"),
        ("street_traffic-lyon-1023-40002", ("street_traffic",), "train", "lyon-1023"),
        ("airport-lisbon-1180-44200", ("airport",), "test", "lisbon-1180"),
        ("street_traffic-prague-1100-41000", ("street_traffic",), "test", "prague-1100"),
    ]
    first = made.clips[0]
    assert first.video == root / "video/airport-lisbon-1175-44106.mp4"
    assert first.audio == root / "audio/airport-lisbon-1175-44106.wav", "never the sound of the video"
    assert (made.problems, made.cut, made.split) == ([], None, None)
    order = json.loads(made.metadata["class_order"])
    assert (len(order), order) == (10, sorted(order))
    assert "log loss" in made.metadata["metric"]


def test_columns_may_be_in_any_order_and_videos_unnamed(root: Path) -> None:
    before = listed(tau, root).clips
    lines = ["\t".join(reversed(row(stem).split("\t"))) for stem in TRAIN]
    table(root / "evaluation_setup/fold1_train.csv", "\t".join(reversed(HEADER.split("\t"))), *lines)
    assert listed(tau, root).clips == before
    lines = ["\t".join(row(stem).split("\t")[::2]) for stem in TRAIN]
    table(root / "evaluation_setup/fold1_train.csv", "filename\tscene_label", *lines)
    assert listed(tau, root).clips == before


@pytest.mark.parametrize(("which", "lost"), [("both", {"audio", "video"}), ("audio", {"audio"}), ("video", {"video"})])
def test_files_that_are_not_there(root: Path, which: str, lost: set[str]) -> None:
    (root / f"audio/{TRAIN[0]}.wav").unlink()
    (root / f"video/{TEST[0]}.mp4").unlink()
    made = listed(tau, root, "--media", which)
    gone = {"audio": f"audio/{TRAIN[0]}.wav", "video": f"video/{TEST[0]}.mp4"}
    assert [(p.kind, p.path) for p in made.problems] == [("missing_file", f"{root}/{gone[k]}") for k in sorted(lost)]
    assert len(made.clips) == 5 - len(lost)
    assert all((c.audio is not None) == (which != "video") for c in made.clips)
    assert all((c.video is not None) == (which != "audio") for c in made.clips)
    assert f"fold1_train.csv, line 2: no such file: {root}/{gone['audio']}" in made.problems[0].message or lost == {
        "video"
    }


def test_a_clip_that_is_there_twice(root: Path) -> None:
    table(root / "evaluation_setup/fold1_train.csv", HEADER, row(TRAIN[0]), row(TRAIN[0]))
    assert kinds(list(listed(tau, root).problems)) == [("duplicate_row", TRAIN[0])]


@pytest.mark.parametrize(
    ("stem", "group"),
    [
        ("airport-lisbon-1175-44106", "lisbon-1175"),
        ("street_pedestrian-london-12-3-4-a", "london-12-3-4"),
        ("airport-44106", "airport-44106"),
        ("44106", "44106"),
    ],
)
def test_locations(stem: str, group: str) -> None:
    assert location(stem) == group


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("audio/a.wav\tvideo/a.mp4\tairprot", 'line 2: unknown scene_label "airprot"; did you mean "airport"?'),
        ("\tvideo/a.mp4\tbus", "line 2: filename_audio is empty; expected a path such as audio/bus-lyon-1-2.wav"),
        ("audio/a.wav\tbus", "line 2: found 2 values, expected 3 (filename_audio, filename_video, scene_label)"),
    ],
)
def test_mistakes_in_its_tables(root: Path, line: str, message: str) -> None:
    path = table(root / "evaluation_setup/fold1_train.csv", HEADER, line)
    with pytest.raises(UserError) as error:
        listed(tau, root)
    assert str(error.value) == f"{path}, {message}"


def test_options_and_folders_that_make_no_sense(root: Path) -> None:
    for given in ("0", "nan", "-1"):
        with pytest.raises(UserError, match=r"--piece-s .*: expected a number of seconds above 0"):
            listed(tau, root, "--piece-s", given)
    with pytest.raises(UserError) as error:
        listed(tau, root.parent)
    assert str(error.value) == (
        f"{root.parent}: no table of TAU's train split; expected evaluation_setup/fold1_train.csv or fold1_train.csv "
        f'in this folder; did you mean "{root}"?'
    )
    (root / "evaluation_setup/fold1_evaluate.csv").unlink()
    with pytest.raises(UserError, match=r"no table of TAU's test split; expected evaluation_setup/fold1_evaluate.csv"):
        listed(tau, root)


def test_none_of_its_files(root: Path) -> None:
    for path in (root / "audio").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"none of the listed files exists; the first: .*no such file: .*44106.wav"):
        listed(tau, root)
    assert len(listed(tau, root, "--media", "video").clips) == 5


def test_from_end_to_end(tmp_path: Path) -> None:
    table(tmp_path / "evaluation_setup/fold1_train.csv", HEADER, *map(row, TRAIN))
    table(tmp_path / "evaluation_setup/fold1_evaluate.csv", HEADER, *map(row, TEST))
    for number, stem in enumerate((*TRAIN, *TEST)):
        media(tmp_path / f"video/{stem}.mp4", 2.9 + number / 10, sound=bool(number % 2))
        wav(tmp_path / f"audio/{stem}.wav", 3, rate=48000, channels=2, bits=24, seed=number)
    manifest, clips, problems = probed(listed(tau, tmp_path, "--piece-s", "1"), tmp_path / "m.parquet")
    assert manifest.splits == {"train": 9, "test": 6}
    assert not problems
    pieces = [clips[f"airport-lisbon-1175-44106#{k}"] for k in range(3)]
    assert [(c.group, c.split, c.labels) for c in pieces] == [("lisbon-1175", "train", ("airport",))] * 3
    assert [(c.start_frame, c.num_frames) for c in pieces] == [(0, 10), (10, 10), (20, 9)]
    assert [(c.start_sample, c.sample_rate, c.channels) for c in pieces] == [
        (48000 * k, 48000, 2) for k in range(3)
    ]  # fmt: skip
    assert [c.num_samples for c in pieces[:2]] == [48000, 48000]
    assert {c.audio_codec for c in clips.values()} == {"pcm_s24le"}
