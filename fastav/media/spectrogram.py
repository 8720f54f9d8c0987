"""Computes log-mel spectrograms from waveforms, on any device, with the settings of published recipes as presets.

In every preset, frames are centred (frame f is computed from the samples around `f * hop_length`), the waveform is
reflected at both ends of the clip, the window is a periodic Hann window, and values are in decibels relative to 1:

    mel_dB = 10 * log10(max(mel_power, 10 ** (floor_db / 10)))

The values equal those of librosa (`pad_mode="reflect"`) and torchaudio. Choices where a publication is silent, and
differences from it:

* `ssw60` (SSW60, section 4.1): the mel scale is not published; HTK without area normalisation is used, the default of
  torchaudio. With 128 HTK bands on an FFT of 512 points, one filter lies between two bins and is empty, so its band
  always has the floor value.
* `inatsounds` (iNatSounds, section 4): the mel scale is not published; the same as in `ssw60` is used.
* `events` (Event-specific fusion, supplement 1): the publication uses the natural logarithm. Decibels differ from it by
  a constant factor, which the normalisation removes.
* `ast` (AST, section 2.1): the publication uses Kaldi features. Sample rate, window, band edges (20 Hz to Nyquist, HTK)
  and FFT size (Kaldi rounds 400 samples up to 512 points) are the same. Kaldi's pre-emphasis, removal of the mean of
  each frame and frames that are not centred are not reproduced, so weights trained on Kaldi features need fine-tuning.
  One band is empty, as in `ssw60`.

The power differs from librosa's in float64 by 2e-6 (median) to 2e-4 (maximum, for bands that overlap hardly one bin,
because torchaudio computes band edges in float32). Decibels differ by less than 1e-3 for bands within 60 dB of the
loudest band of the frame; in quieter bands, the rounding of the float32 FFT is larger.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.functional import amplitude_to_DB, melscale_fbanks, spectrogram

from fastav.core.config import Config, NonNegativeFloat, PositiveFloat, PositiveInt
from fastav.core.errors import UserError, did_you_mean, reason_of
from fastav.core.plugin import load_external


class Spectrogram(Protocol):
    """Computes windows of the spectrogram of a clip. Called from many threads at once."""

    def windows(self, wave_CS: Tensor, starts_W: NDArray[np.int32], length: int) -> Tensor:
        """Computes windows of a spectrogram; `LogMel.windows` describes arguments and result."""
        ...


class Frontend(Config, frozen=True):
    """Settings of the log-mel spectrogram. The defaults are the `ssw60` preset.

    Attributes:
        preset: Name of a set of published settings: `ssw60`, `inatsounds`, `events` or `ast`. Other keys of this table
            override single settings of the preset.
        sample_rate: Sample rate of the waveform, Hz. Audio with another rate is resampled.
        n_fft: Size of the FFT, points.
        win_length: Length of the Hann window, samples, at most `n_fft`. The window is centred in the FFT.
        hop_length: Distance between the starts of two frames, samples.
        num_mels: Number of mel bands.
        f_min: Lower edge of the lowest mel band, Hz.
        f_max: Upper edge of the highest mel band, Hz; at most half the sample rate.
        mel_scale: Formula of the mel scale: `htk` or `slaney`.
        norm: Normalisation of the mel filters: `slaney` divides each filter by its bandwidth; with `none`, every filter
            has height 1.
        power: Exponent of the magnitude: 2 for the power spectrogram, 1 for the magnitude spectrogram. The decibels
            are those of the power with both.
        floor_db: Smallest value, dB. Smaller values are raised to it, and windows that are longer than their clip are
            padded with it.
        mean: Mean of the spectrogram over the training clips, dB; it is subtracted before the model. If it is not set,
            it is measured when a run starts, and stored with the run.
        std: Standard deviation of the spectrogram over the training clips, dB; the model's input is divided by it. If
            it is not set, it is measured when a run starts, and stored with the run.
        factory: `module:attribute` of a spectrogram from outside this project; empty for the log-mel spectrogram. It
            is called as `factory(config, **args)` with this table and returns an object with `LogMel.windows`, or a
            function of the whole clip: samples [C, S] -> [C, M, L] in the layout of `LogMel.log_mel`. It must allow
            calls from several threads at once. Clips are then decoded on the CPU.
        args: Keyword arguments of `factory`.
    """

    preset: str = "ssw60"
    sample_rate: PositiveInt = 16_000
    n_fft: PositiveInt = 512
    win_length: PositiveInt = 512
    hop_length: PositiveInt = 128
    num_mels: PositiveInt = 128
    f_min: NonNegativeFloat = 0.0
    f_max: PositiveFloat = 8_000.0
    mel_scale: Literal["htk", "slaney"] = "htk"
    norm: Literal["none", "slaney"] = "none"
    power: PositiveFloat = 2.0
    floor_db: float = -100.0
    mean: float | None = None
    std: PositiveFloat | None = None
    factory: str = ""
    args: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it

    def needed_samples(self, starts_W: NDArray[np.int32], length: int, num_samples: int) -> tuple[int, int]:
        """Returns the range of samples (first, last + 1) that windows of a clip's spectrogram need.

        Args:
            starts_W: First mel frame of each window; -1 for a window without audio.
            length: Length of a window, mel frames.
            num_samples: Number of samples of the clip at `sample_rate`. Windows at its ends also need the samples that
                are reflected there.
        """
        if self.factory:
            return 0, num_samples  # an external spectrogram may need all samples
        starts = [int(start) for start in starts_W if start >= 0]
        total = int(self.num_frames(num_samples))
        if not starts or min(starts) >= total:
            return 0, 0
        half = self.n_fft // 2
        first = min(starts) * self.hop_length - half
        last = (min(max(starts) + length, total) - 1) * self.hop_length + half + 1
        if last > num_samples:
            first = min(first, num_samples - half - 2)
        return max(first, 0), min(last, num_samples)

    def num_frames(self, num_samples: ArrayLike) -> NDArray[np.int64]:
        """Returns the number of mel frames of clips with S samples: 1 + S // hop_length, and 0 for S = 0."""
        samples = np.asarray(num_samples).astype(np.int64)
        return np.where(samples > 0, 1 + samples // self.hop_length, 0)

    def num_frames_s(self, duration_s: ArrayLike) -> NDArray[np.int64]:
        """Returns the number of mel frames of clips with the given lengths, seconds."""
        return self.num_frames(np.rint(np.asarray(duration_s, dtype=np.float64) * self.sample_rate))

    def build(self) -> Spectrogram:
        """Returns the module that computes the spectrogram.

        Raises:
            UserError: The settings contradict each other, or the external spectrogram cannot be loaded.
        """
        if self.preset not in PRESETS:
            near = did_you_mean(self.preset, PRESETS)
            raise UserError(f'frontend.preset: "{self.preset}" is unknown{near}')
        if self.win_length > self.n_fft:
            raise UserError(f"frontend.win_length: must be at most n_fft = {self.n_fft}, got {self.win_length}")
        if not self.f_min < self.f_max <= self.sample_rate / 2:
            raise UserError(
                f"frontend.f_max: must be above f_min = {self.f_min:g} Hz and at most half the sample rate = "
                f"{self.sample_rate / 2:g} Hz, got {self.f_max:g} Hz"
            )
        return self._external() if self.factory else LogMel(self)

    def _external(self) -> Spectrogram:
        make = load_external(self.factory, "frontend.factory")
        try:
            made = make(self, **self.args)
        except TypeError as error:
            raise UserError(f"frontend.args: {self.factory}: {reason_of(error)}") from error
        if not hasattr(made, "windows") and not callable(made):
            raise UserError(
                f'frontend.factory: "{self.factory}" returns a {type(made).__name__}, expected an object with '
                "windows(wave_CS, starts_W, length), or a function of the samples"
            )
        return made if hasattr(made, "windows") else WholeClip(self, made)


PRESETS: dict[str, Frontend] = {
    "ssw60": Frontend(),
    "inatsounds": Frontend(
        preset="inatsounds", sample_rate=22_050, n_fft=1024, win_length=512, f_min=50.0, f_max=11_025.0
    ),
    "events": Frontend(preset="events", win_length=320, hop_length=160, num_mels=80),
    "ast": Frontend(preset="ast", win_length=400, hop_length=160, f_min=20.0),
}


class WholeClip:
    """Cuts windows from an external spectrogram that is computed from the whole clip.

    Args:
        config: Settings; windows are padded with `floor_db` beyond the end of the clip.
        compute: Function of the samples, [C, S] -> spectrogram [C, M, L].
    """

    def __init__(self, config: Frontend, compute: Callable[[Tensor], Tensor]) -> None:
        self._config, self._compute = config, compute

    def windows(self, wave_CS: Tensor, starts_W: NDArray[np.int32], length: int) -> Tensor:
        """Computes windows of a spectrogram; `LogMel.windows` describes arguments and result.

        Raises:
            UserError: The shape of the spectrogram does not match the settings.
        """
        config = self._config
        expected = (wave_CS.shape[0], config.num_mels, int(config.num_frames(wave_CS.shape[-1])))
        mel_CML = self._compute(wave_CS)
        if tuple(mel_CML.shape) != expected:
            raise UserError(
                f'frontend.factory: "{config.factory}" gives a spectrogram of {list(mel_CML.shape)}, expected '
                f"{list(expected)} (channels, num_mels, 1 + samples // hop_length)"
            )
        shape = (len(starts_W), expected[0], config.num_mels, length)
        windows_WCML = torch.full(shape, config.floor_db, dtype=torch.float32, device=wave_CS.device)
        for window_CML, start in zip(windows_WCML, map(int, starts_W), strict=True):
            if 0 <= start < expected[-1]:
                cut_CML = mel_CML[..., start : start + length]
                window_CML[..., : cut_CML.shape[-1]] = cut_CML
        return windows_WCML


class LogMel(nn.Module):
    """Computes log-mel spectrograms of waveforms, float32, dB. Many threads may call it at once.

    Args:
        config: Settings, as checked by `Frontend.build`.

    Example:
        >>> log_mel = Frontend().build()
        >>> mel_CML = log_mel.log_mel(wave_CS)
    """

    hann_S: Tensor
    filters_MF: Tensor

    def __init__(self, config: Frontend) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("hann_S", torch.hann_window(config.win_length, periodic=True), persistent=False)
        self.register_buffer("filters_MF", _filters(config).T.contiguous(), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """Same as `log_mel`."""
        return self.log_mel(wave)

    def log_mel(self, wave: Tensor) -> Tensor:
        """Computes the spectrogram of whole clips.

        Args:
            wave: Samples, float [..., S] in -1 to 1 at `sample_rate`. A clip shorter than n_fft // 2 + 1 samples
                cannot be reflected; it is first padded with zeros at its end to that length.

        Returns:
            float32 [..., M, L], dB, L = `num_frames(S)`.
        """
        return self._frames(self._reflected(wave), int(self.config.num_frames(wave.shape[-1])))

    def windows(self, wave_CS: Tensor, starts_W: NDArray[np.int32], length: int) -> Tensor:
        """Computes windows of the spectrogram of a clip without computing the rest of it.

        The result equals windows cut from `log_mel(wave_CS)`: frames at the edges of a window use the samples beyond
        them. Beyond the end of the clip, and in windows that start at -1, the result is the floor value.

        Args:
            wave_CS: Samples, float [C, S] in -1 to 1 at `sample_rate`.
            starts_W: First mel frame of each window; -1 for a window without audio.
            length: Length of a window, mel frames.

        Returns:
            float32 [W, C, M, length], dB.
        """
        config = self.config
        total = int(config.num_frames(wave_CS.shape[-1]))
        shape = (len(starts_W), wave_CS.shape[0], config.num_mels, length)
        mel_WCML = torch.full(shape, config.floor_db, dtype=torch.float32, device=wave_CS.device)
        spans = [(s, min(s + length, total)) for s in map(int, starts_W)]
        real = [(a, b) for a, b in spans if 0 <= a < b]
        if not real:
            return mel_WCML
        padded_CS = self._reflected(wave_CS)
        # Overlapping windows (evaluation) are cut from one span; separate windows are computed one by one.
        first, last = min(a for a, _ in real), max(b for _, b in real)
        overlap = last - first <= sum(b - a for a, b in real)
        span_CML = self._span(padded_CS, first, last) if overlap else None
        for window_CML, (a, b) in zip(mel_WCML, spans, strict=True):
            if not 0 <= a < b:
                continue
            if span_CML is None:
                window_CML[..., : b - a] = self._span(padded_CS, a, b)
            else:
                window_CML[..., : b - a] = span_CML[..., a - first : b - first]
        return mel_WCML

    def _reflected(self, wave: Tensor) -> Tensor:
        """Adds n_fft // 2 reflected samples at both ends; clips that are too short are first padded with zeros."""
        half = self.config.n_fft // 2
        wave = wave.to(torch.float32)
        if wave.shape[-1] <= half:
            wave = functional.pad(wave, (0, half + 1 - wave.shape[-1]))
        flat = wave.reshape(-1, wave.shape[-1])  # torch reflects the last axis of 2-D and 3-D input only
        return functional.pad(flat, (half, half), mode="reflect").reshape(*wave.shape[:-1], -1)

    def _span(self, padded: Tensor, first: int, last: int) -> Tensor:
        """Computes the frames first to last - 1 of a waveform that was padded by `_reflected`."""
        start = first * self.config.hop_length
        stop = (last - 1) * self.config.hop_length + self.config.n_fft
        return self._frames(padded[..., start:stop], last - first)

    def _frames(self, padded: Tensor, num_frames: int) -> Tensor:
        """Computes the first `num_frames` frames of a padded waveform."""
        config = self.config
        if num_frames == 0:
            return padded.new_empty(*padded.shape[:-1], config.num_mels, 0)
        with torch.autocast(padded.device.type, enabled=False):  # filters in bf16 would cause errors of 0.03 dB
            power = spectrogram(
                padded,
                pad=0,
                window=self.hann_S,
                n_fft=config.n_fft,
                hop_length=config.hop_length,
                win_length=config.win_length,
                power=config.power,
                normalized=False,
                center=False,
            )[..., :num_frames]
            mel = torch.matmul(self.filters_MF, power)
        db_per_decade = 20.0 / config.power
        return amplitude_to_DB(mel, db_per_decade, 10.0 ** (config.floor_db / db_per_decade), 0.0)


def _filters(config: Frontend) -> Tensor:
    """Returns the mel filter bank [F, M], without torchaudio's warning about the empty filter (see the top)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filterbank has all zero values")
        return melscale_fbanks(
            config.n_fft // 2 + 1,
            config.f_min,
            config.f_max,
            config.num_mels,
            config.sample_rate,
            None if config.norm == "none" else config.norm,
            config.mel_scale,
        )
