"""Prepares audio for DALI's audio decoder, and finds the range of samples that the windows of a clip need."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.media.shards import FLAC_BLOCK, SplicedAudio
from fastav.media.spectrogram import Frontend

_TOTAL_BITS = 36  # width of the number of samples in FLAC's STREAMINFO


@dataclass(frozen=True, slots=True)
class AudioSpan:
    """Range of samples of a clip whose spectrogram contains all mel frames of some windows.

    Attributes:
        begin: First sample, a multiple of the hop length.
        end: Last sample + 1.
        first: Number of the clip's mel frame that is centred on `begin`.
        total: Number of mel frames of the clip.
    """

    begin: int
    end: int
    first: int
    total: int

    @classmethod
    def of(cls, frontend: Frontend, starts_W: NDArray[np.int32], length: int, num_samples: int) -> AudioSpan | None:
        """Returns the range for some windows of a clip; None if no window contains any part of the clip.

        A spectrogram reflects its input at both ends. This is correct at the ends of the clip. Elsewhere, the range
        extends half an FFT beyond the windows, so that no frame of a window uses reflected samples. A clip that is too
        short to be reflected is treated as padded with zeros to `n_fft // 2 + 1` samples.

        Args:
            frontend: Settings of the spectrogram.
            starts_W: First mel frame of each window; -1 for a window without audio.
            length: Length of a window, mel frames.
            num_samples: Number of samples of the clip, at the sample rate of the spectrogram.
        """
        total, half, hop = int(frontend.num_frames(num_samples)), frontend.n_fft // 2, frontend.hop_length
        spans = [(start, min(start + length, total)) for start in starts_W.tolist() if 0 <= start < total]
        if not spans:
            return None
        num_samples = max(num_samples, half + 1)
        first = max(min(start for start, _ in spans) - -(-half // hop), 0)
        end = (max(stop for _, stop in spans) - 1) * hop + half + 1
        if end >= num_samples:
            end = num_samples
            first = min(first, max(num_samples - half - 2, 0) // hop)
        return cls(first * hop, end, first, total)


def trimmed_flac(audio: SplicedAudio, clip: Clip) -> bytes:
    """Returns some FLAC frames of a clip as a stream whose header gives their number of samples and no MD5 digest.

    Raises:
        MediaError: The sample rate or the number of channels in the header differs from the manifest row.
    """
    count = min(len(audio.frames) * FLAC_BLOCK, clip.num_samples - audio.start)
    header = bytearray(audio.header)
    fields = int.from_bytes(header[18:26], "big")  # rate: 20 bits, channels - 1: 3, bits - 1: 5, samples: 36
    rate, channels = fields >> 44, (fields >> 41 & 7) + 1
    if (rate, channels) != (clip.sample_rate, clip.channels):
        expected = f"expected {clip.channels} channels at {clip.sample_rate} Hz as in the manifest"
        raise MediaError(clip.source, f'clip "{clip.id}" has {channels} channels at {rate} Hz, {expected}', "audio")
    header[18:26] = (fields >> _TOTAL_BITS << _TOTAL_BITS | count).to_bytes(8, "big")
    header[26:42] = bytes(16)  # MD5: unknown
    return b"".join((header, *audio.frames))


def wav_of(wave_S: NDArray[np.float32], rate: int) -> bytes:
    """Returns one channel of audio as a WAV file with samples in float32."""
    data = np.ascontiguousarray(wave_S, "<f4").tobytes()
    is_float, size = 3, len(data)
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, is_float, 1, rate, 4 * rate, 4, 32)
    return b"".join(
        (struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE"), layout, struct.pack("<4sI", b"data", size), data)
    )
