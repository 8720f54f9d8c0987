"""Writes small media files of which every frame and sample is known, for the tests of probing and decoding."""

from __future__ import annotations

import functools
from fractions import Fraction

import av
import numpy as np

from fastav.media.probe import probe

BITS = 8


def numbered(number, width=96, height=64):
    """A picture that tells its number by eight dark or light bars in its lower half; some texture above."""
    picture = np.full((height, width, 3), 60, dtype=np.uint8)
    ramp = (np.arange(width) * 2 + number * 7) % 200
    picture[: height // 2] = ramp[None, :, None]
    for bit in range(BITS):
        picture[height // 2 :, bit * width // BITS : (bit + 1) * width // BITS] = 230 if number >> bit & 1 else 20
    return picture


def number_of(picture):
    """The number that a decoded `numbered` picture shows."""
    bars = picture[picture.shape[0] * 3 // 4].mean(axis=-1).reshape(BITS, -1).mean(axis=-1)
    return int(sum((bar > 125) << bit for bit, bar in enumerate(bars)))


def write_media(
    path,
    *,
    frames=0,
    fps=25,
    size=(96, 64),
    codec="libx264",
    options=None,
    pix_fmt="yuv420p",
    times_ms=None,
    start_ms=0,
    rotation=0,
    matrix=None,
    colour=None,
    picture=numbered,
    wave=None,
    rate=44_100,
    audio_codec="aac",
    layout="stereo",
    audio_start_s=0.0,
    format_options=None,
):
    """Writes numbered frames (at `times_ms`, or evenly) and a waveform [C, S] into one file.

    `start_ms` shifts both; `rotation` is counter-clockwise; `matrix` is the display matrix's
    (a, b, c, d); `colour` is (colorspace, range) as FFmpeg's numbers.
    """
    packets = []
    with av.open(str(path), "w", options=format_options or {}) as container:
        video = audio = None
        if frames or times_ms:
            video = container.add_stream(codec, rate=fps, options=options or {})
            video.width, video.height, video.pix_fmt = *size, pix_fmt
            video.codec_context.time_base = Fraction(1, 1000) if times_ms else Fraction(1, fps)
            if matrix:
                a, b, c, d = (round(65536 * value) for value in matrix)
                video.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
            if rotation:
                video.set_display_rotation(rotation)
            if colour:
                video.codec_context.colorspace, video.codec_context.color_range = colour
        if wave is not None:
            audio = container.add_stream(audio_codec, rate=rate, options={"strict": "-2"})
            audio.layout = layout
        if video is not None:
            base = video.codec_context.time_base
            times = times_ms or [Fraction(i * 1000, fps) for i in range(frames)]
            for i, time_ms in enumerate(times):
                frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
                if pix_fmt != "yuv420p" or colour:
                    frame = frame.reformat(
                        format=pix_fmt,
                        dst_colorspace=colour[0] if colour else None,
                        dst_color_range=colour[1] if colour else None,
                    )
                frame.time_base, frame.pts = base, round((Fraction(time_ms) + start_ms) / 1000 / base)
                packets += video.encode(frame)
            packets += video.encode(None)
        if audio is not None:
            packets += _encode_wave(audio, wave, rate, layout, round((start_ms / 1000 + audio_start_s) * rate))
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    return path


def _encode_wave(stream, wave, rate, layout, start):
    context = stream.codec_context
    resampler = av.AudioResampler(context.format.name, layout, rate, context.frame_size or 1024)
    packets = []
    for at in range(0, wave.shape[1], 4096):
        piece = np.ascontiguousarray(wave[:, at : at + 4096].T, dtype=np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(piece, "flt", layout)  # PyAV 18.1 cannot take eight planes
        frame.sample_rate, frame.pts, frame.time_base = rate, start + at, Fraction(1, rate)
        for ready in resampler.resample(frame):
            packets += stream.encode(ready)
    for ready in resampler.resample(None):
        packets += stream.encode(ready)
    return packets + stream.encode(None)


def remux(source, path, shift_s=0.0, keep=lambda packet: True, options=None):
    """Copies packets into another container, shifted in time and sifted, without encoding anything."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=options or {}) as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams if s.type in ("video", "audio")}
        for packet in old.demux(*(old.streams[i] for i in streams)):
            if packet.dts is None or not keep(packet):
                continue
            shift = round(shift_s / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = streams[packet.stream_index]
            new.mux(packet)
    return path


def clicks(seconds, at_s, rate=44_100, channels=2, width_s=0.002):
    """Silence with one short, smooth click at each of the times."""
    time_S = np.arange(round(seconds * rate)) / rate
    wave_S = sum(np.exp(-(((time_S - at) / width_s) ** 2)) * np.cos(2 * np.pi * 900 * (time_S - at)) for at in at_s)
    return np.repeat(0.8 * np.asarray(wave_S)[None], channels, axis=0).astype(np.float32)


def loudest_s(wave_S, rate):
    """Time of the strongest click: the centre of its energy."""
    wave_S = np.asarray(wave_S, dtype=np.float64)
    peak = int(np.abs(wave_S).argmax())
    around = slice(max(peak - rate // 100, 0), peak + rate // 100)
    energy = wave_S[around] ** 2
    return float(((np.arange(len(wave_S))[around] * energy).sum() / energy.sum()) / rate)


@functools.cache
def probed(path):
    """What `probe` finds in the video of a file that does not change, found once for all tests."""
    return probe(path, ("video",))


def straight(path, kind="video"):
    """What a plain decode of the first stream of a kind gives, frame by frame."""
    with av.open(str(path)) as container:
        yield from container.decode(getattr(container.streams, kind)[0])
