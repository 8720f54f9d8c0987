"""What goes into a batch of the DALI decoder and what comes out: rows put together on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastav.core.errors import MediaError
from fastav.data.clip import Clip, ClipPlan
from fastav.media.dali.graph import AudioSample, GraphResults, VideoSample
from fastav.media.decoder import DecodedBatch, DecodeSpec, Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedClip:
    """What one clip brings to a batch; made by `DaliDecoder.prepare`.

    Attributes:
        clip: The clip.
        plans: Its replicas.
        film: Video for DALI to decode.
        pictures: Or finished frames of each plan, uint8 [T, 3, size, size].
        wave: Sound for DALI to decode.
        mel_WCML: Or a finished spectrogram, float32 dB.
    """

    clip: Clip
    plans: tuple[ClipPlan, ...]
    film: VideoSample | None = None
    pictures: tuple[Tensor, ...] | None = None
    wave: AudioSample | None = None
    mel_WCML: Tensor | None = None


class DeviceBatch:
    """Tensors of a batch while its clips come in, made on the current CUDA stream.

    Args:
        read: What the run reads.
        device: Where the tensors are.
        prepared: Clips; None for one that could not be prepared.
        rows: Which row each plan of each clip goes to.
        size: Rows of the batch.
        frames: Frames of a clip.
        windows: Windows of a clip.
    """

    def __init__(
        self,
        spec: DecodeSpec,
        device: torch.device,
        prepared: Sequence[PreparedClip | None],
        rows: Sequence[Sequence[int]],
        size: int,
        frames: int,
        windows: int,
    ) -> None:
        self.spec, self.device = spec, device
        self.errors: list[MediaError | None] = [None] * len(prepared)
        self.clips = [clip for clip in prepared if clip is not None]
        self._numbers = [number for number, clip in enumerate(prepared) if clip is not None]
        self._rows = [rows[number] for number in self._numbers]
        self.has_video_B, self.has_audio_B = np.zeros(size, bool), np.zeros(size, bool)
        frontend, side = spec.frontend, spec.image_size
        self.frames_BTCHW = self.mel_BWCML = None
        if "video" in spec.modalities:
            self.frames_BTCHW = torch.zeros(size, frames, 3, side, side, dtype=torch.uint8, device=device)
        if "audio" in spec.modalities:
            shape = (size, windows, 1, frontend.num_mels, spec.window)
            self.mel_BWCML = torch.full(shape, frontend.floor_db, device=device)

    def take_finished(self) -> None:
        """Copies what was finished on the CPU."""
        for clip, rows in zip(self.clips, self._rows, strict=True):
            pictures = clip.pictures if clip.pictures is not None else (None,) * len(rows)
            for row, picture_TCHW in zip(rows, pictures, strict=True):
                self._put(row, picture_TCHW, clip.mel_WCML)

    def _put(self, row: int, frames_TCHW: Tensor | None, mel_WCML: Tensor | None) -> None:
        """Copies what there is of a finished sample to its row."""
        if self.frames_BTCHW is not None and frames_TCHW is not None:
            self.frames_BTCHW[row].copy_(frames_TCHW)
            self.has_video_B[row] = True
        if self.mel_BWCML is not None and mel_WCML is not None:
            self.mel_BWCML[row].copy_(mel_WCML)
            self.has_audio_B[row] = True

    def take_films(self, results: GraphResults) -> None:
        """Copies decoded frames to their rows."""
        users = [number for number, clip in enumerate(self.clips) if clip.film is not None]
        self._blame(users, results, "video")
        for numbers, lanes in results.parts:
            for lane, frames_NTHWC in enumerate(lanes):
                picked = [n for n, number in enumerate(numbers) if lane < len(self._rows[users[number]])]
                rows = [self._rows[users[numbers[n]]][lane] for n in picked]
                part_NTHWC = frames_NTHWC if len(picked) == len(numbers) else frames_NTHWC[self._index(picked)]
                assert self.frames_BTCHW is not None, "there are films in runs with video only"
                self.frames_BTCHW[self._index(rows)] = part_NTHWC.permute(0, 1, 4, 2, 3)
                self.has_video_B[rows] = True

    def take_waves(self, results: GraphResults) -> None:
        """Cuts the windows out of spectrograms and copies them to their rows."""
        users = [number for number, clip in enumerate(self.clips) if clip.wave is not None]
        self._blame(users, results, "audio")
        for numbers, (mel_NML,) in results.parts:
            windows_NWML = self._windows(mel_NML, [self.clips[users[number]].wave for number in numbers])
            places = [(n, row) for n, number in enumerate(numbers) for row in self._rows[users[number]]]
            rows = [row for _, row in places]
            assert self.mel_BWCML is not None, "there are waves in runs with audio only"
            self.mel_BWCML[self._index(rows)] = windows_NWML[self._index([n for n, _ in places]), :, None]
            self.has_audio_B[rows] = True

    def try_again(self, decode: Callable[[Clip, Sequence[ClipPlan]], Sequence[Sample]]) -> None:
        """Has clips that DALI refused decoded by something else; those that it cannot read either stay broken."""
        for clip, rows, number in zip(self.clips, self._rows, self._numbers, strict=True):
            refused = self.errors[number]
            if refused is None:
                continue
            try:
                samples = decode(clip.clip, clip.plans)
            except MediaError:
                continue
            log.warning("%s; PyAV reads it", refused)
            self.errors[number] = None
            for row, sample in zip(rows, samples, strict=True):
                self._put(row, sample.frames_TCHW, sample.mel_WCML)

    def finish(self) -> DecodedBatch:
        """Returns the batch; rows of clips that failed are blank."""
        for number, rows in zip(self._numbers, self._rows, strict=True):
            if self.errors[number] is not None:
                self._blank(list(rows))
        if self.device.type == "cuda":
            # DALI's buffers end with this call, and whoever takes the batch need not wait for this stream. Only this
            # thread waits; other pipelines go on.
            torch.cuda.current_stream().synchronize()
        return DecodedBatch(self.frames_BTCHW, self.mel_BWCML, self.has_video_B, self.has_audio_B, self.errors)

    def _blank(self, rows: list[int]) -> None:
        self.has_video_B[rows] = self.has_audio_B[rows] = False
        if self.frames_BTCHW is not None:
            self.frames_BTCHW[rows] = 0
        if self.mel_BWCML is not None:
            self.mel_BWCML[rows] = self.spec.frontend.floor_db

    def _blame(self, users: list[int], results: GraphResults, stage: str) -> None:
        for number, reason in results.failed.items():
            clip = self.clips[users[number]].clip
            self.errors[self._numbers[users[number]]] = MediaError(clip.source, f'clip "{clip.id}": {reason}', stage)

    def _windows(self, mel_NML: Tensor, waves: Sequence[AudioSample | None]) -> Tensor:
        """Windows [N, W, M, window] of stretches of spectrograms; the floor past the clip's end and where none is."""
        first_N1 = np.array([[wave.first, wave.total] for wave in waves if wave is not None])
        starts_NW = np.stack([wave.starts_W for wave in waves if wave is not None])
        real_NW = np.where(starts_NW < 0, 0, np.maximum(first_N1[:, 1:] - starts_NW, 0))
        at_NW = starts_NW - first_N1[:, :1]
        length_L = torch.arange(self.spec.window, device=self.device)
        at_NWL = self._index(at_NW)[..., None] + length_L
        real_NWL = length_L < self._index(real_NW)[..., None]
        count, windows, length = at_NWL.shape
        bands = mel_NML.shape[1]
        at_NWML = at_NWL.clamp(0, mel_NML.shape[2] - 1)[:, :, None].expand(count, windows, bands, length)
        cut_NWML = mel_NML[:, None].expand(count, windows, bands, -1).gather(3, at_NWML)
        return cut_NWML.masked_fill(~real_NWL[:, :, None], self.spec.frontend.floor_db)

    def _index(self, numbers: Any) -> Tensor:
        return torch.from_numpy(np.asarray(numbers, np.int64)).to(self.device)
