from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import av
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

import fastav.media.demux as media_module
import fastav.media.frame_seek as frames_module
from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.media.crop import resize_crop
from fastav.media.decoder import DecodeSpec, UncertainSeek
from fastav.media.decoder_choice import DecoderConfig
from fastav.media.frame_seek import PacketReader
from fastav.media.probe import probe, probe_image
from fastav.media.pyav import PyAV
from fastav.media.spectrogram import PRESETS
from tests.helpers.media import clicks, number_of, numbered, probed, remux, straight, write_media
from tests.helpers.plans import clip_of, heard, pictures, plan_of
from tests.media.test_probe import REAL_VIDEO


@pytest.fixture
def no_counting(monkeypatch):
    """Fails a test whose frames were found by decoding the file from its start."""

    def refuse(*args):
        raise AssertionError("the file was decoded from its start")

    monkeypatch.setattr(media_module, "count_frames", refuse)


# Frames: real files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL_VIDEO)
def test_planned_frames_are_those_of_a_straight_decode(realdata, name, monkeypatch):
    path = realdata / "video" / name
    if name != "sample.avi":
        monkeypatch.setattr(media_module, "count_frames", None)
    rng = np.random.default_rng(0)
    info = probed(path)
    side = min(info.width, info.height, 256)
    plans = {}
    pieces = [(0.0, None), *[(k * 2.0, 2.0) for k in range(int(info.duration_s / 2))][-3:]]
    for start_s, duration_s in pieces:
        clip = clip_of(path, start_s, duration_s, info=info)
        plans[clip] = np.sort(rng.integers(0, clip.num_frames, 6))
    wanted = {clip.start_frame + n for clip, frames in plans.items() for n in frames.tolist()}
    truth = {}
    for i, frame in enumerate(straight(path)):
        if i in wanted:
            upright = np.rot90(frame.to_ndarray(format="rgb24"), -info.rotation // 90)
            truth[i] = upright[info.height - side :, info.width - side :]
    for clip, frames in plans.items():
        seen = pictures(clip, frames, side, (info.width - side, info.height - side))
        for number, picture in zip(frames.tolist(), seen, strict=True):
            assert np.array_equal(picture, truth[clip.start_frame + number]), (clip.start_s, number)


def test_damaged_real_files_are_named(realdata):
    row = Clip("x", video=realdata / "video" / "sample_with_invalid_nalu.mp4", num_frames=30, width=1080, height=720)
    row = replace(row, duration_s=1.0, fps=30.0)
    with pytest.raises(MediaError, match="video: is damaged"):
        pictures(row, [2, 28])
    missing = realdata / "video" / "sample_missing_stsd.mp4"
    row = replace(row, video=missing, audio=missing, num_samples=40_000, sample_rate=44_100)
    assert pictures(row, [2, 28]).shape == (2, 32, 32, 3)
    with pytest.raises(MediaError, match="audio: the codec of its audio stream is unknown"):
        heard(row)


# Frames: made files -------------------------------------------------------------------------------------------------

LAYOUTS = {
    "long.mp4": ("libx264", {"g": "250", "bf": "3", "b-pyramid": "normal"}),
    "short.mp4": ("libx264", {"g": "12", "bf": "2", "sc_threshold": "0"}),
    "open.mkv": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0:log-level=-1"}),
    "intra.mov": ("libx264", {"g": "1"}),
    "stream.ts": ("libx264", {"g": "15", "bf": "2"}),
    "open.ts": ("mpeg2video", {"g": "12", "bf": "2"}),
    "hevc.mp4": ("libx265", {"g": "20", "x265-params": "open-gop=1:log-level=none:pools=1"}),
    "vp8.webm": ("libvpx", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "good"}),
    "vp9.webm": ("libvpx-vp9", {"g": "30", "lag-in-frames": "10", "deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.mp4": ("mpeg4", {"g": "20", "bf": "2"}),
    "mpeg4.avi": ("mpeg4", {"g": "20", "bf": "2"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Writes each layout once: 125 numbered frames, five seconds."""
    folder, known = tmp_path_factory.mktemp("decode"), {}

    def get(name):
        if name not in known:
            codec, options = LAYOUTS[name]
            path = write_media(folder / name, frames=125, codec=codec, options=options)
            known[name] = path, probe(path, ("video",))
        return known[name]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_frame_numbers_in_every_layout(made, name, monkeypatch):
    path, info = made(name)
    if name != "mpeg4.avi":
        # By their packets, that is: not by counting, which is always right.
        monkeypatch.setattr(media_module, "count_frames", None)
    rng = np.random.default_rng(1)
    for start_s, duration_s in [(0.0, None), (0.0, 2.0), (2.0, 2.0), (2.52, 1.0), (3.96, 0.5), (4.0, 1.0)]:
        clip = clip_of(path, start_s, duration_s, info=info)
        assert clip.num_frames == round((duration_s or 5.0) * 25 + 0.1)
        for count in (1, 4, 9):
            frames = np.sort(rng.integers(0, clip.num_frames, count))
            assert numbers(clip, frames) == (clip.start_frame + frames).tolist()


def numbers(clip, frames, config=None):
    """The numbers that the planned frames of a `numbered` file show."""
    decoder = (config or PyAV()).build(DecodeSpec(("video",), image_size=96))
    sample = decoder.decode(clip, [plan_of(frames, crop=(0, 0, clip.width, clip.height))])[0]
    return [number_of(picture.permute(1, 2, 0).numpy()) for picture in sample.frames_TCHW]


@pytest.mark.parametrize("name", ["long.mp4", "open.mkv", "hevc.mp4"])
def test_left_out_frames_change_no_pixel(made, name):
    path, info = made(name)
    truth = [frame.to_ndarray(format="rgb24")[:, :64] for frame in straight(path)]
    for frames in ([3, 50, 51, 119], [124], [0]):
        for config in (PyAV(), PyAV(threads_per_clip=2)):
            for number, seen in zip(frames, pictures(clip_of(path, info=info), frames, 64, config=config), strict=True):
                assert np.array_equal(seen, truth[number])


@pytest.mark.parametrize("name", ["short.mp4", "open.mkv", "stream.ts", "hevc.mp4", "vp9.webm", "long.mp4"])
def test_spans_too_large_to_hold_are_read_twice(made, no_counting, monkeypatch, name):
    monkeypatch.setattr(frames_module, "HELD_BYTES", 4000)
    path, info = made(name)
    for start_s, duration_s in [(0.0, None), (2.52, 2.0)]:
        clip = clip_of(path, start_s, duration_s, info=info)
        frames = np.array([0, 1, 19, 40, clip.num_frames - 1])
        assert numbers(clip, frames) == (clip.start_frame + frames).tolist()


def test_only_what_is_needed_is_decoded(made, monkeypatch):
    decoded = []
    real = PacketReader.decode_run

    def count(self, first, last, keep):
        decoded.append(last - first + 1)
        yield from real(self, first, last, keep)

    monkeypatch.setattr(PacketReader, "decode_run", count)
    path, info = made("short.mp4")
    assert numbers(clip_of(path, info=info), [3, 40, 100]) == [3, 40, 100]
    assert len(decoded) == 3
    assert sum(decoded) < 3 * 12
    decoded.clear()
    fed = []
    feed = PacketReader.feed
    monkeypatch.setattr(PacketReader, "feed", lambda self, packet: fed.append(1) or feed(self, packet))
    assert numbers(clip_of(path, 4.0, 1.0, info=info), [2]) == [102]
    assert sum(decoded) <= 12
    assert len(fed) <= 25 + 12 + 1


def test_variable_frame_rate(tmp_path, no_counting):
    times_ms = [0, 40, 80, 500, 540, 1200, 1240, 1280, 2500, 3000, 3040, 3080, 4000, 4040, 4080, 4120]
    path = write_media(tmp_path / "vfr.mp4", times_ms=times_ms, options={"bf": "2", "g": "6"})
    info = probe(path)
    assert numbers(clip_of(path, info=info), [2, 3, 7, 12]) == [2, 3, 7, 12]
    clip = clip_of(path, 2.2, 1.0, info=info)
    assert (clip.start_frame, clip.num_frames) == (8, 4)
    assert numbers(clip, [0, 1, 3]) == [8, 9, 11]


def test_edit_lists(made, tmp_path, monkeypatch):
    path = remux(made("long.mp4")[0], tmp_path / "cut.mp4", shift_s=-0.5, options={"avoid_negative_ts": "disabled"})
    truth = [number_of(frame.to_ndarray(format="rgb24")) for frame in straight(path)]
    assert truth[0] > 5
    clip = clip_of(path)
    frames = [0, 1, 30, len(truth) - 1]
    with monkeypatch.context() as patch:
        patch.setattr(media_module, "count_frames", None)
        assert numbers(clip, frames) == [truth[n] for n in frames]
    piece = clip_of(path, 2.1, 1.0)
    assert numbers(piece, [0, 5]) == [truth[piece.start_frame], truth[piece.start_frame + 5]]


def test_where_packets_prove_nothing_frames_are_counted(made, tmp_path, monkeypatch):
    # The first keyframe is gone: a straight decode drops what cannot be decoded before the second one.
    seen = iter(range(1000))
    source = made("open.mkv")[0]
    path = remux(source, tmp_path / "late.mkv", keep=lambda p: next(seen) > 0)
    truth = [number_of(frame.to_ndarray(format="rgb24")) for frame in straight(path)]
    assert len(truth) < 124
    counted = []
    real = media_module.count_frames
    monkeypatch.setattr(media_module, "count_frames", lambda *args: counted.append(1) or real(*args))
    clip = clip_of(path)
    assert numbers(clip, [0, 20, 60]) == [truth[n] for n in (0, 20, 60)]
    assert counted
    assert numbers(clip_of(path, 0.0, 1.0), [20]) == [truth[20]]


@pytest.mark.parametrize("name", ["mpeg4.mp4", "hevc.mp4"])  # FFmpeg looks for itself into others
def test_packets_wrongly_marked_as_keyframes(made, tmp_path, name):
    def mark(packet):
        packet.is_keyframe = True
        return True

    path = remux(made(name)[0], tmp_path / "lies.mp4", keep=mark)
    with av.open(str(path)) as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    assert numbers(clip_of(path, modalities=("video",)), [0, 43, 44, 120]) == [0, 43, 44, 120]
    piece = clip_of(path, 2.52, 1.0, ("video",))
    assert numbers(piece, [2, 20]) == [65, 83]


def test_a_failing_short_cut_gives_the_same_frames(made, monkeypatch):
    path, info = made("long.mp4")
    clip = clip_of(path, 2.0, 2.0, info=info)
    expected = pictures(clip, [3, 30])

    def fail(self, wanted):
        yield wanted[0], next(straight(made("short.mp4")[0]))
        raise UncertainSeek("for the test")

    monkeypatch.setattr(PacketReader, "pick", fail)
    assert np.array_equal(pictures(clip, [3, 30]), expected)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(tmp_path, degrees):
    path = write_media(tmp_path / "x.mp4", frames=4, rotation=-degrees)
    clip = clip_of(path)
    assert clip.rotation == degrees
    upright = [np.rot90(frame.to_ndarray(format="rgb24"), -degrees // 90)[-40:, -40:] for frame in straight(path)]
    at = (clip.width - 40, clip.height - 40)
    assert np.array_equal(pictures(clip, [0, 3], 40, at), np.stack([upright[0], upright[3]]))


MATRICES = {"601": (6, 1), "709": (1, 1), "709 full": (1, 2), "601 full": (6, 2)}


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_colours_by_matrix_range_and_depth(tmp_path, matrix, pix_fmt):
    def patches(number, width, height):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[:, : width // 2] = (200, 60, 30)
        picture[:, width // 2 :] = (20, 180, 90)
        return picture

    path = write_media(
        tmp_path / "x.mp4", frames=2, pix_fmt=pix_fmt, colour=MATRICES[matrix], picture=patches, options={"crf": "5"}
    )
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.format.name) == (
            *MATRICES[matrix],
            pix_fmt if "full" not in matrix or pix_fmt == "yuv420p10le" else pix_fmt.replace("yuv", "yuvj"),
        )
    seen = pictures(clip_of(path), [1], 64, (16, 0))[0].astype(int)
    assert np.abs(seen[30, 10] - (200, 60, 30)).max() <= 5
    assert np.abs(seen[30, 54] - (20, 180, 90)).max() <= 5


def test_odd_sizes(tmp_path):
    path = write_media(tmp_path / "x.mkv", frames=5, size=(97, 53), codec="ffv1", picture=_texture)
    clip = clip_of(path)
    assert (clip.width, clip.height) == (97, 53)
    truth = [frame.to_ndarray(format="rgb24") for frame in straight(path)]
    seen = pictures(clip, [4], 53, (44, 0))[0].astype(int)
    assert np.abs(seen - truth[4][:, 44:]).mean() < 6  # noise in every pixel, with other neighbours at the edges


def _texture(number, width, height):
    return np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_repeats_crops_and_flips(made):
    path, info = made("long.mp4")
    clip = clip_of(path, info=info)
    truth = [frame.to_ndarray(format="rgb24") for frame in straight(path)]
    frames = [4, 4, 90, 90]
    plans = [plan_of(frames, (3, 5, 60, 40), flip=True), plan_of(frames, (20, 2, 50, 61))]
    for sample, plan in zip(
        PyAV().build(DecodeSpec(("video",), image_size=48)).decode(clip, plans), plans, strict=True
    ):
        expected = resize_crop(np.stack([truth[n] for n in frames]), plan.crop, plan.flip, 48)
        off = (sample.frames_TCHW.int() - expected.int()).abs()
        assert off.float().mean() < 1.5  # FFmpeg's fast conversion of whole frames is about a level too dark
        assert off.max() < 24
        assert torch.equal(sample.frames_TCHW[0], sample.frames_TCHW[1])
        assert sample.mel_WCML is None


# Clips --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("both") / "both.mp4"
    write_media(path, frames=100, options={"g": "250", "bf": "3"}, wave=clicks(4, [1, 3]))
    return path, probe(path)


@pytest.fixture
def opened(monkeypatch):
    """The state of every stream of every container that was opened: (kind, packets skipped, decoder started)."""
    states = []

    class Watched:
        def __init__(self, container):
            self.container = container

        def __enter__(self):
            return self.container

        def __exit__(self, *error):
            streams = self.container.streams
            states.append([(s.type, s.discard.name == "all", s.codec_context.is_open) for s in streams])
            self.container.close()

    real = media_module.open_media
    monkeypatch.setattr(media_module, "open_media", lambda path: Watched(real(path)))
    return states


@pytest.mark.parametrize("start_s", [0.0, 2.5])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_single_modality_decodes_only_itself(both, opened, modality, start_s):
    path, info = both
    clip = clip_of(path, start_s, 1.0, info=info)
    sample = PyAV().build(DecodeSpec((modality,), image_size=32)).decode(clip, [plan_of([1, 20])])[0]
    assert (sample.frames_TCHW is None) == (modality == "audio")
    assert (sample.mel_WCML is None) == (modality == "video")
    assert len(opened) == 1
    for kind, skipped, started in opened[0]:
        assert skipped == (kind != modality)
        assert started == (kind == modality)


def test_both_modalities_share_one_container(both, opened):
    path, info = both
    decoder = PyAV().build(DecodeSpec(image_size=48, window=100))
    plans = [plan_of([0, 50, 99], windows=(20, -1)), plan_of([0, 50, 99], (10, 10, 30, 30), (20, -1), flip=True)]
    samples = decoder.decode(clip_of(path, info=info), plans)
    assert len(opened) == 1
    assert [s.frames_TCHW.shape for s in samples] == [(3, 3, 48, 48)] * 2
    assert samples[0].mel_WCML is samples[1].mel_WCML
    mel_WCML = samples[0].mel_WCML
    assert (mel_WCML.shape, mel_WCML.dtype) == ((2, 1, 128, 100), torch.float32)
    assert (mel_WCML[1] == -100).all()
    whole = PRESETS["ssw60"].build().log_mel(heard(clip_of(path, info=info)))
    assert torch.allclose(mel_WCML[0], whole[..., 20:120], atol=1e-3)
    for sample, plan in zip(samples, plans, strict=True):
        assert torch.equal(sample.frames_TCHW, decoder.decode(clip_of(path, info=info), [plan])[0].frames_TCHW)


def test_what_is_not_there_is_none(made, tmp_path):
    silent, info = made("long.mp4")
    sample = PyAV().build(DecodeSpec(image_size=32)).decode(clip_of(silent, info=info), [plan_of()])[0]
    assert sample.mel_WCML is None
    sound = write_media(tmp_path / "x.m4a", wave=clicks(1, [0.5]))
    sample = PyAV().build(DecodeSpec(image_size=32)).decode(clip_of(sound), [plan_of()])[0]
    assert sample.frames_TCHW is None
    assert sample.mel_WCML.shape == (1, 1, 128, 400)


def test_promises_that_a_file_breaks_are_named(both, made, tmp_path):
    path, info = both
    clip = clip_of(path, info=info)
    decoder = PyAV().build(DecodeSpec(image_size=32))
    silent = made("long.mp4")[0]
    broken = {
        r"open: no such file": replace(clip, video=tmp_path / "gone.mp4", audio=tmp_path / "gone.mp4"),
        r"audio: has no audio stream": replace(clip, video=silent, audio=silent),
        r"video: frame \d+ is 96x64, expected 64x96 as in the manifest": replace(clip, width=64, height=96),
        r"video: its video ends before frame 120 of 130": replace(clip, num_frames=130),
        r"video: has no video stream": replace(
            clip, video=write_media(tmp_path / "x.wav", wave=clicks(1, [0.5]), audio_codec="pcm_s16le")
        ),
    }
    for reason, row in broken.items():
        with pytest.raises(MediaError, match=reason) as caught:
            decoder.decode(row, [plan_of([3, 120 if row.num_frames == 130 else 60])])
        assert "\n" not in str(caught.value)


def test_a_file_cut_off_after_it_was_indexed_is_named(both, tmp_path):
    path = remux(both[0], tmp_path / "front.mp4", options={"movflags": "faststart"})
    clip = clip_of(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    decoder = PyAV().build(DecodeSpec(image_size=32))
    with pytest.raises(MediaError, match=r"(video|audio): (is damaged|its)"):
        decoder.decode(clip, [plan_of([5, 98])])


def test_damage_met_in_a_planned_frame_is_named(made, tmp_path):
    source, info = made("intra.mov")
    with av.open(str(source)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(source.read_bytes())
    start, size = packets[40]
    data[start + size // 3 : start + size // 3 + 60] = bytes(60)
    path = tmp_path / "spoilt.mov"
    path.write_bytes(data)
    clip = replace(clip_of(source, info=info), video=path)
    assert numbers(clip, [20, 90]) == [20, 90]
    with pytest.raises(MediaError, match=r"video: .*damaged"):
        numbers(clip, [20, 40, 90])


def test_a_damaged_motion_jpeg_picture_is_named(tmp_path):
    # FFmpeg shows it over what its memory held before, which depends on the frames decoded before, and flags nothing.
    path = write_media(tmp_path / "a.avi", frames=8, codec="mjpeg", pix_fmt="yuvj420p")
    clip = clip_of(path)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    start, size = packets[5]
    data[start + size * 3 // 4 : start + size * 3 // 4 + 40] = bytes(40)
    path.write_bytes(data)
    assert numbers(clip, [2, 4]) == [2, 4]
    with pytest.raises(MediaError, match=r"a\.avi: video: is damaged"):
        numbers(clip, [2, 5, 7])


def test_many_threads_see_the_same(both, made):
    decoder = PyAV().build(DecodeSpec(image_size=64, window=200))
    rng = np.random.default_rng(0)
    jobs = []
    for path, info in [both, made("short.mp4"), made("open.mkv"), made("mpeg4.avi")] * 6:
        start_s = float(rng.choice([0.0, 1.0, 2.5]))
        clip = clip_of(path, start_s, 1.0, info=info)
        jobs.append((clip, [plan_of(np.sort(rng.integers(0, 25, 4)), (5, 5, 60, 50), windows=(3,))]))
    alone = [decoder.decode(*job)[0] for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = [samples[0] for samples in pool.map(lambda job: decoder.decode(*job), jobs)]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.frames_TCHW, other.frames_TCHW)
        assert (one.mel_WCML is None) == (other.mel_WCML is None)
        assert one.mel_WCML is None or torch.equal(one.mel_WCML, other.mel_WCML)


# Pictures and stored spectrograms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "orientation"), [("a.jpg", 1), ("b.jpg", 6), ("c.jpg", 2), ("d.png", 1), ("e.bmp", 1)]
)
def test_pictures_stand_upright(tmp_path, name, orientation):
    image = Image.fromarray(numbered(178, 96, 64))
    stored = image.rotate(90, expand=True) if orientation == 6 else image
    stored = stored.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if orientation == 2 else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif, **({"quality": 95} if "jpg" in name else {}))
    info = probe_image(tmp_path / name)
    clip = Clip("x", image=tmp_path / name, num_frames=1, width=info.width, height=info.height)
    assert (clip.width, clip.height) == (96, 64)
    assert numbers(clip, [0, 0, 0]) == [178] * 3


def test_deep_grey_and_transparent_pictures(tmp_path):
    deep = np.full((20, 30), 200 * 256, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.full((20, 30), 200, np.uint8)).save(tmp_path / "grey.jpg")
    Image.fromarray(np.full((20, 30, 4), (200, 200, 200, 9), np.uint8)).save(tmp_path / "clear.png")
    for name in ("deep.png", "grey.jpg", "clear.png"):
        clip = Clip("x", image=tmp_path / name, num_frames=1, width=30, height=20)
        assert np.abs(pictures(clip, [0], 16).astype(int) - 200).max() <= 1, name


def test_broken_pictures_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "magic.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    for name in ("text.jpg", "magic.png", "none.jpg"):
        with pytest.raises(MediaError) as caught:
            pictures(Clip("x", image=tmp_path / name, num_frames=1, width=30, height=20), [0], 16)
        assert caught.value.stage == "image"


def test_stored_spectrograms(tmp_path):
    mel_CML = np.random.default_rng(0).normal(size=(1, 128, 250)).astype(np.float32)
    np.save(tmp_path / "a.npy", mel_CML)
    clip = Clip("x", mel=tmp_path / "a.npy", num_mel_frames=250, duration_s=2.0)
    decoder = PyAV().build(DecodeSpec(("video", "audio"), window=100))
    sample = decoder.decode(clip, [plan_of(windows=(0, 200, -1))])[0]
    assert sample.frames_TCHW is None
    assert sample.mel_WCML.shape == (3, 1, 128, 100)
    assert torch.equal(sample.mel_WCML[0], torch.from_numpy(mel_CML[..., :100]))
    assert torch.equal(sample.mel_WCML[1, ..., :50], torch.from_numpy(mel_CML[..., 200:]))
    assert (sample.mel_WCML[1, ..., 50:] == -100).all()
    assert (sample.mel_WCML[2] == -100).all()
    assert PyAV().build(DecodeSpec(("video",))).decode(clip, [plan_of()])[0].mel_WCML is None
    with pytest.raises(MediaError, match=r"has 128 mel bands, expected 80 \(frontend\.num_mels\)"):
        PyAV().build(DecodeSpec(frontend=PRESETS["events"])).decode(clip, [plan_of()])


def test_a_picture_with_a_recording(both, tmp_path):
    Image.fromarray(numbered(77)).save(tmp_path / "a.png")
    path, info = both
    clip = replace(clip_of(path, info=info), video=None, image=tmp_path / "a.png", num_frames=1, width=96, height=64)
    sample = PyAV().build(DecodeSpec(image_size=96)).decode(clip, [plan_of([0], (0, 0, 96, 64))])[0]
    assert number_of(sample.frames_TCHW[0].permute(1, 2, 0).numpy()) == 77
    assert sample.mel_WCML.max() > -60


def test_the_registry():
    assert msgspec.convert({"kind": "pyav"}, DecoderConfig) == PyAV(threads_per_clip=1)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kind": "pyav", "threads": 2}, DecoderConfig)
