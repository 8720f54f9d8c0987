"""BirdCLEF 2021: short recordings, soundscapes, and their labels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fastav.core.errors import UserError
from fastav.datasets import birdclef
from fastav.datasets.birdclef import label_list
from tests.helpers.dataset_trees import kinds, listed, table, tree
from tests.helpers.media import write_media
from tests.helpers.recordings import probed

HEADER = (
    "primary_label,secondary_labels,type,latitude,longitude,scientific_name,common_name,author,date,filename,license,"
    "rating,time,url"
)


def short(code: str, secondary: str, name: str, lat: str = "35.3", lon: str = "-84.1") -> str:
    return f"{code},{secondary},\"['song']\",{lat},{lon},X y,X,Doe,2013-04-20,{name},CC,3.5,09:12,https://x"


SHORT = (
    short("acafly", "[]", "XC109605.ogg"),
    short("amecro", "\"['acafly', 'rocpig1', 'amecro']\"", "XC11.ogg", "nan", "nan"),
    short("acafly", "\"['amecro']\"", "XC12", "", ""),
    short("acafly", "[]", "XC13.ogg"),
    short("acafly", "[]", "XC109605.ogg"),
)
WINDOWS = (
    "row_id,site,audio_id,seconds,birds",
    "7019_COR_5,COR,7019,5,nocall",
    "7019_COR_10,COR,7019,10,amecro acafly",
    "7019_COR_600,COR,7019,600,rubpep1",
    "42_SSW_5,SSW,42,5,nocall",
    "42_SSW_10,SSW,42,10,amecro",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    table(tmp_path / "train_metadata.csv", HEADER, *SHORT)
    table(tmp_path / "train_soundscape_labels.csv", *WINDOWS)
    return tree(
        tmp_path, "train_short_audio/acafly/XC109605.ogg", "train_short_audio/amecro/XC11.OGG",
        "train_short_audio/acafly/XC12.flac", "train_soundscapes/7019_COR_20190904.ogg", "train_soundscapes/notes.txt",
    )  # fmt: skip


def test_all_of_it(root: Path) -> None:
    made = listed(birdclef, root)
    assert [(c.id, c.labels, c.split, c.group) for c in made.clips] == [
        ("train_short_audio/acafly/XC109605", ("acafly",), "train", "XC109605"),
        ("train_short_audio/amecro/XC11", ("amecro", "acafly"), "train", "XC11"),
        ("train_short_audio/acafly/XC12", ("acafly", "amecro"), "train", "XC12"),
        ("train_soundscapes/7019_COR_5", (), "val", "7019_COR"),
        ("train_soundscapes/7019_COR_10", ("amecro", "acafly"), "val", "7019_COR"),
        ("train_soundscapes/7019_COR_600", ("rubpep1",), "val", "7019_COR"),
    ]
    assert [(c.start_s, c.duration_s) for c in made.clips] == [(0, 0)] * 3 + [(0, 5), (5, 5), (595, 5)]
    assert made.clips[1].audio == root / "train_short_audio/amecro/XC11.OGG"
    assert made.clips[3].audio == root / "train_soundscapes/7019_COR_20190904.ogg"
    assert (made.clips[0].lat, made.clips[0].lon) == (35.3, -84.1)
    assert all(math.isnan(c.lat) and math.isnan(c.lon) for c in made.clips[1:])
    assert kinds(list(made.problems)) == [
        ("missing_file", "train_short_audio/acafly/XC13"),
        ("duplicate_row", "train_short_audio/acafly/XC109605"),
        ("missing_file", "train_soundscapes/42_SSW"),
    ]
    assert made.problems[2].message == (
        f"{root}/train_soundscape_labels.csv: no such file: {root}/train_soundscapes/42_SSW_DATE.ogg (2 windows)"
    )
    assert made.notes == ["secondary labels that are not a class, left out: rocpig1 1"]
    assert json.loads(made.metadata["class_order"]) == ["acafly", "amecro", "rubpep1"]
    assert "micro-averaged F1" in made.metadata["metric"]


def test_parts_and_labels(root: Path) -> None:
    assert {c.split for c in listed(birdclef, root, "--part", "short").clips} == {"train"}
    assert {c.split for c in listed(birdclef, root, "--part", "soundscapes").clips} == {"val"}
    made = listed(birdclef, root, "--part", "short", "--labels", "primary")
    assert ([c.labels for c in made.clips], made.notes) == ([("acafly",), ("amecro",), ("acafly",)], [])
    made = listed(birdclef, root, "--part", "soundscapes", "--nocall", "silence")
    assert [c.labels for c in made.clips] == [("silence",), ("amecro", "acafly"), ("rubpep1",)]
    (root / "train_metadata.csv").unlink()
    assert len(listed(birdclef, root, "--part", "soundscapes").clips) == 3
    with pytest.raises(
        UserError, match=r"no table of BirdCLEF's short recordings; expected train_metadata.csv in this folder"
    ):
        listed(birdclef, root)
    (root / "train_soundscape_labels.csv").unlink()
    with pytest.raises(UserError, match=r"no table of BirdCLEF's soundscapes; expected train_soundscape_labels.csv"):
        listed(birdclef, root, "--part", "soundscapes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", []), ("", []), ("['a']", ["a"]), ("['a', 'b']", ["a", "b"]), ("[\"it's\", ' b ', '']", ["it's", "b"]),
        (" ['a'] ", ["a"]),
    ],
)  # fmt: skip
def test_lists_as_python_writes_them(text: str, expected: list[str]) -> None:
    assert label_list(text, Path("t.csv"), 2) == expected


@pytest.mark.parametrize(
    "text",
    ["a b", "['a'", "[1]", "{'a': 1}", "'a'", "__import__('os').getcwd()", "['a'] + ['b']", "[" * 500, "open('x')"],
)
def test_what_is_no_list_is_not_run(text: str) -> None:
    with pytest.raises(UserError) as error:
        label_list(text, Path("t.csv"), 2)
    assert (
        str(error.value) == f"""t.csv, line 2: secondary_labels = "{text[:80]}": expected a list such as ['amecro']"""
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7019_COR_5,COR,7019,10,nocall", 'row_id = "7019_COR_5" and seconds = "10" contradict each other'),
        ("7019_COR_4,COR,7019,4,nocall",
         'row_id = "7019_COR_4": expected ID_SITE_END, such as 7019_COR_5'),
        ("7019_COR,COR,7019,5,nocall", 'row_id = "7019_COR": expected ID_SITE_END, such as 7019_COR_5'),
        ("7019_5,COR,7019,5,nocall", 'row_id = "7019_5": expected ID_SITE_END, such as 7019_COR_5'),
        ("7019_COR_5,COR,7019,five,nocall", 'seconds = "five": expected a number'),
        ("7019_COR_5,COR,7019,5,", "birds is empty; expected bird codes or nocall"),
    ],
)  # fmt: skip
def test_mistakes_in_the_windows(root: Path, line: str, message: str) -> None:
    path = table(root / "train_soundscape_labels.csv", WINDOWS[0], line)
    with pytest.raises(UserError) as error:
        listed(birdclef, root)
    assert str(error.value).startswith(f"{path}, line 2: {message}")


def test_mistakes_in_the_short_recordings(root: Path) -> None:
    path = table(root / "train_metadata.csv", HEADER, short("", "[]", "XC1.ogg"))
    with pytest.raises(UserError) as error:
        listed(birdclef, root)
    assert str(error.value) == f"{path}, line 2: primary_label or filename is empty; expected both"
    table(root / "train_metadata.csv", HEADER.replace("secondary_labels", "secondary"), short("a", "[]", "XC1.ogg"))
    with pytest.raises(UserError, match=r'line 1: no column "secondary_labels"; did you mean "secondary"\?'):
        listed(birdclef, root)
    with pytest.raises(UserError, match=r"none of the listed files exists; the first: .*no such file: .*a/XC1.ogg"):
        listed(birdclef, root, "--part", "short", "--labels", "primary")


def test_soundscapes_of_one_number(root: Path) -> None:
    tree(root, "train_soundscapes/7019_COR_20190904.flac")
    clip = listed(birdclef, root, "--part", "soundscapes").clips[0]
    assert clip.audio == root / "train_soundscapes/7019_COR_20190904.ogg", "the published suffix first"
    tree(root, "train_soundscapes/7019_COR_20190905.ogg")
    with pytest.raises(UserError) as error:
        listed(birdclef, root)
    assert str(error.value) == (
        f"{root}/train_soundscapes: both 7019_COR_20190904.ogg and 7019_COR_20190905.ogg are recording 7019_COR; "
        "expected one file"
    )


def vorbis(path: Path, seconds: float, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(seed).normal(0, 0.1, (2, round(seconds * 32000))).astype(np.float32)
    return write_media(path, wave=wave, rate=32000, audio_codec="vorbis")


def test_from_end_to_end(tmp_path: Path) -> None:
    root = tmp_path / "birdclef"
    table(root / "train_metadata.csv", HEADER, *SHORT[:3], short("amecro", "[]", "XC14.ogg"))
    table(root / "train_soundscape_labels.csv", *WINDOWS[:3])
    for seed, name in enumerate(("acafly/XC109605", "amecro/XC11", "acafly/XC12", "amecro/XC14")):
        vorbis(root / f"train_short_audio/{name}.ogg", 1 + seed / 10, seed)
    vorbis(root / "train_soundscapes/7019_COR_20190904.ogg", 10, 9)
    manifest, clips, problems = probed(listed(birdclef, root), tmp_path / "m.parquet")
    assert (manifest.splits, manifest.classes) == ({"train": 4, "val": 2}, ("acafly", "amecro"))
    assert not problems
    silent, called = clips["train_soundscapes/7019_COR_5"], clips["train_soundscapes/7019_COR_10"]
    assert (silent.labels, silent.start_sample, silent.num_samples) == ((), 0, 160_000)
    assert (called.labels, called.start_sample, called.sample_rate) == (("amecro", "acafly"), 160_000, 32_000)
    assert called.num_samples == pytest.approx(160_000, abs=1000)
    manifest, _, problems = probed(listed(birdclef, root, "--nocall", "nocall"), tmp_path / "n.parquet")
    assert manifest.classes == ("acafly", "amecro", "nocall")
    assert set(problems) == {"empty_class", "single_clip_class"}, "a class that is never trained is told"
