"""Decodes what was spliced out of a shard: access units straight into decoders that are kept, FLAC frames into samples.

There is no container to open, to probe and to seek in, and a decoder is opened once a thread instead of once a clip:
what is left is decoding the frames that the plan needs.
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


class KeptDecoders(threading.local):
    """Open video decoders, one of each codec for each thread."""

    def __init__(self) -> None:
        self._contexts: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[KeptDecoders], tuple[()]]:
        return KeptDecoders, ()  # another process opens its own

    def watch(self, spliced: SplicedFrames, sink: FrameSink, clip: Clip) -> None:
        """Decodes a splice and hands the wanted frames over, ascending.

        Raises:
            MediaError: Another number of frames came out than went in, or a damaged one.
            FFmpegError: The decoder refuses a unit.
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
                reason = f'{len(spliced.units)} frames of clip "{clip.id}" decoded to {count}'
                raise MediaError(clip.source, reason, "video")
            context.flush_buffers()
        except BaseException:
            del self._contexts[spliced.codec]  # its state is unknown now
            raise


def decode_sound(sound: SplicedAudio, clip: Clip) -> NDArray[np.float32]:
    """Decodes a splice of sound into its place in the clip, mixed to one channel.

    Returns:
        float32 [num_samples] in -1 to 1 at the packed rate; silence where nothing was asked for.

    Raises:
        MediaError: The frames are not what the row says.
        FFmpegError: The decoder refuses a frame.
    """
    wave_S = np.zeros(clip.num_samples, dtype=np.float32)
    context: Any = av.CodecContext.create("flac", "r")
    context.thread_count = 1
    context.extradata = sound.header[_STREAMINFO]
    at = sound.start
    for data in sound.frames:
        for frame in context.decode(av.Packet(data)):
            expected = min(FLAC_BLOCK, clip.num_samples - at)
            if frame.samples != expected or frame.sample_rate != clip.sample_rate:
                found = f"{frame.samples} samples at {frame.sample_rate} Hz"
                reason = f'clip "{clip.id}" sounds for {found}, {expected} at {clip.sample_rate} Hz expected'
                raise MediaError(clip.source, reason, "audio")
            wave_S[at : at + frame.samples] = mix_down(frame)
            at += frame.samples
    return wave_S


def wave_of(sound: SplicedAudio, clip: Clip, rate: int) -> Tensor:
    """Returns `decode_sound` at another rate, float32 [1, S]; errors as there."""
    return torch.from_numpy(resample(decode_sound(sound, clip), clip.sample_rate, rate))[None]


def decode_mel(data: bytes, clip: Clip) -> NDArray[np.float32]:
    """Returns a stored spectrogram, float32 [1, M, L]; `MediaError` where it is none."""
    return load_mel(io.BytesIO(data), clip.source)
