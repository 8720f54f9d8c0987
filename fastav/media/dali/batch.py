"""Batches of the DALI decoder: the prepared clips that go in, and the tensors on the device that come out."""

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
    """The data of one clip for a batch, made by `DaliDecoder.prepare`.

    Attributes:
        clip: The clip.
        plans: Plans of its replicas.
        video: Video for DALI to decode; None if `pictures` has the frames, or there is no video.
        pictures: Frames of each plan, already decoded on the CPU, uint8 [T, 3, size, size]; None otherwise.
        audio: Audio for DALI to decode; None if `mel_WCML` has the spectrogram, or there is no audio.
        mel_WCML: Spectrogram, already computed on the CPU, float32, dB; None otherwise.
    """

    clip: Clip
    plans: tuple[ClipPlan, ...]
    video: VideoSample | None = None
    pictures: tuple[Tensor, ...] | None = None
    audio: AudioSample | None = None
    mel_WCML: Tensor | None = None


class DeviceBatch:
    """Tensors of a batch that is being filled, allocated on the current CUDA stream.

    Args:
        spec: What to decode.
        device: Device of the tensors.
        prepared: Prepared clips; None for a clip that could not be prepared.
        rows: Row of the batch of each plan of each clip.
        size: Number of rows of the batch.
        frames: Number of frames per clip.
        windows: Number of spectrogram windows per clip.
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

    def copy_finished(self) -> None:
        """Copies frames and spectrograms that were already finished on the CPU."""
        for clip, rows in zip(self.clips, self._rows, strict=True):
            pictures = clip.pictures if clip.pictures is not None else (None,) * len(rows)
            for row, picture_TCHW in zip(rows, pictures, strict=True):
                self._put(row, picture_TCHW, clip.mel_WCML)

    def _put(self, row: int, frames_TCHW: Tensor | None, mel_WCML: Tensor | None) -> None:
        """Copies the finished frames and spectrogram of a sample to its row, if they exist."""
        if self.frames_BTCHW is not None and frames_TCHW is not None:
            self.frames_BTCHW[row].copy_(frames_TCHW)
            self.has_video_B[row] = True
        if self.mel_BWCML is not None and mel_WCML is not None:
            self.mel_BWCML[row].copy_(mel_WCML)
            self.has_audio_B[row] = True

    def take_videos(self, results: GraphResults) -> None:
        """Copies frames that DALI decoded to their rows."""
        users = [number for number, clip in enumerate(self.clips) if clip.video is not None]
        self._record_failures(users, results, "video")
        for numbers, lanes in results.parts:
            for lane, frames_NTHWC in enumerate(lanes):
                picked = [n for n, number in enumerate(numbers) if lane < len(self._rows[users[number]])]
                rows = [self._rows[users[numbers[n]]][lane] for n in picked]
                part_NTHWC = frames_NTHWC if len(picked) == len(numbers) else frames_NTHWC[self._index(picked)]
                assert self.frames_BTCHW is not None, "only runs with video have video samples"
                self.frames_BTCHW[self._index(rows)] = part_NTHWC.permute(0, 1, 4, 2, 3)
                self.has_video_B[rows] = True

    def take_audio(self, results: GraphResults) -> None:
        """Cuts windows from the spectrograms that DALI computed, and copies them to their rows."""
        users = [number for number, clip in enumerate(self.clips) if clip.audio is not None]
        self._record_failures(users, results, "audio")
        for numbers, (mel_NML,) in results.parts:
            windows_NWML = self._windows(mel_NML, [self.clips[users[number]].audio for number in numbers])
            places = [(n, row) for n, number in enumerate(numbers) for row in self._rows[users[number]]]
            rows = [row for _, row in places]
            assert self.mel_BWCML is not None, "only runs with audio have audio samples"
            self.mel_BWCML[self._index(rows)] = windows_NWML[self._index([n for n, _ in places]), :, None]
            self.has_audio_B[rows] = True

    def retry(self, decode: Callable[[Clip, Sequence[ClipPlan]], Sequence[Sample]]) -> None:
        """Decodes the clips that DALI could not decode with another decoder.

        Args:
            decode: The other decoder. Clips that it cannot decode keep the error of DALI.
        """
        for clip, rows, number in zip(self.clips, self._rows, self._numbers, strict=True):
            error = self.errors[number]
            if error is None:
                continue
            try:
                samples = decode(clip.clip, clip.plans)
            except MediaError:
                continue
            log.warning("%s; decoded with PyAV instead", error)
            self.errors[number] = None
            for row, sample in zip(rows, samples, strict=True):
                self._put(row, sample.frames_TCHW, sample.mel_WCML)

    def finish(self) -> DecodedBatch:
        """Returns the finished batch. Rows of clips that failed are blank."""
        for number, rows in zip(self._numbers, self._rows, strict=True):
            if self.errors[number] is not None:
                self._blank(list(rows))
        if self.device.type == "cuda":
            # DALI's buffers are released after this call, and the user of the batch need not wait for this stream. Only
            # this thread waits; other pipelines continue.
            torch.cuda.current_stream().synchronize()
        return DecodedBatch(self.frames_BTCHW, self.mel_BWCML, self.has_video_B, self.has_audio_B, self.errors)

    def _blank(self, rows: list[int]) -> None:
        self.has_video_B[rows] = self.has_audio_B[rows] = False
        if self.frames_BTCHW is not None:
            self.frames_BTCHW[rows] = 0
        if self.mel_BWCML is not None:
            self.mel_BWCML[rows] = self.spec.frontend.floor_db

    def _record_failures(self, users: list[int], results: GraphResults, stage: str) -> None:
        for number, reason in results.failed.items():
            clip = self.clips[users[number]].clip
            self.errors[self._numbers[users[number]]] = MediaError(clip.source, f'clip "{clip.id}": {reason}', stage)

    def _windows(self, mel_NML: Tensor, samples: Sequence[AudioSample | None]) -> Tensor:
        """Returns windows [N, W, M, window] of spectrograms of parts of clips.

        Beyond the end of a clip, and in windows without audio, they have the floor value.
        """
        first_N1 = np.array([[sample.first, sample.total] for sample in samples if sample is not None])
        starts_NW = np.stack([sample.starts_W for sample in samples if sample is not None])
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
