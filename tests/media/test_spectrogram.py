import warnings

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.core.errors import UserError
from fastav.media import spectrogram as frontend
from fastav.media.spectrogram import PRESETS, Frontend
from tests.helpers.librosa_reference import SCALES, by_librosa, cases, noisy_chirp, stored

REFERENCE = stored()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Empty filters detected")  # librosa names the one that is known
@pytest.mark.parametrize("name", cases())
def test_stored_numbers_are_librosas(name: str) -> None:
    np.testing.assert_allclose(REFERENCE[name], by_librosa(*cases()[name]), rtol=1e-6, atol=1e-12)


def test_all_cases_are_stored() -> None:
    assert REFERENCE.keys() == cases().keys()


def decibels(power_ML: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power_ML, 1e-10))


@pytest.mark.parametrize("name", PRESETS)
def test_numbers_are_librosas(name: str) -> None:
    config, expected_ML = PRESETS[name], REFERENCE[name]
    got_ML = config.build().log_mel(noisy_chirp(config)[0])
    assert got_ML.dtype == torch.float32
    assert got_ML.shape == expected_ML.shape
    power_ML = 10 ** (got_ML.double().numpy() / 10)
    loud = expected_ML > 1e-9
    assert loud.mean() > 0.95
    error = np.abs(power_ML / np.maximum(expected_ML, 1e-10) - 1)[loud]
    assert np.quantile(error, 0.999) <= 1e-4
    assert np.abs(got_ML.numpy() - decibels(expected_ML)).max() <= 2e-3


@pytest.mark.parametrize(("scale", "norm"), SCALES)
def test_scale_and_norm_are_librosas(scale: str, norm: str) -> None:
    config, seconds = cases()[f"{scale}-{norm}"]
    got_ML = config.build().log_mel(noisy_chirp(config, seconds))[0].numpy()
    assert np.abs(got_ML - decibels(REFERENCE[f"{scale}-{norm}"])).max() <= 2e-3


def test_decibels_are_of_power_whatever_the_exponent() -> None:
    tone = torch.sin(torch.arange(8000) * 0.3)
    power = Frontend(num_mels=8).build().log_mel(tone)
    magnitude = Frontend(num_mels=8, power=1.0).build().log_mel(tone)
    assert magnitude.min() >= -100
    assert abs(magnitude.max() - power.max()) < 12  # of a sum of magnitudes, not of powers: alike, not equal
    silence = Frontend(num_mels=8, power=1.0, floor_db=-60.0).build().log_mel(torch.zeros(4000))
    torch.testing.assert_close(silence, torch.full_like(silence, -60.0))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("starts", [[0], [3], [0, 150, 300], [-1, 40, 5], [0, -1, -1], [100, 1], [10_000, 2]])
def test_windows_equal_cutting_the_whole(name: str, starts: list[int]) -> None:
    config = PRESETS[name]
    wave_CS = noisy_chirp(config, 2.0, channels=2)
    mel = config.build()
    whole_CML = mel.log_mel(wave_CS)
    got_WCML = mel.windows(wave_CS, np.array(starts, np.int32), 64)
    assert got_WCML.shape == (len(starts), 2, config.num_mels, 64)
    for window_CML, start in zip(got_WCML, starts, strict=True):
        expected = torch.full_like(window_CML, config.floor_db)
        if start >= 0:
            cut = whole_CML[..., start : start + 64]
            expected[..., : cut.shape[-1]] = cut
        torch.testing.assert_close(window_CML, expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    num_samples=st.integers(0, 3000),
    starts=st.lists(st.integers(-1, 20), min_size=1, max_size=4),
    length=st.integers(1, 30),
)
def test_windows_of_short_clips(num_samples: int, starts: list[int], length: int) -> None:
    wave_CS = torch.randn(1, num_samples, generator=torch.Generator().manual_seed(num_samples)) * 0.1
    config = Frontend()
    mel = config.build()
    whole_CML = mel.log_mel(wave_CS)
    assert whole_CML.shape[-1] == config.num_frames(num_samples)
    got_WCML = mel.windows(wave_CS, np.array(starts, np.int32), length)
    for window_CML, start in zip(got_WCML, starts, strict=True):
        cut = whole_CML[..., start : start + length] if start >= 0 else whole_CML[..., :0]
        torch.testing.assert_close(window_CML[..., : cut.shape[-1]], cut, rtol=0, atol=1e-4)
        assert (window_CML[..., cut.shape[-1] :] == -100).all()


def test_a_clip_too_short_to_reflect_is_padded_with_zeros() -> None:
    mel = Frontend().build()
    wave_S = torch.randn(200) * 0.1
    padded = torch.cat([wave_S, torch.zeros(57)])
    torch.testing.assert_close(mel.log_mel(wave_S), mel.log_mel(padded)[..., :2])
    assert mel.log_mel(torch.zeros(3, 0)).shape == (3, 128, 0)


def test_only_the_needed_frames_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    mel = Frontend().build()

    def counted(*given, **settings):
        power = spectrogram(*given, **settings)
        seen.append(power.shape[-1])
        return power

    spectrogram = frontend.spectrogram
    monkeypatch.setattr(frontend, "spectrogram", counted)
    wave_CS = torch.zeros(1, 160_000)
    mel.windows(wave_CS, np.array([7], np.int32), 400)
    mel.windows(wave_CS, np.array([0, 150, 300, 450, 600], np.int32), 400)
    mel.windows(wave_CS, np.array([0, 900], np.int32), 10)
    assert seen == [400, 1000, 10, 10]


def test_num_frames() -> None:
    config = Frontend()
    assert config.num_frames([0, 1, 127, 128, 160_000]).tolist() == [0, 1, 1, 2, 1251]
    assert config.num_frames_s(np.array([0.0, 10.0, 3.9999999])).tolist() == [0, 1251, 501]
    assert PRESETS["events"].num_frames_s(10.0) == 1001
    wave = torch.zeros(1, 16_000)
    assert config.build().log_mel(wave).shape == (1, 128, int(config.num_frames(16_000)))


def test_presets_are_the_published_ones() -> None:
    ssw60, inat, events, ast = (PRESETS[n] for n in ("ssw60", "inatsounds", "events", "ast"))
    assert (ssw60.sample_rate, ssw60.win_length, ssw60.hop_length, ssw60.num_mels) == (16000, 512, 128, 128)
    assert (inat.sample_rate, inat.n_fft, inat.win_length, inat.hop_length) == (22050, 1024, 512, 128)
    assert (inat.f_min, inat.f_max) == (50, 11025)
    assert (events.n_fft, events.win_length, events.hop_length, events.num_mels) == (512, 320, 160, 80)
    assert (ast.win_length / 16000, ast.hop_length / 16000, ast.num_mels) == (0.025, 0.01, 128)
    assert all(config.preset == name for name, config in PRESETS.items())


def test_empty_filter_is_silent_and_at_the_floor() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mel = Frontend().build()
    empty_M = mel.filters_MF.sum(1) == 0
    assert empty_M.sum() == 1
    assert (mel.log_mel(torch.randn(4000))[empty_M] == -100).all()


def test_autocast_and_float64_change_nothing() -> None:
    mel, wave = Frontend().build(), noisy_chirp(Frontend(), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mel(wave), mel.log_mel(wave.double()), rtol=0, atol=1e-5)
    assert mel(wave.double()).dtype == torch.float32
    assert not mel.state_dict()  # what the config says is not weights


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    mel, wave = Frontend().build(), noisy_chirp(Frontend(), 2.0)
    on_gpu = mel.to("cuda").windows(wave.cuda(), np.array([0, 30, -1], np.int32), 200)
    on_cpu = Frontend().build().windows(wave, np.array([0, 30, -1], np.int32), 200)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Frontend(preset="sww60"), 'frontend.preset: "sww60" is unknown; did you mean "ssw60"?'),
        (Frontend(win_length=600), "frontend.win_length: must be at most n_fft = 512, got 600"),
        (
            Frontend(f_max=9000.0),
            "frontend.f_max: must be above f_min = 0 Hz and at most half the sample rate = 8000 Hz, got 9000 Hz",
        ),
        (Frontend(f_min=8000.0), "frontend.f_max: must be above f_min = 8000 Hz"),
    ],
)
def test_contradictions_are_one_line(config: Frontend, message: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        config.build()
    assert message in str(caught.value)


def test_config_is_spell_checked() -> None:
    assert msgspec.convert({"preset": "ssw60", "hop_length": 64}, Frontend).hop_length == 64
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"hop": 64}, Frontend)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"mel_scale": "bark"}, Frontend)
