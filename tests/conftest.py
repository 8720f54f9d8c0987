"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real media; tests that want it skip where it is absent."""
    folder = Path(os.environ.get("FASTAV_REALDATA", Path(__file__).parents[2] / "shared" / "realdata"))
    if not folder.is_dir():
        pytest.skip("no real media here (set FASTAV_REALDATA)")
    return folder
