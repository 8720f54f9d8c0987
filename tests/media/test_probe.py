import wave as wavefile
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from fastav.core.errors import MediaError
from fastav.media.probe import MediaInfo, SampleClock, probe, probe_image, probe_mel
from tests.helpers.media import clicks, probed, remux, straight, write_media

B_FRAMES = {"g": "250", "bf": "3", "preset": "veryfast"}

REAL_VIDEO = [
    "nasa_13013.mp4",
    "av1_video.mkv",
    "h265_video.mp4",
    "h264_10bits.mp4",
    "flipping_a_pancake.mkv",
    "decord_rot90.mov",
    "big_buck_bunny_0_30.webm",
    "chaplin.mp4",
    "bigbuckbunny_720p.mp4",
    "bikes.mp4",
    "sample_portrait.mp4",
    "sample_video_only.mp4",
    "sample_android_slow_motion_vfr.mp4",
    "sample_h264_mpeg_audio.ts",
    "bbb_2500ms.ts",
    "sample.avi",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two seconds of B-frames in one group of pictures, and sound."""
    path = tmp_path_factory.mktemp("probe") / "whole.mp4"
    return write_media(path, frames=50, options=B_FRAMES, wave=clicks(2, [1]))


@pytest.mark.parametrize("name", REAL_VIDEO)
def test_frames_are_those_of_a_straight_decode(realdata, name):
    path = realdata / "video" / name
    info = probed(path)
    frames = [(frame.pts * frame.time_base, frame.width, frame.height) for frame in straight(path)]
    assert info.num_frames == len(frames)
    assert {tuple(sorted((info.width, info.height)))} == {tuple(sorted(frame[1:])) for frame in frames}
    np.testing.assert_allclose(info.frame_times_s, [float(t - frames[0][0]) for t, _, _ in frames], atol=1e-9)
    assert info.fps * info.duration_s == pytest.approx(info.num_frames)
    assert info.frame_times_s[-1] < info.duration_s


def test_every_real_file_is_read_or_named(realdata):
    wrong = {}
    for path in sorted([*realdata.glob("video/*"), *realdata.glob("audio/*")]):
        if path.name not in REAL_VIDEO:
            try:
                info = probe(path)
            except MediaError as error:
                wrong[path.name] = (error.stage, error.reason)
            else:
                samples = sum(frame.samples for frame in straight(path, "audio")) if info.has_audio else 0
                assert info.num_samples == samples
                assert info.has_video == (path.name == "sample_video_only.mp4")
    assert set(wrong) == {"sample_missing_stsd.mp4", "sample_with_invalid_nalu.mp4", "empty_2c.wav"}
    assert wrong["sample_missing_stsd.mp4"][0] == "audio"
    assert "after 26 good frames" in wrong["sample_with_invalid_nalu.mp4"][1]
    assert wrong["empty_2c.wav"][0] == "audio"


def test_hard_real_cases(realdata):
    folder = realdata / "video"
    turned = probe(folder / "decord_rot90.mov")
    assert (turned.rotation, turned.width, turned.height) == (90, 320, 568)
    slow = probe(folder / "sample_android_slow_motion_vfr.mp4")
    assert np.diff(slow.frame_times_s)[0] > 8 * np.diff(slow.frame_times_s)[1]
    assert probe(folder / "h264_10bits.mp4").pix_fmt == "yuv420p10le"
    # The sound of this recording has a hole of 83 ms, which stays one.
    torn = probe(folder / "bbb_2500ms.ts")
    assert torn.num_samples == sum(f.samples for f in straight(folder / "bbb_2500ms.ts", "audio")) + 3675
    portrait = probe(folder / "sample_portrait.mp4")
    assert portrait.audio_offset_s == pytest.approx(1896 / 44_100)
    assert probe(folder / "sample_missing_stsd.mp4", ("video",)).num_frames == 30
    surround = probe(folder / "bigbuckbunny_720p.mp4")
    assert (surround.channels, surround.sample_rate, surround.num_samples) == (6, 48_000, 254_976)


def test_made_file(whole):
    info = probe(whole)
    assert (info.num_frames, info.fps, info.duration_s) == (50, 25.0, 2.0)
    assert (info.width, info.height, info.rotation) == (96, 64, 0)
    assert (info.video_codec, info.pix_fmt, info.audio_codec) == ("h264", "yuv420p", "aac")
    assert (info.sample_rate, info.channels) == (44_100, 2)
    assert info.num_samples == sum(frame.samples for frame in straight(whole, "audio"))
    assert abs(info.audio_offset_s) < 1e-3
    assert info.frame_times_s == pytest.approx(np.arange(50) / 25)


def test_one_modality_alone(whole):
    video, audio = probe(whole, ("video",)), probe(whole, ("audio",))
    assert video.has_video
    assert not video.has_audio
    assert audio.has_audio
    assert not audio.has_video
    assert audio.audio_offset_s == 0
    assert audio.duration_s == audio.num_samples / 44_100


@pytest.mark.parametrize("suffix", ["mkv", "ts", "mov", "avi"])
def test_containers_without_counts(tmp_path, suffix):
    codec = "mpeg4" if suffix == "avi" else "libx264"
    options = {"bf": "0"} if suffix == "avi" else B_FRAMES
    path = write_media(
        tmp_path / f"x.{suffix}", frames=40, codec=codec, options=options, wave=clicks(1.6, [1]), audio_codec="mp2"
    )
    info = probe(path)
    assert info.num_frames == 40
    assert info.duration_s == pytest.approx(1.6, abs=0.041)
    assert info.num_samples == sum(frame.samples for frame in straight(path, "audio"))


def test_variable_frame_rate(tmp_path):
    times_ms = [0, 40, 80, 500, 540, 1200, 1240, 1280]
    info = probe(write_media(tmp_path / "vfr.mp4", times_ms=times_ms, options={"bf": "2"}))
    assert info.frame_times_s == pytest.approx(np.array(times_ms) / 1000, abs=1e-3)
    assert info.fps * info.duration_s == pytest.approx(8)


def test_frames_cut_by_an_edit_list_do_not_count(whole, tmp_path):
    path = remux(whole, tmp_path / "cut.mp4", shift_s=-0.5, options={"avoid_negative_ts": "disabled"})
    with av.open(str(path)) as container:
        packets = sum(1 for p in container.demux(video=0) if p.size)
    info = probe(path)
    assert packets == 50
    assert info.num_frames == sum(1 for _ in straight(path)) < 40
    assert info.num_samples == sum(frame.samples for frame in straight(path, "audio")) < 70_000


@pytest.mark.parametrize(("start_ms", "suffix"), [(3000, "ts"), (5000, "mkv"), (0, "mp4")])
@pytest.mark.parametrize("offset_s", [0.4, -0.3, 0.0])
def test_audio_offset(tmp_path, start_ms, suffix, offset_s):
    path = write_media(
        tmp_path / f"x.{suffix}",
        frames=25,
        start_ms=start_ms + 320,
        options={"bf": "0"},
        wave=clicks(1, [0.5]),
        audio_codec="mp2",
        audio_start_s=offset_s,
    )
    assert probe(path).audio_offset_s == pytest.approx(offset_s, abs=0.012)  # the coder starts 481 samples early


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_what_makes_it_upright(tmp_path, degrees):
    info = probe(write_media(tmp_path / "x.mp4", frames=3, rotation=-degrees))
    assert info.rotation == degrees
    assert (info.width, info.height) == ((96, 64) if degrees == 180 else (64, 96))


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16_000, options={"strict": "-2"})
        sound.layout = "mono"
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        resampler = av.AudioResampler("fltp", "mono", 16_000, 1024)
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24").reformat(format="yuvj420p")
        container.mux(cover.encode(picture) + cover.encode(None))
        for ready in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(sound.encode(ready))
        container.mux(sound.encode(None))
    info = probe(path)
    assert info.has_audio
    assert not info.has_video


def _cut_file(source, target, share):
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_cut_off_video_is_named(tmp_path, suffix):
    path = write_media(tmp_path / f"x.{suffix}", frames=80, codec="mpeg4" if suffix == "avi" else "libx264")
    with pytest.raises(MediaError, match=r"cut.off|damaged") as caught:
        probe(_cut_file(path, tmp_path / f"cut.{suffix}", 0.6))
    assert str(tmp_path / f"cut.{suffix}") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_off_before_the_end_of_a_moved_header_is_named(whole, tmp_path):
    front = remux(whole, tmp_path / "front.mp4", options={"movflags": "faststart"})
    assert probe(front).num_frames == 50
    with pytest.raises(MediaError, match=r"after .* good"):
        probe(_cut_file(front, tmp_path / "cut.mp4", 0.8))


def test_cut_off_recordings_are_named(tmp_path):
    for suffix, codec in (("wav", "pcm_s16le"), ("flac", "flac")):
        path = write_media(tmp_path / f"x.{suffix}", wave=clicks(4, [1, 3]), audio_codec=codec)
        assert probe(path).num_samples == 4 * 44_100
        with pytest.raises(MediaError, match=r"cut.off"):
            probe(_cut_file(path, tmp_path / f"cut.{suffix}", 0.5))


def test_damage_that_ffmpeg_conceals_is_named(whole, tmp_path):
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        sizes = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    start, size = max(sizes[1:], key=lambda s: s[1])
    data[start + size // 2 : start + size // 2 + 40] = bytes(40)
    path = tmp_path / "spoilt.mp4"
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"video: (is|has) damaged.* after \d+ good frames"):
        probe(path)


def test_a_change_of_size_is_named(tmp_path):
    parts = [write_media(tmp_path / f"{w}.ts", frames=12, size=(w, 64), options={"bf": "0"}) for w in (96, 128)]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(MediaError, match=r"picture size changes from 96x64 to 128x64 after \d+ good frames"):
        probe(path)


def test_what_is_no_media_is_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://example.org/a.ts\n")
    reasons = {
        "empty.mp4": "empty file", "text.mp4": "not a media file", "folder.mp4": "folder", "no.mp4": "no such file",
    }  # fmt: skip
    for name, reason in {**reasons, "list.m3u8": "playlist"}.items():
        with pytest.raises(MediaError, match=reason) as caught:
            probe(tmp_path / name)
        assert "\n" not in str(caught.value)
    subtitles = tmp_path / "words.srt"
    subtitles.write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    with pytest.raises(MediaError, match="has no video and no audio"):
        probe(subtitles)


def test_names_that_look_like_addresses(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "http:12.30.mp4"
    target.write_bytes(whole.read_bytes())
    assert probe(target.relative_to(tmp_path)).num_frames == 50


def test_pieces_share_nothing_and_lose_nothing():
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.choice([1001 / 30_000, 0.04, 0.3], 400)) - 0.04
    times -= times[0]
    info = MediaInfo(
        has_video=True,
        has_audio=True,
        num_frames=400,
        duration_s=float(times[-1]) + 0.04,
        frame_times_s=times,
        num_samples=int((times[-1] - 0.1) * 44_100),
        sample_rate=44_100,
        audio_offset_s=0.02,
    )
    spans = [info.cut(k * 0.7, 0.7) for k in range(int(info.duration_s / 0.7) + 1)]
    assert [s.start_frame for s in spans] == np.cumsum([0, *[s.num_frames for s in spans[:-1]]]).tolist()
    assert sum(s.num_frames for s in spans) == 400
    ends = [s.start_sample + s.num_samples for s in spans]
    assert [s.start_sample for s in spans[1:]] == ends[:-1]
    assert spans[0].start_sample == -882  # sound starts 20 ms after the picture: silence first
    assert ends[-1] == info.num_samples
    assert info.cut().num_frames == 400
    late = info.cut(info.duration_s + 1, 1.0)
    assert (late.num_frames, late.num_samples) == (0, 0)


def test_a_frame_on_the_border_belongs_to_the_later_piece():
    times = np.arange(250) * 1001 / 30_000
    info = MediaInfo(has_video=True, num_frames=250, frame_times_s=times, duration_s=250 * 1001 / 30_000)
    border = 60 * 1001 / 30_000
    assert info.cut(0.0, border).num_frames == 60
    assert info.cut(border - 1e-9, 1.0).start_frame == 60


def _frame(pts, samples=1000):
    return SimpleNamespace(pts=pts, samples=samples)


def test_sample_clock_follows_the_timestamps_but_not_their_faults():
    clock = SampleClock(10_000, Fraction(1, 1000), start_pts=500)
    assert clock.place(_frame(500)) == 0
    assert clock.place(_frame(603)) == 1000  # 3 ms off: rounding
    assert clock.place(_frame(None)) == 2000
    assert clock.place(_frame(1000)) == 5000  # 200 ms of silence
    assert clock.place(_frame(200)) == 6000  # backwards: timestamps at fault, also from here on
    assert clock.place(_frame(300)) == 7000
    assert clock.place(_frame(60_000)) == 8000  # a minute: at fault
    assert clock.place(_frame(60_100)) == 9000
    assert SampleClock(10_000, Fraction(1, 1000), 500, position=None).place(_frame(800)) == 3000


def _picture(path, size=(40, 24), orientation=None, **options):
    image = Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif, **options)
    return path


def test_pictures(tmp_path):
    plain = probe_image(_picture(tmp_path / "a.PNG"))
    assert (plain.num_frames, plain.width, plain.height, plain.rotation, plain.video_codec) == (1, 40, 24, 0, "png")
    assert plain.has_video
    turned = probe_image(_picture(tmp_path / "b.jpg", orientation=6))
    assert (turned.width, turned.height, turned.rotation) == (24, 40, 90)
    assert probe_image(_picture(tmp_path / "c.tif")).width == 40
    _cut_file(_picture(tmp_path / "d.jpg", size=(400, 300)), tmp_path / "cut.jpg", 0.5)
    (tmp_path / "text.jpg").write_text("no picture")
    for name, reason in {"cut.jpg": "truncated", "text.jpg": "not a picture", "none.jpg": "no such file"}.items():
        with pytest.raises(MediaError, match=f"image: .*{reason}"):
            probe_image(tmp_path / name)


def test_stored_spectrograms(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1, 128, 300), np.float32))
    info = probe_mel(tmp_path / "a.npy")
    assert (info.has_audio, info.channels, info.mel_bands, info.num_mel_frames) == (True, 1, 128, 300)
    np.save(tmp_path / "double.npy", np.zeros((1, 128, 300)))
    np.save(tmp_path / "flat.npy", np.zeros((128, 300), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "many.npz", a=np.zeros(3))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    _cut_file(tmp_path / "a.npy", tmp_path / "cut.npy", 0.5)
    (tmp_path / "header.npy").write_bytes((tmp_path / "a.npy").read_bytes().replace(b"}", b"{", 1))
    for name in ("double", "flat", "objects", "many", "cut", "header", "missing"):
        with pytest.raises(MediaError) as caught:
            probe_mel(tmp_path / f"{name}.npy")
        assert caught.value.stage == "mel"


def test_a_wav_that_says_nothing_of_its_length(tmp_path):
    path = tmp_path / "stream.wav"
    with wavefile.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16_000))
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert probe(path).num_samples == 8000
