"""Indexing: what real files hold ends up in the manifest, and what cannot be read is named."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastav.commands import index
from fastav.core.command_runner import run
from fastav.core.errors import MediaError, UserError
from fastav.core.progress import progress
from fastav.data.clip import Clip
from fastav.data.manifest import Manifest
from fastav.datasets import build_manifest as module
from fastav.datasets.build_manifest import build_manifest, fill, problems_path
from fastav.media.probe import MediaInfo

RATE = 16000


def video(
    path: Path, frames: int = 50, *, seed: int = 0, sound_s: float = 2.0, times: list[float] | None = None
) -> Path:
    """An H.264 file of 64x64, 25 frames a second or at the given times, with AAC sound unless `sound_s` is 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream("aac", rate=RATE, layout="mono") if sound_s else None
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(noise.integers(0, 255, (64, 64, 3), np.uint8), format="rgb24")
            seconds = times[number] if times else number / 25
            picture.pts, picture.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if audio is not None:
            wave = noise.normal(0, 0.1, (1, round(sound_s * RATE))).astype(np.float32)
            for start in range(0, wave.shape[1], 1024):
                part = av.AudioFrame.from_ndarray(wave[:, start : start + 1024], format="fltp", layout="mono")
                part.sample_rate, part.pts, part.time_base = RATE, start, Fraction(1, RATE)
                container.mux(audio.encode(part))
            container.mux(audio.encode(None))
    return path


def sound(path: Path, seconds: float = 2.0, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(seed).integers(-9000, 9000, (1, round(seconds * RATE)), np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def still(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)).save(path)
    return path


def mel(path: Path, frames: int = 300) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.zeros((1, 128, frames), np.float32))
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of everything that can be indexed, and what cannot."""
    root = tmp_path_factory.mktemp("media")
    video(root / "owl/a.MP4", seed=1)
    video(root / "owl/silent.mp4", frames=25, seed=2, sound_s=0)
    video(root / "crow/b.mkv", seed=3)
    sound(root / "crow/deep/c.WAV", seed=4)
    still(root / "owl/d.PNG", seed=5)
    still(root / "crow/d.jpg", seed=6)
    mel(root / "owl/e.npy")
    (root / "crow/broken.mp4").write_bytes((root / "owl/a.MP4").read_bytes()[:-4000])
    (root / "crow/empty.wav").touch()
    (root / "crow/notes.txt").write_text("not media")
    return root


def indexed(root: Path, out: Path, *words: str) -> int:
    return run("index", "fastav.commands.index", ["folder", str(root), "--out", str(out), "--workers", "2", *words])


def problems(out: Path) -> list[dict[str, str]]:
    with problems_path(out).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.parquet"
    assert indexed(media, out) == 0
    made = Manifest.open(out)
    clips = {c.id: c for c in made.clips(range(len(made)))}
    assert set(clips) == {
        "owl/a.MP4", "owl/silent.mp4", "crow/b.mkv", "crow/deep/c.WAV", "owl/d.PNG", "crow/d.jpg", "owl/e.npy",
    }  # fmt: skip
    both = clips["owl/a.MP4"]
    assert (both.start_frame, both.num_frames, both.width, both.height, both.video_codec) == (0, 50, 64, 64, "h264")
    assert both.duration_s == pytest.approx(2.0, abs=0.001)
    assert both.fps == pytest.approx(25.0, abs=0.02)
    assert (both.sample_rate, both.channels, both.audio_codec) == (RATE, 1, "aac")
    assert both.num_samples == pytest.approx(2 * RATE, abs=RATE // 50)
    assert both.video == both.audio == media / "owl/a.MP4"
    silent = clips["owl/silent.mp4"]
    assert (silent.audio, silent.num_samples, silent.num_frames) == (None, 0, 25)
    recording = clips["crow/deep/c.WAV"]
    assert (recording.video, recording.num_frames, recording.num_samples) == (None, 0, 2 * RATE)
    assert (recording.audio_codec, recording.duration_s) == ("pcm_s16le", 2.0)
    picture = clips["owl/d.PNG"]
    assert (picture.num_frames, picture.width, picture.height, picture.duration_s) == (1, 60, 40, 0)
    assert (clips["owl/e.npy"].num_mel_frames, clips["owl/e.npy"].has_audio) == (300, True)
    assert made.classes == ("crow", "owl")
    assert made.metadata["source"] == "fastav index folder"

    found = problems(out)
    assert [(p["kind"], Path(p["path"]).name, p["clip"]) for p in found] == [
        ("unknown_suffix", "notes.txt", ""),
        ("unreadable", "broken.mp4", "crow/broken.mp4"),
        ("unreadable", "empty.wav", "crow/empty.wav"),
    ]
    assert "an empty file" in found[2]["message"]
    shown = capsys.readouterr().out
    for text in ("7 (0.00 h)", "train 7", "h264 3", "pcm_s16le 1", "2 x unreadable",
                 "left out, not media files: 1 x .txt", "probing: 9/9 files", str(problems_path(out))):  # fmt: skip
        assert text in shown, text


def test_every_media_file_is_in_the_manifest_or_named(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.parquet"
    assert indexed(media, out, "--piece-s", "0.5") == 0
    made = Manifest.open(out)
    seen = {str(p) for c in made.clips(range(len(made))) for p in (c.video, c.audio, c.image, c.mel) if p}
    named = {p["path"] for p in problems(out)}
    assert seen | named == {str(p) for p in media.rglob("*") if p.is_file()}
    assert not seen & named


def test_pieces_share_no_frame_and_lose_none(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.parquet"
    assert indexed(media, out, "--piece-s", "0.5", "--hold-out", "every:4") == 0
    made = Manifest.open(out)
    assert made.splits == {"train": 14, "test": 3}
    for name, frames in (("owl/a.MP4", 50), ("crow/b.mkv", 50), ("owl/silent.mp4", 25)):
        pieces = sorted((c for c in made.clips(range(len(made))) if c.id.startswith(name)), key=lambda c: c.start_s)
        ends = [0, *(c.start_frame + c.num_frames for c in pieces)]
        assert [c.start_frame for c in pieces] == ends[:-1]
        assert ends[-1] == frames
        if pieces[0].audio:
            ends = [pieces[0].start_sample, *(c.start_sample + c.num_samples for c in pieces)]
            assert [c.start_sample for c in pieces] == pytest.approx(ends[:-1], abs=1)
            assert all(c.num_samples == pytest.approx(RATE / 2, abs=1) for c in pieces[:-1])
    assert {c.group for c in made.clips(range(len(made)))} == {""}
    assert [p["kind"] for p in problems(out) if p["kind"] not in ("unreadable", "unknown_suffix")] == []


def test_pieces_of_a_variable_frame_rate(tmp_path: Path) -> None:
    # Half a second at 40 frames a second, a second of nothing, half a second at 10.
    times = [i / 40 for i in range(20)] + [1.5 + i / 10 for i in range(5)]
    path = video(tmp_path / "media" / "owl" / "a.mp4", frames=25, times=times)
    given = [Clip("a", video=path, audio=path, labels=("owl",))]

    def halves(clip: Clip) -> list[Clip]:
        return [
            Clip(f"a#{k}", video=path, audio=path, start_s=k / 2, duration_s=0.5, labels=("owl",)) for k in range(4)
        ]

    made, found = build_manifest(given, tmp_path / "m.parquet", workers=1, console=quiet(), cut=halves)
    clips = made.clips(range(len(made)))
    assert [(c.start_frame, c.num_frames, c.has_audio) for c in clips] == [
        (0, 20, True), (0, 0, True), (0, 0, True), (20, 5, True),
    ]  # fmt: skip
    assert [c.video for c in clips] == [path, None, None, path]
    assert found == []


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_each_file_is_probed_once(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[module.ProbeJob] = []
    probe_all = module.probe_all

    def count(jobs: list[module.ProbeJob], workers: int) -> object:
        probed.extend(jobs)
        return probe_all(jobs, workers)

    monkeypatch.setattr(module, "probe_all", count)
    path, wav = media / "owl/a.MP4", media / "crow/deep/c.WAV"
    given = [Clip(f"c{k}", video=path, audio=path, start_s=k / 10, duration_s=0.1, labels=("owl",)) for k in range(9)]
    given += [Clip("other", video=path, audio=wav, labels=("owl",)), Clip("heard", audio=path, labels=("crow",))]
    made, _ = build_manifest(given, tmp_path / "m.parquet", workers=1, console=quiet())
    assert probed == [(path, ("audio", "video")), (wav, ("audio",))]
    assert len(made) == 11
    clips = {c.id: c for c in made.clips(range(11))}
    assert (clips["other"].num_frames, clips["other"].num_samples, clips["other"].audio) == (50, 2 * RATE, wav)
    assert (clips["heard"].num_frames, clips["heard"].start_sample) == (0, 0)
    assert [c.start_frame for c in made.clips(range(9))] == pytest.approx([2.5 * k for k in range(9)], abs=0.6)


def test_a_clip_of_two_files_needs_both(media: Path, tmp_path: Path) -> None:
    path, broken = media / "owl/a.MP4", media / "crow/broken.mp4"
    given = [
        Clip("good", video=path, labels=("owl",)),
        Clip("mixed", video=path, audio=broken, labels=("owl",)),
        Clip("again", audio=broken, labels=("crow",)),
        Clip("void", labels=("crow",)),
        Clip("wrong", video=media / "crow/deep/c.WAV", labels=("crow",)),
    ]
    made, found = build_manifest(given, tmp_path / "m.parquet", workers=2, console=quiet())
    assert [c.id for c in made.clips(range(len(made)))] == ["good"]
    assert [(p.kind, p.clip_id, p.fatal) for p in found] == [
        ("unreadable", "mixed", False),
        ("no_media", "void", False),
        ("unreadable", "wrong", False),
        ("lost_class", "", False),
        ("single_clip_class", "good", False),
    ]
    assert found[0].message.endswith("(2 clips)")
    assert found[3].message == 'class "crow" is left out: none of its 3 clips can be read'


INFO = MediaInfo(
    has_video=True, has_audio=True, num_frames=100, fps=25.0, width=64, height=48, duration_s=4.0,
    frame_times_s=np.arange(100) / 25, num_samples=4 * RATE, sample_rate=RATE, channels=1, audio_offset_s=0.5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("start_s", "duration_s", "kept", "message"),
    [
        (1.0, 1.0, (25, 25, RATE // 2, RATE), None),
        (0.0, 0.0, (0, 100, -RATE // 2, 4 * RATE), None),
        (3.0, 1.05, (75, 25, 5 * RATE // 2, RATE), None),
        (
            3.0,
            2.0,
            (75, 25, 5 * RATE // 2, RATE),
            'clip "c": span 3.000 s + 2.000 s ends 1.000 s after the end of {path}; shortened',
        ),
        (4.0, 1.0, None, 'clip "c": span 4.000 s + 1.000 s is outside {path}, which is 4.000 s long'),
        (-1.0, 2.0, None, "is outside {path}"),
        (1.0, -2.0, None, "is outside {path}"),
    ],
)
def test_spans(start_s: float, duration_s: float, kept: tuple[int, ...] | None, message: str | None) -> None:
    path = Path("/media/a.mp4")
    made, problem = fill(Clip("c", video=path, audio=path, start_s=start_s, duration_s=duration_s), {path: INFO})
    if kept is None:
        assert made is None
    else:
        assert made is not None
        assert (made.start_frame, made.num_frames, made.start_sample, made.num_samples) == kept
        assert made.audio_offset_s == 0.5
    assert (problem is None) == (message is None)
    if problem is not None and message is not None:
        assert (problem.kind, problem.path, problem.fatal) == ("bad_span", str(path), False)
        assert message.format(path=path) in problem.message


def test_a_span_between_two_frames() -> None:
    path = Path("/media/a.mp4")
    made, problem = fill(Clip("c", video=path, start_s=0.01, duration_s=0.02), {path: INFO})
    assert made is None
    assert problem is not None
    assert problem.message == f'clip "c": span 0.010 s + 0.020 s contains no frame and no sample of {path}'


def test_a_file_that_kills_its_process_is_named(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text(
        "import os\n"
        "from fastav.media.probe import MediaInfo\n"
        "def look(job):\n"
        "    if job[0].name == 'crash.mp4':\n"
        "        os.abort()\n"
        "    if job[0].name == 'odd.mp4':\n"
        "        return 'of no kind', 'video'\n"
        "    return MediaInfo(has_video=True, num_frames=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "probe_one", __import__("dying").look)
    names = ["a.mp4", "crash.mp4", "odd.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]
    found = dict(module.probe_all([(Path(name), ("video",)) for name in names], workers=1))
    assert {path.name for path in found} == set(names)
    errors = {path.name: str(info) for path, info in found.items() if isinstance(info, MediaError)}
    assert errors == {
        "crash.mp4": "crash.mp4: probe: the decoder crashed on this file",
        "odd.mp4": "odd.mp4: video: of no kind",
    }


def test_a_fault_of_the_prober_is_a_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, wanted: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(module, "probe", fail)
    assert module.probe_one((Path("a.mp4"), ("video",))) == ("MemoryError: no room", "probe")
    assert module.num_cores() >= 1


def failed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the verb; exit code 2 and one line on standard error are expected."""
    assert run("index", "fastav.commands.index", words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_mistakes_are_told_in_one_line(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "m.parquet")
    assert '"foldr" is unknown; did you mean "folder"?' in failed(["foldr", str(media), "--out", out], capsys)
    assert "--out" in failed(["folder", str(media)], capsys)
    assert 'did you mean "--piece-s"' in failed(["folder", str(media), "--out", out, "--pieces", "2"], capsys)
    assert '--out m.csv: expected a name that ends in ".parquet"' in failed(
        ["folder", str(media), "--out", "m.csv"], capsys
    )
    assert "--workers -1: expected 0" in failed(["folder", str(media), "--out", out, "--workers", "-1"], capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "the folder is empty; expected at least one video" in failed(["folder", str(empty), "--out", out], capsys)
    (empty / "a.txt").touch()
    assert "none of its 1 files is a video" in failed(["folder", str(empty), "--out", out], capsys)
    (empty / "owl").mkdir()
    (empty / "owl" / "a.mp4").write_text("no media")
    said = failed(["folder", str(empty), "--out", out], capsys)
    assert "none of the 1 media files can be read" in said
    assert "owl/a.mp4" in said
    assert [p["kind"] for p in problems(Path(out))] == ["unknown_suffix", "unreadable"]
    assert not Path(out).exists()


def test_a_class_with_one_clip_is_a_warning(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "root", tmp_path / "root" / "m.parquet"
    sound(root / "owl/a.wav", seed=1)
    sound(root / "owl/b.wav", seed=2)
    sound(root / "crow/c.wav", seed=3)
    for _ in range(2):  # the second time its own files lie in the folder
        assert indexed(root, out) == 0
        shown = capsys.readouterr().out
        assert 'class "crow" has one clip (1 in train)' in shown
        assert "unknown_suffix" not in shown
        assert [p["kind"] for p in problems(out)] == ["single_clip_class"]


def test_a_manifest_that_spoils_training_is_written_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "root", tmp_path / "m.parquet"
    for number, name in enumerate(("train/owl/a", "train/owl/b", "test/owl/c", "test/crow/d", "test/crow/e")):
        sound(root / f"{name}.wav", seed=number)
    assert indexed(root, out) == 2
    message = 'has a problem that invalidates training: class "crow" has no training clip (2 in test)'
    assert message in capsys.readouterr().err
    assert Manifest.open(out).splits == {"train": 2, "test": 3}


def test_a_bar_on_a_terminal(media: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    given = [Clip("a", video=media / "owl/silent.mp4", labels=("<b>[red]owl",))]
    made, found = build_manifest(given, tmp_path / "m.parquet", workers=1, console=console)
    index.show(console, made, found * 5, ["[a note]"])
    shown = text.getvalue()
    assert "1/1" in shown
    assert "[a note]" in shown
    assert '"<b>[red]owl"' in shown
    assert "and 2 more" in shown


def test_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastav.core.progress.PLAIN_EVERY_S", 0.0)
    text = io.StringIO()
    with progress(Console(file=text), "probing", 3, "files") as advance:
        for _ in range(3):
            advance()
    assert text.getvalue().splitlines() == ["probing: 2/3 files, 0 s left", "probing: 3/3 files, 0 s left"]


def test_real_media(realdata: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.parquet"
    assert indexed(realdata / "video", out, "--classes", "file", "--piece-s", "2", "--hold-out", "every:3") == 0
    made = Manifest.open(out)
    clips = made.clips(range(len(made)))
    seen = {p.name for c in clips for p in (c.video, c.audio) if p}
    named = {Path(p["path"]).name for p in problems(out) if p["kind"] == "unreadable"}
    assert seen | named == {p.name for p in (realdata / "video").iterdir()}
    assert named == {"sample_missing_stsd.mp4", "sample_with_invalid_nalu.mp4"}
    assert Counter(c.id.rpartition("#")[0] for c in clips)["big_buck_bunny_0_30.webm"] == 15
    for name in ("sample_portrait.mp4", "decord_rot90.mov", "sample_android_slow_motion_vfr.mp4", "sample.avi"):
        with av.open(str(realdata / "video" / name)) as container:
            frames = [frame.pts for frame in container.decode(video=0)]
        pieces = [c for c in clips if c.video and c.video.name == name]
        total = sum(c.num_frames for c in pieces)
        assert total == (len(frames) if name != "sample.avi" else 94), name  # 96, of which 2 in a rest of 0.09 s
        assert all(c.num_frames > 0 for c in pieces)
    assert {(c.width, c.height, c.rotation) for c in clips if "rot90" in c.id} == {(320, 568, 90)}


def test_unreadable_recordings(realdata: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.parquet"
    assert indexed(realdata / "audio", out, "--classes", "file") == 0
    made = Manifest.open(out)
    assert [Path(p["path"]).name for p in problems(out) if p["kind"] == "unreadable"] == ["empty_2c.wav"]
    channels = {c.id: c.channels for c in made.clips(range(len(made)))}
    assert channels["vocalpy_fruitfly_multich.wav"] == 3
    assert len(made) == 11


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the cores of a process")
def test_nothing_is_probed_without_jobs() -> None:
    assert list(module.probe_all([])) == []
    with pytest.raises(UserError, match=r"none of the 0 media files can be read"):
        build_manifest([Clip("void")], Path("/nowhere/m.parquet"), console=quiet())
