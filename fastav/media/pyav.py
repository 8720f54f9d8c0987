"""The CPU decoder: decodes packed clips, media files, still pictures and stored spectrograms with PyAV (FFmpeg).

Colour: frames are converted to RGB with the matrix given by the stream (BT.601, BT.709, BT.2020, ...), or with BT.601
if the stream gives none, at any picture size, as FFmpeg and PyAV do. Limited and full range are both expanded to 0 to
255; more than 8 bits are rounded to 8. Transfer functions are not applied, so HDR video looks flat. Chroma is upsampled
bilinearly. Interlaced frames are not deinterlaced, and pixels that are not square are not resampled.

From packed clips, only the GOPs and the range of audio that the plan needs are read. They are decoded without a
container, by decoders that stay open (`fastav.media.packed_clip_decoder`). `fastav.media.demux` reads media files.
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
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from fastav.core.config import Kind, PositiveInt
from fastav.core.errors import MediaError
from fastav.core.regular_file import check_regular
from fastav.data.clip import Clip, ClipPlan
from fastav.media.crop import Cropper, cuttable
from fastav.media.decoder import DecodeSpec, Sample, needed_samples
from fastav.media.demux import read_media
from fastav.media.open_file import media_errors, open_mel
from fastav.media.packed_clip_decoder import OpenDecoders, decode_mel, decode_waveform
from fastav.media.shards import ReadStats, ShardReader
from fastav.media.still_picture import open_picture, rgb_of

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


class PyAV(Kind, frozen=True, tag="pyav"):
    """FFmpeg on the CPU, through PyAV.

    Attributes:
        threads_per_clip: Number of threads that decode the video of one clip. With 1, clips are decoded in parallel
            instead, which gives more clips per second (a fifth more in one public measurement).
    """

    threads_per_clip: PositiveInt = 1

    def build(self, spec: DecodeSpec) -> PyAVDecoder:
        """Returns the decoder for a run.

        Raises:
            UserError: The settings of the frontend contradict each other.
        """
        return PyAVDecoder(self, spec)


class PyAVDecoder:
    """Decodes clips on the CPU. Any number of threads may call it; each thread has its own open decoders.

    Args:
        config: Settings of the decoder.
        spec: What to decode.
        shards: Reader of packed clips, if it is shared with other decoders; None to create one.
    """

    name = "pyav"

    def __init__(self, config: PyAV, spec: DecodeSpec, shards: ShardReader | None = None) -> None:
        self.config, self.spec = config, spec
        self._log_mel = spec.frontend.build()
        self._shards = shards or ShardReader(spec.reading)
        self._decoders = OpenDecoders()

    @property
    def read_stats(self) -> ReadStats:
        """Amount of data read from shards so far. Media files, which FFmpeg reads, are not counted."""
        return self._shards.store.read_stats

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        """Decodes a clip once and returns one `Sample` per plan.

        Args:
            clip: A probed row of a manifest.
            plans: Plans of the replicas of one clip: the same frames and windows, different crops and flips.

        Returns:
            Frames uint8 [T, 3, size, size] and log-mel spectrograms float32 [W, C, M, window], dB.

        Raises:
            MediaError: The file does not match its manifest row; names file and stage.
        """
        if clip.shard:
            return self._packed(clip, plans)
        with_video = "video" in self.spec.modalities and clip.has_video
        crops = _Crops(clip, plans, self.spec.image_size) if with_video else None
        if crops is not None and clip.image is not None:
            crops.add(0, read_image(clip.image))
        sink = None if clip.image is not None else crops
        with_audio = "audio" in self.spec.modalities and clip.num_samples > 0 and clip.mel is None
        audio = None
        if sink is not None or with_audio:
            audio = read_media(clip, sink, with_audio, threads=self.config.threads_per_clip)
        wave_CS = stored = None
        if audio is not None:
            with media_errors(clip.source, "audio"):
                wave_CS = audio.waveform(self.spec.frontend.sample_rate)
        elif "audio" in self.spec.modalities and clip.mel is not None:
            stored = self._check_bands(open_mel(clip.mel), clip)
        return self._samples(plans, crops, wave_CS, stored)

    def _packed(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        """Reads and decodes the parts of a packed clip that the plans need."""
        with_video = "video" in self.spec.modalities and clip.has_video
        with_audio = "audio" in self.spec.modalities and clip.has_audio
        crops = _Crops(clip, plans, self.spec.image_size) if with_video else None
        samples = needed_samples(clip, plans, self.spec) if with_audio else None
        packed = self._shards.fetch(clip, None if crops is None else crops.numbers, samples)
        with media_errors(clip.source, "video"):
            if crops is not None and packed.picture is not None:
                crops.add(0, decode_jpeg(packed.picture))
            elif crops is not None and packed.frames is not None:
                self._decoders.decode(packed.frames, crops, clip)
        wave_CS = stored = None
        with media_errors(clip.source, "audio"):
            if packed.audio is not None:
                wave_CS = decode_waveform(packed.audio, clip, self.spec.frontend.sample_rate)
            elif packed.mel is not None:
                stored = self._check_bands(decode_mel(packed.mel, clip), clip)
        return self._samples(plans, crops, wave_CS, stored)

    def _samples(
        self, plans: Sequence[ClipPlan], crops: _Crops | None, wave_CS: Tensor | None, stored: NDArray[Any] | None
    ) -> list[Sample]:
        """Returns frames and spectrogram windows of each plan. Replicas with the same windows share a tensor."""
        windows: dict[bytes, Tensor] = {}
        for plan in plans:
            key = plan.windows_W.tobytes()
            if key not in windows and wave_CS is not None:
                windows[key] = self._log_mel.windows(wave_CS, plan.windows_W, self.spec.window)
            elif key not in windows and stored is not None:
                windows[key] = self._cut(stored, plan.windows_W)
        frames = [None] * len(plans) if crops is None else crops.finished()
        mels = [windows.get(plan.windows_W.tobytes()) for plan in plans]
        return [Sample(frames_TCHW=f, mel_WCML=m) for f, m in zip(frames, mels, strict=True)]

    def _check_bands(self, mel_CML: NDArray[np.float32], clip: Clip) -> NDArray[np.float32]:
        """Returns a stored spectrogram if it has as many mel bands as the frontend."""
        if mel_CML.shape[1] != self.spec.frontend.num_mels:
            expected = f"expected {self.spec.frontend.num_mels} (frontend.num_mels)"
            raise MediaError(clip.source, f"the spectrogram has {mel_CML.shape[1]} mel bands, {expected}", "mel")
        return mel_CML

    def _cut(self, mel_CML: NDArray[np.float32], starts_W: NDArray[np.int32]) -> Tensor:
        """Cuts windows from a stored spectrogram and pads them with the floor value."""
        channels, bands, _ = mel_CML.shape
        shape = (len(starts_W), channels, bands, self.spec.window)
        mel_WCML = np.full(shape, self.spec.frontend.floor_db, dtype=np.float32)
        for window_CML, start in zip(mel_WCML, starts_W.tolist(), strict=True):
            if start >= 0:
                real_CML = mel_CML[..., start : start + self.spec.window]
                window_CML[..., : real_CML.shape[-1]] = real_CML
        return torch.from_numpy(mel_WCML)


class _Crops:
    """Crops the decoded frames of a clip for each of its plans; whole frames are not kept.

    Args:
        clip: The clip.
        plans: Plans of its replicas.
        size: Height and width of the crops, pixels.
    """

    def __init__(self, clip: Clip, plans: Sequence[ClipPlan], size: int) -> None:
        self.clip, self.plans, self.size = clip, plans, size
        self.numbers: list[int] = np.unique(np.concatenate([plan.frames_T for plan in plans])).tolist()
        if self.numbers[0] < 0 or self.numbers[-1] >= clip.num_frames:
            raise ValueError(f'clip "{clip.id}" has {clip.num_frames} frames, the plan needs {self.numbers}')
        self._missing = set(self.numbers)
        self._out = [torch.empty(len(p.frames_T), 3, size, size, dtype=torch.uint8) for p in plans]
        turns = 0 if clip.image is not None else clip.rotation  # still pictures are already upright
        mirrored = bool(clip.mirrored) and clip.image is None
        self._croppers = [Cropper(size, plan.crop, plan.flip, turns, mirrored=mirrored) for plan in plans]
        self._arrays = [out_TCHW.numpy() for out_TCHW in self._out]
        self._positions = [_positions(plan.frames_T.tolist()) for plan in plans]
        self._sides = (clip.height, clip.width) if clip.rotation % 180 else (clip.width, clip.height)
        self._converter = VideoReformatter()

    def take(self, number: int, frame: av.VideoFrame) -> None:
        """Crops a decoded frame for all plans that contain it.

        Raises:
            MediaError: The frame does not have the size given in the manifest.
        """
        if (frame.width, frame.height) != self._sides:
            width, height = self._sides
            size = f"frame {number} is {frame.width}x{frame.height}, expected {width}x{height} as in the manifest"
            raise MediaError(self.clip.source, size, "video")
        self._cut(number, cuttable(frame, self._converter))

    def add(self, number: int, rgb_HWC: NDArray[Any]) -> None:
        """Crops an upright picture for all plans."""
        self._cut(number, av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HWC), "rgb24"))

    def _cut(self, number: int, frame: av.VideoFrame) -> None:
        """Crops a picture for every plan that contains it."""
        self._missing.discard(number)
        for array_TCHW, cropper, positions_of in zip(self._arrays, self._croppers, self._positions, strict=True):
            positions = positions_of.get(number, [])
            if positions:
                cropper.cut(array_TCHW[positions[0]], frame)
            for position in positions[1:]:
                array_TCHW[position] = array_TCHW[positions[0]]

    def finished(self) -> list[Tensor]:
        """Returns the crops of each plan, uint8 [T, 3, size, size].

        Raises:
            MediaError: The file ended before the last planned frame.
        """
        if self._missing:
            reason = f"its video ends before frame {min(self._missing)} of {self.clip.num_frames}"
            raise MediaError(self.clip.source, reason, "video")
        return self._out


def _positions(numbers: list[int]) -> dict[int, list[int]]:
    """Returns the positions of each frame number in a plan."""
    positions: dict[int, list[int]] = {}
    for position, number in enumerate(numbers):
        positions.setdefault(number, []).append(position)
    return positions


def read_image(path: Path) -> NDArray[np.uint8]:
    """Reads a still picture, turned upright by its EXIF orientation: uint8 RGB [H, W, 3]. Transparency is dropped.

    Raises:
        MediaError: The file cannot be read.
    """
    with media_errors(path, "image"):
        check_regular(path)
        data = path.read_bytes()
    if data.startswith(_MAGIC):
        try:
            return decode_jpeg(data)
        except RuntimeError as error:
            raise MediaError(path, "is damaged or not a picture", "image") from error
    with open_picture(path) as image:
        return rgb_of(image)


def decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    """Decodes a JPEG or PNG picture, turned upright by its EXIF orientation.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        RuntimeError: The data is damaged.
    """
    image = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rgb_CHW = decode_image(image, ImageReadMode.RGB, apply_exif_orientation=True)
    if rgb_CHW.dtype == torch.uint16:
        rgb_CHW = (rgb_CHW.to(torch.int32) >> 8).to(torch.uint8)
    return rgb_CHW.permute(1, 2, 0).numpy()
