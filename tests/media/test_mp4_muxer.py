"""The MP4 that DALI is handed: every demuxer must find the units in it, untouched."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from fastav.media import mp4_muxer
from fastav.media.shards.format import UnitKind
from fastav.pack.encode import VideoEncoder
from fastav.pack.settings import PackSettings
from tests.helpers.media import number_of, numbered


def coded(codec, count=12, width=128, height=96):
    """Units and key marks of numbered pictures."""
    encoder, units = VideoEncoder(PackSettings(codec=codec), width, height, 25.0), []
    for number in range(count):
        frame = av.VideoFrame.from_ndarray(numbered(number, width, height), format="rgb24")
        units += encoder.add(frame.reformat(format=encoder.pixel_format))
    units += encoder.finish()
    return [data for data, _ in units], [kind == UnitKind.KEYFRAME for _, kind in units]


def opened(data):
    return av.open(io.BytesIO(data), format="mp4")


@pytest.mark.parametrize("codec", ["h264", "mjpeg"])
def test_units_times_and_keys_come_out_as_they_went_in(codec):
    units, keys = coded(codec)
    assert keys.count(True) == (3 if codec == "h264" else 12)
    data = mp4_muxer.mux(codec, units, keys, 128, 96)
    key_numbers = np.array([0, 3, 1, 5, 9], ">u4").tobytes()  # version and flags, count, from 1
    assert (b"stss" + key_numbers in data) == (codec == "h264")
    with opened(data) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height, stream.frames) == (codec, 128, 96, 12)
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert [bytes(packet) for packet in packets] == units
        assert [packet.pts for packet in packets] == list(range(12)) == [packet.dts for packet in packets]
        assert [packet.is_keyframe for packet in packets] == keys
    with opened(data) as container:
        assert [number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)] == list(range(12))


def test_h264_passes_the_filter_in_front_of_nvdec_untouched():
    units, keys = coded("h264")
    with opened(mp4_muxer.mux("h264", units, keys, 128, 96)) as container:
        stream = container.streams.video[0]
        to_annex_b = BitStreamFilterContext("h264_mp4toannexb", stream)
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert [bytes(out) for packet in packets for out in to_annex_b.filter(packet)] == units


def test_a_splice_with_gaps_is_a_file_of_its_own():
    units, keys = coded("h264")
    picked = [0, 1, 8, 9, 10]
    data = mp4_muxer.mux("h264", [units[i] for i in picked], [keys[i] for i in picked], 128, 96)
    with opened(data) as container:
        assert [number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)] == picked


def test_one_unit_and_large_units_are_fine():
    units, keys = coded("mjpeg", 1, 640, 480)
    padded = [units[0] + bytes(np.random.default_rng(0).integers(0, 255, 1 << 20, np.uint8))]
    for several in (units, padded):
        with opened(mp4_muxer.mux("mjpeg", several, keys, 640, 480)) as container:
            stream = container.streams.video[0]
            assert [bytes(packet) for packet in container.demux(stream) if packet.size] == several
