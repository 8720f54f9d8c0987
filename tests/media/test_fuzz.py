"""Damaged files and packs: each is named or right, the others are untouched; thousands of them in `make acceptance`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers import fuzz
from tests.helpers.media import numbered, write_media
from tests.helpers.plans import clip_of

COUNT = 20


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Whole files, indexed, packed and loaded."""
    return fuzz.make_whole(tmp_path_factory.mktemp("whole"), 2 * COUNT)


@pytest.fixture(scope="session")
def seeds(whole):
    return {path.name.partition("_")[2]: path for path in whole.files}


def test_damage_is_never_none_and_always_the_same(seeds):
    data = seeds["bframes.mp4"].read_bytes()
    one, two = (np.random.default_rng(3) for _ in range(2))
    for _ in range(200):
        made = fuzz.damage(data, one)
        assert made != data
        assert made == fuzz.damage(data, two)


def test_other_pictures_than_ffmpeg_shows_are_seen(seeds, tmp_path, monkeypatch):
    clip = clip_of(seeds["bframes.mp4"])
    assert fuzz.altered(clip) == ""
    assert fuzz.unlike(clip, replace(clip, video=seeds["silent.mp4"])) == ""  # the same pictures in another coding
    other = write_media(tmp_path / "other.mp4", frames=24, picture=lambda *of: 255 - numbered(*of))
    assert "off by up to" in fuzz.unlike(clip, clip_of(other))
    shown = fuzz.shown_by_ffmpeg(str(other))
    monkeypatch.setattr(fuzz, "shown_by_ffmpeg", lambda path: shown)
    assert "of 24" in fuzz.altered(clip)


@pytest.mark.parametrize("route", [fuzz.fuzz_raw, fuzz.fuzz_pack])
def test_damaged_ones_are_named_or_right(route, whole, tmp_path):
    found = route(tmp_path, COUNT, 0, whole)
    assert found["files"] >= COUNT
    assert found["untouched"] > 0
    assert not found["silent"]
    assert not found["changed"]
    assert found.get("verify", 1) == 1
    assert not found.get("unverified")
