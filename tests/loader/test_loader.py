import gc
import itertools
import logging
import re
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastav.core.errors import MediaError, TooManyBroken
from fastav.data.clip import Clip, ClipPlan
from fastav.loader.batch import Batch
from fastav.loader.loader import Batches, Loader, Loading
from fastav.media.decoder import DecodeSpec, Sample
from fastav.media.spectrogram import Frontend
from tests.helpers.fake_decoder import (
    MELS,
    SIZE,
    WINDOW,
    FakeDecoder,
    FakePlan,
    T,
    make_clips,
    make_loader,
    our_threads,
    paint,
    refuse,
    same,
    train_requests,
)


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    gc.collect()
    deadline = time.perf_counter() + 5
    while our_threads() and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert not our_threads()


def test_batches_hold_what_was_planned() -> None:
    plan = FakePlan(make_clips(6), split=4)
    with make_loader(plan) as loader:
        batches = list(loader.batches(train_requests(4, 3)))
    assert [batch.sample for batch in batches] == [0, 4, 8]
    second = batches[1]
    assert second.ids == ["4", "5", "0", "1"]
    assert second.row_B.tolist() == [0, 1, 0, 1]  # rows of the second source, then of the first
    assert second.frames_BTCHW is not None
    assert second.frames_BTCHW.shape == (4, T, 3, SIZE, SIZE)
    assert second.frames_BTCHW.dtype == torch.uint8
    assert second.frames_BTCHW[:, -1, -1, -1, -1].tolist() == [4, 5, 0, 1]
    assert second.mel_BWCML is not None
    assert second.mel_BWCML.shape == (4, 1, 1, MELS, WINDOW)
    assert second.mel_BWCML[:, 0, 0, 0, 0].tolist() == [-4, -5, 0, -1]
    assert second.targets_BK.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert second.weight_B.tolist() == [0.5] * 4
    assert second.flip_B.tolist() == [False, True, False, True]
    assert second.band_B2.tolist() == [[4, 4], [5, 5], [6, 6], [7, 7]]
    assert second.band_B2.dtype == second.partner_B.dtype == torch.int64
    assert second.has_video_B.all()
    assert second.has_audio_B.all()
    assert second.window_BW is not None
    assert second.window_BW.tolist() == [[True]] * 4
    assert (second.num_broken, second.num_unique) == (0, 4)
    assert (loader.seen, loader.broken) == (12, 0)


def test_content_and_order_do_not_depend_on_workers() -> None:
    def dawdle(clip: Clip, plans: Sequence[ClipPlan]) -> None:
        time.sleep((int(clip.id) * 7919 % 5) * 2e-3)
        refuse(3, 8, 9, 10, 11)(clip, plans)

    def run(workers: int) -> tuple[list[Batch], list[str]]:
        told: list[tuple[Clip, MediaError]] = []
        plan = FakePlan(make_clips(40), mixup=True)
        with make_loader(plan, FakeDecoder(dawdle), workers=workers, told=told) as loader:
            mixed = [*train_requests(4, 12), ("evaluate", 36, 8), ("train", 48, 4)]
            return list(loader.batches(mixed)), [clip.id for clip, _ in told]

    (one, told_by_one), (many, told_by_many) = run(1), run(4)
    assert len(one) == 14
    assert all(same(a, b) for a, b in zip(one, many, strict=True))
    assert told_by_one == told_by_many == ["3", "8", "9", "10", "11"]


def test_replicas_of_one_decode_are_decoded_once() -> None:
    decoder = FakeDecoder()
    with make_loader(FakePlan(make_clips(4), repeat=3), decoder, workers=1) as loader:
        (batch,) = loader.batches([("train", 2, 7)])
    assert decoder.calls == ["0", "1", "2"]
    assert batch.ids == ["0", "1", "1", "1", "2", "2", "2"]
    assert batch.frames_BTCHW is not None
    assert batch.frames_BTCHW[:, 0, 0, 0, 0].tolist() == [2, 0, 1, 2, 0, 1, 2]
    assert batch.num_unique == 3


def test_the_same_clip_with_other_frames_is_decoded_again() -> None:
    plan = FakePlan(make_clips(2))
    at = plan.train(0, 4)
    at.frames_BT[2] += 1
    plan.train = lambda start, count: at  # type: ignore[method-assign]
    decoder = FakeDecoder()
    with make_loader(plan, decoder, workers=1) as loader:
        (batch,) = loader.batches([("train", 0, 4)])
    assert decoder.calls == ["0", "1", "0"]  # rows 1 and 3 share everything, rows 0 and 2 do not
    assert batch.ids == ["0", "1", "0", "1"]


def test_broken_clips_become_good_copies_without_weight() -> None:
    told: list[tuple[Clip, MediaError]] = []
    plan = FakePlan(make_clips(6), mixup=True)
    with make_loader(plan, FakeDecoder(refuse(1)), told=told) as loader:
        first, second = loader.batches([("train", 0, 6), ("train", 6, 6)])
    assert first.ids == ["0", "1", "2", "3", "4", "5"]
    assert first.weight_B.tolist() == [0.5, 0, 0.5, 0.5, 0.5, 0.5]
    assert first.mix_B.tolist() == [1, 1, 0.25, 0.25, 0.25, 0.25]  # neither it nor its partner is mixed
    assert first.frames_BTCHW is not None
    assert first.mel_BWCML is not None
    assert torch.equal(first.frames_BTCHW[1], first.frames_BTCHW[0])
    assert torch.equal(first.mel_BWCML[1], first.mel_BWCML[0])
    assert first.has_video_B.all()
    assert (first.num_broken, first.num_unique) == (1, 5)
    assert (loader.broken, loader.seen) == (2, 12)
    assert [(clip.id, error.stage) for clip, error in told] == [("1", "open")]
    assert second.num_broken == 1


def test_placeholder_takes_over_what_the_copy_lacks() -> None:
    clips = make_clips(2)
    clips[0] = replace(clips[0], audio=None)
    with make_loader(FakePlan(clips), FakeDecoder(refuse(1))) as loader:
        (batch,) = loader.batches([("train", 0, 2)])
    assert batch.has_audio_B.tolist() == [False, False]
    assert batch.has_video_B.tolist() == [True, True]


def test_replicas_of_a_broken_clip_all_break() -> None:
    def late(clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample] | None:
        samples = [paint(clip, plan) for plan in plans]
        if clip.id == "1":  # the second replica has another shape than the batch
            assert samples[1].mel_WCML is not None
            samples[1] = Sample(samples[1].frames_TCHW, samples[1].mel_WCML[..., :2])
        return samples

    told: list[tuple[Clip, MediaError]] = []
    with make_loader(FakePlan(make_clips(3), repeat=2), FakeDecoder(late), told=told) as loader:
        (batch,) = loader.batches([("train", 0, 6)])
    assert batch.weight_B.tolist() == [0.5, 0.5, 0, 0, 0.5, 0.5]
    assert batch.num_broken == 2
    assert str(told[0][1]) == "/media/1.mp4: audio: decoded to shape (1, 1, 3, 2), expected (1, 1, 3, 5)"


def test_a_clip_with_nothing_to_look_at_is_broken() -> None:
    clips = make_clips(2)
    clips[1] = replace(clips[1], video=None)
    told: list[tuple[Clip, MediaError]] = []
    with make_loader(FakePlan(clips), modalities=("video",), told=told) as loader:
        (batch,) = loader.batches([("train", 0, 2)])
    assert batch.weight_B.tolist() == [0.5, 0]
    assert "has none of the modalities that this run uses" in str(told[0][1])


def test_a_broken_batch_borrows_of_the_batch_before() -> None:
    with make_loader(FakePlan(make_clips(6)), FakeDecoder(refuse(2, 3))) as loader:
        batches = list(loader.batches(train_requests(2, 3)))
    middle = batches[1]
    assert middle.weight_B.tolist() == [0, 0]
    assert middle.num_unique == 0
    assert middle.frames_BTCHW is not None
    assert middle.frames_BTCHW[:, 1, 1, 1, 1].tolist() == [1, 1]


@pytest.mark.parametrize("broken", [(0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4)])
def test_a_broken_first_batch_borrows_of_one_on_its_way(broken: tuple[int, ...]) -> None:
    plan = FakePlan(make_clips(8))
    with make_loader(plan, FakeDecoder(refuse(*broken)), prefetch=3) as loader:
        first = next(loader.batches([("evaluate", 0, 2), *train_requests(2, 4)[1:]]))
    assert first.frames_BTCHW is not None
    assert first.mel_BWCML is not None
    donor = max(broken) + 1
    assert first.frames_BTCHW[:, 1, 1, 1, 1].tolist() == [donor, donor]
    assert (first.mel_BWCML == -donor).all()  # the one window of training, for each of evaluation
    assert first.weight_B.tolist() == [0, 0]


def test_nothing_readable_is_an_error_that_names_reasons() -> None:
    told: list[tuple[Clip, MediaError]] = []
    loader = make_loader(FakePlan(make_clips(6)), FakeDecoder(refuse(*range(6))), told=told)
    with pytest.raises(TooManyBroken, match=r"none of the first clips could be read: /media/0.mp4: open: moov"):
        next(loader.batches(train_requests(4, 4)))
    assert len(told) == 4
    assert not our_threads()


def test_evaluation_pads_without_decoding() -> None:
    decoder = FakeDecoder()
    with make_loader(FakePlan(make_clips(5)), decoder) as loader:
        first, second, third = loader.batches([("evaluate", 0, 4), ("evaluate", 4, 4), ("evaluate", 8, 4)])
    assert sorted(decoder.calls) == ["0", "1", "2", "3", "4"]
    assert first.weight_B.tolist() == [1, 1, 1, 1]
    assert first.window_BW is not None
    assert first.window_BW.tolist() == [[True, False]] * 4
    assert second.ids == ["4", "", "", ""]
    assert second.weight_B.tolist() == [1, 0, 0, 0]
    assert second.targets_BK[1:].sum() == 0
    assert second.num_broken == 0
    assert second.mel_BWCML is not None
    assert (second.mel_BWCML == -4).all()
    assert third.ids == [""] * 4
    assert third.num_unique == 0
    assert third.mel_BWCML is not None
    assert (third.mel_BWCML == -4).all()
    assert loader.seen == 5


def test_a_rank_with_nothing_but_padding() -> None:
    with make_loader(FakePlan(make_clips(2))) as loader:
        (batch,) = loader.batches([("evaluate", 4, 2)])
    assert batch.frames_BTCHW is not None
    assert batch.mel_BWCML is not None
    assert (batch.frames_BTCHW == 0).all()
    assert (batch.mel_BWCML == -80).all()
    assert batch.has_video_B.all()
    assert batch.weight_B.tolist() == [0, 0]


def test_missing_modalities_are_filled_and_marked() -> None:
    clips = make_clips(3)
    clips[0], clips[1] = replace(clips[0], video=None), replace(clips[1], audio=None)
    with make_loader(FakePlan(clips)) as loader:
        (batch,) = loader.batches([("train", 0, 3)])
    assert batch.has_video_B.tolist() == [False, True, True]
    assert batch.has_audio_B.tolist() == [True, False, True]
    assert batch.frames_BTCHW is not None
    assert batch.mel_BWCML is not None
    assert (batch.frames_BTCHW[0] == 0).all()
    assert (batch.mel_BWCML[1] == -80).all()
    assert batch.weight_B.tolist() == [0.5] * 3


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_modality(modality: str) -> None:
    with make_loader(FakePlan(make_clips(2)), modalities=(modality,)) as loader:
        (batch,) = loader.batches([("train", 0, 2)])
    assert (batch.frames_BTCHW is None) == (modality == "audio")
    assert (batch.mel_BWCML is None) == (batch.window_BW is None) == (modality == "video")
    assert batch.has_video_B.tolist() == [modality == "video"] * 2
    assert batch.has_audio_B.tolist() == [modality == "audio"] * 2


def test_classes_map_by_name_and_alias() -> None:
    with make_loader(FakePlan(make_clips(3)), classes=("b", "x"), aliases={"c": "x"}) as loader:
        (batch,) = loader.batches([("train", 0, 3)])
    assert batch.targets_BK.tolist() == [[0, 0], [1, 0], [0, 1]]


def test_prefetch_is_bounded_and_requests_may_be_endless() -> None:
    plan = FakePlan(make_clips(4))
    endless = (("train", 2 * i, 2) for i in itertools.count())
    with make_loader(plan, prefetch=3) as loader:
        batches = loader.batches(endless)
        for taken in range(4):
            deadline = time.perf_counter() + 5
            while len(plan.planned) < taken + 3 and time.perf_counter() < deadline:
                time.sleep(0.005)
            time.sleep(0.02)
            assert len(plan.planned) == taken + 3
            next(batches)


def test_first_batch_is_decoded_first() -> None:
    decoder = FakeDecoder(lambda clip, plans: time.sleep(0.01))
    with make_loader(FakePlan(make_clips(20)), decoder, workers=2, prefetch=4) as loader:
        next(loader.batches(train_requests(4, 5)))
        assert set(decoder.calls[:4]) == {"0", "1", "2", "3"}


def test_watchdog_names_stage_file_and_queues(caplog: pytest.LogCaptureFixture) -> None:
    held = threading.Event()
    decoder = FakeDecoder(lambda clip, plans: held.wait(5) and None if clip.id == "1" else None)
    with make_loader(FakePlan(make_clips(9)), decoder, workers=2, watchdog_s=0.1) as loader:
        batches = loader.batches(train_requests(3, 3))
        threading.Timer(0.38, held.set).start()
        with caplog.at_level(logging.WARNING):
            batch = next(batches)
    assert batch.ids == ["0", "1", "2"]  # it never kills
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) >= 2  # it repeats
    assert "stage: decode, 1 of 3 clips of the next batch not decoded yet" in warnings[-1]
    assert re.search(r"decoding now: /media/1.mp4 \(\d+\.\d s\); queue: 0 clips", warnings[-1])
    assert warnings[-1].endswith("prefetching 2 of 2 batches")


def test_watchdog_names_the_planning(caplog: pytest.LogCaptureFixture) -> None:
    def slow() -> Iterator[tuple[str, int, int]]:
        time.sleep(0.15)
        yield ("train", 0, 2)

    with make_loader(FakePlan(make_clips(2)), watchdog_s=0.1) as loader, caplog.at_level(logging.WARNING):
        assert len(list(loader.batches(slow()))) == 1
    assert re.search(r"stage: plan, working on a batch for \d\.\d s; decoding now: nothing", caplog.text)


def test_a_bug_in_the_decoder_surfaces_with_its_traceback() -> None:
    def broken_code(clip: Clip, plans: Sequence[ClipPlan]) -> None:
        if clip.id == "5":
            raise ZeroDivisionError("a bug")

    loader = make_loader(FakePlan(make_clips(8)), FakeDecoder(broken_code))
    batches = loader.batches(train_requests(2, 4))
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        list(batches)
    assert "broken_code" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert not our_threads()


@pytest.mark.parametrize("where", ["requests", "plan", "kind", "on_broken", "count"])
def test_other_errors_surface_too(where: str) -> None:
    def requests() -> Iterator[tuple[str, int, int]]:
        yield ("train", 0, 2)
        if where == "requests":
            raise OSError("pulled the plug")
        yield ("tain" if where == "kind" else "train", 2, 2)

    def tell(clip: Clip, error: MediaError) -> None:
        raise OSError("disk full")

    plan = FakePlan(make_clips(4))
    if where == "plan":
        plan.plan_at = lambda *args, **kwargs: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    act: Any = {"on_broken": refuse(1), "count": lambda clip, plans: []}.get(where)
    expected = {"requests": OSError, "plan": ZeroDivisionError, "kind": KeyError, "on_broken": OSError}
    loader = make_loader(plan, FakeDecoder(act), **({"on_broken": tell} if where == "on_broken" else {}))
    with pytest.raises(expected.get(where, ValueError)):
        list(loader.batches(requests()))
    assert not our_threads()


def test_threads_end_when_the_consumer_stops_early() -> None:
    loader = make_loader(FakePlan(make_clips(50)), FakeDecoder(lambda clip, plans: time.sleep(0.002)))
    batches = loader.batches(train_requests(5, 1000))
    next(batches)
    assert len(our_threads()) == 4
    begun = time.perf_counter()
    batches.close()
    assert time.perf_counter() - begun < 4
    assert not our_threads()
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def test_threads_end_when_the_batches_are_forgotten() -> None:
    loader = make_loader(FakePlan(make_clips(50)))
    for _ in loader.batches(train_requests(5, 1000)):
        break
    gc.collect()
    assert not our_threads()
    unused: Batches | None = loader.batches(train_requests(5, 1000))
    assert our_threads()
    del unused
    assert not our_threads()


def test_closing_the_loader_ends_every_stream() -> None:
    with make_loader(FakePlan(make_clips(50))) as loader:
        one, other = (loader.batches(train_requests(5, 1000)) for _ in range(2))
        assert same(next(one), next(other))
        assert len(our_threads()) == 8
    assert not our_threads()
    assert next(one, None) is None


def test_a_used_up_stream_leaves_nothing_and_the_loader_goes_on() -> None:
    loader = make_loader(FakePlan(make_clips(4)))
    for _ in range(3):
        assert [batch.sample for batch in loader.batches(train_requests(2, 2))] == [0, 2]
        assert not our_threads()
    assert list(loader.batches([])) == []


def test_a_clip_that_hangs_does_not_hold_up_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastav.loader.threads.JOIN_S", 0.1)
    held = threading.Event()
    loader = make_loader(FakePlan(make_clips(4)), FakeDecoder(lambda clip, plans: held.wait(5) and None))
    batches = loader.batches(train_requests(2, 2))
    time.sleep(0.05)
    with caplog.at_level(logging.WARNING):
        batches.close()
    held.set()
    assert "threads still running: /media/" in caplog.text


def test_stages_count_busy_and_waits() -> None:
    decoder = FakeDecoder(lambda clip, plans: time.sleep(0.02))
    with make_loader(FakePlan(make_clips(8)), decoder, workers=2) as loader:
        for _ in loader.batches(train_requests(4, 4)):
            time.sleep(0.01)
        stats = loader.stats()
    assert set(stats) == {"plan", "decode", "collate", "wait"}
    assert stats["decode"].items == 16
    assert stats["plan"].items == stats["collate"].items == stats["wait"].items == 4
    assert stats["decode"].busy_s >= 0.32
    assert stats["wait"].busy_s >= 0.04  # four times 10 ms of the consumer
    assert stats["wait"].get_wait_s > 0.03  # 160 ms of decoding against 40 ms of consuming
    assert stats["plan"].put_wait_s > 0.02
    again = loader.stats()
    assert again["decode"] is not stats["decode"]


def test_decoding_threads_run_torch_on_one_core_and_nobody_else_does() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        decoder = FakeDecoder()
        with make_loader(FakePlan(make_clips(8)), decoder) as loader:
            list(loader.batches(train_requests(4, 2)))
            assert decoder.torch_threads == {1}
            assert torch.get_num_threads() == 3
            fresh: list[int] = []
            thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert fresh == [3]
    finally:
        torch.set_num_threads(before)


def test_too_many_broken() -> None:
    loader = make_loader(FakePlan(make_clips(8)), FakeDecoder(refuse(1)), max_broken=0.1)
    batches = loader.batches(train_requests(8, 8))
    for _ in range(6):
        next(batches)
        loader.check_broken()  # 6 of 48 is too much, but 48 are too few to tell
    next(batches)
    with pytest.raises(TooManyBroken, match=r"^7 of 56 clips could not be read, .*: /media/1.mp4: open: moov"):
        loader.check_broken()
    loader.check_broken(5, 50)
    with pytest.raises(TooManyBroken, match="6 of 50 clips"):
        loader.check_broken(6, 50)
    batches.close()


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert Loading(workers=5).num_workers() == 5
    assert Loading().num_workers() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Loading().num_workers() == 1


def test_real_files_end_to_end(tmp_path: Path) -> None:
    from benchmarks.loader_workers import make_clips as make_media
    from fastav.data.plan import Plan, Sampling
    from fastav.media.pyav import PyAV

    manifest = make_media(tmp_path / "made.parquet", 5)
    broken = manifest.clip(3)
    assert broken.video is not None
    broken.video.write_bytes(broken.video.read_bytes()[:3000])
    sampling = Sampling(frames=3, image_size=32, window=100, eval_windows=(0, 150, 450), mixup=0.3, repeat=2)
    frontend = Frontend()
    decoder = PyAV().build(DecodeSpec(image_size=32, frontend=frontend, window=100))
    options = {"mel_bands": frontend.num_mels, "mel_frames": frontend.num_frames_s}
    plan = Plan([(manifest, 1.0)], sampling, seed=1, **options)

    def run(workers: int) -> tuple[list[Batch], list[str]]:
        told: list[str] = []
        loader = Loader(
            plan,
            decoder,
            Loading(workers=workers),
            modalities=("video", "audio"),
            classes=manifest.classes,
            on_broken=lambda clip, error: told.append(f"{clip.id} {error}"),
        )
        with loader:
            requests = [("train", 0, 4), ("train", 4, 4), ("train", 8, 4), ("evaluate", 0, 4), ("evaluate", 4, 4)]
            return list(loader.batches(requests)), told

    (one, told), (many, _) = run(1), run(4)
    assert all(same(a, b) for a, b in zip(one, many, strict=True))
    assert len(told) == 1
    assert told[0].startswith(f"{broken.id} {broken.video}: ")
    train, evaluation, last = one[0], one[3], one[4]
    planned = plan.train(0, 4)
    for row in range(4):
        clip = manifest.clip(int(planned.row_B[row]))
        if clip.id == broken.id:
            assert train.weight_B[row] == 0
            continue
        (sample,) = decoder.decode(clip, [planned[row]])
        assert train.frames_BTCHW is not None
        assert train.mel_BWCML is not None
        assert sample.frames_TCHW is not None
        assert sample.mel_WCML is not None
        assert torch.equal(train.frames_BTCHW[row], sample.frames_TCHW)
        assert torch.equal(train.mel_BWCML[row], sample.mel_WCML)
        assert train.targets_BK[row].argmax() == manifest.classes.index(clip.labels[0])
    assert evaluation.window_BW is not None
    assert evaluation.window_BW.tolist() == [[True, True, False]] * 4  # 4 s are 501 frames: 450 + 100 do not fit
    assert evaluation.weight_B.tolist() == [1, 1, 1, 0]
    assert last.ids == ["0004", "", "", ""]
    assert sum(batch.num_broken for batch in one[:3]) in (2, 4)  # both replicas of a draw break
