"""Workers that are processes: what they make, and what becomes of them."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fastav.core.errors import FastavError, MediaError
from fastav.data.clip import Clip, ClipPlan
from fastav.loader.batch import Batch
from fastav.loader.loader import Loader, Loading
from fastav.loader.processes import DecoderProcesses
from fastav.media.decoder import DecodeSpec, Sample
from tests import ROOT
from tests.helpers.fake_decoder import (
    CLASSES,
    FRONTEND,
    MELS,
    SIZE,
    WINDOW,
    FakePlan,
    T,
    make_clips,
    same,
    train_requests,
)


class Marked:
    """Frames and spectrograms that say which clip and frames they are; some clips are bad."""

    name = "marked"
    spec = DecodeSpec(image_size=SIZE, frontend=FRONTEND, window=WINDOW)

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        if clip.id == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if clip.id == "slow":
            time.sleep(60)
        if clip.id == "misshapen":
            return [Sample(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), None) for _ in plans]
        if clip.id == "buggy":
            raise ZeroDivisionError("a bug")
        if clip.id == "broken":
            raise MediaError(clip.source, "cut short", "video")
        shared = torch.full((len(plans[0].windows_W), 1, MELS, WINDOW), float(os.getpid() % 1000))
        return [
            Sample(
                torch.from_numpy(np.broadcast_to(plan.frames_T[:, None, None, None], (T, 3, SIZE, SIZE)) % 251).byte(),
                shared,
            )
            for plan in plans
        ]


def named(*ids: str) -> list[Clip]:
    clips = make_clips(len(ids))
    return [
        Clip(**{name: getattr(clip, name) for name in clip.__dataclass_fields__} | {"id": i})
        for clip, i in zip(clips, ids, strict=True)
    ]


def make_loader(plan: FakePlan, told: list[str], workers: int = 2) -> Loader:
    return Loader(
        plan,  # type: ignore[arg-type]
        Marked(),
        Loading(workers=workers, worker="process", max_broken=1.0),
        modalities=("video", "audio"),
        classes=CLASSES,
        on_broken=lambda clip, error: told.append(f"{clip.id}: {error.stage}: {error.reason}"),
    )


def ours() -> list[psutil.Process]:
    """Processes that decode: children of the server that forks them."""
    return [p for child in psutil.Process().children(recursive=True) for p in [child] if "fastav-samples" in _maps(p)]


def _maps(process: psutil.Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return ""


def test_batches_are_those_of_threads(tmp_path: Path) -> None:
    from benchmarks.loader_workers import make_clips as make_media
    from fastav.data.plan import Plan, Sampling
    from fastav.media.pyav import PyAV
    from fastav.media.spectrogram import Frontend

    manifest = make_media(tmp_path / "made.parquet", 5)
    broken = manifest.clip(3).video
    assert broken is not None
    broken.write_bytes(broken.read_bytes()[:3000])
    sampling = Sampling(frames=3, image_size=32, window=100, eval_windows=(0, 150, 450), mixup=0.3, repeat=2)
    frontend = Frontend()
    decoder = PyAV().build(DecodeSpec(image_size=32, frontend=frontend, window=100))
    plan = Plan([(manifest, 1.0)], sampling, seed=1, mel_bands=frontend.num_mels, mel_frames=frontend.num_frames_s)
    requests = [("train", 0, 4), ("evaluate", 0, 4), ("train", 4, 8), ("evaluate", 4, 4)]

    def run(loading: Loading) -> tuple[list[Batch], list[str]]:
        told: list[str] = []
        with Loader(
            plan, decoder, loading, modalities=("video", "audio"), classes=manifest.classes,
            on_broken=lambda clip, error: told.append(str(error)),
        ) as loader:  # fmt: skip
            return list(loader.batches(requests)), told

    (threads, told), (processes, told_too) = run(Loading(workers=2)), run(Loading(workers=2, worker="process"))
    assert all(same(a, b) for a, b in zip(threads, processes, strict=True))
    assert told == told_too
    assert len(told) == 1


def test_a_crash_costs_its_clip_and_nothing_else() -> None:
    told: list[str] = []
    with make_loader(FakePlan(named("0", "crashes", "2", "broken", "4", "5")), told) as loader:
        batches = list(loader.batches(train_requests(3, 4)))
    assert told == ["crashes: decode: the decoder crashed (SIGSEGV)", "broken: video: cut short"]
    assert [batch.num_broken for batch in batches] == [1, 1, 1, 1]
    first = batches[0]
    assert first.frames_BTCHW is not None
    assert first.frames_BTCHW[[0, 2], 0, 0, 0, 0].tolist() == [0, 2]
    assert first.weight_B.tolist() == [0.5, 0, 0.5]


def test_a_bug_in_the_decoder_surfaces_with_its_traceback() -> None:
    with (
        make_loader(FakePlan(named("0", "buggy")), []) as loader,
        pytest.raises(ZeroDivisionError, match="a bug") as caught,
    ):
        list(loader.batches(train_requests(2, 1)))
    assert any("decode" in note and "test_processes" in note for note in caught.value.__notes__)


def test_signals_of_a_job_are_left_to_the_parent_and_ends_leave_nothing() -> None:
    told: list[str] = []
    loader = make_loader(FakePlan(make_clips(6)), told)
    batches = loader.batches(train_requests(2, 40))
    next(batches)
    there = ours()
    assert there
    for process in there:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            process.send_signal(number)
    assert len(list(batches)) == 39
    assert not told
    loader.close()
    assert not ours()


def test_a_sample_of_another_shape_is_broken_and_gives_its_process_back() -> None:
    told: list[str] = []
    with make_loader(FakePlan(named("misshapen", "1", "misshapen", "3")), told, workers=1) as loader:
        assert len(list(loader.batches(train_requests(2, 4)))) == 4
    assert all("expected" in reason for reason in told)
    assert told


def test_closing_in_the_middle_of_decodes_ends_every_process() -> None:
    clips = named("slow", "slow", "slow", "slow")
    plan = FakePlan(clips).train(0, 4)
    processes = DecoderProcesses(Marked(), 4)
    errors: list[Exception] = []

    def work(row: int) -> None:
        try:
            processes.decode(clips[row], [plan[row]])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.perf_counter() + 60
    while len(started := children()) < 4 and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert len(started) == 4
    processes.close()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert not any(process.is_alive() for process in started)
    assert len(errors) == 4
    with pytest.raises(FastavError, match="the loader is closed"):
        processes.decode(clips[0], [plan[0]])


def children() -> list[multiprocessing.Process]:
    """The processes that decode for this one."""
    return [child for child in multiprocessing.active_children() if child.name == "fastav-decode"]


def test_a_forgotten_loader_leaves_nothing() -> None:
    loader = make_loader(FakePlan(make_clips(6)), [])
    list(loader.batches(train_requests(2, 3)))
    assert ours()
    del loader
    gc.collect()
    assert not ours()


def test_a_sample_is_not_overwritten_while_it_is_held_and_rooms_grow() -> None:
    clips = make_clips(4)
    plan = FakePlan(clips).train(0, 4)
    both = DecoderProcesses(Marked(), 2)
    first = both.decode(clips[0], [plan[0]])
    second = both.decode(clips[1], [plan[1]])  # in the other process
    assert first[0].frames_TCHW is not None
    assert second[0].frames_TCHW is not None
    assert (first[0].frames_TCHW[0] == 0).all()
    assert (second[0].frames_TCHW[0] == 1).all()
    del first
    many = both.decode(clips[2], [plan[2]] * 9)
    assert many[0].mel_WCML is not None
    assert len({sample.mel_WCML.data_ptr() for sample in many if sample.mel_WCML is not None}) == 1, "stored once"
    assert all((sample.frames_TCHW[0] == 2).all() for sample in many if sample.frames_TCHW is not None)
    both.close()


_KILLED = """
import os, signal, sys
from tests.loader.test_processes import *
if __name__ == "__main__":
    loader = make_loader(FakePlan(make_clips(6)), [])
    batches = loader.batches(train_requests(2, 100000))
    next(batches)
    print(*(p.pid for p in ours()), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_processes_end_with_the_parent(how: str, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, script, how], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert pids
    deadline = time.perf_counter() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)
