"""The decoder for the CPU: PyAV, which brings FFmpeg with it. Reads raw media files, pictures and stored spectrograms.

Colour: frames become RGB by the matrix that the stream names (BT.601, BT.709, BT.2020, ...) and BT.601
where it names none, whatever the picture's size, which is FFmpeg's and PyAV's own rule; limited and full
range both fill 0 to 255; more than 8 bits are rounded to 8. Transfer functions are left alone (HDR stays
flat). Chroma is upsampled bilinearly. Interlaced frames are taken as they are, and so are pixels that are
not square.

A container is opened once per clip and read once for both modalities, except for pieces of long files,
where each stream is sought for itself. Where a planned frame cannot be told from the packets for certain,
the file is opened again and its frames are counted from the start (`fastav.decode.frames` has the reasons).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import av.error
import av.stream
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from fastav.augment import resize_crop
from fastav.clip import Clip, ClipPlan, Sample
from fastav.config import Kind, PositiveInt
from fastav.decode.base import Modality, Read, Unproven
from fastav.decode.frames import Reel, count_frames, seek_reel
from fastav.decode.probe import explain, first_stream, open_media, open_mel
from fastav.decode.sound import EXACT_SEEK, PREROLL_S, Sound
from fastav.errors import MediaError

_SEEK_FROM_S = 2.0
"""Spans that start later than this are sought: about where decoding up to them costs more than the seek."""

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


class PyAV(Kind, frozen=True, tag="pyav"):
    """FFmpeg on the CPU, through PyAV.

    Attributes:
        threads_per_clip: Threads of one video decoder. With one, whole clips run in parallel instead, which
            gives more clips per second (a fifth more in one public measurement).
    """

    threads_per_clip: PositiveInt = 1

    def build(self, read: Read) -> PyAVDecoder:
        """Returns the decoder for a run.

        Raises:
            UserError: The frontend's settings contradict one another.
        """
        return PyAVDecoder(self, read)


class PyAVDecoder:
    """Decodes clips; holds no state between calls, so any number of threads may call it at once.

    Args:
        config: Its settings.
        read: What the run reads.
    """

    name = "pyav"

    def __init__(self, config: PyAV, read: Read) -> None:
        self.config, self.read = config, read
        self._log_mel = read.frontend.build()

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        """See `Decoder.decode`: frames uint8 [T, 3, size, size], mel float32 [W, C, M, window] in dB."""
        seen, heard = self._asked(clip)
        crops = _Crops(clip, plans, self.read.image_size) if seen else None
        wave_CS = None
        if crops is not None and clip.image is not None:
            crops.add(0, read_image(clip.image))
        elif crops is not None and heard and clip.video == clip.audio and not _is_late(clip):
            wave_CS = self._media(clip, crops, ("video", "audio"))
        elif crops is not None:
            self._media(clip, crops, ("video",))
        if heard and wave_CS is None:
            wave_CS = self._media(clip, None, ("audio",))
        mels = self._mels(clip, plans, wave_CS)
        frames = [None] * len(plans) if crops is None else crops.finished()
        return [Sample(frames_TCHW=f, mel_WCML=m) for f, m in zip(frames, mels, strict=True)]

    def _mels(self, clip: Clip, plans: Sequence[ClipPlan], wave_CS: Tensor | None) -> list[Tensor | None]:
        """The windows of each plan; replicas with the same ones share a tensor."""
        stored = None
        if "audio" in self.read.modalities and clip.mel is not None:
            stored = self._stored(clip.mel)
        if wave_CS is None and stored is None:
            return [None] * len(plans)
        made: dict[bytes, Tensor] = {}
        for plan in plans:
            key = plan.windows_W.tobytes()
            if key not in made and wave_CS is not None:
                made[key] = self._log_mel.windows(wave_CS, plan.windows_W, self.read.window)
            elif key not in made and stored is not None:
                made[key] = self._cut(stored, plan.windows_W)
        return [made[plan.windows_W.tobytes()] for plan in plans]

    def _stored(self, path: Path) -> NDArray[np.float32]:
        mel_CML = open_mel(path)
        if mel_CML.shape[1] != self.read.frontend.num_mels:
            bands = f"has {mel_CML.shape[1]} bands, frontend.num_mels is {self.read.frontend.num_mels}"
            raise MediaError(path, bands, "mel")
        return mel_CML

    def _cut(self, mel_CML: NDArray[np.float32], starts_W: NDArray[np.int32]) -> Tensor:
        """Windows of a stored spectrogram, filled up with the floor value."""
        channels, bands, _ = mel_CML.shape
        shape = (len(starts_W), channels, bands, self.read.window)
        mel_WCML = np.full(shape, self.read.frontend.floor_db, dtype=np.float32)
        for window_CML, start in zip(mel_WCML, starts_W.tolist(), strict=True):
            if start >= 0:
                real_CML = mel_CML[..., start : start + self.read.window]
                window_CML[..., : real_CML.shape[-1]] = real_CML
        return torch.from_numpy(mel_WCML)

    def _asked(self, clip: Clip) -> tuple[bool, bool]:
        """Whether frames are to be decoded, and whether a waveform is."""
        seen = "video" in self.read.modalities and clip.has_video
        return seen, "audio" in self.read.modalities and clip.num_samples > 0 and clip.mel is None

    def _media(self, clip: Clip, crops: _Crops | None, modalities: tuple[Modality, ...]) -> Tensor | None:
        """Decodes the planned frames into `crops` and returns the sound, from one container."""
        path = clip.video if crops is not None else clip.audio
        if path is None:
            raise MediaError("", f'the row of clip "{clip.id}" promises {modalities[0]} and names no file', "open")
        with open_media(path) as container:
            streams = {kind: self._stream(container, kind, path) for kind in modalities}
            _leave_out(container, streams.values())
            reel = sound = None
            if "video" in streams:
                with _blame(path, "video"):
                    late = _is_late(clip) and clip.start_frame > 0
                    reel = (seek_reel if late else Reel)(container, streams["video"], clip)
            if "audio" in streams:
                with _blame(path, "audio"):
                    sound = _prick_ears(container, streams["audio"], clip)
            _pour(container, reel, sound, path)
            if crops is not None:
                self._look(reel, crops, path)
            return None if sound is None else self._listen(sound, clip, path)

    def _listen(self, sound: Sound, clip: Clip, path: Path) -> Tensor:
        """The clip's samples, from where it was sought or, in doubt, by reading from the start."""
        rate = self.read.frontend.sample_rate
        with _blame(path, "audio"):
            try:
                return sound.wave(rate)
            except Unproven:
                pass
            with open_media(path) as container:
                stream = self._stream(container, "audio", path)
                _leave_out(container, (stream,))
                sound = Sound(stream, clip)
                _pour(container, None, sound, path)
                return sound.wave(rate)

    def _stream(self, container: Any, kind: Modality, path: Path) -> Any:
        stream = first_stream(container, kind, path)
        if stream is None:
            raise MediaError(path, f"has no {kind} stream, its row promises one", kind)
        stream.codec_context.thread_count = threads = self.config.threads_per_clip if kind == "video" else 1
        stream.codec_context.thread_type = "AUTO" if threads > 1 else "NONE"
        return stream

    def _look(self, reel: Reel | None, crops: _Crops, path: Path) -> None:
        """Decodes and crops the planned frames, by their packets or, in doubt, by counting."""
        with _blame(path, "video"):
            if reel is not None:
                try:
                    for number, frame in reel.pick(crops.numbers):
                        crops.see(number, frame)
                    return
                except (Unproven, av.error.FFmpegError):
                    pass  # a packet wrongly marked as a keyframe cannot be decoded either
            first = crops.clip.start_frame
            with open_media(path) as container:
                stream = self._stream(container, "video", path)
                _leave_out(container, (stream,))
                for number, frame in count_frames(container, stream, [first + n for n in crops.numbers]):
                    if frame.is_corrupt:
                        raise MediaError(path, f"frame {number} is damaged", "video")
                    crops.see(number - first, frame)


class _Crops:
    """The frames of a clip under each of its plans, filled as they are decoded; whole frames are not kept.

    Args:
        clip: The clip.
        plans: Its replicas.
        size: Height and width wanted.
    """

    def __init__(self, clip: Clip, plans: Sequence[ClipPlan], size: int) -> None:
        self.clip, self.plans, self.size = clip, plans, size
        self.numbers: list[int] = np.unique(np.concatenate([plan.frames_T for plan in plans])).tolist()
        if self.numbers[0] < 0 or self.numbers[-1] >= clip.num_frames:
            raise ValueError(f"frames {self.numbers} planned of {clip.num_frames} of clip {clip.id}")
        self._missing = set(self.numbers)
        self._out = [torch.empty(len(p.frames_T), 3, size, size, dtype=torch.uint8) for p in plans]
        self._reformatter = VideoReformatter()

    def see(self, number: int, frame: av.VideoFrame) -> None:
        """Converts a decoded frame to upright RGB and crops it."""
        clip = self.clip
        width, height = (clip.height, clip.width) if clip.rotation % 180 else (clip.width, clip.height)
        if (frame.width, frame.height) != (width, height):
            size = f"frame {number} is {frame.width}x{frame.height}, its row says {width}x{height}"
            raise MediaError(clip.video or "", size, "video")
        # One thread: starting more costs three times a small frame's conversion.
        rgb_HWC = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        self.add(number, np.rot90(rgb_HWC, -clip.rotation // 90) if clip.rotation else rgb_HWC)

    def add(self, number: int, rgb_HWC: NDArray[Any]) -> None:
        """Crops an upright picture for every plan that names it."""
        self._missing.discard(number)
        rgb_THWC = torch.from_numpy(np.ascontiguousarray(rgb_HWC))[None]
        for out_TCHW, plan in zip(self._out, self.plans, strict=True):
            places = np.flatnonzero(plan.frames_T == number).tolist()
            if places:
                out_TCHW[places[0]] = resize_crop(rgb_THWC, plan.crop, plan.flip, self.size)[0]
            for place in places[1:]:
                out_TCHW[place] = out_TCHW[places[0]]

    def finished(self) -> list[Tensor]:
        """Returns uint8 [T, 3, size, size] per plan.

        Raises:
            MediaError: The file ended before the last planned frame.
        """
        if self._missing:
            reason = f"its frames end before number {min(self._missing)} of {self.clip.num_frames}"
            raise MediaError(self.clip.video or self.clip.image or "", reason, "video")
        return self._out


def read_image(path: Path) -> NDArray[np.uint8]:
    """Returns a picture upright (EXIF), uint8 RGB [H, W, 3]; transparency is dropped.

    Raises:
        MediaError: It cannot be read.
    """
    try:
        data = path.read_bytes()
        if data.startswith(_MAGIC):
            image = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            rgb_CHW = decode_image(image, ImageReadMode.RGB, apply_exif_orientation=True)
            if rgb_CHW.dtype == torch.uint16:
                rgb_CHW = (rgb_CHW.to(torch.int32) >> 8).to(torch.uint8)
            return rgb_CHW.permute(1, 2, 0).numpy()
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, RuntimeError, SyntaxError) as error:
        reason = explain(error, path) if isinstance(error, OSError) else "damaged or not a picture"
        raise MediaError(path, reason, "image") from error


@contextmanager
def _blame(path: Path, stage: str) -> Iterator[None]:
    """Turns what FFmpeg and the system raise into an error that names file and stage."""
    try:
        yield
    except MediaError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, explain(error, path), stage) from error


def _leave_out(container: Any, wanted: Iterable[Any]) -> None:
    """Tells the demuxer to skip every other stream, so that a single modality reads only its own bytes."""
    keep = {stream.index for stream in wanted if stream is not None}
    for stream in container.streams:
        if stream.index not in keep:
            stream.discard = av.stream.Discard.all


def _is_late(clip: Clip) -> bool:
    """Whether the span starts so late in its file that seeking pays; each stream is then sought for itself."""
    return clip.start_s > _SEEK_FROM_S


def _pour(container: Any, reel: Reel | None, sound: Sound | None, path: Path) -> None:
    """Feeds packets from the container's place on until reel and sound have enough."""
    takers = [taker for taker in (reel, sound) if taker is not None and not taker.full]
    if not takers:
        return
    stage = "video" if takers[0] is reel else "audio"
    try:
        for packet in container.demux([taker.stream for taker in takers]):
            is_sound = sound is not None and packet.stream is sound.stream
            stage, taker = ("audio", sound) if is_sound else ("video", reel)
            assert taker is not None, "only their packets are asked for"
            if not taker.full:
                taker.feed(packet)
                if taker.full and all(other.full for other in takers):
                    return
    except MediaError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, explain(error, path), stage) from error


def _prick_ears(container: Any, stream: Any, clip: Clip) -> Sound:
    """Listens from the file's start, or from some packets before the span where that is exact."""
    if not _is_late(clip) or container.format.name not in EXACT_SEEK:
        return Sound(stream, clip)
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
    return Sound(stream, clip, start_pts)
