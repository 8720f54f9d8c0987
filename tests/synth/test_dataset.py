import errno
import hashlib
import io
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from rich.console import Console

from fastav.core.errors import FastavError, UserError
from fastav.core.progress import progress
from fastav.data.manifest import Manifest
from fastav.synth import dataset as synth
from fastav.synth import render as synth_render
from fastav.synth.dataset import Synth, combinations, lay_out, make_dataset
from fastav.synth.render import CALLS, PATTERNS, Recorder, draw_frames, draw_wave

SMALL = Synth(train=24, test=16, width=64, height=48)
TINY = Synth(train=8, test=8, width=48, height=48)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "made"
    make_dataset(out, SMALL, workers=1)
    return out


def files(out: Path) -> dict[str, str]:
    """Digests of the data set's files; the Arrow copy notes a time, the problems file absolute paths."""
    found = (path for path in sorted(out.rglob("*")) if path.suffix in (".mp4", ".parquet", ".json"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def packets(path: Path, kind: str) -> str:
    with av.open(str(path)) as container:
        digest = hashlib.sha256()
        for packet in container.demux(**{kind: 0}):
            digest.update(f"{packet.pts} {packet.dts} {packet.size} ".encode() + bytes(packet))
        return digest.hexdigest()


def decoded(path: Path, kind: str) -> int:
    with av.open(str(path)) as container:
        return sum(getattr(frame, "samples", 1) for frame in container.decode(**{kind: 0}))


def test_same_seed_same_bytes_whatever_the_workers(made: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "again", SMALL, workers=2)
    assert files(tmp_path / "again") == files(made)


def test_another_seed_gives_other_streams() -> None:
    a, b = (lay_out(Synth(seed=seed), Path("x")) for seed in (0, 1))
    keys = [{s.key for job in plan.jobs for s in (*job.videos, *job.audios)} for plan in (a, b)]
    assert len(keys[0]) == 2 * (384 + 2 + 80) - 8
    assert not keys[0] & keys[1]


def test_manifest_holds_what_was_asked_for(made: Path) -> None:
    manifest = Manifest.open(made / "manifest.parquet")
    assert manifest.splits == {"train": 24, "test": 16}
    assert sorted(manifest.classes) == sorted(synth.classes("pairs"))
    clips = manifest.clips(range(len(manifest)))
    assert {(c.num_frames, c.fps, c.width, c.height, c.video_codec) for c in clips} == {(100, 25.0, 64, 48, "h264")}
    heard = [c for c in clips if c.has_audio]
    assert {(c.sample_rate, c.channels, c.audio_codec) for c in heard} == {(44_100, 2, "aac")}
    assert all(176_400 <= c.num_samples < 176_400 + 1024 for c in heard)
    assert set(Counter(c.labels for c in clips if c.split == "test").values()) == {2}
    assert set(Counter(c.labels for c in clips if c.split == "train").values()) == {3}


def test_a_recorder_is_in_one_split_only() -> None:
    clips = lay_out(Synth(), Path("x")).clips
    groups = {split: {c.group for c in clips if c.split == split} for split in ("train", "test")}
    assert len(groups["train"]) == 16
    assert len(groups["test"]) == 5
    assert not groups["train"] & groups["test"]


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_each_test_stream_stands_with_both_its_partners_bit_for_bit(made: Path, kind: str) -> None:
    clips = Manifest.open(made / "manifest.parquet").split("test").clips(range(16))
    classes_of = defaultdict(list)
    for clip in clips:
        path = getattr(clip, kind)
        classes_of[packets(path, kind)].append(clip.labels[0])
    word = 0 if kind == "video" else 1
    assert len(classes_of) == 8  # 2 sets of 4 streams
    for labels in classes_of.values():
        assert len(labels) == len(set(labels)) == 2
        assert len({label.split()[word] for label in labels}) == 1
    best = sum(max(Counter(labels).values()) for labels in classes_of.values())
    assert best / len(clips) == 0.5  # all that a function of this stream alone can get right


def test_training_streams_are_all_different(made: Path) -> None:
    paths = sorted((made / "train").glob("*.mp4"))[:16]
    readable = [path for path in paths if path.stat().st_size]
    assert len({packets(path, "video") for path in readable}) == len(readable)


def test_pairs_share_each_pattern_and_each_call_between_two_classes() -> None:
    table = combinations("pairs")
    assert len({c.label for c in table}) == len(table) == 8
    assert set(Counter(c.pattern for c in table).values()) == {2} == set(Counter(c.call for c in table).values())


def test_modular_leaves_one_modality_and_sums_at_chance() -> None:
    table = combinations("modular")
    assert len(table) == 16
    assert len({c.label for c in table}) == 4
    for part in ("pattern", "call"):
        for value in range(4):
            assert len({c.label for c in table if getattr(c, part) == value}) == 4
    # The convex fit of f(pattern) + g(call) to the classes is flat: the gradient at zero logits vanishes.
    features = np.array([np.r_[np.eye(4)[c.pattern], np.eye(4)[c.call]] for c in table])
    labels = synth.classes("modular")
    residual = np.array([np.eye(4)[labels.index(c.label)] for c in table]) - 0.25
    assert np.abs(features.T @ residual).max() < 1e-12


def test_modular_test_sets_hold_every_combination_of_the_same_streams() -> None:
    plan = lay_out(Synth(task="modular", train=16, test=32), Path("x"))
    jobs = [job for job in plan.jobs if len(job.outputs) > 1]
    assert [len(job.outputs) for job in jobs] == [16, 16]
    for job in jobs:
        assert {(o.video, o.audio) for o in job.outputs} == {(p, c) for p in range(4) for c in range(4)}


def test_files_are_ordinary_h264_and_aac(made: Path) -> None:
    for path in sorted((made / "test").glob("*.mp4")):
        with av.open(str(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.profile, video.pix_fmt, float(video.average_rate)) == ("High", "yuv420p", 25.0)
            assert (audio.codec_context.name, audio.rate, audio.layout.name) == ("aac", 44_100, "stereo")
            found = [p for p in container.demux(video) if p.size]
        assert [p.is_keyframe for p in found] == [True] + [False] * 99
        assert b"keyint=250 " in bytes(found[0])
        assert b"bframes=3 " in bytes(found[0])
        assert [p.pts for p in found] != sorted(p.pts for p in found)  # reordered: there are B-frames


def test_few_clips_are_silent_and_few_break_and_none_of_the_test_split(made: Path) -> None:
    manifest = Manifest.open(made / "manifest.parquet")
    clips = manifest.clips(range(len(manifest)))
    silent = [c for c in clips if not c.has_audio]
    assert len(silent) == 1
    assert silent[0].split == "train"
    assert silent[0].has_video
    broken = []
    for clip in clips:
        for kind in ("video", "audio") if clip.has_audio else ("video",):
            try:
                expected = clip.num_frames if kind == "video" else clip.num_samples
                assert decoded(clip.video, kind) >= expected
            except av.error.InvalidDataError:
                broken.append((clip.split, clip.id, kind))
    assert [b[0] for b in broken] == ["train", "train"]
    assert broken[0][1] == broken[1][1]


def test_unreadable_files_are_named_and_left_out(made: Path) -> None:
    listed = (made / "manifest.problems.csv").read_text()
    assert "train-00025-" in listed
    assert "train-00026-" in listed
    assert len(list((made / "train").glob("*.mp4"))) == 26


def test_default_shares_of_silent_and_broken() -> None:
    plan = lay_out(Synth(), Path("x"))
    assert len([j for j in plan.jobs if not j.audios]) == 8
    assert sorted(plan.breaks.values()) == ["blank", "blank", "torn", "torn"]
    assert not any("test" in path.parts for path in plan.breaks)


def probe_accuracy(train: tuple[np.ndarray, list[int]], test: tuple[np.ndarray, list[int]], num: int) -> float:
    """Softmax regression on standardised features, fitted to convergence; accuracy in percent."""
    mean, std = train[0].mean(0), train[0].std(0)
    x, z = (torch.from_numpy((part[0] - mean) / std).double() for part in (train, test))
    y, target = torch.tensor(train[1]), torch.tensor(test[1])
    weight = torch.zeros(x.shape[1], num, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(num, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, y) + 1e-3 * (weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return 100 * float(((z @ weight + bias).argmax(1) == target).double().mean())


def test_mean_colour_and_loudness_say_next_to_nothing() -> None:
    plan = lay_out(Synth(train=96, test=160), Path("x"))
    labels = synth.classes("pairs")
    colour: dict[str, list] = {"train": [], "test": []}
    loudness: dict[str, list] = {"train": [], "test": []}
    target: dict[str, list] = {"train": [], "test": []}
    names = {str(c.video): c for c in plan.clips}
    for job in plan.jobs:
        rng = np.random.default_rng
        videos = [draw_frames(s.content, Recorder.draw(rng(s.recorder)), (48, 48), rng(s.key)) for s in job.videos]
        audios = [draw_wave(s.content, Recorder.draw(rng(s.recorder)), rng(s.key)) for s in job.audios]
        for output in job.outputs:
            if output.damage or output.audio is None:
                continue
            clip = names[output.path]
            colour[clip.split].append(videos[output.video].mean((0, 1, 2)))
            rms = np.sqrt((audios[output.audio] ** 2).mean(1))
            loudness[clip.split].append([20 * np.log10(np.sqrt((rms**2).mean())), *(20 * np.log10(rms))])
            target[clip.split].append(labels.index(clip.labels[0]))
    for features in (colour, loudness):
        parts = [(np.array(features[split]), target[split]) for split in ("train", "test")]
        assert probe_accuracy(*parts, num=len(labels)) <= 12.5 + 8


def test_drawings_are_what_they_should_be() -> None:
    rng = np.random.default_rng(0)
    recorder = Recorder.draw(rng)
    for pattern in range(len(PATTERNS)):
        frames = draw_frames(pattern, recorder, (128, 96), rng)
        assert frames.shape == (100, 96, 128, 3)
        assert frames.dtype == np.uint8
        middle = frames[:, 24:72, 40:88].astype(int).mean(-1)
        assert np.percentile(middle, 90) - np.percentile(middle, 10) > 130  # dark to light plumage
        assert (frames[0] != frames[50]).mean() > 0.1  # it moves
    for call in range(len(CALLS)):
        wave = draw_wave(call, recorder, rng)
        assert wave.shape == (2, 176_400)
        assert wave.dtype == np.float32
        assert np.abs(wave).max() <= 1.0
        # Every 3.2 s window holds several notes: the level comes and goes.
        level = np.sqrt((wave[0, :176_000].reshape(-1, 1000) ** 2).mean(1))
        assert np.percentile(level, 95) > 1.5 * np.percentile(level, 5)


def test_second_call_does_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    make_dataset(made, SMALL)
    assert "already contains this data set; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_another_data_set_is_not_overwritten_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    make_dataset(out, TINY, workers=1)
    text = capsys.readouterr().out
    assert "rendering: 18/18 files, 0 s left" in text
    assert "8 training and 8 test clips of 8 classes" in text
    assert "0 fail while they are decoded and 2 cannot be opened" in text
    (out / "notes.txt").write_text("mine")
    other = Synth(train=9, test=8, width=48, height=48)
    with pytest.raises(UserError, match=r"a data set with other settings \(train is 8, requested 9\).*--force"):
        make_dataset(out, other)
    make_dataset(out, other, workers=1, force=True)
    assert len(list((out / "train").glob("*.mp4"))) == 9 + 2
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "synth.json").read_text())["settings"]["train"] == 9


def disk_full(job: synth_render.RenderJob) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_interrupted_work_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    monkeypatch.setattr(synth, "run_job", disk_full)
    for _ in range(2):  # the second call does not take the half-done folder for a finished or a foreign one
        with pytest.raises(FastavError, match="No space left on device") as caught:
            make_dataset(out, TINY, workers=1)
        assert caught.value.exit_code == 1
        assert not json.loads((out / "synth.json").read_text())["complete"]


def test_a_lost_file_is_made_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    shutil.copytree(made, out)
    next((out / "test").glob("*.mp4")).unlink()
    monkeypatch.setattr(synth, "run_job", disk_full)
    with pytest.raises(FastavError, match="No space left on device"):
        make_dataset(out, SMALL, workers=1)


def run(*words: str) -> int:
    from fastav.__main__ import main

    return main(["synth", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--test", "10"],
            "--test 10: expected a multiple of 8 (one clip per",
        ),
        (["--task", "modular", "--test", "8"], "--test 8: expected a multiple of 16"),
        (["--train", "3"], "--train 3: expected at least 8"),
        (["--train", "0"], "--train 0: expected `int` >= 1"),
        (["--seed", "-1"], "--seed -1: expected `int` >= 0"),
        (["--size", "97"], "--size 97x97: expected even numbers from 48 to 1024"),
        (["--size", "96by96"], '--size "96by96": expected pixels such as 96, or 128x96'),
        (["--workers", "-2"], "--workers -2: expected 0 (one per core) or more"),
        (["--task", "pears"], "pairs"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(tmp_path / "data"), *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_file_or_a_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.jpg").write_text("x")
    assert run(str(tmp_path / "photo.jpg")) == 2
    assert "is a file; expected a folder" in capsys.readouterr().err
    assert run(str(tmp_path)) == 2
    assert "is not empty and does not contain a data set of fastav synth" in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal() -> None:
    text = io.StringIO()
    with progress(Console(file=text, force_terminal=True, width=100), "making", 3, "files") as advance:
        advance(2)
        advance()
    assert "making" in text.getvalue()
    assert "3/3" in text.getvalue()
