"""Reads the frames and the sound of a clip out of a media file, once through the container for both.

A container is opened once per clip and read once for both modalities, except for pieces of long files, where each
stream is sought for itself. Where a planned frame cannot be told from the packets for certain, the file is opened again
and its frames are counted from the start (`fastav.media.frame_seek` has the reasons).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import av
import av.error
import av.stream

from fastav.core.errors import MediaError
from fastav.data.clip import Clip, Modality
from fastav.media.audio import EXACT_SEEK, PREROLL_S, Sound
from fastav.media.decoder import UncertainSeek
from fastav.media.frame_seek import PacketReader, count_frames, seek_packets
from fastav.media.open_file import explain_error, first_stream, media_errors, open_media

_SEEK_FROM_S = 2.0
"""Spans that start later than this are sought: about where decoding up to them costs more than the seek."""

_UNFLAGGED = frozenset({"mjpeg"})
"""Decoders that show a damaged picture over what their memory held before, and do not say so: these must refuse it."""


class FrameSink(Protocol):
    """Takes the decoded frames of a clip.

    Attributes:
        numbers: Which frames of the clip it wants, distinct and ascending.
    """

    numbers: list[int]

    def take(self, number: int, frame: av.VideoFrame) -> None:
        """Takes one of them, in ascending order; after a doubtful start they come once more from the first on."""
        ...


def read_media(
    clip: Clip,
    sink: FrameSink | None,
    heard: bool,
    *,
    mixed: bool = True,
    threads: int = 1,
) -> Sound | None:
    """Decodes what is wanted of a clip's media files.

    Args:
        clip: A probed row with `video` or `audio` files.
        sink: Is handed the frames; None for no video.
        heard: Whether to collect the sound.
        mixed: Whether its channels are mixed to one.
        threads: Of the video decoder.

    Returns:
        The sound, complete; None where it was not wanted.

    Raises:
        MediaError: A file is not what the row promises; names file and stage.
    """
    reader = _MediaReader(clip, mixed, threads)
    if sink is not None and heard and clip.video == clip.audio and not _is_late(clip):
        return reader.read(sink, ("video", "audio"))
    if sink is not None:
        reader.read(sink, ("video",))
    return reader.read(None, ("audio",)) if heard else None


class _MediaReader:
    """Goes through the files of one clip."""

    def __init__(self, clip: Clip, mixed: bool, threads: int) -> None:
        self.clip, self.mixed, self.threads = clip, mixed, threads

    def read(self, sink: FrameSink | None, modalities: tuple[Modality, ...]) -> Sound | None:
        """Reads one container once; returns the sound where that is among the modalities."""
        clip = self.clip
        path = clip.video if sink is not None else clip.audio
        if path is None:
            raise MediaError("", f'the row of clip "{clip.id}" promises {modalities[0]} and names no file', "open")
        with open_media(path) as container:
            streams = {kind: self._stream(container, kind, path) for kind in modalities}
            _leave_out(container, streams.values())
            reader = sound = None
            if "video" in streams:
                with media_errors(path, "video"):
                    late = _is_late(clip) and clip.start_frame > 0
                    reader = (seek_packets if late else PacketReader)(container, streams["video"], clip)
            if "audio" in streams:
                with media_errors(path, "audio"):
                    sound = _prick_ears(container, streams["audio"], clip, self.mixed)
            _pour(container, reader, sound, path)
            if sink is not None:
                self._look(reader, sink, path)
            return None if sound is None else self._listen(sound, path)

    def _listen(self, sound: Sound, path: Path) -> Sound:
        """The clip's samples, from where it was sought or, in doubt, by reading from the start."""
        with media_errors(path, "audio"):
            try:
                sound.finish()
                return sound
            except UncertainSeek:
                pass
            with open_media(path) as container:
                stream = self._stream(container, "audio", path)
                _leave_out(container, (stream,))
                sound = Sound(stream, self.clip, mixed=self.mixed)
                _pour(container, None, sound, path)
                sound.finish()
                return sound

    def _stream(self, container: Any, kind: Modality, path: Path) -> Any:
        stream = first_stream(container, kind, path)
        if stream is None:
            raise MediaError(path, f"has no {kind} stream, its row promises one", kind)
        stream.codec_context.thread_count = threads = self.threads if kind == "video" else 1
        stream.codec_context.thread_type = "AUTO" if threads > 1 else "NONE"
        if stream.codec_context.name in _UNFLAGGED:
            stream.codec_context.options = {"err_detect": "explode"}
        return stream

    def _look(self, reader: PacketReader | None, sink: FrameSink, path: Path) -> None:
        """Hands out the planned frames, by their packets or, in doubt, by counting."""
        with media_errors(path, "video"):
            if reader is not None:
                try:
                    for number, frame in reader.pick(sink.numbers):
                        sink.take(number, frame)
                    return
                except (UncertainSeek, av.error.FFmpegError):
                    pass  # a packet wrongly marked as a keyframe cannot be decoded either
            first = self.clip.start_frame
            with open_media(path) as container:
                stream = self._stream(container, "video", path)
                _leave_out(container, (stream,))
                for number, frame in count_frames(container, stream, [first + n for n in sink.numbers]):
                    if frame.is_corrupt:
                        raise MediaError(path, f"frame {number} is damaged", "video")
                    sink.take(number - first, frame)


def _leave_out(container: Any, wanted: Iterable[Any]) -> None:
    """Tells the demuxer to skip every other stream, so that a single modality reads only its own bytes."""
    keep = {stream.index for stream in wanted if stream is not None}
    for stream in container.streams:
        if stream.index not in keep:
            stream.discard = av.stream.Discard.all


def _is_late(clip: Clip) -> bool:
    """Whether the span starts so late in its file that seeking pays; each stream is then sought for itself."""
    return clip.start_s > _SEEK_FROM_S


def _pour(container: Any, reader: PacketReader | None, sound: Sound | None, path: Path) -> None:
    """Feeds packets from the container's place on until reader and sound have enough."""
    takers = [taker for taker in (reader, sound) if taker is not None and not taker.full]
    if not takers:
        return
    stage = "video" if takers[0] is reader else "audio"
    try:
        for packet in container.demux([taker.stream for taker in takers]):
            is_sound = sound is not None and packet.stream is sound.stream
            stage, taker = ("audio", sound) if is_sound else ("video", reader)
            assert taker is not None, "only their packets are asked for"
            if not taker.full:
                taker.feed(packet)
                if taker.full and all(other.full for other in takers):
                    return
    except MediaError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, explain_error(error, path), stage) from error


def _prick_ears(container: Any, stream: Any, clip: Clip, mixed: bool) -> Sound:
    """Listens from the file's start, or from some packets before the span where that is exact."""
    if not _is_late(clip) or container.format.name not in EXACT_SEEK:
        return Sound(stream, clip, mixed=mixed)
    start_pts = None
    for packet in container.demux(stream):
        frames = packet.decode()
        if frames:
            start_pts = frames[0].pts
            break
    if start_pts is None:
        raise ValueError("no timestamp at the start of its sound")
    first_s = max(clip.start_sample / clip.sample_rate - PREROLL_S, 0.0)
    container.seek(start_pts + int(first_s / stream.time_base), stream=stream)
    return Sound(stream, clip, start_pts, mixed=mixed)
