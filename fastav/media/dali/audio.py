"""Sound as DALI's audio decoder takes it, and how much of a clip's is needed for its windows."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.media.shards import FLAC_BLOCK, SplicedAudio
from fastav.media.spectrogram import Frontend

_TOTAL_BITS = 36  # of STREAMINFO's number of samples


@dataclass(frozen=True, slots=True)
class AudioSpan:
    """The stretch of a clip's sound whose own spectrogram holds its windows' frames.

    Attributes:
        begin: First sample, on the grid of frames.
        end: Sample after the last.
        first: Mel frame of the clip that is centred on `begin`.
        total: Mel frames of the clip.
    """

    begin: int
    end: int
    first: int
    total: int

    @classmethod
    def of(cls, frontend: Frontend, starts_W: NDArray[np.int32], length: int, num_samples: int) -> AudioSpan | None:
        """Returns the stretch for some windows of a clip; None where none of them holds any of it.

        A spectrogram reflects its input at both ends. At the clip's own ends that is wanted; elsewhere the stretch
        reaches half an FFT beyond the windows, so that the frames that see the reflection are not theirs. A clip that
        is too short to be reflected counts as padded with zeros to `n_fft // 2 + 1` samples.

        Args:
            frontend: Settings of the spectrogram.
            starts_W: First mel frame of each window, -1 for none.
            length: Mel frames of a window.
            num_samples: Samples of the clip.
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


def shortened(sound: SplicedAudio, clip: Clip) -> bytes:
    """Returns a splice as a FLAC stream whose header tells its own number of samples, and no digest.

    Raises:
        MediaError: The header tells another rate or number of channels than the row.
    """
    count = min(len(sound.frames) * FLAC_BLOCK, clip.num_samples - sound.start)
    header = bytearray(sound.header)
    told = int.from_bytes(header[18:26], "big")  # rate: 20 bits, channels - 1: 3, bits - 1: 5, samples: 36
    rate, channels = told >> 44, (told >> 41 & 7) + 1
    if (rate, channels) != (clip.sample_rate, clip.channels):
        found = f"{channels} channels at {rate} Hz, its row says {clip.channels} at {clip.sample_rate}"
        raise MediaError(clip.source, f'clip "{clip.id}" sounds in {found}', "audio")
    header[18:26] = (told >> _TOTAL_BITS << _TOTAL_BITS | count).to_bytes(8, "big")
    header[26:42] = bytes(16)  # MD5: unknown
    return b"".join((header, *sound.frames))


def wav_of(wave_S: NDArray[np.float32], rate: int) -> bytes:
    """Returns one channel of sound as a WAV of float32, sample for sample."""
    data = np.ascontiguousarray(wave_S, "<f4").tobytes()
    is_float, size = 3, len(data)
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, is_float, 1, rate, 4 * rate, 4, 32)
    return b"".join(
        (struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE"), layout, struct.pack("<4sI", b"data", size), data)
    )
