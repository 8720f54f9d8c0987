"""The DALI decoder on a CPU, against PyAV: same frames, same spectrograms, and what a clip it cannot decode costs."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import av
import msgspec
import numpy as np
import pytest
import torch

from fastav.core.errors import FastavError, MediaError, UserError
from fastav.media import mp4_muxer
from fastav.media.crop import crop_box, resize_crop
from fastav.media.dali import decoder as dali
from fastav.media.dali.decoder import Dali, missing_requirement
from fastav.media.dali.graph import Engine, PipelinePlace, VideoGraph, VideoSample
from fastav.media.decoder import DecodeSpec
from fastav.media.pyav import PyAV, PyAVDecoder
from fastav.media.shards import SplicedFrames
from fastav.pack.settings import PackSettings
from tests.helpers.dali_media import (  # fixtures
    DB,
    LEVELS,
    SIZE,
    both,
    cpu,
    distance,
    folder,
    needs_dali,
    noise,
    pack,
    reading,
    smooth,
    spoken,
    tall,
    webm,
    wide,
)
from tests.helpers.media import number_of, remux, write_media
from tests.helpers.plans import clip_of, plan_of
from tests.media.test_mp4_muxer import coded

# What is there


def test_what_is_missing_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_requirement("cpu") == "the package nvidia-dali-cuda130 is not installed (pip install 'fastav[dali]')"
    with pytest.raises(UserError, match=r'^decode\.kind "dali" with device "cpu": the package nvidia-dali-cuda130 is'):
        Dali(device="cpu").build(DecodeSpec())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    assert missing_requirement("cpu") == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing_requirement("auto") == ""
    assert missing_requirement("gpu") == "PyTorch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def not_there(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", not_there)
    for device in ("gpu", "auto"):
        assert missing_requirement(device) == (
            "libnvcuvid.so.1, the video decoder of the driver, is missing "
            "(a container needs NVIDIA_DRIVER_CAPABILITIES=compute,video,utility)"
        )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    assert missing_requirement("gpu") == ""


def test_dali_is_loaded_by_the_first_pipeline_not_by_the_import():
    code = (
        "import sys, fastav.media.dali.decoder as d; d.missing_requirement('auto'); print('nvidia.dali' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_threads_are_two_for_each_video_decoder_of_the_gpu(monkeypatch):
    gpu = torch.device("cuda", 0)
    names = {"NVIDIA H200": 14, "NVIDIA A100-SXM4-80GB": 10, "NVIDIA L4": 8, "NVIDIA GeForce RTX 3070": 4}
    for name, threads in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert dali.num_threads(gpu) == threads
    assert dali.num_threads(torch.device("cpu")) >= 1


def test_a_gpu_takes_neither_mjpeg_nor_odd_sides():
    assert dali.can_decode("gpu", "h264", 448, 256)
    assert dali.can_decode("cpu", "mjpeg", 448, 256)
    assert not dali.can_decode("gpu", "mjpeg", 448, 256)
    assert dali.can_decode("gpu", "vp9", 448, 256)
    assert dali.can_decode("cpu", "vp9", 447, 255)
    assert not dali.can_decode("gpu", "vp9", 447, 256)
    assert not dali.can_decode("gpu", "vp9", 448, 255)
    assert not dali.can_decode("gpu", "vp9", 126, 256)
    assert not dali.can_decode("cpu", "h264", 448, 256)


@needs_dali
def test_a_pack_of_mjpeg_is_pyavs_on_a_gpu(wide):
    decoder, plan = cpu(reading(("video",))), plan_of([0, 30], flip=True)
    decoder.kind = "gpu"
    prepared = decoder.prepare(wide, [plan])
    assert prepared.video is None
    expected = PyAV().build(decoder.spec).decode(wide, [plan])[0].frames_TCHW
    assert torch.equal(prepared.pictures[0], expected)


@needs_dali
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_workers_decode_the_video_of_a_share_of_the_clips(wide, share):
    """The same share of every batch, and the same clips each time."""
    spec, count = reading(), 32
    decoder = cpu(spec, hybrid=share)
    plans = [replace(plan_of([0, 30], windows=[5]), sample=1_000_003 + i) for i in range(count)]
    by_hand = [decoder.prepare(wide, [plan]).pictures is not None for plan in plans]
    assert by_hand == [decoder.prepare(wide, [plan]).video is None for plan in plans]
    for start in range(0, count, 8):
        assert abs(sum(by_hand[start : start + 8]) - 8 * share) <= 1
    prepared = [decoder.prepare(wide, [plan]) for plan in plans[:8]]
    assert all(clip.audio is not None for clip in prepared)
    made = decoder.decode(prepared, [[i] for i in range(8)], size=8, frames=2, windows=1)
    expected = PyAV().build(spec).decode(wide, plans[:1])[0].frames_TCHW
    for row in range(8):
        found = made.frames_BTCHW[row]
        assert torch.equal(found, expected) if by_hand[row] else distance(found, expected) <= LEVELS


def test_settings_are_a_kind_of_their_own():
    assert msgspec.convert({"kind": "dali", "device": "gpu", "pipelines": 3}, Dali | PyAV) == Dali("gpu", 0, 3)
    with pytest.raises(msgspec.ValidationError, match="pipelines"):
        msgspec.convert({"kind": "dali", "pipelines": 0}, Dali | PyAV)
    with pytest.raises(msgspec.ValidationError, match="hybrid"):
        msgspec.convert({"kind": "dali", "hybrid": 1.5}, Dali | PyAV)


@needs_dali
def test_settings_of_the_spectrogram_that_contradict_one_another_are_refused():
    with pytest.raises(UserError, match=r"frontend\.win_length"):
        cpu(reading(win_length=1024))


@needs_dali
def test_a_dali_that_does_not_work_is_found_when_the_decoder_is_built(monkeypatch):
    broken = VideoSample(b"not a video", *[np.zeros(1, np.int32)] * 2, ((0, 0, 1, 1),), (False,), 3)
    monkeypatch.setattr(dali, "trial_video", lambda codec: broken)
    with pytest.raises(FastavError, match=r'^decode\.kind "dali" with device "cpu" does not work on this .*: DALI: \S'):
        cpu(reading(("video",)))
    cpu(reading(("audio",)))  # which needs no film


@needs_dali
def test_a_dali_that_shows_other_pictures_is_found_when_the_decoder_is_built(monkeypatch):
    assert dali.self_test_failure("cpu") == ""
    monkeypatch.setattr(dali, "TRIAL_GREYS", (40, 90, 140, 190))
    made = dali.trial_video("mjpeg")
    monkeypatch.setattr(dali, "trial_video", lambda codec: made)
    monkeypatch.setattr(dali, "TRIAL_GREYS", (40, 90, 40, 90))  # as if the second group were the first one again
    with pytest.raises(FastavError, match=r"grey levels 40, 90, 40, 90 were decoded as \d\d, \d\d, 1\d\d, 1\d\d"):
        cpu(reading(("video",)))


# Frames


@needs_dali
def test_packed_video_of_two_sizes_agrees_with_pyav(wide, tall):
    plans = [
        plan_of([0, 7, 7, 30, 74], crop=(12.4, 3.6, 100.3, 80.8)),
        plan_of([1, 2, 3, 38, 39], crop=(0, 0, 96, 128), flip=True),
        plan_of([5, 5, 5, 5, 5], crop=(100, 60, 20, 17), flip=True),
        plan_of([9, 20, 21, 22, 23], crop=(0, 0, 160, 96)),
    ]
    for size in (32, 224):
        prepared, made, expected = both(reading(("video",), size), [wide, tall, wide, wide], plans)
        assert all(clip.video is not None and clip.pictures is None for clip in prepared)
        assert made.frames_BTCHW.shape == (4, 5, 3, size, size)
        assert made.frames_BTCHW.is_contiguous()
        assert made.mel_BWCML is None
        assert made.has_video_B.all()
        assert not made.has_audio_B.any()
        assert made.errors == [None] * 4
        for frames_TCHW, sample in zip(made.frames_BTCHW, expected, strict=True):
            assert distance(frames_TCHW, sample.frames_TCHW) <= LEVELS
    shown = [number_of(frame.flip(2).permute(1, 2, 0).numpy()) for frame in made.frames_BTCHW[1]]
    assert shown == [1, 2, 3, 38, 39]


@needs_dali
@pytest.mark.parametrize("size", [24, 96, 300])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_resize_are_those_of_resize_crop(size, flip):
    """Of the very frames that DALI decodes: what is left is rounding."""
    units, keys = coded("mjpeg", 3)
    data = mp4_muxer.mux("mjpeg", units, keys, 128, 96)
    frames = np.array([0, 2], np.int32)
    crop = (37, 11, 81, 59)

    def run(side, box, flip):
        engine = Engine(VideoGraph(PipelinePlace(None, 1), side))
        engine.start([VideoSample(data, frames, np.array([0, 1], np.int32), (box,), (flip,), 128 * 96 * 3)])
        return engine.finish().parts[0][1][0][0]

    # 96 x 96 pixels of the frame as they are, and the rest of it: cropped and resized to their own size.
    left, right = run(96, (0, 0, 96, 96), False), run(96, (32, 0, 128, 96), False)
    whole_THWC = torch.cat([left, right[:, :, 64:]], dim=2)
    expected = resize_crop(whole_THWC, crop, flip, size)
    found = run(size, crop_box(crop, 96, 128), flip).permute(0, 3, 1, 2)
    assert distance(found, expected) <= 0.6
    assert int((found.to(torch.int16) - expected.to(torch.int16)).abs().max()) <= 8


@needs_dali
def test_vp9_in_a_raw_webm_goes_through_dali(webm):
    plans = [plan_of([0, 3, 20, 59], crop=(10, 5, 120, 80)), plan_of([58, 58, 59, 59], crop=(0, 0, 160, 96), flip=True)]
    prepared, made, expected = both(reading(("video",)), [webm, webm], plans)
    assert all(clip.video is not None for clip in prepared)
    for frames_TCHW, sample in zip(made.frames_BTCHW, expected, strict=True):
        assert distance(frames_TCHW, sample.frames_TCHW) <= LEVELS


@needs_dali
def test_frames_of_a_raw_file_are_those_that_were_planned(folder):
    path = folder / "numbered.mkv"
    options = {"deadline": "realtime", "cpu-used": "4", "g": "10", "b": "2M"}
    write_media(path, frames=50, size=(128, 128), codec="libvpx-vp9", options=options)
    numbers = [0, 9, 10, 11, 33, 49]
    plan = plan_of(numbers, crop=(0, 0, 128, 128))
    prepared, made, _ = both(reading(("video",), 128), [clip_of(path)], [plan])
    assert prepared[0].video is not None
    assert [number_of(frame.permute(1, 2, 0).numpy()) for frame in made.frames_BTCHW[0]] == numbers


@needs_dali
def test_what_dali_cannot_take_here_is_pyavs_to_the_bit(folder, wide):
    """H.264 and pictures on a CPU; turned, sought and BT.709 video anywhere."""
    h264 = folder / "h264.mp4"
    write_media(h264, frames=30, size=(160, 96), picture=smooth)
    vp9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}, "picture": smooth}
    blue = folder / "bt709.webm"
    write_media(blue, frames=30, size=(160, 96), colour=(1, 1), **vp9)
    turned = [folder / f"turned{degrees}.mp4" for degrees in (90, 180)]
    for path, degrees in zip(turned, (90, 180), strict=True):
        write_media(path, frames=30, size=(160, 96), rotation=degrees, **vp9)
    long = folder / "long.webm"
    write_media(long, frames=60, size=(160, 96), **vp9)
    still = folder / "still.jpg"
    av.VideoFrame.from_ndarray(smooth(1, 160, 96), format="rgb24").to_image().save(still)
    picture = replace(clip_of(still), video=None, image=still, num_frames=1)
    clips = [
        pack(clip_of(h264), folder / "h264.tar", PackSettings()),
        clip_of(h264),
        clip_of(blue),
        *map(clip_of, turned),
        clip_of(long, 1.0, 1.0),
        picture,
        pack(replace(picture, fps=0.0), folder / "still.tar"),
    ]
    plans = [plan_of([0, 0] if clip.num_frames == 1 else [2, 19], crop=(4, 6, 70, 77), flip=True) for clip in clips]
    prepared, made, expected = both(reading(("video",)), [*clips, wide], [*plans, plan_of([0, 1])])
    assert [clip.video is None for clip in prepared] == [True] * len(clips) + [False]
    for frames_TCHW, sample in zip(made.frames_BTCHW[: len(clips)], expected[: len(clips)], strict=True):
        assert torch.equal(frames_TCHW, sample.frames_TCHW)
    assert made.has_video_B.all()


@needs_dali
def test_a_part_at_the_start_of_a_raw_file_goes_through_dali_and_doubts_do_not(folder, webm):
    decoder, plan = cpu(reading(("video",))), plan_of([0, 29])
    part = clip_of(webm.video, 0.0, 1.2)
    assert part.num_frames == 30
    assert decoder.prepare(part, [plan]).video is not None
    assert decoder.prepare(replace(part, duration_s=1.0), [plan]).video is None  # 30 frames do not end there
    with pytest.raises(MediaError, match=r"frame 0 is 160x96, expected 96x96 as in the manifest"):
        decoder.prepare(replace(part, width=96), [plan])
    edited = remux(webm.video, folder / "edited.mp4", -0.2, options={"avoid_negative_ts": "disabled"})
    assert decoder.prepare(clip_of(edited), [plan_of([0, 54])]).video is None  # five packets are not shown
    cut = folder / "cut.webm"
    cut.write_bytes(webm.video.read_bytes()[: webm.video.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"cut\.webm"):
        decoder.prepare(replace(webm, video=cut), [plan_of([0, 59])])
    with pytest.raises(MediaError, match="no such file"):
        decoder.prepare(replace(webm, video=folder / "none.webm"), [plan])


@needs_dali
def test_replicas_share_a_decode_and_go_to_their_rows(wide, tall):
    spec = reading(("video", "audio"))
    decoder, reference = cpu(spec), PyAV().build(spec)
    crops = [(0, 0, 90, 90), (30, 5, 60, 60), (60, 0, 96, 96)]
    plans = [plan_of([3, 50], crop=crop, windows=[7], flip=i == 1) for i, crop in enumerate(crops)]
    single = [plan_of([4, 5], crop=(0, 30, 90, 90), windows=[0])]
    prepared = [decoder.prepare(wide, plans), None, decoder.prepare(tall, single)]
    made = decoder.decode(prepared, [[5, 0, 2], [3], [1]], size=7, frames=2, windows=1)
    for row, sample in zip([5, 0, 2], reference.decode(wide, plans), strict=True):
        assert distance(made.frames_BTCHW[row], sample.frames_TCHW) <= LEVELS
        torch.testing.assert_close(made.mel_BWCML[row], sample.mel_WCML, rtol=0, atol=DB)
    assert distance(made.frames_BTCHW[1], reference.decode(tall, single)[0].frames_TCHW) <= LEVELS
    assert np.flatnonzero(made.has_video_B).tolist() == [0, 1, 2, 5]
    assert np.flatnonzero(made.has_audio_B).tolist() == [0, 2, 5]
    assert made.errors == [None] * 3
    assert made.frames_BTCHW[[3, 4, 6]].max() == 0
    assert made.mel_BWCML[[1, 3, 4, 6]].unique().tolist() == [-100.0]


@needs_dali
def test_a_row_of_another_size_than_the_stream_is_broken(wide):
    decoder = cpu(reading(("video",)))
    with pytest.raises(MediaError, match=r'video: clip "wide" is 160x96, expected 176x96 as in the manifest'):
        decoder.prepare(replace(wide, width=176), [plan_of([0])])
    units, keys = coded("h264", 4)
    spliced = SplicedFrames("h264", units, keys, [0])
    dali.check_size(spliced, replace(wide, width=128, height=96))
    with pytest.raises(MediaError, match=r"is 128x96, expected 160x96 as in the manifest"):
        dali.check_size(spliced, wide)
    with pytest.raises(ValueError, match=r'clip "wide" has 75 frames, the plan needs \[75\]'):
        decoder.prepare(wide, [plan_of([75])])


# Batches


@needs_dali
def test_a_clip_without_one_modality_is_blank_in_it(wide, tall, spoken):
    plans = [plan_of([0, 1], windows=[3])] * 3
    _, made, expected = both(reading(), [wide, tall, spoken], plans)
    assert made.has_video_B.tolist() == [True, True, False]
    assert made.has_audio_B.tolist() == [True, False, True]
    assert made.frames_BTCHW[2].max() == 0
    assert made.mel_BWCML[1].unique().tolist() == [-100.0]
    for row, sample in enumerate(expected):
        if sample.mel_WCML is not None:
            torch.testing.assert_close(made.mel_BWCML[row], sample.mel_WCML, rtol=0, atol=DB)


@needs_dali
def test_a_clip_with_nothing_of_what_the_run_looks_at_is_broken(tall, spoken):
    for modality, clip in (("audio", tall), ("video", spoken)):
        with pytest.raises(MediaError, match=f"has no {modality}"):
            cpu(reading((modality,))).prepare(clip, [plan_of()])


@needs_dali
def test_a_batch_of_nothing_is_blank():
    made = cpu(reading()).decode([None], [[1]], size=2, frames=3, windows=4)
    assert made.frames_BTCHW.shape == (2, 3, 3, SIZE, SIZE)
    assert made.mel_BWCML.shape == (2, 4, 1, 128, 100)
    assert made.mel_BWCML.unique().tolist() == [-100.0]
    assert not made.has_video_B.any()
    assert made.errors == [None]


def poisoned(prepared, part):
    """The same clip with bytes that DALI cannot decode: damaged in the middle, or no media at all."""
    if part == "video":
        data = prepared.video.data
        middle = len(data) // 2
        damaged = data[:middle] + bytes(len(data) - middle)
        return replace(prepared, video=replace(prepared.video, data=damaged))
    if part == "not a video":
        return replace(prepared, video=replace(prepared.video, data=b"no video" * 99))
    return replace(prepared, audio=replace(prepared.audio, data=prepared.audio.data[:300]))


def unreadable(self, clip, plans):
    raise MediaError(clip.shard, "PyAV cannot either", "video")


@needs_dali
@pytest.mark.parametrize("part", ["video", "not a video", "audio"])
def test_a_poisoned_clip_is_pyavs_or_named_and_the_others_come_out_as_without_it(wide, tall, webm, part, caplog):
    spec = reading()
    decoder = cpu(spec)
    plans = [
        plan_of([0, 1, 40 if clip is wide else 30], windows=[i]) for i, clip in enumerate([wide, tall, wide, webm])
    ]
    prepared = [decoder.prepare(clip, [plan]) for clip, plan in zip([wide, tall, wide, webm], plans, strict=True)]
    rows, shape = [[3], [2], [1], [0]], {"size": 4, "frames": 3, "windows": 1}
    clean = decoder.decode(prepared, rows, **shape)
    assert clean.errors == [None] * 4
    bad = [*prepared[:2], poisoned(prepared[2], part), prepared[3]]

    def others_are_clean(made):
        for row in (0, 2, 3):
            assert torch.equal(made.frames_BTCHW[row], clean.frames_BTCHW[row])
            assert torch.equal(made.mel_BWCML[row], clean.mel_BWCML[row])

    for _ in range(2):  # and again, with the pipelines of before
        made = decoder.decode(bad, rows, **shape)
        others_are_clean(made)
        assert made.errors == [None] * 4
        assert "DALI: " in caplog.text
        assert "decoded with PyAV instead" in caplog.text
        (sample,) = PyAV().build(spec).decode(wide, [plans[2]])
        assert torch.equal(made.frames_BTCHW[1], sample.frames_TCHW)
        if sample.mel_WCML is not None:
            assert torch.equal(made.mel_BWCML[1], sample.mel_WCML)
        with patch.object(PyAVDecoder, "decode", unreadable):
            made = decoder.decode(bad, rows, **shape)
        others_are_clean(made)
        assert [error is not None for error in made.errors] == [False, False, True, False]
        error = made.errors[2]
        assert (error.path, error.stage) == (wide.shard, "audio" if part == "audio" else "video")
        assert error.reason.startswith('clip "wide": DALI: ')
        assert len(error.reason) > len('clip "wide": DALI: ') + 10
        assert not any(word in error.reason for word in ("traceback", "/opt", "Current pipeline"))
        assert made.has_video_B.tolist() == [True, False, True, True]
        assert made.has_audio_B.tolist() == [False, False, False, True]
        assert made.frames_BTCHW[1].max() == 0
        assert made.mel_BWCML[1].unique().tolist() == [-100.0]
        after = decoder.decode(prepared, rows, **shape)
        assert after.errors == [None] * 4
        assert torch.equal(after.frames_BTCHW, clean.frames_BTCHW)
        assert torch.equal(after.mel_BWCML, clean.mel_BWCML)


@needs_dali
def test_where_all_clips_fail_a_made_one_tells_whether_dali_still_works(wide, monkeypatch):
    decoder = cpu(reading(("video",)))
    bad = poisoned(decoder.prepare(wide, [plan_of([0])]), "not a video")
    shape = {"size": 2, "frames": 1, "windows": 1}
    monkeypatch.setattr(PyAVDecoder, "decode", unreadable)
    made = decoder.decode([bad, bad], [[0], [1]], **shape)
    assert all(error is not None for error in made.errors)
    monkeypatch.setattr(dali.Slot, "self_test", lambda self, kind: "out of memory")
    with pytest.raises(FastavError, match="DALI stopped working: out of memory"):
        decoder.decode([bad, bad], [[0], [1]], **shape)
    decoder.close()  # the slot was given back


@needs_dali
def test_threads_share_pipelines_and_larger_batches_follow_smaller_ones(wide, tall, spoken):
    spec = reading()
    decoder = cpu(spec, pipelines=2)
    clips = [wide, tall, spoken]
    plans = [plan_of([0, 1], windows=[i]) for i in range(3)]
    prepared = [decoder.prepare(clip, [plan]) for clip, plan in zip(clips, plans, strict=True)]
    alone = [decoder.decode([p], [[0]], size=1, frames=2, windows=1) for p in prepared]
    failures = Counter()

    def drive(number):
        rng = np.random.default_rng(number)
        for _ in range(6):
            chosen = rng.integers(0, 3, rng.integers(1, 7)).tolist()
            rows = [[i] for i in range(len(chosen))]
            made = decoder.decode([prepared[i] for i in chosen], rows, size=len(chosen), frames=2, windows=1)
            for row, i in enumerate(chosen):
                failures["frames"] += not torch.equal(made.frames_BTCHW[row], alone[i].frames_BTCHW[0])
                failures["mel"] += not torch.equal(made.mel_BWCML[row], alone[i].mel_BWCML[0])
            failures["done"] += 1

    threads = [threading.Thread(target=drive, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(failures) == {"frames": 0, "mel": 0, "done": 24}
    decoder.close()
    again = decoder.decode(prepared[:1], [[0]], size=1, frames=2, windows=1)
    assert torch.equal(again.frames_BTCHW, alone[0].frames_BTCHW)


@needs_dali
def test_outputs_of_a_pipeline_outlive_later_runs_and_the_pipeline():
    units, keys = coded("mjpeg", 4)
    data = mp4_muxer.mux("mjpeg", units, keys, 128, 96)
    engine = Engine(VideoGraph(PipelinePlace(None, 1), 64))

    def run(number):
        one = np.array([number], np.int32)
        engine.start([VideoSample(data, one, np.zeros(1, np.int32), ((0, 0, 128, 96),), (False,), 1)] * 2)
        return engine.finish().parts[0][1][0]

    kept = run(0)
    copy = kept.clone()
    later = [run(number) for number in (1, 2, 3, 1)]
    assert torch.equal(kept, copy)
    assert not torch.equal(kept, later[0])
    assert torch.equal(later[0], later[3])
    engine.close()
    gc.collect()
    assert torch.equal(kept, copy)


@needs_dali
def test_an_engine_keeps_batches_apart_and_takes_larger_ones():
    units, keys = coded("mjpeg", 4)
    data, place = mp4_muxer.mux("mjpeg", units, keys, 128, 96), np.zeros(1, np.int32)

    def sample(number):
        return VideoSample(data, np.array([number], np.int32), place, ((0, 0, 128, 96),), (False,), 1)

    engine = Engine(VideoGraph(PipelinePlace(None, 1), 64))
    engine.start([sample(3)])
    engine.start([sample(1)])
    again = engine.finish().parts[0][1][0]
    engine.start([sample(1)])
    assert torch.equal(again, engine.finish().parts[0][1][0])
    engine.start([])
    assert engine.finish().parts == []
    for count in (2, 5, 3):  # each in one run, though larger than the one before
        engine.start([sample(1)] * count)
        assert [numbers for numbers, _ in engine.finish().parts] == [list(range(count))]


@pytest.mark.gpu
@pytest.mark.skipif(bool(missing_requirement("gpu")), reason=missing_requirement("gpu"))
def test_packed_h264_and_sound_on_a_gpu_agree_with_pyav(folder):
    path = folder / "gpu.mp4"
    write_media(path, frames=75, size=(160, 96), picture=smooth, wave=noise(3, 44_100), rate=44_100, layout="mono")
    for name in ("small", "balanced", "fast"):
        clip = pack(clip_of(path), folder / f"{name}.tar", PackSettings(preset=name))
        spec = reading()
        decoder = Dali(device="gpu").build(spec)
        plans = [plan_of([0, 7, 7, 30, 74], crop=(10, 5, 120, 80), windows=[w], flip=w == 5) for w in (0, 5, 200)]
        prepared, made, expected = both(spec, [clip] * 3, plans, decoder)
        made.adopt()
        assert made.frames_BTCHW.is_cuda
        assert made.mel_BWCML.is_cuda
        assert all(one.video is not None for one in prepared)
        for row, sample in enumerate(expected):
            assert distance(made.frames_BTCHW[row].cpu(), sample.frames_TCHW) <= LEVELS
            torch.testing.assert_close(made.mel_BWCML[row].cpu(), sample.mel_WCML, rtol=0, atol=DB)
