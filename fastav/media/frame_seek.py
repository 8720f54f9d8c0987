"""Finds the packets of a video that must be decoded to get the planned frames, and decodes only those.

A plan needs about eight of the hundreds of frames of a clip. The other frames are skipped in three ways, none of which
changes a pixel of the planned frames:

* Groups of pictures (GOPs) without a planned frame are not decoded, nor are the frames of a GOP after its last planned
  frame. Decoding starts at a keyframe that is presented no later than the planned frame, so leading pictures of open
  GOPs are decoded from the right keyframe.
* Frames that are not planned and that no other frame refers to are skipped, if the standard guarantees that no frame
  depends on them (nal_ref_idc 0 of H.264; B pictures of MPEG-2 and MPEG-4).
* Clips that start late in a long file are reached by seeking.

Frames are numbered in presentation order. Each packet has a presentation time, so the number of a frame is the rank of
its time among the packets of the clip. This is true only if every packet is one frame with a timestamp. Therefore
`PacketReader` checks each clip: the number of packets, the times at both ends, a real keyframe, and that every planned
frame is decoded without damage. If a check fails, it raises `UncertainSeek`. The file is then decoded from its first
packet and the frames are counted, as in `probe`, which is always right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from fastav.data.clip import Clip
from fastav.media.decoder import UncertainSeek
from fastav.media.open_file import TIME_TOLERANCE_S, frame_times_s

# Containers whose packets carry the presentation times of their frames.
_TIMED = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts"})

# Codecs for which FFmpeg's AVDISCARD_NONREF skips only frames that no other frame depends on. HEVC is not among them,
# because a higher layer may refer to its sub-layer non-reference pictures.
_DISPOSABLE = frozenset({"h264", "mpeg2video", "mpeg4"})

# Distances to seek back, seconds, tried in order. A seek reaches a decoding time, or a packet near it, so the next
# keyframe may be presented too late.
_SEEK_BACK_S = (0.0, 1.0, 4.0, 16.0)

_MOST_REORDERED = 64  # number of packets at the start of a file that may contain the first presented frame
_MARGIN_S = 1.0  # packets are read up to this long after the end of the clip, longer than any reordering
HELD_BYTES = 1 << 26
"""Maximum size of the packets of a clip to keep in memory. If a clip is larger, only the timestamps and flags of its
packets are kept, and the needed packets are read again."""


class _PacketInfo(NamedTuple):
    """A packet without its data. The names are those of PyAV's packets."""

    pts: int
    dts: int | None
    is_keyframe: bool
    is_discard: bool

    @classmethod
    def of(cls, packet: Any) -> _PacketInfo:
        return cls(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)


class PacketReader:
    """Collects the video packets of a clip, in decoding order, and decodes the planned frames.

    Args:
        container: File opened by `open_media`.
        stream: Its video stream.
        clip: The clip, which gives the time span.
        start_pts: After a seek, the timestamp of the first presented frame of the file; None when reading from the
            start.
    """

    def __init__(self, container: Any, stream: Any, clip: Clip, start_pts: int | None = None) -> None:
        self.container, self.stream, self.clip = container, stream, clip
        self.from_start = start_pts is None
        self.start_pts = start_pts
        self.untimed = container.format.name not in _TIMED
        self.full = self.untimed
        self._ended = False
        self._held = 0
        self._packets: list[Any] = []  # packets, or `_PacketInfo` of all of them
        self._end_s = clip.start_s + clip.duration_s
        self._read_to = round((self._end_s + _MARGIN_S) / stream.time_base)

    def feed(self, packet: Any) -> None:
        """Adds the next packet of the stream, including the empty packet at its end; `full` is set when complete."""
        if not packet.size:
            self._ended = self.full = True
            return
        pts, dts = packet.pts, packet.dts
        if pts is None:
            self.untimed = self.full = True
            self._packets.clear()
            return
        held, self._held = self._held, self._held + packet.size
        if self._held > HELD_BYTES:
            if held <= HELD_BYTES:
                self._packets = [_PacketInfo.of(earlier) for earlier in self._packets]
            packet = _PacketInfo.of(packet)
        self._packets.append(packet)
        if self.start_pts is None:
            self.start_pts = pts
        # The first packets of Matroska have no decoding times.
        self.full = dts is not None and dts - self.start_pts > self._read_to

    def pick(self, numbers: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decodes the planned frames and yields their numbers and frames, ascending.

        Raises:
            UncertainSeek: It is not certain which packets contain the frames. Frames yielded before are right.
            FFmpegError: A packet cannot be decoded.
        """
        pts_N = self._frame_pts()
        wanted = {int(pts_N[n]): n for n in numbers}
        place = {packet.pts: i for i, packet in enumerate(self._packets)}
        keys = [(i, p.pts) for i, p in enumerate(self._packets) if p.is_keyframe]
        context = self.stream.codec_context
        # With frame threads, options take effect late: `skip_frame` would skip a neighbouring frame.
        skips = context.thread_count == 1 and context.codec.canonical_name in _DISPOSABLE
        for first, last in self._runs(sorted(wanted, key=place.__getitem__), place, keys):
            run = {pts for pts in wanted if first <= place[pts] <= last}
            context.flush_buffers()
            checked = self._packets[first].is_discard
            for frame in self.decode_run(first, last, run if skips else None):
                if not checked and not frame.key_frame:
                    raise UncertainSeek("decoding did not start at a keyframe")
                checked = True
                if frame.pts in run:
                    if frame.is_corrupt:
                        raise UncertainSeek("a planned frame is damaged")
                    run.discard(frame.pts)
                    frame.time_base = self.stream.time_base  # the decoder does not set it
                    yield wanted[frame.pts], frame
                    if not run:
                        break
            if run:
                raise UncertainSeek("a planned frame was not decoded")

    def _frame_pts(self) -> NDArray[np.int64]:
        """Returns the timestamps of the clip's frames in presentation order, or raises `UncertainSeek`."""
        packets, clip = self._packets, self.clip
        if self.untimed or not packets:
            raise UncertainSeek("packets without timestamps")
        shown = np.sort(np.array([p.pts for p in packets if not p.is_discard], dtype=np.int64))
        opens = next((p.pts for p in packets if p.is_keyframe), None)
        if opens is None or len(shown) == 0 or np.any(np.diff(shown) <= 0):
            raise UncertainSeek("no keyframe, or two frames with the same timestamp")
        if self.from_start:
            # Pictures before the first keyframe, in decoding or presentation order, may not be decodable, and `probe`
            # then does not count them.
            if not packets[0].is_keyframe or shown[0] < opens:
                raise UncertainSeek("the file does not start at a keyframe")
            self.start_pts = int(shown[0])
        times = frame_times_s(shown, self.start_pts or 0, self.stream.time_base)
        opens_s = frame_times_s(np.array([opens]), self.start_pts or 0, self.stream.time_base)[0]
        if not self.from_start and opens_s > clip.start_s + TIME_TOLERANCE_S:
            raise UncertainSeek("the seek went past the start of the clip")
        first = int(np.searchsorted(times, clip.start_s - TIME_TOLERANCE_S)) if clip.start_frame else 0
        last = first + clip.num_frames
        whole = self._ended and first == 0 == clip.start_frame and last == len(times)
        end_s = self._end_s - TIME_TOLERANCE_S
        if not whole and (last > len(times) or times[last - 1] >= end_s or (last < len(times) and times[last] < end_s)):
            raise UncertainSeek("the numbers of packets and frames differ")
        return shown[first:last]

    def _runs(self, wanted: list[int], place: dict[int, int], keys: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Returns first and last packet of each run to decode; `wanted` are timestamps in decoding order."""
        runs: list[tuple[int, int]] = []
        for pts in wanted:
            first = next((i for i, key_pts in reversed(keys) if i <= place[pts] and key_pts <= pts), None)
            if first is None:
                raise UncertainSeek("no keyframe before a planned frame")
            while runs and runs[-1][1] >= first:  # a leading picture starts before its own keyframe
                first = min(first, runs.pop()[0])
            runs.append((first, place[pts]))
        return runs

    def decode_run(self, first: int, last: int, keep: set[int] | None) -> Iterator[av.VideoFrame]:
        """Decodes the packets first to last, both included, and drains the decoder.

        Args:
            first: First packet.
            last: Last packet.
            keep: Timestamps of the only disposable frames to decode; None decodes all frames.
        """
        context = self.stream.codec_context
        held = self._held <= HELD_BYTES
        for packet in self._packets[first : last + 1] if held else self._read_again(first, last):
            if keep is not None:
                context.skip_frame = "DEFAULT" if packet.pts in keep else "NONREF"
            yield from context.decode(packet)
        yield from context.decode(None)

    def _read_again(self, first: int, last: int) -> Iterator[Any]:
        """Seeks back to a keyframe and yields the packets first to last, both included, again."""
        key = self._packets[first]
        at = key.pts if key.dts is None else key.dts
        for back_s in _SEEK_BACK_S:
            self.container.seek(at - round(back_s / self.stream.time_base), stream=self.stream)
            expected = iter(self._packets[first : last + 1])
            info = next(expected)
            for packet in self.container.demux(self.stream):
                if packet.pts == info.pts:
                    yield packet
                    info = next(expected, None)
                    if info is None:
                        return
                elif info is not key:
                    raise UncertainSeek("the packets differ from those of the first reading")
                elif not packet.size or (packet.dts is not None and packet.dts > at):
                    break
        raise UncertainSeek("a keyframe was not found when the file was read again")


def count_frames(container: Any, stream: Any, numbers: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decodes a file from its start and yields numbers and frames of the planned frames; stops after the last one.

    Args:
        container: File that was just opened.
        stream: Its video stream.
        numbers: Frame numbers, ascending, counted from the first presented frame of the file.
    """
    wanted = iter(numbers)
    number = next(wanted)
    for i, frame in enumerate(container.decode(stream)):
        if i == number:
            yield i, frame
            number = next(wanted, -1)
            if number < 0:
                return


def seek_packets(container: Any, stream: Any, clip: Clip) -> PacketReader | None:
    """Seeks to the last keyframe that is presented no later than the start of the clip.

    Returns:
        A reader at the keyframe; None if frames of this file can only be found by counting.
    """
    start_pts = first_pts(container, stream)
    if start_pts is None:
        return None
    target = start_pts + round(clip.start_s / stream.time_base)
    for back_s in _SEEK_BACK_S:
        container.seek(max(target - round(back_s / stream.time_base), start_pts), stream=stream)
        for packet in container.demux(stream):
            if packet.size and packet.is_keyframe:
                if packet.pts is None or packet.pts > target:
                    break
                reader = PacketReader(container, stream, clip, start_pts)
                reader.feed(packet)
                return reader
    return None


def first_pts(container: Any, stream: Any) -> int | None:
    """Returns the timestamp of the first presented frame from the first packets of a file; None if uncertain."""
    if container.format.name not in _TIMED:
        return None
    first: int | None = None
    for packet in islice(container.demux(stream), _MOST_REORDERED):
        if packet.pts is None or (first is None and packet.is_discard):
            return None
        if first is None:
            if not packet.is_keyframe:
                return None
            first = packet.pts
        elif packet.pts < first:
            return None
        if packet.dts is not None and packet.dts >= first:
            # All frames that are decoded later are also presented later.

            return first
    return None
