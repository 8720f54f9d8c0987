"""Packing: what comes out for every kind of clip, resuming after a kill, what is refused, and what --verify finds."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fastav.pack.build
from fastav.__main__ import main
from fastav.core.errors import MediaError, UserError
from fastav.data.manifest import Manifest, check, write_manifest
from fastav.media.decoder import DecodeSpec
from fastav.media.packed_clip_decoder import decode_audio
from fastav.media.pyav import PyAV
from fastav.media.shards import ShardReader, ShardReading
from fastav.media.spectrogram import Frontend
from fastav.pack import transcode
from fastav.pack.build import build_pack
from fastav.pack.encode import encode_flac
from fastav.pack.folder import PackFolder, plan_shards
from fastav.pack.quality import psnr_db
from fastav.pack.settings import PackSettings
from fastav.pack.transcode import PackJob, pack_clip
from tests.helpers.media import clicks, number_of, write_media
from tests.helpers.plans import clip_of, plan_of

RATE = 16_000


def packed(path, settings=None, tmp=None, **changes):
    """One clip packed on its own, and how to read it."""
    clip = replace(clip_of(path), **changes)
    manifest = write_manifest(tmp / "one.parquet", [clip])
    made = build_pack(manifest, tmp / "pack", settings or PackSettings(), workers=1)
    return made.clip(0)


def frames_of(clip, numbers, size=None):
    """The planned frames of a packed clip, whole, [T, H, W, 3] when it is square."""
    spec = DecodeSpec(("video",), image_size=size or clip.height)
    plan = plan_of(frames=numbers, crop=(0, 0, clip.width, clip.height))
    return PyAV().build(spec).decode(clip, [plan])[0].frames_TCHW.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A manifest of one clip of each kind, and a broken one."""
    folder = tmp_path_factory.mktemp("mixed")
    write_media(folder / "both.mp4", frames=50, size=(128, 96), wave=clicks(2, [0.3, 1.5]))
    write_media(folder / "silent.mkv", frames=20, size=(96, 128))
    write_media(folder / "sound.wav", wave=clicks(1, [0.5]), audio_codec="pcm_s16le")
    Image.fromarray(np.full((300, 400, 3), 90, np.uint8)).save(folder / "still.png")
    np.save(folder / "mel.npy", np.linspace(-90, 0, 128 * 300, dtype=np.float32).reshape(1, 128, 300))
    clips = [
        clip_of(folder / "both.mp4"),
        replace(clip_of(folder / "both.mp4", 1.0, 0.8), id="piece"),
        clip_of(folder / "silent.mkv"),
        clip_of(folder / "sound.wav"),
    ]
    clips.append(
        replace(
            clips[0],
            id="still",
            video=None,
            audio=None,
            num_samples=0,
            num_frames=1,
            fps=0.0,
            width=400,
            height=300,
            image=folder / "still.png",
            duration_s=0.0,
        )
    )
    clips.append(replace(clips[4], id="mel", image=None, num_frames=0, mel=folder / "mel.npy", num_mel_frames=300))
    (folder / "broken.mp4").write_bytes((folder / "both.mp4").read_bytes()[:4000])
    clips.append(replace(clips[0], id="broken", video=folder / "broken.mp4", audio=folder / "broken.mp4"))
    clips = [replace(c, labels=("a",), split="test" if i % 3 == 2 else "train", row=i) for i, c in enumerate(clips)]
    return write_manifest(folder / "m.parquet", clips)


@pytest.fixture(scope="module")
def pack(mixed, tmp_path_factory):
    out = tmp_path_factory.mktemp("pack") / "p"
    return build_pack(mixed, out, PackSettings(), workers=2)


def by_id(manifest):
    return {clip.id: clip for clip in manifest.clips(range(len(manifest)))}


def test_every_kind_of_clip(mixed, pack):
    clips = by_id(pack)
    assert set(clips) == {"both.mp4", "piece", "silent.mkv", "sound.wav", "still", "mel"}
    assert pack.splits == {"train": 4, "test": 2}
    assert pack.classes == mixed.classes
    assert check(pack) == []
    both = clips["both.mp4"]
    assert (both.num_frames, both.width, both.height, both.video_codec) == (50, 128, 96, "h264")
    assert (both.sample_rate, both.channels, both.audio_codec) == (RATE, 1, "flac")
    assert both.num_samples == pytest.approx(2 * RATE, abs=800)
    assert (both.video, both.audio, both.start_s, both.rotation) == (None, None, 0.0, 0)
    assert clips["piece"].num_frames == 20
    assert clips["piece"].num_samples == pytest.approx(0.8 * RATE, abs=2)
    assert (clips["silent.mkv"].num_samples, clips["silent.mkv"].has_audio) == (0, False)
    assert (clips["sound.wav"].num_frames, clips["sound.wav"].num_samples) == (0, RATE)
    assert (clips["still"].width, clips["still"].height, clips["still"].video_codec) == (341, 256, "jpeg")
    assert clips["mel"].num_mel_frames == 300
    skipped = (pack.root / "skipped.csv").read_text().splitlines()
    assert len(skipped) == 2
    assert "broken.mp4" in skipped[1]


def test_packed_frames_and_sound_are_those_of_the_source(mixed, pack):
    raw, made = by_id(mixed), by_id(pack)
    for name, numbers in (("both.mp4", [0, 7, 8, 30, 49]), ("piece", [0, 3, 19]), ("silent.mkv", [0, 19])):
        shift = 25 if name == "piece" else 0
        pictures = frames_of(made[name], numbers, size=64)
        assert [number_of(picture) for picture in pictures] == [n + shift for n in numbers]
    spec = DecodeSpec(("audio",), window=100)
    for name in ("both.mp4", "piece", "sound.wav", "mel"):
        for start in (0, 40, 90):
            one, two = (
                PyAV().build(spec).decode(c[name], [plan_of(windows=(start,))])[0].mel_WCML for c in (raw, made)
            )
            loud = one > -40  # quieter ones show the rounding to 16 bits
            assert ((one - two)[loud].abs() < (0.5 if name != "mel" else 1e-6)).all()
            assert loud.any() or start
            assert two.shape == (1, 1, 128, 100)


def test_the_mel_of_a_splice_is_that_of_the_whole_clip(pack):
    clip, frontend = by_id(pack)["both.mp4"], Frontend()
    wave = ShardReader(ShardReading()).fetch(clip, None, (0, clip.num_samples)).audio
    from fastav.media.packed_clip_decoder import decode_waveform

    whole = frontend.build().log_mel(decode_waveform(wave, clip, RATE))
    decoder = PyAV().build(DecodeSpec(("audio",), window=60))
    for starts in ((0,), (10,), (150,), (190,), (230,), (0, 120, 190), (249,), (-1, 40), (-1,)):
        found = decoder.decode(clip, [plan_of(windows=starts)])[0].mel_WCML
        for window, start in zip(found, starts, strict=True):
            real = 0 if start < 0 else min(60, whole.shape[-1] - start)
            assert np.allclose(window[..., :real], whole[..., max(start, 0) : max(start, 0) + real], atol=1e-3), starts
            assert (window[..., real:] == frontend.floor_db).all()


def test_rotation_is_baked_in(tmp_path):
    def corner(number, width, height):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[: height // 2, : width // 2] = 255
        return picture

    for rotation, place in ((90, (1, 0)), (180, (1, 1)), (270, (0, 1))):
        folder = tmp_path / str(rotation)
        folder.mkdir()
        path = write_media(folder / "r.mp4", frames=4, size=(128, 96), rotation=rotation, picture=corner)
        clip = packed(path, tmp=folder)
        raw = clip_of(path)
        assert (clip.width > clip.height) == (raw.width > raw.height)
        spec = DecodeSpec(("video",), image_size=32)
        one, two = (
            PyAV().build(spec).decode(c, [plan_of(crop=(0, 0, c.width, c.height))])[0].frames_TCHW[0].float()
            for c in (raw, clip)
        )
        assert (one - two).abs().mean() < 3
        half = two.mean(0)
        quarter = half[place[0] * 16 : place[0] * 16 + 16, place[1] * 16 : place[1] * 16 + 16]
        assert quarter.mean() > 200


def test_a_variable_rate_becomes_constant(tmp_path):
    times = [0, 40, 80, 400, 440, 480, 800, 840, 880, 920]  # ms; the mean rate is about 10 Hz
    path = write_media(tmp_path / "v.mkv", times_ms=times, size=(96, 64))
    raw = clip_of(path)
    clip = packed(path, tmp=tmp_path)
    assert clip.num_frames == raw.num_frames == 10
    shown = [number_of(picture) for picture in frames_of(clip, list(range(10)), size=64)]
    ticks_ms = np.arange(10) * 1000 * raw.duration_s / 10
    expected = [max(i for i, t in enumerate(times) if t <= tick + 500 * raw.duration_s / 10) for tick in ticks_ms]
    assert shown == expected


def test_a_lower_frame_rate(tmp_path):
    path = write_media(tmp_path / "v.mp4", frames=50, size=(96, 64))
    clip = packed(path, PackSettings(fps=5.0), tmp=tmp_path)
    assert (clip.num_frames, clip.fps) == (10, 5.0)
    assert [number_of(p) for p in frames_of(clip, list(range(10)), size=64)] == [
        pytest.approx(5 * i, abs=2) for i in range(10)
    ]


def test_keep_preserves_channels_rate_and_width(tmp_path):
    rng = np.random.default_rng(0)
    wave = rng.uniform(-0.9, 0.9, (2, 30_000)).astype(np.float32)
    path = write_media(tmp_path / "s.wav", wave=wave, rate=48_000, audio_codec="pcm_s24le")
    clip = packed(path, PackSettings(audio="keep"), tmp=tmp_path)
    assert (clip.channels, clip.sample_rate, clip.num_samples) == (2, 48_000, 30_000)
    with tarfile.open(clip.shard) as tar:
        flac = next(m for m in tar if m.name.endswith(".flac"))
        (tmp_path / "x.flac").write_bytes(tar.extractfile(flac).read())

    def samples(file):
        with av.open(str(file)) as container:
            parts = [f.to_ndarray().reshape(-1, 2) for f in container.decode(audio=0)]
        return np.concatenate(parts)

    assert np.array_equal(samples(tmp_path / "x.flac") >> 8, samples(path) >> 8)


def test_flac_is_lossless_for_16_bits():
    whole = np.random.default_rng(1).integers(-(2**15), 2**15, 10_000).astype(np.int16)
    units = encode_flac((whole / 2**15).astype(np.float32)[None], RATE, 16)
    assert len(units) == 1 + 3
    with av.open(__import__("io").BytesIO(b"".join(data for data, _ in units))) as container:
        decoded = np.concatenate([f.to_ndarray().ravel() for f in container.decode(audio=0)])
    assert np.array_equal(decoded, whole)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((640, 360), (448, 256)), ((1920, 1080), (448, 256)), ((1080, 1920), (256, 448)), ((640, 480), (336, 256)),
        ((512, 512), (256, 256)), ((426, 240), (432, 240)), ((64, 64), (64, 64)), ((320, 180), (320, 176)),
        ((640, 272), (608, 256)),
    ],
)  # fmt: skip
def test_sizes(given, expected):
    assert PackSettings().video_size(*given) == expected


def test_pack_describes_itself(mixed, pack):
    told = json.loads((pack.root / "pack.json").read_text())
    assert told["finished"]
    assert told["settings"]["preset"] == "balanced"
    assert told["totals"]["clips"] == 6
    assert told["totals"]["skipped"] == 1
    assert told["totals"]["bytes"] == sum(p.stat().st_size for p in (pack.root / "shards").glob("*.tar"))
    assert 30 < told["quality"]["psnr_y_db"] < 60
    assert told["quality"]["worst_psnr_y_db"] <= told["quality"]["psnr_y_db"]
    assert 0.8 < told["quality"]["ssim_y"] <= 1
    assert not (pack.root / "parts").exists()
    assert json.loads(pack.metadata["pack"])["codec"] == "h264"


def test_the_index_names_every_byte(mixed, pack):
    table = pq.read_table(pack.root / "index.parquet").to_pylist()
    assert {entry["id"] for entry in table} == set(by_id(pack))
    for entry in table:
        clip = by_id(pack)[entry["id"]]
        raw = Path(clip.shard).read_bytes()
        with tarfile.open(clip.shard) as tar:
            for member in entry["members"]:
                assert (
                    raw[member["offset"] : member["offset"] + member["size"]] == tar.extractfile(member["name"]).read()
                )
        units = ShardReader(ShardReading()).units(clip)
        assert entry["unit_offset"] == units.at_U.tolist()
        with tarfile.open(clip.shard) as tar:
            told = json.loads(tar.extractfile(f"{entry['key']}.json").read())
        assert (told["id"], told["labels"]) == (clip.id, list(clip.labels))
        for source in entry["sources"]:
            file = mixed.root / source["path"]
            assert hashlib.sha256(file.read_bytes()).hexdigest() == source["sha256"]


def test_webdataset_reads_the_shards(pack):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted((pack.root / "shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert {sample["json"]["id"] for sample in samples} == set(by_id(pack))
    for sample in samples:
        assert sample["idx.npy"].dtype == np.uint32
        if "h264" in sample:
            frames = sample["idx.npy"][:, 1] <= 1
            assert sample["idx.npy"][frames, 0].sum() == len(sample["h264"])


def digests(folder):
    names = [
        "index.parquet",
        "manifest.parquet",
        "skipped.csv",
        *(f"shards/{p.name}" for p in (folder / "shards").glob("*.tar")),
    ]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


SMALL = PackSettings(shard_mib=1)


@pytest.fixture(scope="module")
def straight(made, tmp_path_factory):
    """A pack of several shards that was made in one go."""
    return build_pack(Manifest.open(made), tmp_path_factory.mktemp("straight") / "p", SMALL, workers=1).root


def test_a_killed_pack_takes_its_workers_along_and_goes_on_to_the_same_bytes(made, straight, tmp_path, capsys):
    killed = tmp_path / "killed"
    words = ["pack", str(made), str(killed), "--shard-mib", "1", "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "fastav", *words], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(killed.glob("parts/[0-9]*.parquet"))) < 2:
        time.sleep(0.02)
    process.kill()  # itself alone: its worker has packed two shards' clips, and has more to pack
    process.communicate(timeout=60)  # ends when the last process that holds its output does
    assert process.returncode == -signal.SIGKILL, "it was still packing"
    kept = {
        p: p.stat().st_mtime_ns
        for p in killed.glob("shards/[0-9]*.tar")
        if (killed / "parts" / f"{p.stem}.parquet").exists()
    }
    assert len(kept) >= 2
    assert not (killed / "manifest.parquet").exists()
    assert main(words) == 0
    assert "shards were already packed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert digests(killed) == digests(straight)
    assert sorted(p.name for p in killed.rglob(".*.tmp")) == []
    assert main(words) == 0
    assert "is already packed" in capsys.readouterr().out


def test_a_shard_that_was_lost_is_packed_again(made, straight, tmp_path, capsys, monkeypatch):
    manifest = Manifest.open(made)
    out = PackFolder(tmp_path / "lost")
    one, two, *_ = plan_shards(manifest, SMALL)
    each = fastav.pack.build.run_jobs

    def interrupted(*jobs, **options):
        for done in each(*jobs, **options):
            if out.has(two):
                raise KeyboardInterrupt
            yield done

    monkeypatch.setattr(fastav.pack.build, "run_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_pack(manifest, out.path, SMALL, workers=1)
    monkeypatch.undo()
    assert out.has(one)
    (out.path / two.name).unlink()
    build_pack(manifest, out.path, SMALL, workers=1)
    assert "1 of " in capsys.readouterr().out
    assert digests(out.path) == digests(straight)


def test_files_that_are_gone_leave_their_shards_open(tmp_path, capsys):
    here = tmp_path / "media"
    here.mkdir()
    for name in ("a", "b", "c"):
        write_media(here / f"{name}.mp4", frames=12)
    words = ["index", "folder", str(here), "--classes", "file", "--out", str(tmp_path / "m.parquet")]
    assert main(words) == 0
    (here / "b.mp4").rename(tmp_path / "b.mp4")
    pack = ["pack", str(tmp_path / "m.parquet"), str(tmp_path / "p"), "--workers", "1"]
    assert main(pack) == 2
    told = capsys.readouterr().err
    assert "media files cannot be opened (first: " in told
    assert "b.mp4, affected clips: 1)" in told
    assert "--skip-missing" in told
    (tmp_path / "b.mp4").rename(here / "b.mp4")
    assert main(pack) == 0
    assert len(Manifest.open(tmp_path / "p" / "manifest.parquet")) == 3
    (here / "b.mp4").unlink()
    assert main([*pack[:2], str(tmp_path / "q"), "--workers", "1", "--skip-missing"]) == 3  # a third is left out
    assert "1 of 3 clips were skipped, more than --max-broken 0.05 allows" in capsys.readouterr().err
    assert main([*pack[:2], str(tmp_path / "q"), "--skip-missing", "--max-broken", "0.5"]) == 0


def test_damage_that_ffmpeg_calls_an_io_error_is_damage(tmp_path, monkeypatch):
    file = tmp_path / "a.mkv"
    file.write_bytes(b"whatever")

    def fail(order):
        raise MediaError(file, "input/output error", "video") from OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(transcode, "pack_readable", fail)
    assert transcode.pack_clip(None)[2] == "video"
    file.unlink()
    assert transcode.pack_clip(None)[2] == transcode.MISSING


def refused(manifest, out, settings):
    with pytest.raises(UserError) as error:
        build_pack(manifest, out, settings, workers=1)
    return str(error.value)


def test_another_pack_is_never_overwritten(mixed, pack, tmp_path):
    before = digests(pack.root)
    message = refused(mixed, pack.root, PackSettings(preset="fast", fps=5.0))
    assert "contains a different pack (fps is 0.0, requested 5.0; preset is 'balanced', requested 'fast')" in message
    other = write_manifest(tmp_path / "m.parquet", [by_id(mixed)["both.mp4"]])
    assert "sha256 is " in refused(other, pack.root, PackSettings())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    assert "expected a new or empty folder, found thesis.txt" in refused(mixed, tmp_path / "full", PackSettings())
    assert digests(pack.root) == before


def test_packed_clips_are_not_packed_again(pack, tmp_path):
    assert "is the manifest of a pack; pack the manifest of the original media" in refused(
        pack, tmp_path / "twice", PackSettings()
    )
    assert not (tmp_path / "twice").exists()


def test_two_at_once_are_refused(mixed, tmp_path):
    with PackFolder(tmp_path / "p").locked():
        assert "another process is packing" in refused(mixed, tmp_path / "p", PackSettings())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.parquet"], "got 1 path, expected two: MANIFEST OUT"),
        (["--verify", "a", "b"], "got 2 paths, expected one"),
        (["--verify", "nowhere"], "is not a finished pack"),
        (["a.parquet", "o", "--preset", "fats"], 'did you mean "fast"'),
        (["a.parquet", "o", "--workers", "-1"], "--workers -1"),
        (["a.parquet", "o", "--short-side", "8"], "fastav pack --short-side 8: expected int >= 48"),
    ],
)
def test_wrong_words(words, message, capsys):
    assert main(["pack", *words]) == 2
    assert message in capsys.readouterr().err


def test_verify_finds_what_only_other_readers_see(mixed, tmp_path, capsys):
    made = build_pack(mixed, tmp_path / "p", PackSettings(), workers=1)
    shard = Path(made.clip(0).shard)
    whole = shard.read_bytes()
    assert main(["pack", "--verify", str(tmp_path / "p")]) == 0
    with tarfile.open(shard) as tar:
        headers = [member.offset for member in tar if member.name.endswith(".json")]
    for at in (headers[0] + 130, headers[0] + 512 + 5, len(whole) - 3):  # a size, a letter, the padding at the end
        altered = bytearray(whole)
        altered[at] ^= 1
        shard.write_bytes(altered)
        capsys.readouterr()
        assert main(["pack", "--verify", str(tmp_path / "p")]) == 1
        assert "000000.tar: content has changed since it was packed" in capsys.readouterr().out


def test_odd_folders_and_manifests_are_refused(mixed, pack, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "expected a new or empty folder, got a file" in refused(mixed, tmp_path / "file", PackSettings())
    shutil.copytree(pack.root, tmp_path / "p")
    (tmp_path / "p" / "manifest.arrow").unlink()
    data = bytearray((tmp_path / "p" / "manifest.parquet").read_bytes())
    data[4:200] = bytes(196)
    (tmp_path / "p" / "manifest.parquet").write_bytes(data)
    assert main(["pack", "--verify", str(tmp_path / "p")]) == 2
    assert "the manifest is damaged" in capsys.readouterr().err


def test_quiet_recordings_keep_their_24_bits(tmp_path):
    quiet = (3e-5 * np.random.default_rng(0).normal(size=(1, 16_000))).astype(np.float32)
    path = write_media(tmp_path / "q.wav", wave=quiet, rate=RATE, audio_codec="pcm_s24le", layout="mono")
    clip = packed(path, tmp=tmp_path)
    wave_S = decode_audio(ShardReader(ShardReading()).fetch(clip, None, (0, clip.num_samples)).audio, clip)
    assert np.abs(wave_S - quiet[0]).max() < 2**-22


def test_verify_finds_what_was_altered(mixed, tmp_path, capsys):
    out = tmp_path / "p"
    made = build_pack(mixed, out, PackSettings(), workers=1)
    assert main(["pack", "--verify", str(out), "--workers", "1"]) == 0
    assert "all checksums and frames are correct" in capsys.readouterr().out
    clip = by_id(made)["both.mp4"]
    units = ShardReader(ShardReading()).units(clip)
    shard = Path(clip.shard)
    raw = bytearray(shard.read_bytes())
    raw[int(units.at_U[30]) + 9] ^= 4
    shard.write_bytes(raw)
    (out / "shards" / "000099.tar").write_bytes(b"")
    assert main(["pack", "--verify", str(out), "--workers", "1"]) == 1
    shown = capsys.readouterr().out
    assert 'clip "both.mp4"' in shown
    assert "unit 30" in shown
    assert "000099.tar: is not one of the pack's shards" in shown


def test_shards_are_planned_from_the_numbers_alone(made):
    manifest = Manifest.open(made)
    shards = plan_shards(manifest, PackSettings(shard_mib=1))
    rows = np.concatenate([shard.rows for shard in shards])
    assert sorted(rows.tolist()) == list(range(len(manifest)))
    assert len(shards) > 4
    assert rows.tolist() != sorted(rows.tolist())
    ordered = plan_shards(manifest, PackSettings(shuffle=False))
    assert np.concatenate([shard.rows for shard in ordered]).tolist() == list(range(len(manifest)))
    train = len(manifest.split("train"))
    assert all((shard.rows < train).all() or (shard.rows >= train).all() for shard in shards)


def test_a_clip_that_kills_its_process_is_skipped(mixed, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import os\nfrom fastav.pack import transcode\n"
        "def pack_clip(order):\n"
        "    if order.clip.id == 'piece': os._exit(9)\n"
        "    return transcode.pack_clip(order)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("fastav.pack.build.pack_clip", __import__("deadly").pack_clip)
    made = build_pack(mixed, tmp_path / "p", PackSettings(), workers=1)
    assert "piece" not in by_id(made)
    assert "the decoder crashed or hung on this clip" in (tmp_path / "p" / "skipped.csv").read_text()


def test_a_fault_of_ours_is_named_and_not_fatal(mixed, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr("fastav.pack.transcode.read_media", fail)
    order = PackJob(by_id(mixed)["both.mp4"], PackSettings(), mixed.root, False)
    assert pack_clip(order) == (order.clip.source, "MemoryError: no room", "pack")


def test_psnr():
    assert psnr_db(255.0**2) == 0
    assert psnr_db(1.0) == pytest.approx(48.13, abs=0.01)
    assert psnr_db(0.0) == 100
