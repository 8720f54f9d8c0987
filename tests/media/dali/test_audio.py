"""Sound through the DALI decoder: spectrograms, cuts, headers."""

from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from fastav.core.errors import MediaError
from fastav.media.dali.audio import AudioSpan, trimmed_flac, wav_of
from fastav.media.decoder import DecodeSpec
from fastav.media.pyav import PyAV
from fastav.media.shards import FLAC_BLOCK, ShardReader, ShardReading
from fastav.media.spectrogram import PRESETS, Frontend
from fastav.pack.settings import PackSettings
from tests.helpers.dali_media import (  # fixtures
    DB,
    RATE,
    both,
    cpu,
    folder,
    needs_dali,
    noise,
    pack,
    reading,
    spoken,
)
from tests.helpers.media import write_media
from tests.helpers.plans import clip_of, plan_of

# Sound

SETTINGS = PRESETS | {
    "power 1": Frontend(power=1.0),
    "power 3": Frontend(power=3.0, mel_scale="slaney", norm="slaney"),
    "odd sizes": Frontend(n_fft=1000, win_length=601, hop_length=170, num_mels=40, f_min=300.0, f_max=7_000.0),
    "norm": Frontend(norm="slaney", floor_db=-60.0),
    "wide steps": Frontend(hop_length=700),
}


@needs_dali
@pytest.mark.parametrize("name", SETTINGS)
def test_spectrograms_are_the_frontends_for_any_settings(name, folder, tmp_path):
    frontend = SETTINGS[name]
    path = tmp_path / "sound.wav"
    wave_CS = noise(4, frontend.sample_rate)
    write_media(path, wave=wave_CS, rate=frontend.sample_rate, layout="mono", audio_codec="pcm_s16le")
    settings = PackSettings(sample_rate=frontend.sample_rate)
    clip = pack(clip_of(path), tmp_path / "sound.tar", settings)
    total = int(frontend.num_frames(clip.num_samples))
    spec = DecodeSpec(("audio",), frontend=frontend, window=60)
    decoder, reference = cpu(spec), PyAV().build(spec)
    places = [0, 1, 3, total // 2, total - 61, total - 60, total - 59, total - 5, total - 1, total, -1]
    plans = [plan_of(windows=[start]) for start in places if start < total + 1]
    prepared = [decoder.prepare(clip, [plan]) for plan in plans]
    made = decoder.decode(prepared, [[i] for i in range(len(plans))], size=len(plans), frames=1, windows=1)
    assert made.frames_BTCHW is None
    assert made.has_audio_B.all()
    for mel_WCML, plan in zip(made.mel_BWCML, plans, strict=True):
        expected = reference.decode(clip, [plan])[0].mel_WCML
        torch.testing.assert_close(mel_WCML, expected, rtol=0, atol=DB)
        power, wanted = 10 ** (mel_WCML.double() / 10), 10 ** (expected.double() / 10)
        assert float(((power - wanted).abs() / wanted).median()) <= 1e-5
    assert made.mel_BWCML[-1].unique().tolist() == [frontend.floor_db]
    evaluation = plan_of(windows=[0, 40, total - 30, -1])
    made = decoder.decode([decoder.prepare(clip, [evaluation])], [[0]], size=1, frames=1, windows=4)
    expected = reference.decode(clip, [evaluation])[0].mel_WCML
    torch.testing.assert_close(made.mel_BWCML[0], expected, rtol=0, atol=DB)


def test_the_cut_of_a_sound_holds_its_windows_frames_exactly():
    rng = np.random.default_rng(0)
    for frontend in (Frontend(), PRESETS["inatsounds"], PRESETS["ast"], SETTINGS["odd sizes"], SETTINGS["wide steps"]):
        log_mel, half = frontend.build(), frontend.n_fft // 2
        for _ in range(40):
            count = int(rng.integers(1, 12_000))
            wave_CS = torch.from_numpy(rng.standard_normal((1, count)).astype(np.float32))
            total = int(frontend.num_frames(count))
            starts_W, length = rng.integers(-1, total + 2, 2).astype(np.int32), int(rng.integers(1, 40))
            cut = AudioSpan.of(frontend, starts_W, length, count)
            if cut is None:
                assert not any(0 <= start < total for start in starts_W)
                continue
            padded_CS = torch.nn.functional.pad(wave_CS, (0, max(half + 1 - count, 0)))
            whole, part = log_mel.log_mel(padded_CS), log_mel.log_mel(padded_CS[:, cut.begin : cut.end])
            for start in starts_W:
                if 0 <= start < total:
                    stop = min(start + length, total)
                    here = part[..., start - cut.first : stop - cut.first]
                    torch.testing.assert_close(here, whole[..., start:stop], rtol=0, atol=1e-3)


@needs_dali
def test_only_the_needed_frames_of_flac_are_read(spoken, monkeypatch):
    decoder = cpu(reading(("audio",)))
    asked = []
    fetch = ShardReader.fetch

    def noted(self, clip, numbers, samples):
        asked.append(samples)
        return fetch(self, clip, numbers, samples)

    monkeypatch.setattr(ShardReader, "fetch", noted)
    wave = decoder.prepare(spoken, [plan_of(windows=[400])]).audio
    begin, end = asked[0]
    assert (begin, end) == (51_200 - 256, (499 * 128) + 257)
    first = begin // FLAC_BLOCK * FLAC_BLOCK
    assert (wave.begin, wave.count, wave.first, wave.total) == (begin - first, end - begin, 398, 751)
    assert len(wave.data) < 0.3 * len(decoder.prepare(spoken, [plan_of(windows=[0, 740])]).audio.data)
    assert decoder.prepare(spoken, [plan_of(windows=[-1])]).audio is None
    assert len(asked) == 2


@needs_dali
def test_every_other_sound_is_decoded_on_the_cpu_and_agrees_too(folder, spoken):
    """Other rates, lossy codecs, more channels, sounds shorter than half an FFT, stored spectrograms."""
    keep = PackSettings(codec="mjpeg", audio="keep")
    aac, wav = folder / "aac.mp4", folder / "short.wav"
    write_media(aac, frames=50, size=(96, 64), wave=noise(2, 44_100, 2), rate=44_100)
    write_media(wav, wave=noise(0.01), rate=RATE, layout="mono", audio_codec="pcm_s16le")
    layouts = {1: "mono", 2: "stereo", 6: "5.1"}
    clips = [
        clip_of(aac),
        pack(clip_of(aac), folder / "rate.tar", keep),
        clip_of(wav),
        pack(clip_of(wav), folder / "short.tar"),
    ]
    for channels, layout in layouts.items():
        path = folder / f"{channels}.wav"
        write_media(path, wave=noise(1, RATE, channels), rate=RATE, layout=layout, audio_codec="pcm_s16le")
        clips.append(pack(clip_of(path), folder / f"{channels}.tar", keep))
    mel_CML = np.linspace(-90, 0, 128 * 300, dtype=np.float32).reshape(1, 128, 300)
    np.save(folder / "mel.npy", mel_CML)
    stored = replace(spoken, shard="", mel=folder / "mel.npy", num_mel_frames=300, num_samples=0)
    clips += [stored, pack(stored, folder / "mel.tar")]
    for windows in ([0], [50], [290], [-1], [2, 60, -1]):
        plans = [plan_of(windows=windows)] * len(clips)
        _, made, expected = both(reading(("audio",)), clips, plans)
        for clip, mel_WCML, sample in zip(clips, made.mel_BWCML, expected, strict=True):
            torch.testing.assert_close(mel_WCML, sample.mel_WCML, rtol=0, atol=DB, msg=f"{clip.id} {windows}")
        assert made.has_audio_B.all()
    flac = [
        clip.audio is not None and clip.audio.data.startswith(b"fLaC")
        for clip in both(reading(("audio",)), clips, [plan_of()] * len(clips))[0]
    ]
    assert flac == [False, False, False, False, True, True, False, False, False]


def test_a_header_tells_the_samples_that_follow_it(spoken):
    sound = ShardReader(ShardReading()).fetch(spoken, None, (20_000, 30_000)).audio
    assert (sound.start, len(sound.frames)) == (16_384, 4)
    stream = trimmed_flac(sound, spoken)
    assert int.from_bytes(stream[18:26], "big") & (1 << 36) - 1 == 4 * FLAC_BLOCK
    tail = ShardReader(ShardReading()).fetch(spoken, None, (90_000, 96_000)).audio
    assert int.from_bytes(trimmed_flac(tail, spoken)[18:26], "big") & (1 << 36) - 1 == 96_000 - tail.start
    for wrong in ({"sample_rate": 8_000}, {"channels": 2}):
        with pytest.raises(MediaError, match=r'audio: clip "spoken" has 1 channels at 16000 Hz, expected'):
            trimmed_flac(sound, replace(spoken, **wrong))


def test_a_wav_holds_the_samples_to_the_bit(tmp_path):
    wave_S = noise(0.1)[0] * 20
    path = tmp_path / "x.wav"
    path.write_bytes(wav_of(wave_S, RATE))
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.rate, stream.codec_context.channels) == ("pcm_f32le", RATE, 1)
        found_S = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert np.array_equal(found_S, wave_S)
