"""Annotated recordings: Raven's and Audacity's tables, which recording they are of, clips and windows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.datasets import annotation_tables
from fastav.datasets.annotation_tables import (
    LONGEST_REMAINDER_S,
    Annotation,
    Windows,
    cut,
    hold_out,
    read_audacity,
    read_raven,
    table_kind,
    window_starts,
)
from fastav.datasets.clip_list import ClipList
from tests.helpers.dataset_trees import kinds, listed, media, table, tree
from tests.helpers.recordings import probed, wav

HEADER = "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\tSpecies"
NAMED = HEADER + "\tBegin File\tFile Offset (s)"


def row(begin_s: float, end_s: float, *more: str, number: int = 1, view: str = "Spectrogram 1") -> str:
    return "\t".join((str(number), view, "1", str(begin_s), str(end_s), "1000", "3000", *more))


def spans(made: ClipList) -> list[tuple[str, float, float, tuple[str, ...]]]:
    return [(c.id, c.start_s, round(c.duration_s, 6), c.labels) for c in made.clips]


def test_a_clip_for_each_annotation(tmp_path: Path) -> None:
    root = tree(tmp_path, "a.WAV", "deep/b.mp4", "c.flac")
    table(root / "a.Table.1.selections.txt", HEADER, row(2, 3.5, "owl, tawny"), row(0.5, 1, " wren "))
    table(root / "deep/b.txt", "1.5\t2.25\twren", "\\\t1000\t2000", "4,5\t5\towl, tawny")
    made = listed(annotation_tables, root)
    assert spans(made) == [
        ("a.WAV#0", 0.5, 0.5, ("wren",)),
        ("a.WAV#1", 2, 1.5, ("owl, tawny",)),
        ("deep/b.mp4#0", 1.5, 0.75, ("wren",)),
        ("deep/b.mp4#1", 4.5, 0.5, ("owl, tawny",)),
    ]
    assert [(c.video, c.audio, c.group) for c in made.clips[1:3]] == [
        (None, root / "a.WAV", "a"),
        (root / "deep/b.mp4", root / "deep/b.mp4", "deep/b"),
    ]
    assert kinds(list(made.problems)) == [("no_table", "c.flac")]
    assert made.problems[0].message == f"{root}/c.flac: none of the 2 tables annotates this recording; left out"
    assert made.notes == ["each annotation is a clip with its label"]
    assert (made.cut, made.split) == (None, None)
    assert made.metadata["rule"] == made.notes[0]
    assert "mAP" in made.metadata["metric"]


@pytest.mark.parametrize(
    ("name", "recording"),
    [
        ("rec.txt", "rec.wav"), ("rec.selections.txt", "rec.wav"), ("REC.Table.12.selections.TXT", "rec.wav"),
        ("rec.BirdNET.selection.table.txt", "rec.wav"), ("rec.labels.tsv", "rec.wav"), ("rec.wav.txt", "rec.wav"),
        ("20.05.01.txt", "20.05.01.flac"), ("a.selections.txt", "a.selections.wav"),
    ],
)  # fmt: skip
def test_the_recording_of_a_table(tmp_path: Path, name: str, recording: str) -> None:
    table(tmp_path / name, "1\t2\towl")
    assert [c.id for c in listed(annotation_tables, tree(tmp_path, recording)).clips] == [f"{recording}#0"]


def test_a_recording_of_a_similar_name_is_not_taken(tmp_path: Path) -> None:
    table(tmp_path / "site.2020.txt", "1\t2\towl")
    table(tmp_path / "b.txt", "1\t2\towl")
    made = listed(annotation_tables, tree(tmp_path, "site.wav", "b.wav"))
    assert [c.id for c in made.clips] == ["b.wav#0"]
    assert kinds(list(made.problems)) == [("missing_file", ""), ("no_table", "site.wav")]
    assert made.problems[0].message == (
        f"{tmp_path}/site.2020.txt: no recording site.2020.* in {tmp_path} or its subfolders (1 annotations)"
    )


def test_recordings_elsewhere_and_of_one_name(tmp_path: Path) -> None:
    root = tmp_path / "tables"
    table(root / "x/a.txt", "1\t2\towl")
    table(root / "y/a.txt", "1\t2\twren")
    table(root / "b.txt", "1\t2\twren")
    tree(tmp_path / "media", "x/a.wav", "y/a.wav", "x/b.wav", "z/b.wav")
    made = listed(annotation_tables, root, "--media-root", str(tmp_path / "media"))
    assert [(c.id, c.labels) for c in made.clips] == [("x/a.wav#0", ("owl",)), ("y/a.wav#0", ("wren",))]
    assert made.problems[0].kind == "ambiguous_recording"
    assert made.problems[0].message == (
        f"{root}/b.txt: its recording could be {tmp_path}/media/x/b.wav or {tmp_path}/media/z/b.wav; "
        "left out (1 annotations)"
    )


def test_one_table_of_several_recordings(tmp_path: Path) -> None:
    table(
        tmp_path / "all.txt",
        NAMED,
        row(1, 2, "owl", "a.wav", "1"),
        row(61, 62.5, "wren", "b.wav", "1"),  # times run on through the files, offsets do not
        row(63, 64, "wren", "B.flac", "3"),
        row(70, 71, "owl", "gone.wav", "4"),
        row(1, 2, "lark"),
    )
    made = listed(annotation_tables, tree(tmp_path, "a.wav", "b.wav", "all.wav"))
    assert spans(made) == [
        ("a.wav#0", 1, 1, ("owl",)),
        ("all.wav#0", 1, 1, ("lark",)),
        ("b.wav#0", 1, 1.5, ("wren",)),
        ("b.wav#1", 3, 1, ("wren",)),
    ]
    assert kinds(list(made.problems)) == [("missing_file", "")]
    assert made.problems[0].path == str(tmp_path / "gone.wav")
    assert f"no recording gone.wav in {tmp_path} or its subfolders" in made.problems[0].message


def test_paths_of_another_machine(tmp_path: Path) -> None:
    header = NAMED.replace("Begin File", "Begin Path")
    table(tmp_path / "1.txt", header, row(1, 2, "owl", r"D:\field\SITE2\a.wav", ""), row(3, 4, "owl", "/x/site1/a.wav"))
    made = listed(annotation_tables, tree(tmp_path, "site1/a.wav", "site2/a.wav"))
    assert spans(made) == [("site1/a.wav#0", 3, 1, ("owl",)), ("site2/a.wav#0", 1, 1, ("owl",))]


def test_what_is_there_twice_is_taken_once(tmp_path: Path) -> None:
    table(
        tmp_path / "a.Table.1.selections.txt", HEADER,
        row(1, 2, "owl", view="Waveform 1"), row(1, 2, "owl"), row(1, 2, "wren", number=2),
    )  # fmt: skip
    table(tmp_path / "a.Table.2.selections.txt", HEADER, row(1, 2, "owl"), row(5, 6, "owl"))
    made = listed(annotation_tables, tree(tmp_path, "a.wav"))
    assert spans(made) == [("a.wav#0", 1, 1, ("owl",)), ("a.wav#1", 1, 1, ("wren",)), ("a.wav#2", 5, 1, ("owl",))]
    assert made.notes[0] == "2 repeated annotations, each used once"


@pytest.mark.parametrize(
    ("encoding", "guessed"),
    [("utf-8", False), ("utf-8-sig", False), ("utf-16", False), ("cp1252", True), ("utf-16-be", False)],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings(tmp_path: Path, encoding: str, guessed: bool, end: str) -> None:
    text = f"{HEADER}{end}{row(1, 2, 'Grünspecht')}{end}"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    made = listed(annotation_tables, tree(tmp_path, "a.wav"))
    assert [c.labels for c in made.clips] == [("Grünspecht",)]
    said = f"{tmp_path}/a.txt: neither UTF-8 nor UTF-16; read as Windows-1252"
    assert (said in made.notes) == guessed


def test_columns_of_labels(tmp_path: Path) -> None:
    path = table(tmp_path / "a.txt", HEADER.replace("Species", "Common Name\tKind"), row(1, 2, "Tawny Owl", "hoot"))
    tree(tmp_path, "a.wav")
    assert listed(annotation_tables, tmp_path).clips[0].labels == ("Tawny Owl",)
    assert listed(annotation_tables, tmp_path, "--label-column", "kind").clips[0].labels == ("hoot",)
    with pytest.raises(UserError) as error:
        listed(annotation_tables, tmp_path, "--label-column", "Kinds")
    assert str(error.value) == f'{path}, line 1: no column "Kinds"; did you mean "Kind"?'
    table(path, HEADER.replace("Species", "Notes"), row(1, 2, "x"))
    with pytest.raises(UserError) as error:
        listed(annotation_tables, tmp_path)
    assert str(error.value) == (
        f"{path}: no label column; use --label-column with one of Selection, View, Channel, Begin Time (s), "
        "End Time (s), Low Freq (Hz), High Freq (Hz), Notes, or --label NAME"
    )
    assert listed(annotation_tables, tmp_path, "--label", "call").clips[0].labels == ("call",)


def test_annotations_without_label_or_length(tmp_path: Path) -> None:
    table(
        tmp_path / "a.txt", HEADER, row(1, 2), row(3, 3, "owl"), row(5, 4, "owl"), row(-1, 4, "owl"), row(6, 7, "owl")
    )
    made = listed(annotation_tables, tree(tmp_path, "a.wav"))
    assert spans(made) == [("a.wav#2", 6, 1, ("owl",))]
    path = tmp_path / "a.txt"
    assert [(p.kind, p.message) for p in made.problems] == [
        ("no_label", f"{path}, line 2: 1 s to 2 s has no label; give it one, or use --label NAME"),
        ("bad_span", f"{path}, line 4: 5 s to 4 s is not a valid span; left out"),
        ("bad_span", f"{path}, line 5: -1 s to 4 s is not a valid span; left out"),
        ("bad_span", f"{path}, line 3: the annotation at 3 s has zero length; use --window-s"),
    ]
    assert not any(p.fatal for p in made.problems)
    assert spans(listed(annotation_tables, tmp_path, "--label", "?"))[0] == ("a.wav#0", 1, 1, ("?",))


def test_other_text_is_left_out(tmp_path: Path) -> None:
    table(tmp_path / "README.txt", "Recorded in 2020.", "1\t2\towl")
    table(tmp_path / "none.txt")
    table(tmp_path / "a.txt", "1\t2\towl")
    made = listed(annotation_tables, tree(tmp_path, "a.wav"))
    assert kinds(list(made.problems)) == [("not_annotations", "")] * 2
    assert made.problems[0].message == f"{tmp_path}/README.txt: neither a Raven nor an Audacity table; left out"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"), ("\n \n", "empty"), ("1\t2", "audacity"), ("\n1,5\t2,5\tx", "audacity"), ("1\tx", ""),
        ("1 2 owl", ""), ("a,b", ""), ("Begin Time (s)\tx", "raven"), ("selection\tVIEW\tx", "raven"), ("inf\t2", ""),
    ],
)  # fmt: skip
def test_kinds_of_text(text: str, kind: str) -> None:
    assert table_kind(text) == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace("End Time (s)", "End Time") + "\n",
         'line 1: no column "End Time (s)"; did you mean "End Time"?'),
        (f"{HEADER}\n{row(1, 2, 'owl').replace('1000', 'x', 1).replace('2', 'two', 1)}\n",
         'line 2: End Time (s) = "two": expected seconds'),
        (f"{HEADER}\n{row(1, 2, 'owl')}\tmore\n", "line 2: found 9 values, expected 8 (Selection, View, "),
        (f"{NAMED}\n{row(1, 2, 'owl', 'a.wav', 'x')}\n", 'line 2: File Offset (s) = "x": expected seconds'),
        ("1\t2\towl\nowl\t1\t2\n", 'line 2: "owl\t1\t2": expected start, end and label, separated by tabs'),
        ("1\t2\n3\n", 'line 2: "3": expected start, end and label, separated by tabs'),
    ],
)  # fmt: skip
def test_mistakes_in_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tree(tmp_path, "a.wav") / "a.txt"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        listed(annotation_tables, tmp_path)
    assert str(error.value).startswith(f"{path}, {message}")


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"/a.txt: cannot be read \(No such file or directory\)"):
        listed(annotation_tables, tree(tmp_path, "a.wav"))


def test_nothing_to_list(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a.wav", "b.md")
    with pytest.raises(UserError) as error:
        listed(annotation_tables, root)
    assert str(error.value) == (
        f"{root}: no tables in this folder or its subfolders; expected Raven or Audacity files (.txt, .tsv)"
    )
    with pytest.raises(UserError, match=r'rot: no such file or folder; did you mean "root"\?'):
        listed(annotation_tables, tmp_path / "rot")
    path = table(root / "b.txt", "1\t2\towl")
    with pytest.raises(UserError, match=r'--media-root .*/roof: no such folder; did you mean "root"\?'):
        listed(annotation_tables, root, "--media-root", str(tmp_path / "roof"))
    with pytest.raises(UserError) as error:
        listed(annotation_tables, root)
    assert str(error.value) == (
        f"{root}: no annotations that could become clips in 1 tables; the first problem: {path}: "
        f"no recording b.* in {root} or its subfolders (1 annotations)"
    )
    with pytest.raises(UserError) as error:
        listed(annotation_tables, path)  # one table
    assert str(error.value).startswith(f"{path}: no annotations that could")
    tree(root, "b.wav")
    assert [c.id for c in listed(annotation_tables, path).clips] == ["b.wav#0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window-s", "0"], "--window-s 0.0: expected a number above 0"),
        (["--window-s", "nan"], "--window-s nan: expected a number above 0"),
        (
            ["--window-s", "2", "--hop-s", "3"],
            "--hop-s 3.0: leaves gaps between windows; expected at most --window-s 2.0",
        ),
        (["--hop-s", "3"], "--hop-s 3.0: needs --window-s"),
        (["--background", "noise"], "--background noise: needs --window-s"),
        (["--min-overlap", "0"], "--min-overlap 0.0: expected a number above 0"),
        (["--min-overlap", "1.5"], "--min-overlap 1.5: expected a fraction of at most 1"),
        (
            ["--hold-out", "every:3"],
            '--hold-out "every:3": would put parts of a recording in both splits; use none or fraction:F',
        ),
        (["--hold-out", "fraction:2"], "0 < F < 1"),
        (["--hold-out", "fraction:0.5"], "each of the 1 recordings is the only one of some class; expected several"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, words: list[str], message: str) -> None:
    table(tmp_path / "a.txt", "1\t2\towl")
    with pytest.raises(UserError) as error:
        listed(annotation_tables, tree(tmp_path, "a.wav"), *words)
    assert message in str(error.value)


def test_labels_of_clips_that_overlap(tmp_path: Path) -> None:
    lines = ["0\t2\twren", "1\t3\towl", "1.9\t2.9\tlark", "0\t10\tcrow"]
    table(tmp_path / "a.txt", *lines)
    made = listed(annotation_tables, tree(tmp_path, "a.wav"), "--min-overlap", "0.5")
    assert [c.labels for c in made.clips] == [
        ("wren", "crow", "owl"),
        ("crow", "wren", "owl", "lark"),
        ("owl", "wren", "crow", "lark"),
        ("lark", "crow", "owl"),
    ], "its own first"
    assert made.notes[-1] == (
        "each annotation is a clip with its label, and the labels of all annotations with at least 0.5 of their "
        "length in the clip, or that cover at least 0.5 of it"
    )


def test_a_few_windows() -> None:
    rule = Windows(window_s=2, hop_s=2, share=0.5, background="noise")
    given = [
        Annotation(0.5, 0.7, "wren", Path("t"), 1),  # short, all of it in the first
        Annotation(1.0, 5.0, "owl", Path("t"), 2),  # half of the first, all of the second, half of the third
        Annotation(7.9, 8.9, "lark", Path("t"), 3),  # 0.1 in the fourth, 0.9 in the fifth
        Annotation(12.0, 12.0, "crow", Path("t"), 4),  # a point, in the seventh
        Annotation(12.5, 12.6, "", Path("t"), 5),
        Annotation(14.5, 14.6, "", Path("t"), 6),
        Annotation(19.0, 19.0, "late", Path("t"), 7),
    ]
    made = cut(Clip("a", audio=Path("a.wav"), duration_s=19.0), given, rule)
    assert [(c.id, c.start_s, c.duration_s, c.labels) for c in made[:-1]] == [
        ("a#0", 0, 2, ("wren", "owl")),
        ("a#1", 2, 2, ("owl",)),
        ("a#2", 4, 2, ("owl",)),
        ("a#4", 8, 2, ("lark",)),  # the one before touches it and gets no label
        ("a#5", 10, 2, ("noise",)),
        ("a#6", 12, 2, ("crow",)),
        ("a#8", 16, 2, ("noise",)),  # the one before touches what has no label
        ("a#9", 17, 2, ("noise",)),  # ends with the recording
    ]
    assert (made[-1].id, made[-1].start_s, made[-1].labels) == ("a, t line 7", 19.0, ("late",))
    plain = cut(Clip("a", audio=Path("a.wav"), duration_s=18.0), given, Windows(2, 2, 0.5, ""))
    assert [c.id for c in plain if "#" in c.id] == ["a#0", "a#1", "a#2", "a#4", "a#6"]
    strict = cut(Clip("a", audio=Path("a.wav"), duration_s=18.0), given[:3], Windows(2, 2, 1.0, ""))
    assert [(c.id, c.labels) for c in strict] == [("a#0", ("wren",)), ("a#1", ("owl",))]


@pytest.mark.parametrize(
    ("duration_s", "hop_s", "expected"),
    [
        (10.0, 2.0, [0, 2, 4, 6, 8]),
        (10.05, 2.0, [0, 2, 4, 6, 8]),
        (10.5, 2.0, [0, 2, 4, 6, 8, 8.5]),
        (9.9999999, 2.0, [0, 2, 4, 6, 8]),
        (5.0, 1.0, [0, 1, 2, 3]),
        (2.0, 2.0, [0]),
        (0.5, 2.0, [0]),
    ],
)
def test_where_windows_start(duration_s: float, hop_s: float, expected: list[float]) -> None:
    assert window_starts(duration_s, 2.0, hop_s) == pytest.approx(expected)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_annotation_is_lost(data: st.DataObject) -> None:
    duration_s = data.draw(st.floats(0.5, 40))
    window_s = data.draw(st.floats(0.3, 12))
    hop_s = window_s * data.draw(st.sampled_from([1.0, 0.5, 0.3]))
    begin_s = data.draw(st.floats(0, duration_s - 0.4))
    end_s = data.draw(st.floats(begin_s + 2 * LONGEST_REMAINDER_S, duration_s))
    one = Annotation(begin_s, end_s, "owl", Path("t"), 1)
    rule = Windows(window_s, hop_s, 0.5, "noise")
    made = cut(Clip("a", audio=Path("a.wav"), duration_s=duration_s), [one], rule)
    assert any(c.labels == ("owl",) for c in made)
    for clip in made:
        last_s = clip.start_s + clip.duration_s
        assert last_s <= duration_s + 1e-9
        assert clip.duration_s == pytest.approx(min(window_s, duration_s))
        if clip.labels == ("noise",):
            assert last_s <= begin_s + 1e-5 or clip.start_s >= end_s - 1e-5


def clips_of(*recordings: str) -> list[Clip]:
    """A recording for each word, a clip of it for each letter."""
    return [Clip(f"{k}#{a}", labels=(a,), group=str(k)) for k, word in enumerate(recordings) for a in word]


def test_recordings_are_held_out_whole() -> None:
    clips = clips_of(*["ab"] * 6, *["bc"] * 4)
    made = hold_out(clips, fraction=0.3)
    held = {c.group for c in made if c.split == "test"}
    assert len(held) == 3
    assert {c.group for c in made if c.split == "train"}.isdisjoint(held)
    assert {c.labels for c in made if c.split == "train"} == {("a",), ("b",), ("c",)}
    turned = hold_out(clips[::-1], fraction=0.3)
    assert {c.group for c in turned if c.split == "test"} == held
    assert {c.group for c in hold_out(clips_of("ab", "a", "b"), fraction=0.9) if c.split == "test"} in (
        {"0"},
        {"1", "2"},
    )
    with pytest.raises(UserError) as error:
        hold_out(clips_of("a", "b", "c"), fraction=0.5)
    assert str(error.value) == (
        "--hold-out fraction:0.5: each of the 3 recordings is the only one of some class; expected several recordings "
        "per class, or --hold-out none"
    )


def test_from_end_to_end(tmp_path: Path) -> None:
    root = tmp_path / "field"
    for k, name in enumerate("abcd"):
        wav(root / f"{name}.wav", 5 + k, seed=k)
        table(root / f"{name}.txt", "0.25\t0.75\towl", "3\t4\twren", f"{5.5 + k}\t{6 + k}\tlate")
    media(root / "e.mp4", 4)
    table(root / "e.selections.txt", HEADER)
    made = listed(annotation_tables, root, "--hold-out", "fraction:0.5")
    manifest, clips, problems = probed(made, tmp_path / "m.parquet")
    assert manifest.splits == {"train": 4, "test": 4}
    assert problems == {"bad_span": 4, "lost_class": 1}
    assert {(c.start_sample, c.num_samples) for c in clips.values()} == {(2000, 4000), (24000, 8000)}

    words = ["--window-s", "2", "--background", "noise", "--hold-out", "fraction:0.5"]
    made = listed(annotation_tables, root, *words)
    assert made.notes[-1] == (
        "windows of 2 s every 2 s with the labels of all annotations with at least 0.5 of their length in the window, "
        'or that cover at least 0.5 of it; windows without annotations are of class "noise"'
    )
    manifest, clips, problems = probed(made, tmp_path / "w.parquet")
    assert problems["bad_span"] == 4
    assert problems["split_leak"] == problems["duplicate_media"] == 0
    assert [clips[f"b.wav#{k}"].labels for k in range(3)] == [("owl",), ("wren",), ("noise",)]
    assert [clips[f"a.wav#{k}"].start_sample for k in range(3)] == [0, 16000, 24000]
    assert {clips[f"e.mp4#{k}"].labels for k in range(2)} == {("noise",)}, (
        "a table of nothing says that there is nothing"
    )
    assert clips["e.mp4#1"].start_frame == 20
    assert {len({c.split for c in clips.values() if c.group == name}) for name in "abcde"} == {1}
    assert sum(manifest.splits.values()) == len(clips) == 3 + 3 + 4 + 4 + 2


def test_real_tables(realdata: Path, tmp_path: Path) -> None:
    folder = realdata / "annotations"
    if not folder.is_dir():
        pytest.skip("no real tables here")
    text = (folder / "raven_MSD-0003.selections.txt").read_text()
    found = [annotation for _, annotation in read_raven(text, Path("t"))]
    assert Counter(one.label for one in found) == {"WOTH": 4, "EATO": 4, "LOWA": 1, "": 1}
    assert (found[0].begin_s, found[0].end_s) == (1.897648165999982, 4.110570810999974)
    assert list(read_raven((folder / "raven_empty.selections.txt").read_text(), Path("t"))) == []
    text = (folder / "audacity_spinetail.txt").read_text()
    assert Counter(one.label for one in read_audacity(text, Path("t"))) == {"SP": 14, "CRER": 4}

    (tmp_path / "spinetail.txt").write_text(text)
    made = listed(annotation_tables, tmp_path, "--media-root", str(realdata / "audio"), "--window-s", "2")
    manifest, clips, problems = probed(made, tmp_path / "m.parquet")
    assert manifest.classes == ("CRER", "SP")
    assert all(c.has_audio and c.audio and c.audio.name == "spinetail.wav" for c in clips.values())
    assert set(problems) == {"no_table"}, "the table is of this recording"
