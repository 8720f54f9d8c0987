"""Reads the frames and the audio of a clip from its media files, in one pass through a file that contains both.

If a clip starts late in a long file, video and audio are read in separate passes, because each stream seeks to its own
position. If the packets do not identify a planned frame with certainty, the file is opened again and its frames are
counted from the start (see `fastav.media.frame_seek`).
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
from fastav.media.audio import EXACT_SEEK, PREROLL_S, AudioReader
from fastav.media.decoder import UncertainSeek
from fastav.media.frame_seek import PacketReader, count_frames, seek_packets
from fastav.media.open_file import explain_error, first_stream, media_errors, open_media

_SEEK_FROM_S = 2.0
"""Clips that start later than this in their file are reached by seeking. Before it, decoding up to the clip costs less
than a seek."""

_UNREPORTED = frozenset({"mjpeg"})
"""Decoders that return a damaged picture, mixed with earlier memory contents, without marking it as corrupt. They are
configured to raise an error instead."""


class FrameSink(Protocol):
    """Receives the decoded frames of a clip.

    Attributes:
        numbers: Frame numbers within the clip to receive, distinct and ascending.
    """

    numbers: list[int]

    def take(self, number: int, frame: av.VideoFrame) -> None:
        """Receives one of the frames, in ascending order.

        If an attempt was uncertain, all frames are delivered again from the first one.
        """
        ...


def read_media(
    clip: Clip,
    sink: FrameSink | None,
    with_audio: bool,
    *,
    mono: bool = True,
    threads: int = 1,
) -> AudioReader | None:
    """Decodes the requested frames and audio of a clip from its media files.

    Args:
        clip: A probed row with `video` or `audio` files.
        sink: Receives the frames; None for no video.
        with_audio: Whether to decode the audio.
        mono: Whether to mix the audio to one channel.
        threads: Number of threads of the video decoder.

    Returns:
        The audio of the clip, complete; None if it was not requested.

    Raises:
        MediaError: A file does not match its manifest row; names file and stage.
    """
    reader = _MediaReader(clip, mono, threads)
    if sink is not None and with_audio and clip.video == clip.audio and not _needs_seek(clip):
        return reader.read(sink, ("video", "audio"))
    if sink is not None:
        reader.read(sink, ("video",))
    return reader.read(None, ("audio",)) if with_audio else None


class _MediaReader:
    """Reads the files of one clip."""

    def __init__(self, clip: Clip, mono: bool, threads: int) -> None:
        self.clip, self.mono, self.threads = clip, mono, threads

    def read(self, sink: FrameSink | None, modalities: tuple[Modality, ...]) -> AudioReader | None:
        """Reads one file once. Returns the audio if it is one of the modalities."""
        clip = self.clip
        path = clip.video if sink is not None else clip.audio
        if path is None:
            raise MediaError("", f'clip "{clip.id}" has {modalities[0]} in its manifest row, but no file', "open")
        with open_media(path) as container:
            streams = {kind: self._stream(container, kind, path) for kind in modalities}
            _discard_others(container, streams.values())
            video = audio = None
            if "video" in streams:
                with media_errors(path, "video"):
                    late = _needs_seek(clip) and clip.start_frame > 0
                    video = (seek_packets if late else PacketReader)(container, streams["video"], clip)
            if "audio" in streams:
                with media_errors(path, "audio"):
                    audio = _seek_audio(container, streams["audio"], clip, self.mono)
            _feed_packets(container, video, audio, path)
            if sink is not None:
                self._deliver_frames(video, sink, path)
            return None if audio is None else self._finish_audio(audio, path)

    def _finish_audio(self, audio: AudioReader, path: Path) -> AudioReader:
        """Completes the samples. If the seek was uncertain, reads the file from the start."""
        with media_errors(path, "audio"):
            try:
                audio.finish()
                return audio
            except UncertainSeek:
                pass
            with open_media(path) as container:
                stream = self._stream(container, "audio", path)
                _discard_others(container, (stream,))
                audio = AudioReader(stream, self.clip, mono=self.mono)
                _feed_packets(container, None, audio, path)
                audio.finish()
                return audio

    def _stream(self, container: Any, kind: Modality, path: Path) -> Any:
        stream = first_stream(container, kind, path)
        if stream is None:
            raise MediaError(path, f"has no {kind} stream, expected one as in the manifest", kind)
        stream.codec_context.thread_count = threads = self.threads if kind == "video" else 1
        stream.codec_context.thread_type = "AUTO" if threads > 1 else "NONE"
        if stream.codec_context.name in _UNREPORTED:
            stream.codec_context.options = {"err_detect": "explode"}
        return stream

    def _deliver_frames(self, reader: PacketReader | None, sink: FrameSink, path: Path) -> None:
        """Passes the planned frames to the sink. If their packets are uncertain, counts frames from the start."""
        with media_errors(path, "video"):
            if reader is not None:
                try:
                    for number, frame in reader.pick(sink.numbers):
                        sink.take(number, frame)
                    return
                except (UncertainSeek, av.error.FFmpegError):
                    pass  # an FFmpegError may come from a packet that is wrongly marked as a keyframe
            first = self.clip.start_frame
            with open_media(path) as container:
                stream = self._stream(container, "video", path)
                _discard_others(container, (stream,))
                for number, frame in count_frames(container, stream, [first + n for n in sink.numbers]):
                    if frame.is_corrupt:
                        raise MediaError(path, f"frame {number} is damaged", "video")
                    sink.take(number - first, frame)


def _discard_others(container: Any, wanted: Iterable[Any]) -> None:
    """Makes the demuxer skip all other streams, so that reading one modality reads only its own bytes."""
    keep = {stream.index for stream in wanted if stream is not None}
    for stream in container.streams:
        if stream.index not in keep:
            stream.discard = av.stream.Discard.all


def _needs_seek(clip: Clip) -> bool:
    """Returns True if the clip starts so late in its file that a seek is cheaper than decoding up to it."""
    return clip.start_s > _SEEK_FROM_S


def _feed_packets(container: Any, video: PacketReader | None, audio: AudioReader | None, path: Path) -> None:
    """Feeds packets from the current position of the container until video and audio are complete."""
    readers = [reader for reader in (video, audio) if reader is not None and not reader.full]
    if not readers:
        return
    stage = "video" if readers[0] is video else "audio"
    try:
        for packet in container.demux([reader.stream for reader in readers]):
            is_audio = audio is not None and packet.stream is audio.stream
            stage, reader = ("audio", audio) if is_audio else ("video", video)
            assert reader is not None, "only packets of these streams are demuxed"
            if not reader.full:
                reader.feed(packet)
                if reader.full and all(other.full for other in readers):
                    return
    except MediaError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, explain_error(error, path), stage) from error


def _seek_audio(container: Any, stream: Any, clip: Clip, mono: bool) -> AudioReader:
    """Returns a reader at the start of the file, or shortly before the clip if the format can seek exactly."""
    if not _needs_seek(clip) or container.format.name not in EXACT_SEEK:
        return AudioReader(stream, clip, mono=mono)
    start_pts = None
    for packet in container.demux(stream):
        frames = packet.decode()
        if frames:
            start_pts = frames[0].pts
            break
    if start_pts is None:
        raise ValueError("the first packets of the audio stream have no timestamp")
    first_s = max(clip.start_sample / clip.sample_rate - PREROLL_S, 0.0)
    container.seek(start_pts + int(first_s / stream.time_base), stream=stream)
    return AudioReader(stream, clip, start_pts, mono=mono)
