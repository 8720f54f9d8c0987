"""From waveform to log-mel spectrogram, on any device: the presets of the published recipes.

Every preset is centred (frame f looks at the samples around `f * hop_length`), reflects the waveform at the
clip's two true edges, weighs with a periodic Hann window and ends in decibels against reference 1:

    mel_dB = 10 * log10(max(mel_power, 10 ** (floor_db / 10)))

so that the numbers are librosa's (`pad_mode="reflect"`) and torchaudio's. What a preset's source leaves open:

* `ssw60` (SSW60, section 4.1): the mel scale. HTK without area normalisation, torchaudio's default. With 128
  HTK bands on an FFT of 512 points one filter falls between two bins and stays empty: that band is always at
  the floor, which costs nothing but the row.
* `inatsounds` (iNatSounds, section 4): the mel scale, taken as above.
* `events` (Event-specific fusion, supplement 1): takes the natural logarithm; decibels differ from it by a
  constant factor, which the normalisation removes.
* `ast` (AST, section 2.1): the source computes Kaldi features. Rates, window, band edges (20 Hz to Nyquist,
  HTK) and FFT size (Kaldi rounds 400 samples up to 512 points) are the same; Kaldi's pre-emphasis, per-frame
  removal of the mean and uncentred frames are not imitated, so weights trained on Kaldi features want
  fine-tuning. One band is empty, as in `ssw60`.

Against librosa in float64 the power differs by 2e-6 (median) to 2e-4 (worst: bands that barely touch one bin,
where torchaudio's float32 band edges show), the decibels by less than 1e-3, as long as a band is within 60 dB
of the frame's loudest; below that the rounding of a float32 FFT shows.
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
    """Computes the windows of a clip's spectrogram; called from many threads at once."""

    def windows(self, wave_CS: Tensor, starts_W: NDArray[np.int32], length: int) -> Tensor:
        """See `LogMel.windows`."""
        ...


class Frontend(Config, frozen=True):
    """Settings of the log-mel spectrogram; the defaults are the `ssw60` preset.

    Attributes:
        preset: Name of the table in `PRESETS` that the other keys override.
        sample_rate: Hz to which the waveform is resampled before.
        n_fft: Points of the FFT.
        win_length: Samples of the Hann window, centred in the `n_fft` points.
        hop_length: Samples from one frame to the next.
        num_mels: Mel bands.
        f_min: Lower edge of the first band, Hz.
        f_max: Upper edge of the last band, Hz, at most half the sample rate.
        mel_scale: `htk` or `slaney`.
        norm: `slaney` divides each band by its width, `none` leaves triangles of height 1.
        power: Exponent of the magnitude: 2 for power, 1 for magnitude (decibels are of power either way).
        floor_db: Smallest value, dB; also what pads a clip that is shorter than its window.
        mean: Mean over the training clips, dB; absent: measured when a run starts and stored with it.
        std: Standard deviation over the training clips, dB; absent: as for `mean`.
        factory: `module:attribute` of a spectrogram from outside this project; empty for the log-mel spectrogram. It
            is called as `factory(config, **args)` with this table and returns an object with `LogMel.windows`, or a
            function of the whole clip: samples [C, S] -> [C, M, L] in the layout of `LogMel.log_mel`. It must allow
            calls from several threads at once. Clips are then decoded on the CPU.
        args: Further arguments of the factory.
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
        """Returns first sample and the one after the last that windows of a clip's spectrogram look at.

        Args:
            starts_W: First mel frame of each window, -1 for none.
            length: Mel frames of a window.
            num_samples: Samples of the clip at `sample_rate`; its edges are reflected, so they need their neighbours.
        """
        if self.factory:
            return 0, num_samples  # what it looks at is unknown
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
        """Returns how many mel frames clips of so many samples have: 1 + S // hop_length; 0 of 0."""
        samples = np.asarray(num_samples).astype(np.int64)
        return np.where(samples > 0, 1 + samples // self.hop_length, 0)

    def num_frames_s(self, duration_s: ArrayLike) -> NDArray[np.int64]:
        """Returns how many mel frames clips of these lengths in seconds have, vectorised."""
        return self.num_frames(np.rint(np.asarray(duration_s, dtype=np.float64) * self.sample_rate))

    def build(self) -> Spectrogram:
        """Returns the module that computes it.

        Raises:
            UserError: where the settings contradict one another.
        """
        if self.preset not in PRESETS:
            near = did_you_mean(self.preset, PRESETS)
            raise UserError(f'frontend.preset: "{self.preset}" is unknown{near}')
        if self.win_length > self.n_fft:
            raise UserError(f"frontend.win_length: {self.win_length} given, at most n_fft = {self.n_fft} expected")
        if not self.f_min < self.f_max <= self.sample_rate / 2:
            raise UserError(
                f"frontend.f_max: {self.f_max:g} Hz given, more than f_min = {self.f_min:g} and at most half "
                f"the sample rate = {self.sample_rate / 2:g} expected"
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
    """Windows of a spectrogram that is computed of the whole clip.

    Args:
        config: Settings; `floor_db` fills what lies past the clip's end.
        compute: Samples [C, S] -> spectrogram [C, M, L].
    """

    def __init__(self, config: Frontend, compute: Callable[[Tensor], Tensor]) -> None:
        self._config, self._compute = config, compute

    def windows(self, wave_CS: Tensor, starts_W: NDArray[np.int32], length: int) -> Tensor:
        """See `LogMel.windows`.

        Raises:
            UserError: The spectrogram has other sizes than the settings say.
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
    """The log-mel spectrogram of waveforms, float32, in dB; `.to(device)` moves window and filters.

    Stateless: may be called from many threads at once.

    Args:
        config: Settings, checked by `Frontend.build`.
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
            wave: float [..., S] in -1 to 1 at `sample_rate`. A clip shorter than n_fft // 2 + 1 samples
                cannot be reflected and is first padded with zeros at its end to that length.

        Returns:
            float32 [..., M, L] in dB, L = `num_frames(S)`.
        """
        return self._frames(self._reflected(wave), int(self.config.num_frames(wave.shape[-1])))

    def windows(self, wave_CS: Tensor, starts_W: NDArray[np.int32], length: int) -> Tensor:
        """Cuts windows out of a clip's spectrogram without computing the rest of it.

        The result equals cutting `log_mel(wave_CS)`: frames at a window's edges see the real samples beyond.
        Past the clip's end there is the floor value; so there is in the whole of a window that starts at -1.

        Args:
            wave_CS: float [C, S] at `sample_rate`.
            starts_W: First mel frame of each window, -1 for none.
            length: Mel frames of a window.

        Returns:
            float32 [W, C, M, length] in dB.
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
        # Overlapping windows (evaluation) are cut from one span; scattered ones are computed one by one.
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
        """Returns [..., S] with n_fft // 2 reflected samples on either side; a short S gets zeros before."""
        half = self.config.n_fft // 2
        wave = wave.to(torch.float32)
        if wave.shape[-1] <= half:
            wave = functional.pad(wave, (0, half + 1 - wave.shape[-1]))
        flat = wave.reshape(-1, wave.shape[-1])  # torch reflects the last axis of 2-D and 3-D input only
        return functional.pad(flat, (half, half), mode="reflect").reshape(*wave.shape[:-1], -1)

    def _span(self, padded: Tensor, first: int, last: int) -> Tensor:
        """Returns frames first..last of a waveform that was padded by `_reflected`."""
        start = first * self.config.hop_length
        stop = (last - 1) * self.config.hop_length + self.config.n_fft
        return self._frames(padded[..., start:stop], last - first)

    def _frames(self, padded: Tensor, num_frames: int) -> Tensor:
        """Returns the first so many frames of a waveform that already has its edges."""
        config = self.config
        if num_frames == 0:
            return padded.new_empty(*padded.shape[:-1], config.num_mels, 0)
        with torch.autocast(padded.device.type, enabled=False):  # filters in bf16 would cost 0.03 dB
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
    """Returns the mel filter bank [F, M], without torchaudio's warning of the empty filter (see the top)."""
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
