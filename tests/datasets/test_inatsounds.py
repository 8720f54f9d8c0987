"""iNatSounds: its annotation files and where its recordings may lie."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from fastav.core.errors import UserError
from fastav.datasets import inatsounds
from tests.helpers.dataset_trees import kinds, listed, tree
from tests.helpers.recordings import probed, wav

CATEGORIES = [
    {"id": 7, "name": "Aix sponsa", "common_name": "Wood Duck", "supercategory": "Aves", "evaluation": 1,
     "audio_dir_name": "00007_Animalia_Aix_sponsa"},
    {"id": 3, "name": "Acris crepitans", "common_name": None, "supercategory": "Amphibia", "evaluation": 0,
     "audio_dir_name": "00003_Animalia_Acris_crepitans"},
]  # fmt: skip


def write(root: Path, split: str, *files: str, **changed: Any) -> Path:
    """An annotation file: recordings 1, 2, ... of the two categories in turns."""
    audio = [{"id": k, "file_name": name, "duration": 9.5, "license": 0, "rights_holder": "x", "date": "2020-01-01",
              "latitude": 40.5, "longitude": -73.25, "location_uncertainty": None}
             for k, name in enumerate(files, 1)]  # fmt: skip
    content = {
        "info": {},
        "audio": audio,
        "categories": CATEGORIES,
        "annotations": [{"id": a["id"], "audio_id": a["id"], "category_id": (3, 7)[a["id"] % 2]} for a in audio],
        "licenses": [],
        **changed,
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}.json").write_text(json.dumps(content))  # writes NaN as the published files may
    return root


def test_recordings(tmp_path: Path) -> None:
    root = write(tmp_path, "train", "train/00007_Animalia_Aix_sponsa/a.wav", "00003_Animalia_Acris_crepitans/b.wav")
    write(root, "val", "a.wav", "gone.wav")
    write(root, "test", "test/x/c.wav")
    tree(
        root, "train/00007_Animalia_Aix_sponsa/a.WAV", "train/00003_Animalia_Acris_crepitans/b.flac",
        "val/00007_Animalia_Aix_sponsa/a.wav", "test/x/c.wav",
    )  # fmt: skip
    made = listed(inatsounds, root)
    assert [(c.id, c.labels, c.split, c.group) for c in made.clips] == [
        ("train/1", ("Aix sponsa",), "train", "train/1"),
        ("train/2", ("Acris crepitans",), "train", "train/2"),
        ("val/1", ("Aix sponsa",), "val", "val/1"),
        ("test/1", ("Aix sponsa",), "test", "test/1"),
    ], "ids of different splits may be the same"
    assert [c.audio and c.audio.relative_to(root).as_posix() for c in made.clips] == [
        "train/00007_Animalia_Aix_sponsa/a.WAV", "train/00003_Animalia_Acris_crepitans/b.flac",
        "val/00007_Animalia_Aix_sponsa/a.wav", "test/x/c.wav",
    ]  # fmt: skip
    assert {(c.start_s, c.duration_s, c.lat, c.lon) for c in made.clips} == {(0, 0, 40.5, -73.25)}
    assert kinds(list(made.problems)) == [("missing_file", "val/2")]
    assert made.problems[0].message == f"{root}/val.json: no such file: {root}/val/gone.wav"
    assert made.notes == []
    assert json.loads(made.metadata["class_order"]) == ["Acris crepitans", "Aix sponsa"]
    assert json.loads(made.metadata["evaluated_classes"]) == ["Aix sponsa"]
    assert json.loads(made.metadata["supercategories"]) == {"Acris crepitans": "Amphibia", "Aix sponsa": "Aves"}
    assert "classes that are not in the split masked" in made.metadata["metric"]


def test_splits_that_are_there_or_wanted(tmp_path: Path) -> None:
    root = tree(write(write(tmp_path, "train", "a.wav"), "val", "a.wav"), "train/a.wav", "val/a.wav")
    made = listed(inatsounds, root)
    assert (made.notes, made.metadata["splits"]) == ([f"{root}: no test.json, so there is no test split"], "train val")
    assert [c.id for c in listed(inatsounds, root, "--splits", "val").clips] == ["val/1"]
    with pytest.raises(UserError) as error:
        listed(inatsounds, root, "--splits", "test")
    assert str(error.value).startswith(
        f"{root}: no table of iNatSounds (train.json, val.json or test.json); expected test.json in this folder"
    )
    with pytest.raises(UserError, match=r"expected train.json in this folder; did you mean "):
        listed(inatsounds, root / "train")


def test_coordinates_that_are_none(tmp_path: Path) -> None:
    places = [(None, None), (math.nan, 1.0), (91.0, 0.0), ("nan", "nan"), (0.0, 0.0), (12.5, None)]
    audio = [
        {"id": k, "file_name": f"{k}.wav", "latitude": lat, "longitude": lon} for k, (lat, lon) in enumerate(places)
    ]
    audio.append({"id": 6, "file_name": "6.wav"})
    annotations = [{"id": k, "audio_id": k, "category_id": 7} for k in range(7)]
    root = tree(write(tmp_path, "train", audio=audio, annotations=annotations), *(f"train/{k}.wav" for k in range(7)))
    assert "NaN" in (root / "train.json").read_text()
    made = listed(inatsounds, root)
    assert [math.isnan(c.lat) and math.isnan(c.lon) for c in made.clips] == [True] * 4 + [False] + [True] * 2


def test_annotations_that_are_repeated_or_absent(tmp_path: Path) -> None:
    annotations = [
        {"id": 1, "audio_id": 1, "category_id": 7}, {"id": 2, "audio_id": 1, "category_id": 7},
        {"id": 3, "audio_id": 1, "category_id": 3},
    ]  # fmt: skip
    root = tree(write(tmp_path, "train", "a.wav", "b.wav", annotations=annotations), "train/a.wav", "train/b.wav")
    made = listed(inatsounds, root)
    assert [c.labels for c in made.clips] == [("Aix sponsa", "Acris crepitans")]
    assert kinds(list(made.problems)) == [("no_label", "train/2")]
    assert "audio 2" in made.problems[0].message
    assert "has no annotation; left out" in made.problems[0].message


def test_a_recording_that_is_there_twice(tmp_path: Path) -> None:
    audio = [{"id": 1, "file_name": "a.wav"}, {"id": 1, "file_name": "a.wav"}]
    annotations = [{"id": 1, "audio_id": 1, "category_id": 7}]
    root = tree(write(tmp_path, "train", audio=audio, annotations=annotations), "train/a.wav")
    made = listed(inatsounds, root)
    assert ([c.id for c in made.clips], kinds(list(made.problems))) == (["train/1"], [("duplicate_row", "train/1")])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"audio": None, "audios": []}, 'no list "audio"; did you mean "audios"?'),
        ({"annotations": [{"audio_id": 1, "category_id": 99}]},
         "an annotation of audio 1 has category 99, which is not in categories"),
        ({"annotations": [{"category_id": 7}]}, '"audio_id" of {"category_id": 7}: expected a number'),
        ({"audio": [{"id": 1}]}, '"file_name" of {"id": 1}: expected a non-empty text'),
        ({"audio": ["a.wav"]}, '"id" of "a.wav": expected a number'),
        ({"categories": [CATEGORIES[0], CATEGORIES[0]]}, "category 7 is listed twice, expected once"),
        ({"categories": [CATEGORIES[0], {**CATEGORIES[0], "id": 8}]},
         'two categories have the name "Aix sponsa"; expected unique names'),
    ],
)  # fmt: skip
def test_mistakes_in_its_files(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    root = write(tmp_path, "train", "a.wav", **changed)
    with pytest.raises(UserError) as error:
        listed(inatsounds, root)
    assert str(error.value) == f"{root}/train.json: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes"),
        (b"\xff\xfe", "not JSON ('utf-8' codec can't decode"),
        (b"[]", "expected a JSON object with audio, categories and annotations at the top level"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        listed(inatsounds, tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/train.json: {message}")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.json").write_text("{}")

    def gone(self: Path, **options: str) -> str:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(Path, "read_text", gone)
    with pytest.raises(UserError, match=r"/train.json: cannot be read \(No such file or directory\)"):
        listed(inatsounds, tmp_path)


def test_none_of_its_recordings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.json: none of the listed files exists; the first: .*a.wav"):
        listed(inatsounds, write(tmp_path, "train", "a.wav"))


def test_from_end_to_end(tmp_path: Path) -> None:
    names = ["a.wav", "b.wav", "c.wav", "d.wav"]
    root = write(write(tmp_path / "i", "train", *names), "val", *names[:2])
    for k, name in enumerate(names):
        wav(root / "train" / name, 0.5 + k / 10, rate=22050, seed=k)
    for k, name in enumerate(names[:2]):
        wav(root / "val" / name, 0.5, rate=22050, seed=10 + k)
    manifest, clips, problems = probed(listed(inatsounds, root), tmp_path / "m.parquet")
    assert (manifest.splits, manifest.classes) == ({"train": 4, "val": 2}, ("Acris crepitans", "Aix sponsa"))
    assert clips["train/4"].duration_s == pytest.approx(0.8)
    assert (clips["val/1"].lat, clips["val/1"].lon) == pytest.approx((40.5, -73.25))
    assert not problems
