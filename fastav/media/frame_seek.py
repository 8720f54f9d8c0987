"""Which packets of a video must be decoded to see the planned frames, and those frames alone.

A clip shows eight frames of hundreds. The rest can be skipped in three ways, none of which may change a
pixel:

* Groups of pictures without a planned frame, and what follows the last planned frame of a group, are not
decoded.
  Decoding starts at a keyframe that is presented no later than the frame wanted, so the leading pictures of
  open groups are never asked of the wrong one.
* Frames that no other frame refers to are left out unless planned, where the standard makes the promise that
  nothing else depends on them (H.264's nal_ref_idc 0; B pictures of MPEG-2 and MPEG-4).
* A piece of a long file is reached by seeking.

Frame numbers are presentation order, and a packet knows its presentation time, so a frame's number is the
rank of its time among its clip's packets. That holds where every packet is one frame and tells its time.
`PacketReader` therefore proves it on each clip (the count of packets, the times at both ends, a real keyframe, each
planned time coming out of the decoder undamaged), and says so where it cannot; then the file is decoded
from its first packet and frames are counted, which is always right and is what `probe` did.
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

# Codings in which FFmpeg's AVDISCARD_NONREF leaves out only what nothing depends on. Not HEVC, whose sub-
# layer non-reference pictures may be referred to from a higher layer.
_DISPOSABLE = frozenset({"h264", "mpeg2video", "mpeg4"})

# Readers go to a decoding time, or to any packet near it: where the next keyframe is presented too late, go back more.
_SEEK_BACK_S = (0.0, 1.0, 4.0, 16.0)

_MOST_REORDERED = 64  # packets at the head of a file among which an earlier picture could still come
_MARGIN_S = 1.0  # read on so far past the end: more than any reordering
HELD_BYTES = 1 << 26
"""Of a longer span the packets' marks are kept alone, and the needed packets read again."""


class _Mark(NamedTuple):
    """What is kept of a packet without its data; the names are the packet's own."""

    pts: int
    dts: int | None
    is_keyframe: bool
    is_discard: bool

    @classmethod
    def of(cls, packet: Any) -> _Mark:
        return cls(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)


class PacketReader:
    """The packets of a clip's span of video, in decoding order.

    Args:
        container: From `open_media`.
        stream: Its video stream.
        clip: The span.
        start_pts: Timestamp of the file's first presented frame after a seek; None when reading from the
            start.
    """

    def __init__(self, container: Any, stream: Any, clip: Clip, start_pts: int | None = None) -> None:
        self.container, self.stream, self.clip = container, stream, clip
        self.from_start = start_pts is None
        self.start_pts = start_pts
        self.blind = container.format.name not in _TIMED
        self.full = self.blind
        self._ended = False
        self._held = 0
        self._packets: list[Any] = []  # packets, or the marks of all of them
        self._end_s = clip.start_s + clip.duration_s
        self._read_to = round((self._end_s + _MARGIN_S) / stream.time_base)

    def feed(self, packet: Any) -> None:
        """Takes the stream's next packet, the empty one at the end too; `full` says when it has enough."""
        if not packet.size:
            self._ended = self.full = True
            return
        pts, dts = packet.pts, packet.dts
        if pts is None:
            self.blind = self.full = True
            self._packets.clear()
            return
        held, self._held = self._held, self._held + packet.size
        if self._held > HELD_BYTES:
            if held <= HELD_BYTES:
                self._packets = [_Mark.of(earlier) for earlier in self._packets]
            packet = _Mark.of(packet)
        self._packets.append(packet)
        if self.start_pts is None:
            self.start_pts = pts
        # Matroska knows no decoding times for its first packets.
        self.full = dts is not None and dts - self.start_pts > self._read_to

    def pick(self, numbers: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields number and frame of the planned frames, ascending; decodes nothing that it need not.

        Raises:
            Unproven: It is not certain which packets they are. Frames yielded before are right.
            FFmpegError: The decoder refuses a packet.
        """
        pts_N = self._span()
        wanted = {int(pts_N[n]): n for n in numbers}
        place = {packet.pts: i for i, packet in enumerate(self._packets)}
        keys = [(i, p.pts) for i, p in enumerate(self._packets) if p.is_keyframe]
        context = self.stream.codec_context
        # Frame threads hand options on late: skip_frame would hit a neighbour.
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
                        raise UncertainSeek("a planned frame came out damaged")
                    run.discard(frame.pts)
                    frame.time_base = self.stream.time_base  # a bare decoder does not know it
                    yield wanted[frame.pts], frame
                    if not run:
                        break
            if run:
                raise UncertainSeek("a planned frame did not come out")

    def _span(self) -> NDArray[np.int64]:
        """Timestamps of the clip's frames in presentation order, when there is no doubt which they are."""
        packets, clip = self._packets, self.clip
        if self.blind or not packets:
            raise UncertainSeek("packets without times")
        shown = np.sort(np.array([p.pts for p in packets if not p.is_discard], dtype=np.int64))
        opens = next((p.pts for p in packets if p.is_keyframe), None)
        if opens is None or len(shown) == 0 or np.any(np.diff(shown) <= 0):
            raise UncertainSeek("no keyframe, or two frames of one time")
        if self.from_start:
            # Pictures that lead the first keyframe, or come before one, might not decode and not count.
            if not packets[0].is_keyframe or shown[0] < opens:
                raise UncertainSeek("the file does not start at a keyframe")
            self.start_pts = int(shown[0])
        times = frame_times_s(shown, self.start_pts or 0, self.stream.time_base)
        opens_s = frame_times_s(np.array([opens]), self.start_pts or 0, self.stream.time_base)[0]
        if not self.from_start and opens_s > clip.start_s + TIME_TOLERANCE_S:
            raise UncertainSeek("the seek landed too late")
        first = int(np.searchsorted(times, clip.start_s - TIME_TOLERANCE_S)) if clip.start_frame else 0
        last = first + clip.num_frames
        whole = self._ended and first == 0 == clip.start_frame and last == len(times)
        end_s = self._end_s - TIME_TOLERANCE_S
        if not whole and (last > len(times) or times[last - 1] >= end_s or (last < len(times) and times[last] < end_s)):
            raise UncertainSeek("the span holds another number of packets than of frames")
        return shown[first:last]

    def _runs(self, wanted: list[int], place: dict[int, int], keys: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """First and last packet of each run to decode; `wanted` are timestamps in decoding order."""
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
        """Decodes packets first..last and drains the decoder; `keep`: leave disposable frames out but these."""
        context = self.stream.codec_context
        held = self._held <= HELD_BYTES
        for packet in self._packets[first : last + 1] if held else self._read_again(first, last):
            if keep is not None:
                context.skip_frame = "DEFAULT" if packet.pts in keep else "NONREF"
            yield from context.decode(packet)
        yield from context.decode(None)

    def _read_again(self, first: int, last: int) -> Iterator[Any]:
        """Goes back to a keyframe and yields packets first..last once more."""
        key = self._packets[first]
        at = key.pts if key.dts is None else key.dts
        for back_s in _SEEK_BACK_S:
            self.container.seek(at - round(back_s / self.stream.time_base), stream=self.stream)
            expected = iter(self._packets[first : last + 1])
            mark = next(expected)
            for packet in self.container.demux(self.stream):
                if packet.pts == mark.pts:
                    yield packet
                    mark = next(expected, None)
                    if mark is None:
                        return
                elif mark is not key:
                    raise UncertainSeek("other packets than before")
                elif not packet.size or (packet.dts is not None and packet.dts > at):
                    break
        raise UncertainSeek("a keyframe was not found again")


def count_frames(container: Any, stream: Any, numbers: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decodes from the file's start and yields number and frame of the planned ones; stops after the last.

    Args:
        container: Freshly opened.
        stream: Its video stream.
        numbers: Ascending, counted from the file's first presented frame.
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
    """Goes to the last keyframe that is presented no later than the span; None where only counting is certain."""
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
    """Timestamp of the first presented frame, found at the head of the file; None where it cannot be told so."""
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
            # What is decoded later is presented later, too.
            return first
    return None
