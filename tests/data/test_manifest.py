"""The manifest: what is written is read, however it is read; and every way in which one can be wrong is named."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastav.core.errors import FastavError, UserError
from fastav.data.clip import Clip
from fastav.data.manifest import SCHEMA, Manifest, check, merge, store, write, write_manifest, write_table

LABELS = ("crow", "owl", "wren")


def clip(number: int, **changes: object) -> Clip:
    """A clip of a file of its own, with something in every column."""
    given = {
        "id": f"c{number}",
        "video": Path(f"/media/v{number}.mp4"),
        "audio": Path(f"/media/v{number}.mp4"),
        "start_s": 0.5 * number,
        "duration_s": 2.0,
        "start_frame": 3 * number,
        "num_frames": 50 + number,
        "fps": 25.0,
        "width": 64,
        "height": 48,
        "rotation": 90,
        "mirrored": 1,
        "video_codec": "h264",
        "start_sample": -number,
        "num_samples": 32000 + number,
        "sample_rate": 16000,
        "channels": 2,
        "audio_codec": "aac",
        "audio_offset_s": 0.02,
        "labels": (LABELS[number % 3],),
        "group": f"g{number}",
        "weight": 1.5,
        "lat": 47.0 + number,
    }
    return Clip(**{**given, **changes})


def same(read: Clip, written: Clip) -> bool:
    """Whether two clips are equal but for the row number, NaN being equal to itself."""
    pairs = zip(dataclasses.astuple(read)[2:], dataclasses.astuple(written)[2:], strict=True)
    return read.id == written.id and all(a == b or (a != a and b != b) for a, b in pairs)


@pytest.fixture(params=["mapped", "paged", "memory"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three ways in which rows are reached: touched, read one by one, held in memory."""
    if request.param == "paged":
        monkeypatch.setattr(store, "PAGED_BYTES", 0)
    if request.param == "memory":
        monkeypatch.setattr(store, "map_copy", lambda copy, path: None)
        monkeypatch.setattr(store, "written_beside", refuse)
    monkeypatch.setattr(store, "COPY_ROWS", 7)
    return request.param


def refuse(*args: object, **kwargs: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def many() -> list[Clip]:
    split = {0: "test", 1: "train", 2: "odd", 3: "val"}
    clips = [clip(i, split=split[i % 4]) for i in range(40)]
    clips[5] = dataclasses.replace(clips[5], labels=("owl", "crow"))
    clips[9] = dataclasses.replace(clips[9], labels=())
    clips[6] = dataclasses.replace(clips[6], video=None, num_frames=0)
    clips[7] = dataclasses.replace(clips[7], audio=None, num_samples=0)
    clips[10] = Clip("still", image=Path("/media/a.png"), num_frames=1, labels=("owl",), split="odd")
    clips[11] = Clip("mel", mel=Path("/media/a.npy"), num_mel_frames=400, labels=("owl",), split="val")
    return clips


def test_what_is_written_is_read(tmp_path: Path, reading: str) -> None:
    clips = many()
    made = write_manifest(tmp_path / "m.parquet", clips, metadata={"source": "a test"})
    order = [c for name in ("train", "val", "test", "odd") for c in clips if c.split == name]
    assert list(made.splits) == ["train", "val", "test", "odd"]
    assert all(same(a, b) for a, b in zip(made.clips(range(40)), order, strict=True))
    assert [c.row for c in made.clips([3, 1])] == [3, 1]
    assert made.classes == LABELS
    assert made.metadata == {"source": "a test"}
    columns = made.columns(np.arange(40)[::-1], ["num_frames", "lat", "label", "has_video", "has_audio", "num_samples"])
    for row, expected in enumerate(order[::-1]):
        assert columns["num_frames"][row] == expected.num_frames
        assert columns["num_samples"][row] == expected.num_samples
        assert columns["lat"][row] == expected.lat or (math.isnan(expected.lat) and math.isnan(columns["lat"][row]))
        assert columns["label"][row] == (LABELS.index(expected.labels[0]) if expected.labels else -1)
        assert (columns["has_video"][row], columns["has_audio"][row]) == (expected.has_video, expected.has_audio)
    assert {name: values.dtype.name for name, values in columns.items()} == {
        "num_frames": "int64", "lat": "float64", "label": "int64",
        "has_video": "bool", "has_audio": "bool", "num_samples": "int64",
    }  # fmt: skip
    assert len(made.columns(np.zeros(0, np.int64), ["fps"])["fps"]) == 0


def test_labels_as_a_matrix(tmp_path: Path, reading: str) -> None:
    clips = many()
    made = write_manifest(tmp_path / "m.parquet", clips)
    rows = np.array([3, 39, 0, 11])
    expected = [[float(name in c.labels) for name in LABELS] for c in made.clips(rows)]
    matrix = made.label_matrix(rows)
    assert matrix.dtype == np.float32
    assert matrix.tolist() == expected
    whole = made.label_matrix(range(40))
    assert made.class_counts().tolist() == whole.sum(0).tolist()
    assert whole.sum(1).max() == 2
    for name in made.splits:
        window = made.split(name)
        assert window.class_counts().tolist() == window.label_matrix(range(len(window))).sum(0).tolist()


def test_labels_in_another_class_space(tmp_path: Path) -> None:
    made = write_manifest(tmp_path / "m.parquet", [clip(0), clip(1), clip(2), clip(4, labels=("owl", "crow"))])
    target, aliases = ["Wren", "crow", "eagle"], {"wren": "Wren", "owl": "hawk"}
    assert made.class_map(target, aliases).tolist() == [1, -1, 0]
    assert made.label_matrix([0, 1, 2, 3], target, aliases).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_windows(tmp_path: Path, reading: str) -> None:
    made = write_manifest(tmp_path / "m.parquet", many())
    train = made.split("train")
    assert (len(train), train.splits) == (10, {"train": 10})
    assert [c.id for c in train.clips(range(10))] == [f"c{i}" for i in range(1, 40, 4)]
    assert made.split("test").clip(0).row == 0
    assert train.select(["video", "audio"], "all") is train
    both = made.select(["video", "audio"], "all")
    assert len(both) == 36
    assert {"still", "mel", "c6", "c7"}.isdisjoint(c.id for c in both.clips(range(36)))
    assert both.splits == {"train": 10, "val": 8, "test": 10, "odd": 8}
    assert [c.id for c in both.split("val").clips([0, 1, 2])] == ["c3", "c15", "c19"]
    assert both.class_counts().tolist() == both.label_matrix(range(36)).sum(0).tolist()
    seen = made.select(["video"])
    assert {c.id for c in made.clips(range(40))} - {c.id for c in seen.clips(range(38))} == {"mel", "c6"}
    assert len(seen.select(["audio"])) == 36
    assert Manifest.open(made.path, split="odd").clip(2).id == "still"
    with pytest.raises(IndexError):
        train.clip(10)
    with pytest.raises(IndexError):
        train.columns(np.array([-1]), ["fps"])


def test_a_window_goes_to_another_process(tmp_path: Path) -> None:
    made = write_manifest(tmp_path / "m.parquet", many())
    for window in (made, made.split("val"), made.select(["video"], "all")):
        again = pickle.loads(pickle.dumps(window))
        assert [c.id for c in again.clips(range(len(again)))] == [c.id for c in window.clips(range(len(window)))]
    sent = pickle.dumps(made)
    write_manifest(made.path, [clip(0)])
    with pytest.raises(UserError, match="was rewritten while it was in use"):
        pickle.loads(sent)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.integers(-(2**40), 2**40), st.floats(width=64)), min_size=1
    ),
    rows=st.lists(st.integers(0, 10**6), max_size=20),
)
def test_columns_of_any_rows(tmp_path: Path, numbers: list[tuple[int, int, float]], rows: list[int]) -> None:
    clips = [clip(i, num_frames=a, start_sample=b, lat=c) for i, (a, b, c) in enumerate(numbers)]
    made = write_manifest(tmp_path / "m.parquet", clips)
    wanted = np.array([row % len(clips) for row in rows], np.int64)
    columns = made.columns(wanted, ["num_frames", "start_sample", "lat"])
    assert columns["num_frames"].tolist() == [clips[row].num_frames for row in wanted]
    assert columns["start_sample"].tolist() == [clips[row].start_sample for row in wanted]
    assert np.array_equal(columns["lat"], [clips[row].lat for row in wanted], equal_nan=True)
    assert all(same(made.clip(row), clips[row]) for row in wanted)


def test_media_are_stored_relative_to_the_manifest(tmp_path: Path) -> None:
    real = tmp_path / "real" / "deep"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    path = tmp_path / "link" / "m.parquet"
    inside, beside, far = tmp_path / "link" / "a.mp4", tmp_path / "b.mp4", Path("/elsewhere/c.mp4")
    made = write_manifest(path, [clip(0, video=inside, audio=beside), clip(1, video=far)])
    stored = pq.read_table(path)
    assert stored.column("video").to_pylist() == ["a.mp4", "/elsewhere/c.mp4"]
    assert stored.column("audio")[0].as_py() == "../../b.mp4"
    assert made.clip(0).video == real / "a.mp4"
    assert made.clip(0).audio == beside
    assert made.clip(1).video == far
    moved = tmp_path / "moved"
    real.rename(moved)
    assert Manifest.open(moved / "m.parquet").clip(0).video == moved / "a.mp4"


def edited(path: Path, **columns: list[object]) -> None:
    """Does what another tool does: reads the Parquet file, changes columns, writes it with its metadata."""
    table = pq.read_table(path)
    for name, values in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, table.field(at), pa.array(values, table.field(at).type))
    pq.write_table(table, path)


def test_a_stale_copy_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(path, [clip(0), clip(1)])
    copy, first = path.with_suffix(".arrow"), path.with_suffix(".arrow").stat()
    assert Manifest.open(path).clip(0).num_frames == 50
    assert copy.stat().st_ino == first.st_ino
    os.utime(path, ns=(1, 1))  # as after a plain copy of the folder: other times, the same content
    assert Manifest.open(path).clip(0).num_frames == 50
    assert copy.stat().st_ino == first.st_ino
    edited(path, num_frames=[7, 51])
    assert Manifest.open(path).clip(0).num_frames == 7
    before = path.read_bytes()
    edited(path, num_frames=[8, 51])
    assert len(before) == path.stat().st_size, "meant to have the same size"
    assert Manifest.open(path).clip(0).num_frames == 8
    for broken in (b"", b"ARROW1", copy.read_bytes()[:-200], b"x" * 1000):
        copy.write_bytes(broken)
        assert Manifest.open(path).clip(0).num_frames == 8
    copy.unlink()
    assert Manifest.open(path).clip(0).num_frames == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.arrow", "m.parquet"]


def test_an_old_copy_never_hides_a_newer_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(path, [clip(0)])
    edited(path, num_frames=[7])
    monkeypatch.setattr(store, "written_beside", refuse)
    made = Manifest.open(path)
    assert made.clip(0).num_frames == 7
    assert pickle.loads(pickle.dumps(made)).clip(0).num_frames == 7


def test_several_processes_make_the_copy_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(path, [clip(i) for i in range(20)])
    path.with_suffix(".arrow").unlink()
    other: list[Manifest] = []
    write_copy = store.write_copy

    def interrupted(*args: object) -> None:
        if not other:  # in the midst of our writing another process starts, finishes and reads
            other.append(Manifest.__new__(Manifest))
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 4_000_000)
                other[0] = Manifest.open(path)
        write_copy(*args)

    monkeypatch.setattr(store, "write_copy", interrupted)
    assert Manifest.open(path).clip(19).id == "c19"
    assert other[0].clip(19).id == "c19"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.arrow", "m.parquet"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_large_manifest_is_not_loaded(tmp_path: Path) -> None:
    count = 250_000
    numbers = np.arange(count)
    nulls = pa.array(np.zeros(count, np.int64))
    names = pa.array([f"a folder/with/some/clip_{i:09d}.mp4" for i in range(count)])
    labels = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32)), pa.array(["a"]).take(nulls))
    split, frames = pa.array(["train"]).take(nulls), pa.array((numbers + 1).astype(np.int32))
    table = pa.table({"id": names, "video": names, "split": split, "labels": labels, "num_frames": frames})
    path = write_table(tmp_path / "m.parquet", table).path
    assert path.with_suffix(".arrow").stat().st_size > store.PAGED_BYTES

    def held_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if "VmRSS" in line).split()[1])

    before, rows = held_kib(), np.random.default_rng(0).integers(0, count, 512)
    made = Manifest.open(path, split="train").select(["video", "audio"])
    assert made.columns(rows, ["num_frames", "fps"])["num_frames"].tolist() == (rows + 1).tolist()
    assert [c.id for c in made.clips(rows[:8])] == [names[int(row)].as_py() for row in rows[:8]]
    assert held_kib() - before < 20_000
    assert made.columns(numbers, ["num_frames"])["num_frames"].tolist() == (numbers + 1).tolist()


def opened(path: Path) -> str:
    """The message with which a manifest is refused."""
    with pytest.raises(UserError) as error:
        Manifest.open(path)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_manifest_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "manifest.parquet", [clip(0)]).path
    assert 'no such file, expected a .parquet file; did you mean "manifest.parquet"?' in opened(
        tmp_path / "manifst.parquet"
    )
    assert f'is a folder, expected a .parquet file; did you mean "{path}"?' in opened(tmp_path)
    assert "no such file" in opened(tmp_path / "nowhere" / "m.parquet")
    assert "this is the Arrow copy; expected" in opened(path.with_suffix(".arrow"))
    text = tmp_path / "text.parquet"
    text.write_text("id,video\n")
    assert "not a manifest: not a Parquet file" in opened(text)
    text.write_bytes(b"")
    assert "not a manifest: not a Parquet file" in opened(text)
    pq.write_table(pa.table({"a": [1]}), text)
    assert "not a fastav manifest (no fastav.schema_version" in opened(text)
    meta = pq.read_schema(path).metadata
    pq.write_table(pa.table({"id": ["a"]}).replace_schema_metadata(meta), text)
    assert "not a fastav manifest (no column labels, split)" in opened(text)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fastav.schema_version", b"4", "manifest version is 4, but this fastav reads versions up to 3"),
        ("fastav.schema_version", b"new", "not a fastav manifest (schema metadata"),
        ("fastav.classes", b"[", "not a fastav manifest (schema metadata"),
        ("fastav.splits", b"[1]", "not a fastav manifest (schema metadata"),
        ("fastav.splits", b'{"train": [0, 1]}', "do not cover its 2 rows"),
        ("fastav.splits", b'{"train": [0, 1], "test": [1, 2]}', 'not all of the rows 1..2 are in split "test"'),
        ("fastav.classes", b'["crow", "owls"]', 'label "owl" is not among the classes; did you mean "owls"?'),
    ],
)
def test_metadata_that_do_not_fit(tmp_path: Path, key: str, value: bytes, message: str) -> None:
    path = write_manifest(tmp_path / "m.parquet", [clip(0), clip(1)]).path
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, key.encode(): value}), path)
    assert message in opened(path)


def test_a_too_new_copy_of_a_too_new_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SCHEMA_VERSION", 4)
    path = write_manifest(tmp_path / "m.parquet", [clip(0)]).path
    monkeypatch.undo()
    assert "manifest version is 4" in opened(path)


def test_columns_of_other_tools(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.parquet", [clip(0), clip(1)]).path
    table = pq.read_table(path)
    kept = table.select(["id", "split", "labels", "video", "num_frames", "weight"]).append_column("mine", [[1, 2]])
    kept = kept.set_column(4, "num_frames", pa.array([5.0, None])).set_column(5, "weight", pa.array([1, None]))
    pq.write_table(kept.replace_schema_metadata(table.schema.metadata), path)
    made = Manifest.open(path)
    assert made.columns(np.arange(2), ["num_frames", "weight"])["num_frames"].tolist() == [5, 0]
    assert made.clip(1).weight == 1
    assert math.isnan(made.clip(1).lat)
    kept = kept.set_column(4, "num_frames", pa.array(["many", "few"]))
    pq.write_table(kept.replace_schema_metadata(table.schema.metadata), path)
    assert "as a scalar of type int32" in opened(path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(UserError, match="the manifest would have no clips"):
        write_manifest(path, [])
    with pytest.raises(UserError, match='label "wren" is not among the classes; did you mean "wrens"'):
        write_manifest(path, [clip(2)], ["crow", "owl", "wrens"])
    with pytest.raises(UserError, match="a class name is repeated"):
        write_manifest(path, [clip(0)], ["crow", "crow"])
    with pytest.raises(UserError, match=r'expected a name that ends in "\.parquet"'):
        write_manifest(tmp_path / "m.csv", [clip(0)])
    with pytest.raises(UserError, match="NUL"):
        write_manifest(path, [clip(0, id="a\0b")])
    with pytest.raises(UserError, match='column "labels" is not numeric'):
        write_manifest(path, [clip(0)]).columns(np.arange(1), ["labels"])
    with pytest.raises(UserError, match='no split "tset"; it has: train'):
        Manifest.open(path, split="tset")
    with pytest.raises(UserError, match=r"none of the 1 clips \(train\) has audio"):
        write_manifest(path, [clip(0, audio=None, num_samples=0)]).select(["audio"])


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_manifest(tmp_path / "m.parquet", [clip(0)]).path

    def full(table: pa.Table, where: Path, **options: object) -> None:
        Path(where).write_bytes(b"PAR1 and then no more room")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.pq, "write_table", full)
    with pytest.raises(FastavError, match=r"cannot write .*m\.parquet: No space left on device") as error:
        write_manifest(path, [clip(1)])
    assert error.value.exit_code == 1
    assert Manifest.open(path).clip(0).id == "c0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.arrow", "m.parquet"]


def test_merging(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one = [clip(0, video=tmp_path / "a" / "x.mp4"), clip(1, split="test", audio=None)]
    two = [clip(5, video=tmp_path / "b" / "y.mp4", labels=("zebra",)), clip(6, split="val")]
    first = write_manifest(tmp_path / "a" / "m.parquet", one, metadata={"source": "s", "root": "a"})
    second = write_manifest(tmp_path / "b" / "m.parquet", two, metadata={"source": "s", "root": "b"})
    both = merge([first.path, second.path], tmp_path / "all.parquet")
    assert both.splits == {"train": 2, "val": 1, "test": 1}
    assert both.classes == ("crow", "owl", "zebra")
    assert both.metadata == {"source": "s"}
    expected = [one[0], two[0], two[1], one[1]]
    assert all(same(a, b) for a, b in zip(both.clips(range(4)), expected, strict=True))
    assert pq.read_table(both.path).column("video")[0].as_py() == "a/x.mp4"
    with pytest.raises(UserError, match='2 clips of the 2 manifests have the id "c0"; expected unique ids'):
        merge([first.path, first.path], tmp_path / "twice.parquet")


# What may be wrong with a manifest


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"f{i}.mp4" for i in range(6)]
    for number, path in enumerate(made):
        path.write_bytes(bytes([number]) * (1000 + number))
    return made


def found(tmp_path: Path, clips: list[Clip], **given: object) -> list[tuple[str, str, bool, str]]:
    manifest = write_manifest(tmp_path / "m.parquet", clips, **given)
    return [(p.kind, p.clip_id, p.fatal, p.message) for p in check(manifest)]


def sound(files: list[Path]) -> list[Clip]:
    """Two classes of two clips with nothing wrong."""
    names = [("crow", "train"), ("owl", "train"), ("crow", "test"), ("owl", "test")]
    return [
        clip(i, video=files[i], audio=files[i], start_s=0.0, start_frame=0, start_sample=0, labels=(name,), split=split)
        for i, (name, split) in enumerate(names)
    ]


def test_nothing_is_wrong(tmp_path: Path, files: list[Path]) -> None:
    extents = dict.fromkeys(files, (60, 40000))
    assert found(tmp_path, sound(files), extents=extents) == []


def test_missing_file(tmp_path: Path, files: list[Path]) -> None:
    clips = sound(files)
    files[3].unlink()
    ((kind, name, fatal, message),) = found(tmp_path, clips)
    assert (kind, name, fatal) == ("missing_file", "c3", True)
    assert message == f'no such file: {files[3]} (clip "c3")'
    again = dataclasses.replace(clips[3], id="c3b", start_s=9.0, group="")
    assert found(tmp_path, [*clips, again])[0][3].endswith('(clip "c3" and 1 more)')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"duration_s": 0.0}, "span 0.000 s + 0.000 s of {path} has zero length"),
        ({"duration_s": float("nan")}, "has zero length"),
        ({"start_s": -1.0}, "span -1.000 s + 2.000 s starts before the start of {path}"),
        ({"start_frame": -1}, "starts before the start of {path}"),
        ({"start_sample": -50000}, "starts before the start of {path}"),
        ({"start_frame": 11}, "ends at frame 61, but {path} has 60"),
        ({"start_sample": 10000}, "ends at sample 42000, but {path} has 40000"),
    ],
)
def test_bad_span(tmp_path: Path, files: list[Path], changes: dict[str, object], message: str) -> None:
    clips = sound(files)
    clips[0] = dataclasses.replace(clips[0], num_frames=50, num_samples=32000, **changes)
    ((kind, name, fatal, said),) = found(tmp_path, clips, extents={files[0]: (60, 40000)})
    assert (kind, name, fatal) == ("bad_span", "c0", True)
    assert said.startswith('clip "c0": span ')
    assert message.format(path=files[0]) in said


def test_sound_that_starts_after_the_picture_is_no_bad_span(tmp_path: Path, files: list[Path]) -> None:
    clips = sound(files)
    clips[0] = dataclasses.replace(clips[0], start_sample=-1896)
    assert found(tmp_path, clips) == []


def test_no_media(tmp_path: Path, files: list[Path]) -> None:
    clips = sound(files)
    clips[0] = dataclasses.replace(clips[0], num_frames=0, num_samples=0)
    clips[1] = Clip("c1", labels=("owl",))
    clips[2] = Clip("c2", labels=("crow",), split="test", image=files[2], num_frames=1)
    clips[3] = Clip("c3", labels=("owl",), split="test", mel=files[3], num_mel_frames=400)
    one, two = found(tmp_path, clips)
    assert one[:3] == ("no_media", "c0", True)
    assert one[3] == f'clip "c0": its row has no frames and no samples of {files[0]}; was the file probed?'
    assert two == ("no_media", "c1", True, 'clip "c1" has no video, audio, image or mel file')


def test_duplicate_id(tmp_path: Path, files: list[Path]) -> None:
    clips = sound(files)
    clips[1] = dataclasses.replace(clips[1], id="c0")
    assert found(tmp_path, clips) == [("duplicate_id", "c0", True, '2 clips have the id "c0"')]


def test_classes_without_enough_clips(tmp_path: Path, files: list[Path]) -> None:
    clips = sound(files)
    clips[1] = dataclasses.replace(clips[1], labels=("wren",))
    problems = found(tmp_path, clips, classes=["crow", "owl", "wren", "yak"])
    assert problems == [
        ("empty_class", "", True, 'class "owl" has no training clip (1 in test)'),
        ("single_clip_class", "c3", False, 'class "owl" has one clip (1 in test)'),
        ("single_clip_class", "c1", False, 'class "wren" has one clip (1 in train)'),
        ("empty_class", "", True, 'class "yak" has no training clip (no clip at all)'),
    ]
    only_test = [dataclasses.replace(c, split="test") for c in sound(files)]
    assert found(tmp_path, only_test) == [], "a manifest made for testing needs no training clips"


def test_split_leak(tmp_path: Path, files: list[Path]) -> None:
    clips = sound(files)
    clips[0] = dataclasses.replace(clips[0], group="recorder 7")
    clips[3] = dataclasses.replace(clips[3], group="recorder 7")
    message = 'group "recorder 7" is in two splits: train (clip "c0") and test (clip "c3")'
    assert found(tmp_path, clips) == [("split_leak", "c3", True, message)]
    clips = [dataclasses.replace(c, group="") for c in sound(files)]
    assert found(tmp_path, clips) == []


def test_the_same_seconds_in_two_splits(tmp_path: Path, files: list[Path]) -> None:
    clips = sound(files)
    clips[2] = dataclasses.replace(clips[2], video=None, num_frames=0, audio=files[0], start_s=1.0, duration_s=9.0)
    ((kind, name, fatal, message),) = found(tmp_path, clips)
    assert (kind, name, fatal) == ("duplicate_media", "c2", True)
    assert message == f'clip "c0" (train) and clip "c2" (test) are both cut from {files[0]} from 1.000 s on'
    clips[2] = dataclasses.replace(clips[2], start_s=2.0)
    assert found(tmp_path, clips) == [], "one piece after the other"
    clips[2] = dataclasses.replace(clips[2], start_s=0.5, split="train")
    assert "duplicate_media" not in {p[0] for p in found(tmp_path, clips)}, "overlap within a split is no leak"


def test_a_long_span_overlaps_beyond_its_neighbour(tmp_path: Path, files: list[Path]) -> None:
    spans = [("train", 0.0, 100.0), ("train", 1.0, 2.0), ("test", 50.0, 1.0)]
    clips = [
        clip(i, video=files[0], audio=files[0], group="", split=split, start_s=start, duration_s=length, labels=("a",))
        for i, (split, start, length) in enumerate(spans)
    ]
    assert [p[:3] for p in found(tmp_path, clips)] == [("duplicate_media", "c2", True)]


def test_one_picture_in_two_splits(tmp_path: Path, files: list[Path]) -> None:
    clips = [
        Clip(f"c{i}", image=files[0], num_frames=1, labels=("a",), split=split)
        for i, split in enumerate(("train", "val"))
    ]
    message = f'clip "c0" (train) and clip "c1" (val) are both cut from {files[0]}'
    assert found(tmp_path, clips) == [("duplicate_media", "c1", True, message)]


def test_two_files_with_the_same_content(tmp_path: Path, files: list[Path]) -> None:
    clips = sound(files)
    content = bytes(range(256)) * 2000
    files[1].write_bytes(content)
    files[3].write_bytes(content)
    message = f'{files[3]} (clip "c3", test) seems to have the same content as {files[1]} (clip "c1", train)'
    assert found(tmp_path, clips) == [("duplicate_media", "c3", False, message)]
    files[3].write_bytes(content[:-1] + b"x")
    assert found(tmp_path, clips) == [], "another end"
    files[3].unlink()
    files[3].symlink_to(files[1])
    assert found(tmp_path, clips) == [], "another name of the same file"


def test_the_schema_has_every_field_of_a_clip() -> None:
    assert {f.name for f in dataclasses.fields(Clip)} - {"row"} | {"media_frames", "media_samples"} == set(SCHEMA.names)
    assert json.loads(store.ManifestHeader(("a",), {"train": (0, 1)}, {}).write()[b"fastav.splits"]) == {
        "train": [0, 1]
    }


def test_means_over_labels_are_those_of_the_label_matrix(tmp_path: Path) -> None:
    labels = [("crow",), ("owl", "wren"), (), ("wren",), ("crow", "owl", "wren")]
    clips = [Clip(id=str(i), num_samples=1, audio=tmp_path / "a.wav", labels=of) for i, of in enumerate(labels)]
    manifest = write_manifest(tmp_path / "m.parquet", clips)
    values_K, rows = np.array([1.0, 10.0, 100.0]), np.array([4, 0, 1, 2, 3, 1])
    matrix_BK = manifest.label_matrix(rows).astype(np.float64)
    count_B = matrix_BK.sum(axis=1)
    expected = np.where(count_B > 0, matrix_BK @ values_K / np.maximum(count_B, 1), 1.0)
    assert np.allclose(manifest.label_means(rows, values_K), expected)
