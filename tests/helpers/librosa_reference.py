"""Mel spectrograms as librosa computes them, stored: librosa compiles code for a long time before the first of them.

python -m tests.helpers.librosa_reference        writes tests/data_files/librosa_mel.npz again
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from fastav.media.spectrogram import PRESETS, Frontend
from tests import FILES

FILE = FILES / "librosa_mel.npz"
SCALES = [("slaney", "slaney"), ("slaney", "none"), ("htk", "slaney")]


def noisy_chirp(config: Frontend, seconds: float = 3.0, channels: int = 1) -> torch.Tensor:
    """A tone that rises through all bands, and some noise, [C, S]."""
    t = np.arange(int(seconds * config.sample_rate)) / config.sample_rate
    noise = np.random.default_rng(0).standard_normal((channels, len(t)))
    wave_CS = 0.1 * np.sin(2 * np.pi * (300 * t + 700 * t**2)) * np.minimum(1, t) + 0.03 * noise
    return torch.from_numpy(wave_CS.astype(np.float32))


def cases() -> dict[str, tuple[Frontend, float]]:
    """Settings, and seconds of the chirp, by the name in the file."""
    found = {name: (config, 3.0) for name, config in PRESETS.items()}
    for scale, norm in SCALES:
        found[f"{scale}-{norm}"] = msgspec.structs.replace(PRESETS["inatsounds"], mel_scale=scale, norm=norm), 1.0
    return found


def by_librosa(config: Frontend, seconds: float) -> np.ndarray:
    """Powers of the chirp, [M, L], in float64 all the way."""
    import librosa

    return librosa.feature.melspectrogram(
        y=noisy_chirp(config, seconds)[0].double().numpy(),
        sr=config.sample_rate,
        n_fft=config.n_fft,
        hop_length=config.hop_length,
        win_length=config.win_length,
        window="hann",
        center=True,
        pad_mode="reflect",
        power=2.0,
        n_mels=config.num_mels,
        fmin=config.f_min,
        fmax=config.f_max,
        htk=config.mel_scale == "htk",
        norm=None if config.norm == "none" else config.norm,
    )


def stored() -> dict[str, np.ndarray]:
    """What `by_librosa` gives of each of the cases, rounded to float32."""
    with np.load(FILE) as file:
        return {name: file[name].astype(np.float64) for name in file.files}


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    made = {name: by_librosa(*case).astype(np.float32) for name, case in cases().items()}
    np.savez_compressed(FILE, **made)
    print(f"{FILE}: {FILE.stat().st_size} bytes")
