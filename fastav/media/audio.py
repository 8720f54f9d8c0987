"""Decodes the audio of a clip, mixes it to one channel, and resamples it to the sample rate of the spectrogram.

Channels are mixed before resampling, with fixed weights that sum to 1. So nothing can clip, and a tone that is equal in
all channels keeps its level. Mono, stereo and layouts without channel positions (field recorders) are averaged.
Surround layouts use the weights of ITU-R BS.775 (front 0.707, centre 1, surround 0.5, no LFE), divided by their sum.
FFmpeg's own downmix is not used, because its stereo sum is 3 dB louder for float codecs than for integer codecs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import av.error
import av.filter
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.media.decoder import UncertainSeek
from fastav.media.probe import SampleClock

# After a seek, lossy codecs need some packets until their output is right (bit reservoir of MP3, 80 ms of Opus, SBR).
PREROLL_S = 0.5

# Formats whose timestamps after a seek are exact to the sample (Matroska: to half a millisecond). Others, such as AVI,
# are read from the start.
EXACT_SEEK = frozenset(
    {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "wav", "w64", "aiff", "flac", "mp3", "ogg"}
)

_DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
_CHUNK = 44_100  # samples per step; larger steps are slower because of page faults (4 s of audio: three times)
_SHORT_BY = 16  # samples that may be missing at the end, because spans are rounded
_FRONT, _CENTRE, _SURROUND = 0.7071, 1.0, 0.5
_WEIGHTS = {"FL": _FRONT, "FR": _FRONT, "FC": _CENTRE, "LFE": 0.0, "LFE2": 0.0} | dict.fromkeys(
    ("BL", "BR", "SL", "SR", "BC", "FLC", "FRC"), _SURROUND
)


class AudioReader:
    """Decodes the packets of a stream and collects the samples of one clip.

    Args:
        stream: The audio stream.
        clip: The clip, which gives the range of samples.
        start_pts: After a seek, the timestamp of the first sample of the stream; None when reading from the start.
        mono: Whether to mix the channels to one.

    Attributes:
        full: True if no more packets are needed.
        wave_CS: Samples, float32 in -1 to 1, at the clip's sample rate; complete after `finish`.
        bits: Bits per sample to store: 16, or 24 if the stream has more than 16.
    """

    def __init__(self, stream: Any, clip: Clip, start_pts: int | None = None, *, mono: bool = True) -> None:
        self.stream, self.clip = stream, clip
        self.full, self.bits = False, 16
        self._begin, self._end, self._mono = clip.start_sample, clip.start_sample + clip.num_samples, mono
        self.wave_CS = np.zeros((1 if mono else clip.channels, clip.num_samples), dtype=np.float32)
        self._clock: SampleClock | None = None
        self._seek_pts = start_pts
        self._fifo = av.AudioFifo()
        self._next: int | None = None  # number of the sample after the last one in the queue
        self._first: int | None = None
        self._reached = 0

    def feed(self, packet: Any) -> None:
        """Decodes the next packet of the stream, including the empty packet at its end.

        Raises:
            FFmpegError: The packet cannot be decoded.
            MediaError: The audio does not match the manifest row.
        """
        for frame in packet.decode():
            self._add(frame)
        if not packet.size:
            self.full = True

    def _add(self, frame: av.AudioFrame) -> None:
        if self._clock is None:
            seeked = self._seek_pts is not None
            start_pts, position = (self._seek_pts, None) if seeked else (frame.pts, 0)
            self._clock = SampleClock(frame.sample_rate, self.stream.time_base, start_pts, position)
            wide = frame.format.name.removesuffix("p") in ("s32", "s64", "dbl")
            self.bits = 24 if wide or self.stream.codec_context.name.startswith("pcm_f") else 16
        if frame.sample_rate != self.clip.sample_rate:
            expected = f"expected {self.clip.sample_rate} Hz as in the manifest"
            raise self._error(f"its audio has {frame.sample_rate} Hz, {expected}")
        start = self._clock.place(frame)
        self._first = start if self._first is None else self._first
        self._reached = max(self._reached, start + frame.samples)
        self.full = start + frame.samples >= self._end
        if start + frame.samples <= self._begin or start >= self._end:
            return
        if self._next != start:
            self._flush()
        frame.pts = None  # otherwise the queue requires timestamps without gaps
        self._fifo.write(frame)
        self._next = start + frame.samples
        if self._fifo.samples >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        """Moves the queued samples to their position in `wave_CS`."""
        queued = self._fifo.read()
        if queued is None or self._next is None:
            return
        new_CS = mix_down(queued)[None] if self._mono else channels(queued)
        if len(new_CS) != len(self.wave_CS):
            expected = f"expected {len(self.wave_CS)} as in the manifest"
            raise self._error(f"its audio has {len(new_CS)} channels, {expected}")
        at = self._next - new_CS.shape[1] - self._begin
        piece_CS = new_CS[:, max(-at, 0) : self.clip.num_samples - at]
        self.wave_CS[:, max(at, 0) : max(at, 0) + piece_CS.shape[1]] = piece_CS

    def finish(self) -> None:
        """Completes `wave_CS`.

        Raises:
            MediaError: The stream ends before the clip does.
            UncertainSeek: The seek went past the start of the clip.
        """
        self._flush()
        if self._seek_pts is not None and (self._first is None or self._first > max(self._begin, 0)):
            raise UncertainSeek("the seek went past the start of the clip")
        missing = self._end - self._reached
        if missing > _SHORT_BY:
            found = max(self._reached - self._begin, 0)
            raise self._error(f"its audio ends after {found} of {self.clip.num_samples} samples")

    def waveform(self, rate: int) -> Tensor:
        """Returns the samples resampled to `rate`, Hz: float32 [C, S], S = round(num_samples * rate / sample_rate)."""
        resampled = [resample(wave_S, self.clip.sample_rate, rate) for wave_S in self.wave_CS]
        return torch.from_numpy(np.stack(resampled))

    def _error(self, reason: str) -> MediaError:
        return MediaError(self.clip.audio or "", reason, "audio")


def mix_down(frame: av.AudioFrame) -> NDArray[np.float32]:
    """Mixes the samples of a frame to one channel in -1 to 1, float32 [S]."""
    names = [channel.name for channel in frame.layout.channels]
    if len(names) < 3 or not set(names) <= set(_WEIGHTS):
        weight_C = np.full(len(names), 1 / len(names))
    else:
        weight_C = np.array([_WEIGHTS[name] for name in names])
        weight_C /= weight_C.sum()
    mono_S = np.zeros(frame.samples, dtype=np.float32)
    for weight, wave_S in zip(weight_C.tolist(), _channels(frame), strict=True):
        mono_S += _scaled(wave_S, weight)
    return mono_S


def channels(frame: av.AudioFrame) -> NDArray[np.float32]:
    """Returns the samples of a frame in -1 to 1, float32 [C, S]."""
    return np.stack([_scaled(wave_S, 1.0) for wave_S in _channels(frame)])


def _scaled(wave_S: NDArray[Any], weight: float) -> NDArray[np.float32]:
    """Returns samples, scaled to -1 to 1 and multiplied by a weight."""
    if wave_S.dtype == np.uint8:
        return (wave_S.astype(np.float32) - 128) * np.float32(weight / 128)
    if np.issubdtype(wave_S.dtype, np.integer):
        return (wave_S * np.float32(weight / -float(np.iinfo(wave_S.dtype).min))).astype(np.float32, copy=False)
    return wave_S.astype(np.float32, copy=False) * np.float32(weight)


def _channels(frame: av.AudioFrame) -> list[NDArray[Any]]:
    """Returns views of the channels [S] of a frame; they are valid as long as the frame exists."""
    # `frame.to_ndarray()` is not used: with eight planes it reads beyond their pointers and crashes (PyAV 18.1).
    dtype, channels = _DTYPES[frame.format.name.removesuffix("p")], frame.layout.nb_channels
    if frame.format.is_packed:
        packed = np.frombuffer(frame.planes[0], dtype)[: frame.samples * channels]
        return list(packed.reshape(-1, channels).T)
    return [np.frombuffer(plane, dtype)[: frame.samples] for plane in frame.planes[:channels]]


def resample(wave_S: NDArray[np.float32], sample_rate: int, rate: int) -> NDArray[np.float32]:
    """Resamples one channel with FFmpeg's polyphase filter. If the rates are equal, returns the input.

    Args:
        wave_S: Samples, float32.
        sample_rate: Sample rate of `wave_S`, Hz.
        rate: Sample rate of the output, Hz.

    Returns:
        float32 [round(S * rate / sample_rate)]; sample 0 has the time of sample 0 of the input.
    """
    if sample_rate == rate or not len(wave_S):
        return wave_S
    graph = _resampling_graph(sample_rate, rate)
    out_S = np.zeros(round(len(wave_S) * rate / sample_rate), dtype=np.float32)
    at = 0
    for start in range(0, len(wave_S) + _CHUNK, _CHUNK):
        frame = None  # the last push ends the stream
        if start < len(wave_S):
            frame = av.AudioFrame.from_ndarray(wave_S[None, start : start + _CHUNK], "fltp", "mono")
            frame.sample_rate, frame.pts = sample_rate, start
        graph.push(frame)
        for piece in _pull_all(graph):
            piece_S = piece.to_ndarray()[0, : len(out_S) - at]
            out_S[at : at + len(piece_S)] = piece_S
            at += len(piece_S)
    return out_S


def _resampling_graph(sample_rate: int, rate: int) -> Any:
    """Returns a filter graph that resamples from one rate to another.

    It is the graph of `av.AudioResampler`, but with one thread. `av.AudioResampler` starts one per core for every clip.
    """
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add(
        "abuffer",
        sample_rate=str(sample_rate),
        sample_fmt="fltp",
        channel_layout="mono",
        time_base=f"1/{sample_rate}",
    )
    graph.link_nodes(source, graph.add("aresample", str(rate)), graph.add("abuffersink"))
    graph.configure()
    return graph


def _pull_all(graph: Any) -> Iterator[av.AudioFrame]:
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
