"""Encoders give the same bytes: each time, wherever memory lies, at every level of x264's assembly."""

import json
import re
from pathlib import Path

import av
import numpy as np
import pytest

import fastav
from fastav.__main__ import main
from fastav.core.errors import UserError
from fastav.data.manifest import Manifest, write_manifest
from fastav.media.x264 import SAME_BYTES, same_bytes
from fastav.pack import encode as pack_encode
from fastav.pack.build import build_pack
from fastav.pack.settings import PackSettings
from fastav.synth import render as synth_render
from tests.helpers.encoded import KINDS, SIZES, digests, encode, fits, pictures, poisoned
from tests.helpers.media import write_media
from tests.helpers.plans import clip_of

BEYOND = ("AVX", "FMA", "XOP", "BMI", "LZCNT")  # what x264 would name, had it more than x86-64-v2
ON_X86 = pytest.mark.skipif("asm=" not in SAME_BYTES, reason="no x86-64 CPU")
SMALL = tuple(size for size in SIZES if size != (448, 256))


def with_parameters(monkeypatch, text):
    for module in (synth_render, pack_encode):
        monkeypatch.setattr(module, "SAME_BYTES", text)


@pytest.mark.parametrize(("size", "times"), [((448, 256), 2), *((size, 4) for size in SMALL)])
def test_a_clip_encoded_again_is_the_same(size, times):
    found = digests(times, frames=12, sizes=(size,), kinds=("synth", "balanced"))
    assert {name for name, these in found.items() if len(these) != 1} == set()
    assert found


def test_padding_is_there_to_be_poisoned_and_changes_nothing():
    padded = 0
    for size in ((96, 96), (64, 48), (144, 80)):
        clip = pictures(*size, 8)
        frame = av.VideoFrame.from_ndarray(clip[0], "rgb24").reformat(format="yuv420p")
        padded += any(plane.line_size > plane.width for plane in frame.planes)
        clean = encode("balanced", clip)
        assert all(encode("balanced", clip, np.random.default_rng(seed)) == clean for seed in range(3))
        shown = frame.to_ndarray()
        assert np.array_equal(poisoned(frame, np.random.default_rng(0)).to_ndarray(), shown)
    assert padded


@ON_X86
@pytest.mark.parametrize("kind", KINDS)
def test_every_level_of_assembly_gives_what_plain_c_gives(kind, monkeypatch):
    clips = [pictures(*size, 12) for size in SMALL if fits(kind, size)]
    straight = [encode(kind, clip) for clip in clips]
    for level in ("SSE2", "SSSE3", "0"):
        with_parameters(monkeypatch, f"cpu-independent=1:asm={level}")
        assert [encode(kind, clip) for clip in clips] == straight, level
    with_parameters(monkeypatch, "cpu-independent=1")  # all that this CPU has
    assert [encode(kind, clip) for clip in clips] == straight


@ON_X86
def test_without_the_switch_assembly_changes_the_bytes(monkeypatch):
    """So the test above looks at something."""
    clip = pictures(96, 96, 12)
    made = []
    for level in ("SSE4.2", "0"):
        with_parameters(monkeypatch, f"asm={level}")
        made.append(encode("balanced", clip))
    assert made[0] != made[1]


@ON_X86
@pytest.mark.parametrize("kind", ["synth", "balanced"])
def test_x264_says_that_it_uses_no_more_than_sse42(kind):
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture(local=False) as said:
            encode(kind, pictures(64, 48, 2))
    finally:
        av.logging.set_level(None)
    used = [re.findall(r"using cpu capabilities: (.*)", text) for _, _, text in said]
    (capabilities,) = [names for (names,) in (found for found in used if found)]
    assert "SSE4.2" in capabilities
    assert not [name for name in BEYOND if name in capabilities]


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64", "ppc64le", ""])
def test_only_x86_is_told_of_an_instruction_set_and_of_none_that_fastav_can_run_without(machine):
    told = dict(pair.split("=") for pair in same_bytes(machine).split(":"))
    assert told.pop("cpu-independent") == "1"
    assert told == ({"asm": "SSE4.2"} if machine in ("x86_64", "AMD64") else {})


@ON_X86
def test_the_named_instruction_set_is_one_that_this_cpu_has():
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("the system does not say what the CPU has")
    assert {"ssse3", "sse4_1", "sse4_2"} <= set(info.read_text().split("flags", 1)[1].split("\n", 1)[0].split())


def test_every_h264_encoder_is_held_to_it():
    encoding = [
        path for path in Path(fastav.__file__).parent.rglob("*.py") if '"libx264"' in path.read_text(encoding="utf-8")
    ]
    assert len(encoding) >= 3
    assert [path.name for path in encoding if "SAME_BYTES" not in path.read_text(encoding="utf-8")] == []


def test_packs_of_before_are_read_but_not_gone_on_with(tmp_path):
    """Else the shards of half a pack would hold what x264 gave before, the others what it gives now."""
    manifest = write_manifest(tmp_path / "one.parquet", [clip_of(write_media(tmp_path / "v.mp4", frames=8))])
    build_pack(manifest, tmp_path / "pack", PackSettings(), workers=1)
    file = tmp_path / "pack" / "pack.json"
    told = json.loads(file.read_text())
    assert told["encoders"].pop("x264") == "cpu-independent"
    file.write_text(json.dumps(told))
    assert main(["pack", "--verify", str(tmp_path / "pack")]) == 0
    assert Manifest.open(tmp_path / "pack" / "manifest.parquet").clip(0).num_frames == 8
    for finished in (True, False):
        file.write_text(json.dumps(told | {"finished": finished}))
        with pytest.raises(UserError, match=r"contains a different pack \(x264 is None, requested 'cpu-independent'\)"):
            build_pack(manifest, tmp_path / "pack", PackSettings(), workers=1)
