"""Decodes the parts of a packed clip that were read from a shard: access units into frames, FLAC frames into samples.

Packed clips need no container to be opened, probed and searched. Video decoders stay open, one per thread, instead of
being opened for each clip. Only the frames that the plan needs are decoded.
"""

from __future__ import annotations

import io
import threading
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.media.audio import mix_down, resample
from fastav.media.demux import FrameSink
from fastav.media.open_file import load_mel
from fastav.media.shards import FLAC_BLOCK, SplicedAudio, SplicedFrames

_STREAMINFO = slice(8, 42)  # after `fLaC` and the header of the first metadata block


class OpenDecoders(threading.local):
    """Open video decoders, one per codec and thread."""

    def __init__(self) -> None:
        self._contexts: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[OpenDecoders], tuple[()]]:
        return OpenDecoders, ()  # another process opens its own decoders

    def decode(self, spliced: SplicedFrames, sink: FrameSink, clip: Clip) -> None:
        """Decodes the access units of a clip and passes the planned frames to the sink, ascending.

        Raises:
            MediaError: The number of decoded frames differs from the number of units, or a frame is damaged.
            FFmpegError: A unit cannot be decoded.
        """
        context = self._contexts.get(spliced.codec)
        if context is None:
            context = av.CodecContext.create(spliced.codec, "r")
            context.thread_count, context.thread_type = 1, "NONE"
            self._contexts[spliced.codec] = context
        wanted = dict(zip(spliced.shown, sink.numbers, strict=True))
        count = 0
        try:
            for unit in (*spliced.units, None):
                for frame in context.decode(None if unit is None else av.Packet(unit)):
                    if count in wanted:
                        if frame.is_corrupt:
                            raise MediaError(
                                clip.source, f'frame {wanted[count]} of clip "{clip.id}" is damaged', "video"
                            )
                        sink.take(wanted[count], frame)
                    count += 1
            if count != len(spliced.units):
                reason = f'clip "{clip.id}": decoded {count} frames, expected {len(spliced.units)}'
                raise MediaError(clip.source, reason, "video")
            context.flush_buffers()
        except BaseException:
            del self._contexts[spliced.codec]  # its state is unknown after an error
            raise


def decode_audio(audio: SplicedAudio, clip: Clip) -> NDArray[np.float32]:
    """Decodes the FLAC frames of a clip, mixes them to one channel, and puts them at their position in the clip.

    Returns:
        float32 [num_samples] in -1 to 1 at the clip's sample rate; 0 where no frame was read.

    Raises:
        MediaError: The frames do not match the manifest row.
        FFmpegError: A frame cannot be decoded.
    """
    wave_S = np.zeros(clip.num_samples, dtype=np.float32)
    context: Any = av.CodecContext.create("flac", "r")
    context.thread_count = 1
    context.extradata = audio.header[_STREAMINFO]
    at = audio.start
    for data in audio.frames:
        for frame in context.decode(av.Packet(data)):
            expected = min(FLAC_BLOCK, clip.num_samples - at)
            if frame.samples != expected or frame.sample_rate != clip.sample_rate:
                found = f"{frame.samples} samples at {frame.sample_rate} Hz"
                reason = f'clip "{clip.id}": decoded {found}, expected {expected} at {clip.sample_rate} Hz'
                raise MediaError(clip.source, reason, "audio")
            wave_S[at : at + frame.samples] = mix_down(frame)
            at += frame.samples
    return wave_S


def decode_waveform(audio: SplicedAudio, clip: Clip, rate: int) -> Tensor:
    """Decodes as `decode_audio` and resamples to `rate`, Hz: float32 [1, S]. Raises the errors of `decode_audio`."""
    return torch.from_numpy(resample(decode_audio(audio, clip), clip.sample_rate, rate))[None]


def decode_mel(data: bytes, clip: Clip) -> NDArray[np.float32]:
    """Returns a stored spectrogram, float32 [1, M, L]; raises `MediaError` if the data is not a spectrogram."""
    return load_mel(io.BytesIO(data), clip.source)
