"""Encoders for the contents of a pack: video as access units, audio as FLAC frames, still pictures as JPEG.

Each encoder runs in one thread and gives the same bytes for the same input on every x86-64 machine
(`fastav.media.x264`). For speed, many clips are packed in parallel instead.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastav.media.shards.format import FLAC_BLOCK, UnitKind
from fastav.media.x264 import SAME_BYTES
from fastav.pack.settings import PRESETS, PackSettings

Unit = tuple[bytes, UnitKind]

_JPEG_QUALITY = 92
_MJPEG_SCALE = "3"  # FFmpeg's quantiser scale
_FLAC_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
_CHUNK = 1 << 16

MOST_CHANNELS = max(_FLAC_LAYOUTS)
"""Maximum number of channels of a FLAC stream."""


class VideoEncoder:
    """Encodes upright frames of one size into access units. Frames are BT.601 in limited range (JPEG: full range).

    The H.264 settings are chosen for fast decoding with any standard decoder: 8-bit 4:2:0, no B-frames, one reference
    frame, closed GOPs of fixed length, no CABAC and no deblocking (`fastdecode`). An access unit delimiter precedes
    every picture, and the parameter sets precede every keyframe.

    Args:
        settings: Settings of the pack; codec and preset are used.
        width: Frame width, pixels, a multiple of 16.
        height: Frame height, pixels, a multiple of 16.
        fps: Constant frame rate, Hz.
    """

    def __init__(self, settings: PackSettings, width: int, height: int, fps: float) -> None:
        preset = PRESETS[settings.preset]
        self.intra = settings.codec == "mjpeg" or preset.gop == 1
        context: Any = av.CodecContext.create("libx264" if settings.codec == "h264" else "mjpeg", "w")
        context.width, context.height = width, height
        context.framerate = Fraction(fps).limit_denominator(1001)
        context.time_base = 1 / context.framerate
        context.thread_count, context.thread_type = 1, "NONE"
        if settings.codec == "h264":
            context.pix_fmt = "yuv420p"
            context.options = {"preset": "veryfast", "tune": "fastdecode", "crf": f"{preset.crf:g}"} | {
                "x264-params": f"keyint={preset.gop}:min-keyint={preset.gop}:scenecut=0:bframes=0:ref=1:open-gop=0:"
                "aud=1:repeat-headers=1:annexb=1:colormatrix=smpte170m:colorprim=smpte170m:transfer=smpte170m:"
                f"fullrange=off:threads=1:{SAME_BYTES}"
            }
        else:
            context.pix_fmt = "yuvj420p"
            context.options = {"qmin": _MJPEG_SCALE, "qmax": _MJPEG_SCALE}
        self._context, self._count = context, 0

    @property
    def pixel_format(self) -> str:
        """FFmpeg's name of the pixel format that `add` expects."""
        return str(self._context.pix_fmt)

    def add(self, frame: av.VideoFrame) -> list[Unit]:
        """Encodes the next frame and returns the access units that are ready."""
        frame.pts, frame.time_base = self._count, self._context.time_base
        frame.pict_type = 0  # otherwise the encoder forces the picture type of the source frame
        self._count += 1
        return self._units(self._context.encode(frame))

    def finish(self) -> list[Unit]:
        """Flushes the encoder and returns the remaining access units."""
        return self._units(self._context.encode(None))

    def _units(self, packets: Any) -> list[Unit]:
        units = []
        for packet in packets:
            key = self.intra or packet.is_keyframe
            units.append((bytes(packet), UnitKind.KEYFRAME if key else UnitKind.FRAME))
        return units


def encode_flac(wave_CS: NDArray[np.float32], rate: int, bits: int) -> list[Unit]:
    """Encodes audio as FLAC, lossless except for rounding to integers.

    Args:
        wave_CS: Samples, float32 in -1 to 1; values outside this range are clipped.
        rate: Sample rate, Hz.
        bits: Bits per sample, 16 or 24.

    Returns:
        The stream header, then one unit per FLAC frame of `FLAC_BLOCK` samples.
    """
    channels, total = wave_CS.shape
    scale = 1 << (bits - 1)
    integer_SC = np.rint(np.clip(wave_CS.T * np.float64(scale), -scale, scale - 1)).astype(np.int32)
    format_name, dtype, shift = ("s16", np.int16, 0) if bits == 16 else ("s32", np.int32, 8)
    packed = (integer_SC << shift).astype(dtype)
    out = io.BytesIO()
    sizes = []
    with av.open(out, "w", format="flac", options={"metadata_header_padding": "0", "fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("flac", rate=rate, options={"frame_size": str(FLAC_BLOCK)})
        stream.layout, stream.format = _FLAC_LAYOUTS[channels], format_name
        stream.codec_context.thread_count = 1
        for begin in range(0, total, _CHUNK):
            piece = np.ascontiguousarray(packed[begin : begin + _CHUNK]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(piece, format_name, _FLAC_LAYOUTS[channels])
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            for packet in stream.encode(frame):
                sizes.append(packet.size)
                container.mux(packet)
        for packet in stream.encode(None):
            if packet.size:
                sizes.append(packet.size)
            container.mux(packet)
    return list(_split(out.getvalue(), sizes))


def _split(data: bytes, sizes: list[int]) -> Iterator[Unit]:
    """Splits a FLAC stream into its header and its frames of the given sizes."""
    at = len(data) - sum(sizes)
    yield data[:at], UnitKind.AUDIO
    for size in sizes:
        yield data[at : at + size], UnitKind.AUDIO
        at += size


def encode_jpeg(rgb_HWC: NDArray[np.uint8], size: tuple[int, int]) -> bytes:
    """Resizes a picture to `size`, (width, height), if needed, and encodes it as JPEG."""
    picture = Image.fromarray(np.ascontiguousarray(rgb_HWC))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=None)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=_JPEG_QUALITY)
    return out.getvalue()
