"""Manifest rows and plans of single files, for tests of decoding."""

from __future__ import annotations

from unittest.mock import patch

import msgspec
import numpy as np
import torch

from fastav.data.clip import Clip, ClipPlan
from fastav.media.decoder import DecodeSpec
from fastav.media.probe import probe, probe_image
from fastav.media.pyav import PyAV
from fastav.media.spectrogram import PRESETS, LogMel

RATE = 16_000


def clip_of(path, start_s=0.0, duration_s=None, modalities=("video", "audio"), info=None):
    """A manifest row for a span of a file, as the index writes it."""
    info = info or (probe(path, modalities) if path.suffix != ".jpg" else probe_image(path))
    span = info.cut(start_s, duration_s)
    return Clip(
        id=path.name,
        video=path if info.has_video else None,
        audio=path if info.has_audio else None,
        start_s=start_s,
        duration_s=info.duration_s - start_s if duration_s is None else duration_s,
        start_frame=span.start_frame,
        num_frames=span.num_frames,
        fps=info.fps,
        width=info.width,
        height=info.height,
        rotation=info.rotation,
        mirrored=info.mirrored,
        start_sample=span.start_sample,
        num_samples=span.num_samples,
        sample_rate=info.sample_rate,
        channels=info.channels,
        audio_offset_s=info.audio_offset_s,
    )


def plan_of(frames=(0,), crop=(0, 0, 32, 32), windows=(0,), flip=False):
    return ClipPlan(
        sample=0,
        source=0,
        row=0,
        replica=0,
        frames_T=np.array(frames, np.int32),
        crop=crop,
        flip=flip,
        windows_W=np.array(windows, np.int32),
        band=(0, 0),
        mix=1.0,
        partner=0,
        weight=1.0,
    )


def pictures(clip, frames, size=32, at=(0, 0), config=None):
    """The planned frames [T, size, size, 3]: an untouched square of each, cut out at `at`."""
    decoder = (config or PyAV()).build(DecodeSpec(("video",), image_size=size))
    sample = decoder.decode(clip, [plan_of(frames, crop=(*at, size, size))])[0]
    return sample.frames_TCHW.permute(0, 2, 3, 1).numpy()


def heard(clip, rate=RATE):
    """The waveform [C, S] that the spectrogram is computed from."""
    caught = []

    def windows(self, wave_CS, starts_W, length):
        caught.append(wave_CS)
        return torch.zeros(len(starts_W), 1, 128, length)

    decoder = PyAV().build(
        DecodeSpec(("audio",), frontend=msgspec.structs.replace(PRESETS["ssw60"], sample_rate=rate, f_max=rate / 2))
    )
    with patch.object(LogMel, "windows", windows):
        decoder.decode(clip, [plan_of()])
    return caught[0]
