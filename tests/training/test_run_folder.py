"""The run folder survives kills and repeats itself on resume."""

from __future__ import annotations

import json

import pytest

from fastav.core.errors import MediaError, UserError
from fastav.training.run_folder import RunFolder


def test_metrics_are_cut_back_to_the_resumed_step_and_a_half_line_is_dropped(tmp_path):
    run = RunFolder(tmp_path / "run")
    for step in (10, 20, 30):
        run.append_metrics({"step": step, "loss": 1 / step})
    with run.metrics.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [row["step"] for row in run.read_metrics()] == [10, 20, 30]
    run.drop_rows_after(20)
    assert [row["step"] for row in run.read_metrics()] == [10, 20]


def test_a_broken_clip_is_listed_once_with_its_reason(tmp_path):
    run = RunFolder(tmp_path)
    error = MediaError("a,b.mp4", 'says "no"', "video")
    run.skip("a,b", error, 3)
    run.skip("a,b", error, 4)
    run.skip("c", MediaError("c.mp4", "gone"), 9)
    again = RunFolder(tmp_path)
    again.skip("a,b", error, 12)
    assert [(row["id"], row["stage"], row["reason"], row["step"]) for row in again.read_skipped()] == [
        ("a,b", "video", 'says "no"', "3"),
        ("c", "open", "gone", "9"),
    ]
    again.drop_skipped_after(5)
    assert [row["id"] for row in again.read_skipped()] == ["a,b"]
    again.skip("c", MediaError("c.mp4", "gone"), 7)
    assert [row["step"] for row in again.read_skipped()] == ["3", "7"]


def test_only_the_writer_writes(tmp_path):
    RunFolder(tmp_path / "main")
    other = RunFolder(tmp_path / "main", writer=False)
    other.append_metrics({"step": 1})
    other.write_status("running")
    other.write_environment()
    other.skip("a", MediaError("a", "b"), 1)
    assert list((tmp_path / "main").iterdir()) == []


def test_status_and_environment_are_readable(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_status() == {}
    run.write_status("stopped", step=7, signal="SIGTERM")
    assert run.read_status()["state"] == "stopped"
    assert run.read_status()["step"] == 7
    run.write_environment(device="cpu")
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["versions"]["torch"]


def test_outside_a_checkout_the_revision_that_the_image_names_is_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no git, as in the image
    RunFolder(tmp_path / "plain").write_environment()
    assert json.loads((tmp_path / "plain" / "env.json").read_text())["git"] is None
    monkeypatch.setenv("FASTAV_REVISION", "abc")
    RunFolder(tmp_path / "image").write_environment()
    assert json.loads((tmp_path / "image" / "env.json").read_text())["git"]["commit"] == "abc"


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run folder"):
        RunFolder(tmp_path / "file" / "run")


def test_what_other_ranks_skip_reaches_the_writers_list_once(tmp_path):
    main, other = RunFolder(tmp_path), RunFolder(tmp_path, writer=False)
    main.skip("a", MediaError("a.mp4", "gone"), 1)
    other.skip("a", MediaError("a.mp4", "gone"), 1)
    other.skip("b", MediaError("b.mp4", "cut"), 2)
    main.add_skipped(other.pop_skipped())
    assert other.pop_skipped() == []
    assert [row["id"] for row in main.read_skipped()] == ["a", "b"]
    with main.skipped.open("a") as file:
        file.write("c,c.mp4,vid")
    assert [row["id"] for row in main.read_skipped()] == ["a", "b"]
    main.drop_skipped_after(1)
    assert [row["id"] for row in main.read_skipped()] == ["a"]
