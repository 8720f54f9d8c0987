"""SSW60: its four parts, from trees in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastav.core.errors import UserError
from fastav.datasets import ssw60
from tests.helpers.dataset_trees import kinds, listed, media, table, tree
from tests.helpers.recordings import picture, probed, wav

TAXA = (
    "label,species_code,inat_taxon_id,inat2021_label,nabirds_labels,common_name,scientific_name,family,order",
    '10,cangoo,7089,3187,76 313,Canada Goose,Branta canadensis,"Anatidae (Ducks, Geese, and Waterfowl)",Anseriformes',
    '2,wooduc,7107,3188,81 314 613,Wood Duck,Aix sponsa,"Anatidae (Ducks, Geese, and Waterfowl)",Anseriformes',
)
VIDEOS = (
    ",asset_id,label,split,fps,frame_count,duration_seconds,frame_height,frame_width,frame_channels,"
    "orginal_video_start_second,original_video_end_second,original_video_target_second,target_second,reliable_audio",
    "0,483821,10,train,25,327,9.96,1080,1920,3,63,73,68,5,1",
    "1,483326,10,test,25,320,9.96,1080,1920,3,35,45,40,5,0",
    "2,477001,2,train,25,277,9.96,1080,1920,3,0,10,5,5,1",
    "3,477002,2,test,25,277,9.96,1080,1920,3,0,10,5,5,0",
    "4,477003,2,test,25,277,9.96,1080,1920,3,0,10,5,5,0",
    "5,477001,2,train,25,277,9.96,1080,1920,3,0,10,5,5,1",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ssw60"
    table(root / "taxa.csv", *TAXA)
    table(root / "video_ml.csv", *VIDEOS)
    return tree(root, *(f"video_ml/{name}.mp4" for name in (483821, 483326, 477001)), "video_ml/477002.MP4")


def test_videos(root: Path) -> None:
    made = listed(ssw60, root)
    assert [(c.id, c.labels, c.split) for c in made.clips] == [
        ("video_ml/483821", ("Canada Goose",), "train"),
        ("video_ml/483326", ("Canada Goose",), "test"),
        ("video_ml/477001", ("Wood Duck",), "train"),
        ("video_ml/477002", ("Wood Duck",), "test"),
    ]
    assert all(c.video == c.audio and c.group == c.id for c in made.clips)
    assert made.clips[3].video == root / "video_ml/477002.MP4"
    assert {(c.num_frames, c.start_s, c.duration_s) for c in made.clips} == {(0, 0, 0)}, "its counts are wrong"
    assert kinds(list(made.problems)) == [("missing_file", "video_ml/477003"), ("duplicate_row", "video_ml/477001")]
    assert made.problems[0].message == f"{root}/video_ml.csv, line 6: no such file: {root}/video_ml/477003.mp4"
    assert made.notes == []
    assert json.loads(made.metadata["class_order"]) == ["Wood Duck", "Canada Goose"], "by the published number"
    assert "top-1" in made.metadata["metric"]
    assert (made.metadata["source"], made.metadata["part"]) == ("fastav index ssw60", "video")


def test_the_misspelt_column_may_be_mended_and_the_index_may_be_absent(root: Path) -> None:
    lines = [line.partition(",")[2].replace("orginal", "original") for line in VIDEOS]
    before = listed(ssw60, root).clips
    table(root / "video_ml.csv", *lines)
    assert listed(ssw60, root).clips == before


@pytest.mark.parametrize(("sound", "heard"), [("all", 4), ("reliable", 2), ("none", 0)])
def test_sound_that_may_be_of_something_else(root: Path, sound: str, heard: int) -> None:
    made = listed(ssw60, root, "--sound", sound)
    assert sum(c.audio is not None for c in made.clips) == heard
    assert len(made.clips) == 4
    said = [f"--sound {sound}: {4 - heard} videos are used without audio"]
    assert made.notes == (said if heard < 4 else [])


@pytest.mark.parametrize(
    ("names", "label"), [("scientific", "Aix sponsa"), ("code", "wooduc"), ("common", "Wood Duck")]
)
def test_names(root: Path, names: str, label: str) -> None:
    assert listed(ssw60, root, "--names", names).clips[2].labels == (label,)


def test_recordings(root: Path) -> None:
    table(
        root / "audio_ml.csv",
        "asset_id,label,split,samplerate,channels,samples,duration_seconds",
        "45516191,2,train,22050,1,220500,10",
        "292755661,10,test,22050,1,220500,10",
    )
    tree(root, "audio_ml/45516191.wav", "audio_ml/292755661.flac")
    made = listed(ssw60, root, "--part", "audio")
    assert [(c.id, c.audio, c.video, c.labels, c.split) for c in made.clips] == [
        ("audio_ml/45516191", root / "audio_ml/45516191.wav", None, ("Wood Duck",), "train"),
        ("audio_ml/292755661", root / "audio_ml/292755661.flac", None, ("Canada Goose",), "test"),
    ]


def test_pictures(root: Path) -> None:
    table(
        root / "images_inat.csv",
        "asset_id,label,split,height,width,channels,rights_holder,license_id",
        '11,2,train,375,500,3,"Doe, Jane",1',
        "12,2,val,375,500,3,x,1",
        "13,2,test,375,500,3,x,1",
    )
    table(
        root / "images_nabirds.csv",
        "asset_id,label,split,height,width,channels,photographer",
        "0233251e10054daa99e6b68369e143fb,2,train,1024,683,3,David",
        "13e5d907000000000000000000000000,2,test,1024,683,3,David",
    )
    tree(root, *(f"images_inat/{k}.jpg" for k in (11, 12, 13)))
    tree(root, "images_nabirds/0233251e10054daa99e6b68369e143fb.jpg")
    made = listed(ssw60, root, "--part", "inat")
    assert [(c.id, c.image, c.video, c.audio, c.split) for c in made.clips] == [
        (f"images_inat/{k}", root / f"images_inat/{k}.jpg", None, None, split)
        for k, split in ((11, "train"), (12, "val"), (13, "test"))
    ]
    made = listed(ssw60, root, "--part", "nabirds")
    assert [c.id for c in made.clips] == ["images_nabirds/0233251e10054daa99e6b68369e143fb"]
    assert kinds(list(made.problems)) == [("missing_file", "images_nabirds/13e5d907000000000000000000000000")]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("video_ml.csv", "483821,10", "483821,11", 'line 2: label = "11": expected one of the 2 labels in taxa.csv'),
        ("video_ml.csv", "483821,10,train", "483821,10,tain", 'line 2: unknown split "tain"; did you mean "train"?'),
        ("video_ml.csv", "asset_id", "asset", 'line 1: no column "asset_id"; did you mean "asset"?'),
        (
            "taxa.csv",
            "10,cangoo",
            "ten,cangoo",
            'label = "ten", common_name = "Canada Goose": expected a number and a name',
        ),
        ("taxa.csv", "10,cangoo", "2,cangoo", 'line 3: label 2 or "Wood Duck" is repeated; expected each once'),
        ("taxa.csv", "Canada Goose", "Wood Duck", 'label 2 or "Wood Duck" is repeated; expected each once'),
    ],
)
def test_mistakes_in_its_tables(root: Path, name: str, old: str, new: str, message: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))
    with pytest.raises(UserError) as error:
        listed(ssw60, root)
    assert str(error.value).startswith(f"{root / name}, line ")
    assert message in str(error.value)


def test_a_folder_without_its_tables(root: Path) -> None:
    with pytest.raises(UserError) as error:
        listed(ssw60, root.parent)
    assert str(error.value) == (
        f'{root.parent}: no table of SSW60\'s classes; expected taxa.csv in this folder; did you mean "{root}"?'
    )
    with pytest.raises(UserError, match=r"--sound none: applies to --part video only; the part audio has no videos"):
        listed(ssw60, root, "--part", "audio", "--sound", "none")
    with pytest.raises(UserError, match=r"no table of SSW60's part audio; expected audio_ml.csv in this folder"):
        listed(ssw60, root, "--part", "audio")
    for path in (root / "video_ml").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"video_ml.csv: none of the listed files exists; the first: .*483821.mp4"):
        listed(ssw60, root)


def test_from_end_to_end(tmp_path: Path) -> None:
    root = tmp_path / "ssw60"
    table(root / "taxa.csv", *TAXA)
    table(root / "video_ml.csv", *(line for line in VIDEOS if not line.startswith("5")))
    media(root / "video_ml/483821.mp4", 1)
    media(root / "video_ml/483326.mp4", 1, sound=False)
    media(root / "video_ml/477001.mp4", 1.2)
    media(root / "video_ml/477002.mp4", 1.4)
    manifest, clips, problems = probed(listed(ssw60, root), tmp_path / "m.parquet")
    assert manifest.classes == ("Canada Goose", "Wood Duck")
    assert manifest.splits == {"train": 2, "test": 2}
    assert {c.num_frames for c in clips.values()} == {10, 12, 14}
    silent = clips["video_ml/483326"]
    assert (silent.audio, silent.has_audio, silent.has_video) == (None, False, True)
    assert all(c.has_audio for c in clips.values() if c is not silent)
    assert problems == {"missing_file": 1}
    assert manifest.metadata["metric"] == ssw60.METRIC

    table(root / "audio_ml.csv", "asset_id,label,split", "1,2,train", "2,10,train", "3,2,train", "4,10,train")
    for k in range(4):
        wav(root / f"audio_ml/{k + 1}.wav", rate=22050, seed=k)
    _, clips, problems = probed(listed(ssw60, root, "--part", "audio"), tmp_path / "a.parquet")
    assert {(c.num_samples, c.sample_rate) for c in clips.values()} == {(22050, 22050)}
    assert not problems

    table(root / "images_nabirds.csv", "asset_id,label,split", "a,2,train", "b,10,train", "c,2,train", "d,10,train")
    for k, name in enumerate("abcd"):
        picture(root / f"images_nabirds/{name}.jpg", seed=k)
    _, clips, problems = probed(listed(ssw60, root, "--part", "nabirds"), tmp_path / "i.parquet")
    assert {(c.num_frames, c.width, c.height) for c in clips.values()} == {(1, 48, 32)}
    assert not problems
