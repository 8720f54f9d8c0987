"""Atomic writes: the old content survives any failure."""

from __future__ import annotations

import hashlib

import pytest

from fastav.core.atomic_files import sha256, write_text, written_beside


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "status.json"
    write_text(file, "old")

    def fail_halfway():
        with written_beside(file) as beside:
            beside.write_text("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_halfway()
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_write_replaces_the_whole_file_and_makes_its_folder(tmp_path):
    file = tmp_path / "deep" / "er" / "x.txt"
    write_text(file, "a longer first text")
    write_text(file, "grün")
    assert file.read_text(encoding="utf-8") == "grün"


def test_sha256_is_that_of_the_content(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc" * 100_000)
    assert sha256(file) == hashlib.sha256(b"abc" * 100_000).hexdigest()
