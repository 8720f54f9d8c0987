"""The decoder for the CPU: PyAV, which brings FFmpeg with it. Reads packed clips, media files, pictures and mels.

Colour: frames become RGB by the matrix that the stream names (BT.601, BT.709, BT.2020, ...) and BT.601
where it names none, whatever the picture's size, which is FFmpeg's and PyAV's own rule; limited and full
range both fill 0 to 255; more than 8 bits are rounded to 8. Transfer functions are left alone (HDR stays
flat). Chroma is upsampled bilinearly. Interlaced frames are taken as they are, and so are pixels that are
not square.

Of a packed clip, only the groups of pictures and the stretch of sound that the plan needs are read, and
decoded without a container by decoders that are kept (`fastav.media.packed_clip_decoder`).

A container is opened once per clip and read once for both modalities, except for pieces of long files,
where each stream is sought for itself. Where a planned frame cannot be told from the packets for certain,
the file is opened again and its frames are counted from the start (`fastav.media.frame_seek` has the reasons).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from fastav.core.config import Kind, PositiveInt
from fastav.core.errors import MediaError
from fastav.data.clip import Clip, ClipPlan
from fastav.media.crop import Cropper, cuttable
from fastav.media.decoder import DecodeSpec, Sample, needed_samples
from fastav.media.demux import read_media
from fastav.media.open_file import explain_error, media_errors, open_mel
from fastav.media.packed_clip_decoder import KeptDecoders, decode_mel, wave_of
from fastav.media.shards import ReadStats, ShardReader

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


class PyAV(Kind, frozen=True, tag="pyav"):
    """FFmpeg on the CPU, through PyAV.

    Attributes:
        threads_per_clip: Threads of one video decoder. With one, whole clips run in parallel instead, which
            gives more clips per second (a fifth more in one public measurement).
    """

    threads_per_clip: PositiveInt = 1

    def build(self, spec: DecodeSpec) -> PyAVDecoder:
        """Returns the decoder for a run.

        Raises:
            UserError: The frontend's settings contradict one another.
        """
        return PyAVDecoder(self, spec)


class PyAVDecoder:
    """Decodes clips; keeps no more than open decoders, one set a thread, so any number of threads may call it.

    Args:
        config: Its settings.
        read: What the run reads.
        shards: The reader of packed clips, to share one; None for its own.
    """

    name = "pyav"

    def __init__(self, config: PyAV, spec: DecodeSpec, shards: ShardReader | None = None) -> None:
        self.config, self.spec = config, spec
        self._log_mel = spec.frontend.build()
        self._shards = shards or ShardReader(spec.reading)
        self._decoders = KeptDecoders()

    @property
    def read_stats(self) -> ReadStats:
        """What was read of shards so far; not of media files, which FFmpeg reads."""
        return self._shards.store.read_stats

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        """See `Decoder.decode`: frames uint8 [T, 3, size, size], mel float32 [W, C, M, window] in dB."""
        if clip.shard:
            return self._packed(clip, plans)
        seen = "video" in self.spec.modalities and clip.has_video
        crops = _Crops(clip, plans, self.spec.image_size) if seen else None
        if crops is not None and clip.image is not None:
            crops.add(0, read_image(clip.image))
        looks = crops is not None and clip.image is None
        heard = "audio" in self.spec.modalities and clip.num_samples > 0 and clip.mel is None
        sound = None
        if looks or heard:
            sound = read_media(clip, crops if looks else None, heard, threads=self.config.threads_per_clip)
        wave_CS = stored = None
        if sound is not None:
            with media_errors(clip.source, "audio"):
                wave_CS = sound.wave(self.spec.frontend.sample_rate)
        elif "audio" in self.spec.modalities and clip.mel is not None:
            stored = self._banded(open_mel(clip.mel), clip)
        return self._samples(plans, crops, wave_CS, stored)

    def _packed(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        """Reads and decodes what the plans name of a packed clip."""
        seen, heard = ("video" in self.spec.modalities and clip.has_video), "audio" in self.spec.modalities
        crops = _Crops(clip, plans, self.spec.image_size) if seen else None
        samples = needed_samples(clip, plans, self.spec) if heard and clip.has_audio else None
        packed = self._shards.fetch(clip, None if crops is None else crops.numbers, samples)
        with media_errors(clip.source, "video"):
            if crops is not None and packed.picture is not None:
                crops.add(0, decode_jpeg(packed.picture))
            elif crops is not None and packed.frames is not None:
                self._decoders.watch(packed.frames, crops, clip)
        wave_CS = stored = None
        with media_errors(clip.source, "audio"):
            if packed.sound is not None:
                wave_CS = wave_of(packed.sound, clip, self.spec.frontend.sample_rate)
            elif packed.mel is not None:
                stored = self._banded(decode_mel(packed.mel, clip), clip)
        return self._samples(plans, crops, wave_CS, stored)

    def _samples(
        self, plans: Sequence[ClipPlan], crops: _Crops | None, wave_CS: Tensor | None, stored: NDArray[Any] | None
    ) -> list[Sample]:
        """Frames and windows of each plan; replicas with the same windows share a tensor."""
        made: dict[bytes, Tensor] = {}
        for plan in plans:
            key = plan.windows_W.tobytes()
            if key not in made and wave_CS is not None:
                made[key] = self._log_mel.windows(wave_CS, plan.windows_W, self.spec.window)
            elif key not in made and stored is not None:
                made[key] = self._cut(stored, plan.windows_W)
        frames = [None] * len(plans) if crops is None else crops.finished()
        mels = [made.get(plan.windows_W.tobytes()) for plan in plans]
        return [Sample(frames_TCHW=f, mel_WCML=m) for f, m in zip(frames, mels, strict=True)]

    def _banded(self, mel_CML: NDArray[np.float32], clip: Clip) -> NDArray[np.float32]:
        """A stored spectrogram that has the frontend's bands."""
        if mel_CML.shape[1] != self.spec.frontend.num_mels:
            bands = f"has {mel_CML.shape[1]} bands, frontend.num_mels is {self.spec.frontend.num_mels}"
            raise MediaError(clip.source, bands, "mel")
        return mel_CML

    def _cut(self, mel_CML: NDArray[np.float32], starts_W: NDArray[np.int32]) -> Tensor:
        """Windows of a stored spectrogram, filled up with the floor value."""
        channels, bands, _ = mel_CML.shape
        shape = (len(starts_W), channels, bands, self.spec.window)
        mel_WCML = np.full(shape, self.spec.frontend.floor_db, dtype=np.float32)
        for window_CML, start in zip(mel_WCML, starts_W.tolist(), strict=True):
            if start >= 0:
                real_CML = mel_CML[..., start : start + self.spec.window]
                window_CML[..., : real_CML.shape[-1]] = real_CML
        return torch.from_numpy(mel_WCML)


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
        turns = 0 if clip.image is not None else clip.rotation  # a still is upright already
        self._croppers = [Cropper(size, plan.crop, plan.flip, turns) for plan in plans]
        self._rooms = [out_TCHW.numpy() for out_TCHW in self._out]
        self._places = [_places(plan.frames_T.tolist()) for plan in plans]
        self._sides = (clip.height, clip.width) if clip.rotation % 180 else (clip.width, clip.height)
        self._converter = VideoReformatter()

    def take(self, number: int, frame: av.VideoFrame) -> None:
        """Takes a decoded frame of the row's size."""
        if (frame.width, frame.height) != self._sides:
            width, height = self._sides
            size = f"frame {number} is {frame.width}x{frame.height}, its row says {width}x{height}"
            raise MediaError(self.clip.source, size, "video")
        self._cut(number, cuttable(frame, self._converter))

    def add(self, number: int, rgb_HWC: NDArray[Any]) -> None:
        """Takes an upright picture."""
        self._cut(number, av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HWC), "rgb24"))

    def _cut(self, number: int, frame: av.VideoFrame) -> None:
        """Crops a picture for every plan that names it."""
        self._missing.discard(number)
        for room_TCHW, cropper, known in zip(self._rooms, self._croppers, self._places, strict=True):
            places = known.get(number, [])
            if places:
                cropper.cut(room_TCHW[places[0]], frame)
            for place in places[1:]:
                room_TCHW[place] = room_TCHW[places[0]]

    def finished(self) -> list[Tensor]:
        """Returns uint8 [T, 3, size, size] per plan.

        Raises:
            MediaError: The file ended before the last planned frame.
        """
        if self._missing:
            reason = f"its frames end before number {min(self._missing)} of {self.clip.num_frames}"
            raise MediaError(self.clip.source, reason, "video")
        return self._out


def _places(numbers: list[int]) -> dict[int, list[int]]:
    """Where each frame number stands in a plan."""
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number, []).append(place)
    return places


def read_image(path: Path) -> NDArray[np.uint8]:
    """Returns a picture upright (EXIF), uint8 RGB [H, W, 3]; transparency is dropped.

    Raises:
        MediaError: It cannot be read.
    """
    try:
        data = path.read_bytes()
        if data.startswith(_MAGIC):
            return decode_jpeg(data)
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, RuntimeError, SyntaxError) as error:
        reason = explain_error(error, path) if isinstance(error, OSError) else "damaged or not a picture"
        raise MediaError(path, reason, "image") from error


def decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    """Returns a JPEG or PNG upright (EXIF), uint8 RGB [H, W, 3]; `RuntimeError` where it is damaged."""
    image = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rgb_CHW = decode_image(image, ImageReadMode.RGB, apply_exif_orientation=True)
    if rgb_CHW.dtype == torch.uint16:
        rgb_CHW = (rgb_CHW.to(torch.int32) >> 8).to(torch.uint8)
    return rgb_CHW.permute(1, 2, 0).numpy()
