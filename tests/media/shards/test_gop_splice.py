"""Shard format and splice: offsets, checksums, and the pixels of a splice against those of the whole stream."""

from __future__ import annotations

import io
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.media.packed_clip_decoder import OpenDecoders, decode_audio
from fastav.media.shards import ShardReader, ShardReading
from fastav.media.shards.format import (
    FLAC_BLOCK,
    Member,
    ShardWriter,
    UnitKind,
    decode_table,
    encode_table,
    num_units,
    table_place,
)
from fastav.media.shards.gop_splice import needed_audio, needed_units
from fastav.pack.settings import PackSettings
from fastav.pack.transcode import PackJob, pack_clip
from tests.helpers.media import clicks, write_media
from tests.helpers.plans import clip_of

RATE = 16_000
SETTINGS = {
    "small": PackSettings(preset="small"),
    "balanced": PackSettings(),
    "fast": PackSettings(preset="fast"),
    "mjpeg": PackSettings(codec="mjpeg"),
}


def moving(number, width, height):
    """A picture in which every frame differs everywhere."""
    y, x = np.mgrid[:height, :width]
    wave = 120 + 70 * np.sin((x + 3 * number) / 7) + 50 * np.cos((y - 2 * number) / 5)
    return np.stack([wave, np.roll(wave, number, 1), 255 - wave], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "a.mp4"
    write_media(
        path, frames=75, size=(160, 96), picture=moving, wave=clicks(3, [0.5, 2.2]), options={"bf": "3", "g": "250"}
    )
    return clip_of(path)


@pytest.fixture(scope="module")
def packs(source, tmp_path_factory):
    """The same clip in every preset, the second of three clips of its shard."""
    folder, made = tmp_path_factory.mktemp("packs"), {}
    for name, settings in SETTINGS.items():
        packed = pack_clip(PackJob(source, settings, source.video.parent, True))
        shard = folder / f"{name}.tar"
        with shard.open("wb") as file:
            writer = ShardWriter(file)
            writer.add("000000000", packed.members)
            at, size = writer.add("000000001", packed.members)
            writer.add("000000002", packed.members)
            writer.close()
        made[name] = replace(packed.clip, shard=str(shard), shard_at=at, shard_size=size)
    return made


class Film:
    """Keeps the frames it is shown, as planes."""

    def __init__(self, numbers):
        self.numbers, self.frames = list(numbers), {}

    def take(self, number, frame):
        self.frames[number] = frame.to_ndarray()


def whole_stream(clip):
    """All frames of the member, by FFmpeg's own demuxer and decoder, without any of our offsets."""
    with tarfile.open(clip.shard) as tar:
        data = tar.extractfile(f"000000001.{clip.video_codec}").read()
    with av.open(io.BytesIO(data), format=clip.video_codec) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_splice_decodes_to_the_same_pixels_as_the_whole_file(packs, name):
    clip, shards, decoders = packs[name], ShardReader(ShardReading()), OpenDecoders()
    expected = whole_stream(clip)
    assert len(expected) == clip.num_frames == 75
    rng = np.random.default_rng(5)
    for _ in range(40):
        numbers = sorted(rng.choice(75, size=rng.integers(1, 9), replace=False).tolist())
        film = Film(numbers)
        decoders.decode(shards.fetch(clip, numbers, None).frames, film, clip)
        assert list(film.frames) == numbers
        assert all(np.array_equal(film.frames[n], expected[n]) for n in numbers)


@pytest.mark.parametrize("name", SETTINGS)
def test_only_the_needed_groups_are_read(packs, name):
    clip = packs[name]
    gop = {"small": 8, "balanced": 4, "fast": 1, "mjpeg": 1}[name]
    packed = ShardReader(ShardReading()).fetch(clip, [9, 10, 42], None)
    expected = list(range(9 // gop * gop, 10 // gop * gop + 10 % gop + 1)) if gop > 1 else [9, 10]
    expected += list(range(42 // gop * gop, 43))
    assert len(packed.frames.units) == len(expected)
    assert [expected[i] for i in packed.frames.shown] == [9, 10, 42]
    keys = [expected[i] for i, key in enumerate(packed.frames.keys) if key]
    assert keys == [n for n in expected if n % gop == 0]
    assert packed.num_bytes < clip.shard_size / 2
    assert packed.audio is None


def test_h264_has_delimiters_parameter_sets_and_no_reordering(packs):
    for name in ("small", "balanced", "fast"):
        clip = packs[name]
        frames = ShardReader(ShardReading()).fetch(clip, list(range(75)), None).frames
        for unit, key in zip(frames.units, frames.keys, strict=True):
            kinds = [part[0] & 31 for part in unit.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]]
            assert kinds[0] == 9  # access unit delimiter
            assert ({7, 8, 5} <= set(kinds)) == key  # SPS, PPS, IDR
            assert key or set(kinds) <= {9, 1}
        context = av.CodecContext.create("h264", "r")
        context.decode(av.Packet(frames.units[0]))
        context.decode(None)
        assert not context.has_b_frames
        assert (context.width, context.height, context.pix_fmt) == (160, 96, "yuv420p")
        # What x264 says of itself in the first unit.
        assert all(word in frames.units[0] for word in (b" ref=1 ", b" bframes=0 ", b" cabac=0 ", b" deblock=0:"))


def test_a_spliced_stream_decodes_without_a_word_from_ffmpeg(packs):
    previous = av.logging.get_level()
    av.logging.set_level(av.logging.WARNING)
    rng = np.random.default_rng(3)
    try:
        with av.logging.Capture(local=False) as said:
            for clip in packs.values():
                for _ in range(10):
                    numbers = sorted(rng.choice(75, size=8, replace=False).tolist())
                    frames = ShardReader(ShardReading()).fetch(clip, numbers, None).frames
                    with av.open(io.BytesIO(frames.stream), format=clip.video_codec) as container:
                        assert sum(1 for _ in container.decode(video=0)) == len(frames.units)
        # The MJPEG coder of full-range pictures is deprecated by name only; everything else would be a fault.
        assert [
            text for _, _, text in said if "deprecated pixel format" not in text and "Estimating duration" not in text
        ] == []
    finally:
        av.logging.set_level(previous)


def test_sound_is_spliced_by_frames(packs):
    clip, shards = packs["balanced"], ShardReader(ShardReading())
    whole = decode_audio(shards.fetch(clip, None, (0, clip.num_samples)).audio, clip)
    assert len(whole) == clip.num_samples == pytest.approx(3 * RATE, abs=RATE // 20)
    peaks = np.flatnonzero(np.abs(whole) > 0.6)
    assert abs(peaks[0] - 0.5 * RATE) < 50
    assert abs(peaks[-1] - 2.2 * RATE) < 50
    sound = shards.fetch(clip, None, (10_000, 20_000)).audio
    assert (sound.start, len(sound.frames)) == (8192, 3)
    part = decode_audio(sound, clip)
    assert np.array_equal(part[8192 : 5 * FLAC_BLOCK], whole[8192 : 5 * FLAC_BLOCK])
    assert not part[:8192].any()
    with av.open(
        io.BytesIO(sound.header + b"".join(shards.fetch(clip, None, (0, clip.num_samples)).audio.frames))
    ) as flac:
        assert flac.streams.audio[0].codec_context.name == "flac"


def test_altered_bytes_are_named(packs, tmp_path):
    clip = packs["balanced"]
    raw = bytearray(Path(clip.shard).read_bytes())
    units = ShardReader(ShardReading()).units(clip)
    raw[int(units.at_U[20]) + 5] ^= 1
    copy = tmp_path / "x.tar"
    copy.write_bytes(raw)
    moved, shards = replace(clip, shard=str(copy)), ShardReader(ShardReading())
    with pytest.raises(MediaError, match=rf"x.tar: shard: unit 20 of clip .* at byte {units.at_U[20]} is damaged"):
        shards.fetch(moved, [21], None)
    assert shards.fetch(moved, [24], None).frames is not None  # its neighbours are still good


def test_an_altered_table_is_named(packs, tmp_path):
    clip = packs["fast"]
    at, size = table_place(clip)
    original = Path(clip.shard).read_bytes()
    for place in (at + 3, at + size - 12, at + size - 1):
        raw = bytearray(original)
        raw[place] ^= 0x40
        copy = tmp_path / "x.tar"
        copy.write_bytes(raw)
        with pytest.raises(MediaError, match="shard: "):
            ShardReader(ShardReading()).fetch(replace(clip, shard=str(copy)), list(range(75)), (0, clip.num_samples))


def test_an_altered_kind_is_named(packs, tmp_path):
    clip = packs["balanced"]
    data = bytearray(Path(clip.shard).read_bytes())
    place, size = table_place(clip)
    row = place + size - 12 * num_units(clip) + 12 * 6  # frame 6 is the third of its group
    assert data[row + 4] == UnitKind.FRAME
    data[row + 4] = UnitKind.KEYFRAME
    (tmp_path / "kind.tar").write_bytes(data)
    with pytest.raises(MediaError, match=r"unit 6 of clip .* is damaged"):
        ShardReader(ShardReading()).fetch(replace(clip, shard=str(tmp_path / "kind.tar")), [2, 6], None)


def test_a_zeroed_row_of_the_table_is_named(packs, tmp_path):
    # The CRC of nothing is nought, too: a last stretch of sound would be silence.
    clip = packs["balanced"]
    data = bytearray(Path(clip.shard).read_bytes())
    place, size = table_place(clip)
    data[place + size - 12 : place + size] = bytes(12)
    (tmp_path / "zero.tar").write_bytes(data)
    with pytest.raises(MediaError, match=r"the table of clip .* is damaged"):
        ShardReader(ShardReading()).fetch(replace(clip, shard=str(tmp_path / "zero.tar")), None, (0, clip.num_samples))


def test_a_cut_off_or_missing_shard_is_named(packs, tmp_path):
    clip = packs["fast"]
    copy = tmp_path / "cut.tar"
    copy.write_bytes(Path(clip.shard).read_bytes()[: clip.shard_at + 2000])
    with pytest.raises(MediaError, match=r"cut\.tar: shard: "):
        ShardReader(ShardReading()).fetch(replace(clip, shard=str(copy)), [70], None)
    with pytest.raises(MediaError, match=r"gone\.tar: shard: "):
        ShardReader(ShardReading()).fetch(replace(clip, shard=str(tmp_path / "gone.tar")), [70], None)


def test_the_table_is_plain_numpy():
    units = [(b"abc", UnitKind.KEYFRAME), (b"", UnitKind.FRAME), (b"defg", UnitKind.AUDIO)]
    loaded = np.load(io.BytesIO(encode_table(units)), allow_pickle=False)
    assert loaded.tolist() == [[3, 1, zlib.crc32(b"abc", 1)], [0, 0, 0], [4, 2, zlib.crc32(b"defg", 2)]]


def test_offsets_are_those_of_the_tar(tmp_path):
    video, sound = [b"v" * 700, b"w" * 30], [b"head", b"s" * 1000]
    units = [(data, UnitKind.KEYFRAME) for data in video] + [(data, UnitKind.AUDIO) for data in sound]
    members = [Member("idx.npy", encode_table(units)), Member("h264", b"".join(video)), Member("flac", b"".join(sound))]
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        writer = ShardWriter(file)
        writer.add("000", [Member("json", b"{}")])
        at, size = writer.add("001", members)
        writer.close()
    clip = Clip(id="a", shard=str(path), shard_at=at, shard_size=size, num_frames=2, num_samples=FLAC_BLOCK)
    assert num_units(clip) == 4
    raw = path.read_bytes()
    begin, length = table_place(clip)
    found = decode_table(clip, raw[begin : begin + length])
    stored = [raw[a : a + n] for a, n in zip(found.at_U, found.size_U, strict=True)]
    assert stored == [*video, *sound]
    with tarfile.open(path) as tar:
        assert [member.name for member in tar] == ["000.json", "001.idx.npy", "001.h264", "001.flac"]


def test_needed_units_and_sound():
    kinds = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1, 0])
    assert needed_units(kinds, [2]).tolist() == [0, 1, 2]
    assert needed_units(kinds, [1, 3, 8]).tolist() == [0, 1, 2, 3, 8]
    assert needed_units(kinds, []).tolist() == []
    with pytest.raises(ValueError, match="frames"):
        needed_units(kinds, [10])
    clip = Clip(id="a", num_samples=10_000)
    assert needed_audio(clip, (0, 1)).tolist() == [0, 1]
    assert needed_audio(clip, (4096, 10_000)).tolist() == [0, 2, 3]
    assert needed_audio(clip, (0, 0)).tolist() == [0]
    assert needed_audio(clip, None).tolist() == []
    assert needed_audio(Clip(id="m", num_mel_frames=5), (0, 0)).tolist() == [0]
