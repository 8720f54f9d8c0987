"""Sound of clips: every sample at its place, mixed and resampled without loss or gain."""

from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
import pytest
import torch

import fastav.media.demux as media_module
from fastav.core.errors import MediaError
from fastav.media.audio import mix_down, resample
from fastav.media.probe import probe
from tests.helpers.media import clicks, loudest_s, remux, straight, write_media
from tests.helpers.plans import RATE, clip_of, heard

SOUNDS = {
    "aac.mp4": ("aac", 44_100),
    "aac.ts": ("aac", 48_000),
    "opus.webm": ("libopus", 48_000),
    "mp3.mp3": ("libmp3lame", 44_100),
    "mp3.avi": ("libmp3lame", 48_000),
    "pcm.wav": ("pcm_s16le", 44_100),
    "flac.flac": ("flac", 22_050),
    "vorbis.ogg": ("vorbis", 44_100),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_a_click_lands_on_its_sample(tmp_path, name):
    codec, rate = SOUNDS[name]
    path = write_media(tmp_path / name, wave=clicks(8, [0.5, 3.25, 5.5], rate), rate=rate, audio_codec=codec)
    info = probe(path, ("audio",))
    # Some coders start with a little silence that their container does not mark: as much in every piece.
    ahead_s = loudest_s(heard(clip_of(path, 0.0, 1.0, info=info))[0], RATE) - 0.5
    assert abs(ahead_s) < (1e-3 if name not in ("mp3.avi", "aac.ts") else 0.05)
    for start_s, length_s, after_s, at_s in [(3, 1, 0, 3.25), (2, 2, 0, 3.25), (5, 1.1, 0, 5.5), (0, 3.4, 1, 3.25)]:
        wave = heard(clip_of(path, start_s, length_s, info=info))
        assert wave.shape == (1, round(length_s * RATE))
        assert wave.dtype == torch.float32
        found_s = loudest_s(wave[0, after_s * RATE :], RATE) + after_s + start_s
        assert found_s == pytest.approx(at_s + ahead_s, abs=1e-3)


@pytest.mark.parametrize("offset_s", [0.6, -0.25])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_sound_and_picture_stay_in_step(tmp_path, suffix, offset_s):
    path = write_media(
        tmp_path / f"x.{suffix}",
        frames=125,
        options={"bf": "2"},
        start_ms=400,
        wave=clicks(5.5, [1.2, 3.5]),
        audio_codec="libmp3lame",
        audio_start_s=offset_s,
    )
    info = probe(path)
    for start_s, length_s, at_s in [(0.0, 2.4, 1.2), (2.0, 2.4, 3.5), (3.0, 2.0, 3.5)]:
        clip = clip_of(path, start_s, length_s, info=info)
        found_s = loudest_s(heard(clip)[0], RATE) + start_s
        assert found_s == pytest.approx(at_s + offset_s, abs=1e-3), (start_s, clip.start_sample)
    before = clip_of(path, 0.0, 0.5, info=info)
    if offset_s > 0.5:
        assert before.num_samples == 0
        lead = heard(clip_of(path, 0.0, 2.0, info=info))[0]
        assert torch.count_nonzero(lead[: round((offset_s - 0.05) * RATE)]) == 0


def test_a_hole_in_the_sound_is_silence(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(4 * 8000) / 8000)[None].astype(np.float32) * 0.5
    whole = write_media(tmp_path / "whole.mkv", wave=tone, rate=8000, audio_codec="pcm_s16le", layout="mono")
    path = remux(whole, tmp_path / "torn.mkv", keep=lambda p: not 1.0 <= p.pts * p.time_base < 2.0)
    info = probe(path)
    assert info.num_samples == pytest.approx(32_000, abs=300)
    wave = heard(clip_of(path, info=info), 8000)[0]
    hole = torch.nonzero(wave[4000:20_000].abs() > 0.01).flatten() + 4000
    assert torch.diff(hole).max() == pytest.approx(8000, abs=300)
    late = heard(clip_of(path, 2.5, 1.0, info=info), 8000)[0]
    assert torch.allclose(late, wave[20_000:28_000], atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "codec", "suffix"), [("5.1(side)", "pcm_s16le", "wav"), ("7.1", "flac", "mka"), ("5.1", "aac", "mp4")]
)
def test_surround_is_mixed_by_place(tmp_path, layout, codec, suffix):
    time = np.arange(48_000) / 48_000
    weights = {"FL": 0.7071, "FR": 0.7071, "FC": 1.0, "LFE": 0.0, "BL": 0.5, "BR": 0.5, "SL": 0.5, "SR": 0.5}
    hertz = dict(zip(weights, (200, 450, 800, 60, 1600, 2500, 3300, 5000), strict=True))
    names = [channel.name for channel in av.AudioLayout(layout).channels]
    tones = {name: hertz[name] for name in names}
    wave = np.stack([0.9 * np.sin(2 * np.pi * hz * time) for hz in tones.values()]).astype(np.float32)
    path = write_media(tmp_path / f"x.{suffix}", wave=wave, rate=48_000, audio_codec=codec, layout=layout)
    mono = heard(clip_of(path))[0].numpy()
    spectrum = np.abs(np.fft.rfft(mono[1600:14_400])) / 6400
    got = {name: spectrum[round(hz * 12_800 / RATE)] / 0.9 for name, hz in tones.items()}
    total = sum(weights[name] for name in names)
    assert got == pytest.approx({name: weights[name] / total for name in names}, abs=0.01)


@pytest.mark.parametrize("layout", ["mono", "stereo", "2.1", "5.1(side)", "7.1"])
@pytest.mark.parametrize("sample_format", ["flt", "fltp", "s16", "s16p", "s32", "u8", "dbl"])
def test_no_mix_clips_or_gains(layout, sample_format):
    channels = av.AudioLayout(layout).nb_channels
    level = np.tile(np.array([1.0, -1.0, 0.5, 0.0], np.float32), (channels, 50))
    packed = np.ascontiguousarray(level.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, "flt", layout)
    frame.sample_rate = 8000
    ready = av.AudioResampler(sample_format, layout, 8000).resample(frame)[0]
    mono = mix_down(ready)
    assert mono.dtype == np.float32
    assert np.abs(mono).max() <= 1.0 + 1e-6
    np.testing.assert_allclose(mono, level[0], atol=0.01)


def test_channels_without_places_are_averaged(realdata):
    path = realdata / "audio" / "vocalpy_fruitfly_multich.wav"
    clip = clip_of(path)
    planes = np.concatenate([f.to_ndarray().reshape(-1, 3) for f in straight(path, "audio")])
    np.testing.assert_allclose(heard(clip, 10_000)[0], planes.mean(axis=1) / 32_768, atol=1e-6)


def test_sound_at_the_wanted_rate_passes_through(tmp_path):
    wave = (np.random.default_rng(0).integers(-32_768, 32_767, (1, 40_000)) / 32_768).astype(np.float32)
    path = write_media(tmp_path / "x.wav", wave=wave, rate=RATE, audio_codec="pcm_s16le", layout="mono")
    assert torch.equal(heard(clip_of(path)), torch.from_numpy(wave))
    assert torch.equal(heard(clip_of(path, 2.25, 0.2)), torch.from_numpy(wave[:, 36_000:39_200]))


@pytest.mark.parametrize(("rate", "samples"), [(44_100, 176_400), (48_000, 12_345), (22_000, 1), (8000, 99_999)])
def test_resampled_length_and_level(rate, samples):
    tone = np.cos(2 * np.pi * 500 * np.arange(samples) / rate).astype(np.float32)
    out = resample(tone, rate, RATE)
    assert len(out) == round(samples * RATE / rate)
    expected = np.cos(2 * np.pi * 500 * np.arange(len(out)) / RATE)
    np.testing.assert_allclose(out[200:-200], expected[200:-200], atol=2e-3)


def test_real_sound_survives_cutting(realdata):
    for path in [*realdata.glob("audio/perch*"), realdata / "video" / "nasa_13013.mp4"]:
        info = probe(path, ("audio",))
        whole = heard(clip_of(path, info=info))[0]
        piece = heard(clip_of(path, 4.0, 3.0, info=info))[0]
        error = (piece - whole[4 * RATE : 7 * RATE])[100:-100]
        assert error.norm() < 2e-3 * piece.norm(), path.name


def test_a_span_that_sounds_too_short_is_named(tmp_path):
    path = write_media(tmp_path / "x.flac", wave=clicks(1, [0.5]), audio_codec="flac")
    clip = clip_of(path)
    assert heard(replace(clip, num_samples=44_105)).shape == (1, 16_002)
    with pytest.raises(MediaError, match="audio: its audio ends after 44100 of 50000 samples"):
        heard(replace(clip, num_samples=50_000))
    with pytest.raises(MediaError, match="its audio has 44100 Hz, expected 48000 Hz as in the manifest"):
        heard(replace(clip, sample_rate=48_000))


def test_a_late_landing_is_read_from_the_start(tmp_path, monkeypatch):
    path = write_media(tmp_path / "x.mp3", wave=clicks(6, [4.5]), audio_codec="libmp3lame")
    clip = clip_of(path, 4.0, 1.0)
    expected = heard(clip)
    monkeypatch.setattr(media_module, "PREROLL_S", -0.7)
    assert torch.allclose(heard(clip), expected, atol=1e-4)
