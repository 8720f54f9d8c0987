"""Tables and the files they name: what is read, and how mistakes in them are told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.datasets.tables import (
    ClipRows,
    MediaFolders,
    class_order,
    coordinates,
    find_file,
    missing_file,
    number,
    number_or_nan,
    read_table,
)
from tests.helpers.dataset_trees import tree


def rows(path: Path, text: str | bytes, **options: Any) -> list[tuple[int, dict[str, str]]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_table(path, **options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a,b\n1,2\n", {}, [(2, {"a": "1", "b": "2"})]),
        ("\ufeffa,b\r\n1,2\r\n", {"required": ["a"]}, [(2, {"a": "1", "b": "2"})]),
        ('a,b\n1,"x, y"\n"two\nlines",""\n', {}, [(2, {"a": "1", "b": "x, y"}), (4, {"a": "two\nlines", "b": ""})]),
        (",a,b\n0,1,2\n", {}, [(2, {"a": "1", "b": "2"})]),
        ("Unnamed: 0,a,b\n0,1,2\n", {}, [(2, {"a": "1", "b": "2"})]),
        (" a , B\n1,2\n", {"required": ["a", "b"]}, [(2, {"a": "1", "b": "2"})]),
        ("a\torginal\n1\t2\n", {"delimiter": "\t", "aliases": {"original": ("orginal",)}}, [
            (2, {"a": "1", "original": "2"})]),
        ("a,A\n1,2\n", {"required": ["a"]}, [(2, {"a": "1", "A": "2"})]),
        ("1&2\n\n3&4\n", {"delimiter": "&", "header": ["a", "b"]}, [(1, {"a": "1", "b": "2"}),
                                                                   (3, {"a": "3", "b": "4"})]),
        ("A, b\n1,2\n", {"header": ["a", "b"]}, [(2, {"a": "1", "b": "2"})]),
        ("# one, two\n# three\nx, \"m,n\"\n", {"header": ["a", "b"], "comment": "#", "skip_initial_space": True}, [
            (3, {"a": "x", "b": "m,n"})]),
        ('a\tb\n"x\t2\n', {"delimiter": "\t", "quoted": False}, [(2, {"a": '"x', "b": "2"})]),
        ("a,b\n", {}, []),
        ("", {"header": ["a"]}, []),
    ],
)  # fmt: skip
def test_tables(path: Path, text: str, options: Mapping[str, Any], expected: list[Any]) -> None:
    assert rows(path, text, **options) == expected


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {"required": ["a", "b"]}, "{path}: the table is empty; expected a header line with a, b"),
        ("", {}, "{path}: the table is empty; expected a header line"),
        ("labels,b\n", {"required": ["label"]}, '{path}, line 1: no column "label"; did you mean "labels"?'),
        ("x,y\n", {"required": ["label"]}, '{path}, line 1: no column "label"; known: x, y'),
        ("a,b\n1,2,3\n", {}, "{path}, line 2: found 3 values, expected 2 (a, b)"),
        ("a,b\n1\n", {}, "{path}, line 2: found 1 values, expected 2 (a, b)"),
        ("1,2\n1\n", {"header": ["a", "b"]}, "{path}, line 2: found 1 values, expected 2 (a, b)"),
        ("a,b,a\n", {}, '{path}, line 1: column "a" occurs twice, expected once'),
        ('a,b\n"1,2\n3,4\n', {}, "{path}, line 3: unexpected end of data; expected values separated by ','"),
        (b"a,b\n\n1,caf\xe9\n", {}, "{path}, line 3: not UTF-8; expected a text table in UTF-8"),
    ],
)
def test_mistakes_in_tables(path: Path, text: str | bytes, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        rows(path, text, **options)
    assert str(error.value) == message.format(path=path)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.csv: cannot be read \(No such file"):
        list(read_table(tmp_path / "gone.csv"))


def test_ragged_rows() -> None:
    lines = ["a\tb\tc\t\n", "1\n", "1\t2\t3\t\t\n"]
    table = read_table(Path("t"), lines=lines, delimiter="\t", ragged=True)
    assert [row for _, row in table] == [{"a": "1", "b": "", "c": ""}, {"a": "1", "b": "2", "c": "3"}]
    with pytest.raises(UserError, match=r"^t, line 2: found 5 values, expected 4"):
        list(read_table(Path("t"), lines=["a\tb\tc\t\n", "1\t2\t3\t\tx\n"], delimiter="\t", ragged=True))


def test_numbers(path: Path) -> None:
    assert number({"x": " 1.5 "}, "x", path, 3) == 1.5
    assert number_or_nan({"x": "-2"}, "x", path, 3) == -2
    for text in ("", "NaN", "null", "None", " nan "):
        assert math.isnan(number_or_nan({"x": text}, "x", path, 3))
        with pytest.raises(UserError, match=f'table.csv, line 3: x = "{text}": expected a number'):
            number({"x": text}, "x", path, 3)
    assert math.isnan(number_or_nan({}, "x", path, 3))
    for text in ("1,5", "inf", "ten"):
        with pytest.raises(UserError, match=f'table.csv, line 3: x = "{text}": expected a number'):
            number_or_nan({"x": text}, "x", path, 3)


@pytest.mark.parametrize(
    ("latitude", "longitude", "known"),
    [
        (61.5, "23.8", True), ("-90", 180, True), (None, 23.8, False), ("nan", "23.8", False), (float("nan"), 1, False),
        ("", "", False), ("Not specified", "1", False), (91, 0, False), (0, -181, False), (float("inf"), 0, False),
        (True, 0, False), ([1], 0, False),
    ],
)  # fmt: skip
def test_coordinates(latitude: object, longitude: object, known: bool) -> None:
    lat, lon = coordinates(latitude, longitude)
    assert not (math.isnan(lat) or math.isnan(lon)) if known else math.isnan(lat) and math.isnan(lon)
    if known:
        assert (lat, lon) == (float(latitude), float(longitude))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "where", "names", "message"),
    [
        (["taxas.csv"], "", ["taxa.csv"],
         'ROOT: no table; expected taxa.csv in this folder; did you mean "taxas.csv"?'),
        (["notes.md"], "", ["taxa.csv"], "ROOT: no table; expected taxa.csv in this folder; known: notes.md"),
        ([".x/y"], "", ["taxa.csv", "t.csv"], "ROOT: no table; expected taxa.csv or t.csv in this folder; known: .x"),
        (["ssw60/taxa.csv"], "", ["taxa.csv"],
         'ROOT: no table; expected taxa.csv in this folder; did you mean "ROOT/ssw60"?'),
        (["taxa.csv", "media/x"], "media", ["taxa.csv"],
         'ROOT/media: no table; expected taxa.csv in this folder; did you mean "ROOT"?'),
        (["setup/fold_train.csv"], "", ["setup/fold1_train.csv"],
         'ROOT: no table; expected setup/fold1_train.csv in this folder; did you mean "setup/fold_train.csv"?'),
        (["media/x"], "medias", ["taxa.csv"],
         'ROOT/medias: no such folder; expected a folder with the table; did you mean "media"?'),
        (["media"], "media", ["taxa.csv"], "ROOT/media: not a folder; expected a folder with the table"),
    ],
)  # fmt: skip
def test_tables_that_are_not_found(
    tmp_path: Path, files: Sequence[str], where: str, names: Sequence[str], message: str
) -> None:
    root = tree(tmp_path.resolve() / "root", *files)
    with pytest.raises(UserError) as error:
        find_file(root / where, names, "table")
    assert str(error.value).startswith(message.replace("ROOT", str(root)))
    assert "\n" not in str(error.value)


def test_the_first_table_that_is_there(tmp_path: Path) -> None:
    tree(tmp_path, "b.csv", "c.csv")
    assert find_file(tmp_path, ["a.csv", "b.csv", "c.csv"], "table") == tmp_path / "b.csv"


def test_media_are_found_by_their_stem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "x/a.MP4", "x/b.v2.mp4", "x/b.webm", "x/b.mp4", "x/ABC.mp4", "x/abc.mp4", "x/d.mp4", "x/d.MP4")
    folders, folder = MediaFolders(), tmp_path / "x"
    assert folders.find_media(folder, "a", (".mp4",)) == folder / "a.MP4"
    assert folders.find_media(folder, "b.v2", (".mp4",)) == folder / "b.v2.mp4"
    assert folders.find_media(folder, "b", (".webm", ".mp4")) == folder / "b.webm"
    assert folders.find_media(folder, "abc", (".mp4",)) == folder / "abc.mp4", "stems keep their case"
    assert folders.find_media(folder, "aBC", (".mp4",)) is None
    assert folders.find_media(folder, "d", (".mp4",)) == folder / "d.mp4"
    assert folders.find_media(folder, "c", (".mp4",)) is None
    assert folders.find_media(tmp_path / "gone", "a", (".mp4",)) is None
    monkeypatch.setattr("os.scandir", None)  # a folder is listed once only
    assert folders.find_media(folder, "a", (".mp4",)) == folder / "a.MP4"
    assert folders.find_media(tmp_path / "gone", "a", (".mp4",)) is None


def test_rows_take_an_id_once() -> None:
    table, taken = Path("t.csv"), ClipRows()
    taken.add(Clip("a", audio=Path("a.wav")), table, 2)
    taken.add(Clip("a", audio=Path("a.wav")), table, 5)
    taken.add(Clip("b"), table)
    taken.add(Clip("b"), table)
    assert [clip.id for clip in taken.clips] == ["a", "b"]
    assert [(p.kind, p.clip_id, p.message, p.fatal) for p in taken.problems] == [
        ("duplicate_row", "a", 't.csv, line 5: clip "a" is already listed (t.csv, line 2); left out', False),
        ("duplicate_row", "b", 't.csv: clip "b" is already listed (t.csv); left out', False),
    ]
    clip_list = taken.clip_list([table], {"source": "test"}, notes=["a note"])
    assert (clip_list.clips, clip_list.problems, clip_list.notes) == (taken.clips, taken.problems, ["a note"])
    assert clip_list.published_splits
    assert clip_list.metadata == {"source": "test"}


def test_a_listing_of_nothing_is_refused() -> None:
    taken = ClipRows()
    with pytest.raises(UserError, match=r"^t.csv: contains no clips; expected at least one$"):
        taken.clip_list([Path("t.csv")], {})
    taken.add_missing("a", Path("x/a.wav"), Path("t.csv"), 2)
    assert taken.problems == [missing_file("a", Path("x/a.wav"), Path("t.csv"), 2)]
    assert taken.problems[0].message == "t.csv, line 2: no such file: x/a.wav"
    assert not taken.problems[0].fatal
    with pytest.raises(UserError) as error:
        taken.clip_list([Path("t.csv")], {})
    expected = "t.csv: none of the listed files exists; the first: t.csv, line 2: no such file: x/a.wav"
    assert str(error.value) == expected


def test_class_order() -> None:
    assert class_order(["b", "é"]) == '["b", "é"]'
