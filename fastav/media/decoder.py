"""The interfaces of decoders: what to decode (`DecodeSpec`), and the decoded clips and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastav.core.errors import MediaError
from fastav.data.clip import Clip, ClipPlan, Modality
from fastav.media.shards import ShardReading
from fastav.media.spectrogram import Frontend


@dataclass(frozen=True)
class DecodeSpec:
    """What a run decodes from every clip.

    Attributes:
        modalities: Modalities to decode; other streams are not read.
        image_size: Height and width of the decoded frames, pixels.
        frontend: Settings of the spectrogram.
        window: Length of a spectrogram window, mel frames.
        reading: Settings for reading shards of packed clips.
    """

    modalities: tuple[Modality, ...] = ("video", "audio")
    image_size: int = 224
    frontend: Frontend = field(default_factory=Frontend)
    window: int = 400
    reading: ShardReading = field(default_factory=ShardReading)


def needed_samples(clip: Clip, plans: Sequence[ClipPlan], spec: DecodeSpec) -> tuple[int, int]:
    """Returns the range of samples (first, last + 1) of a packed clip that the plans need, at its stored sample rate.

    If the audio must be resampled, the range is the whole clip, because every output sample depends on the samples
    around it.
    """
    if clip.sample_rate != spec.frontend.sample_rate:
        return 0, clip.num_samples
    starts_W = np.concatenate([plan.windows_W for plan in plans])
    return spec.frontend.needed_samples(starts_W, spec.window, clip.num_samples)


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded clip under one plan, on the CPU.

    Attributes:
        frames_TCHW: uint8, cropped, resized, flipped; None if the clip has no video or video is not decoded.
        mel_WCML: float32 log-mel, dB, neither masked nor normalised; None if the clip has no audio or audio is not
            decoded.
    """

    frames_TCHW: Tensor | None
    mel_WCML: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """A complete batch on the device. The thread that uses it must call `adopt` first.

    Attributes:
        frames_BTCHW: uint8, black for clips without video; None in a run without video.
        mel_BWCML: float32 log-mel, dB, the floor value for clips without audio; None in a run without audio.
        has_video_B: bool, on the CPU.
        has_audio_B: bool, on the CPU.
        errors: Error of each clip that could not be decoded, in the order of `prepared`; its rows are blank.
    """

    frames_BTCHW: Tensor | None
    mel_BWCML: Tensor | None
    has_video_B: NDArray[np.bool_]
    has_audio_B: NDArray[np.bool_]
    errors: list[MediaError | None]

    def adopt(self) -> None:
        """Prevents reuse of the memory before the current CUDA stream of the calling thread has finished with it.

        The tensors were allocated on another stream. Without this call, PyTorch could give their memory to that stream
        as soon as the last reference is gone.
        """
        for tensor in (self.frames_BTCHW, self.mel_BWCML):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


class UncertainSeek(Exception):
    """A seek may not have reached the planned frames or samples; the file must be read from its start."""


class Decoder(Protocol):
    """Decodes planned frames and spectrogram windows. Called from many threads at once."""

    name: str

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        """Decodes a clip once and returns one `Sample` per plan.

        Args:
            clip: A probed row of a manifest.
            plans: Plans of the replicas of one clip: the same frames and windows, different crops and flips.

        Raises:
            MediaError: The file does not match its manifest row; names file and stage.
        """
        ...


class ClipDecoder(Decoder, Protocol):
    """A decoder that returns single clips.

    Attributes:
        spec: What it decodes. The loader fills missing frames and spectrograms in the same shape.
    """

    spec: DecodeSpec


@runtime_checkable
class BatchDecoder(Protocol):
    """A decoder that reads single clips and decodes whole batches on a device."""

    name: str
    spec: DecodeSpec

    @property
    def batches_at_once(self) -> int:
        """Number of calls of `decode` that can run at the same time."""
        ...

    def prepare(self, clip: Clip, plans: Sequence[ClipPlan]) -> Any:
        """Reads the data that decoding a clip needs. Called from many threads at once.

        Raises:
            MediaError: The file does not match its manifest row; names file and stage.
        """
        ...

    def decode(
        self, prepared: Sequence[Any], rows: Sequence[Sequence[int]], *, size: int, frames: int, windows: int
    ) -> DecodedBatch:
        """Decodes a batch; `fastav.media.dali.decoder.DaliDecoder.decode` describes the arguments."""
        ...

    def close(self) -> None:
        """Frees the decoders on the device."""
        ...
