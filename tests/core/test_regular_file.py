"""Special files are refused at once, whatever they are called."""

from __future__ import annotations

import os
import socket

import pytest

from fastav.core.regular_file import check_regular


def test_regular_files_and_links_to_them_pass(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    (tmp_path / "b.wav").symlink_to(tmp_path / "a.wav")
    check_regular(tmp_path / "a.wav")
    check_regular(str(tmp_path / "b.wav"))
    with (tmp_path / "a.wav").open("rb") as file:
        check_regular(file.fileno())


def test_everything_else_is_named(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "lost.wav").symlink_to(tmp_path / "gone.wav")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        server.bind("socket.wav")
        reasons = {
            "pipe": "is a named pipe, expected a regular file", "zero": "is a device, expected a regular file",
            "folder": "is a folder, expected a file", "lost": "No such file or directory",
            "socket": "is a socket, expected a regular file",
        }  # fmt: skip
        for name, reason in reasons.items():
            with pytest.raises(OSError, match=reason):
                check_regular(tmp_path / f"{name}.wav")
