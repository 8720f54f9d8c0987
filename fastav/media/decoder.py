"""What every decoder does, and what it is told of the run."""

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
    """What a run reads of every clip.

    Attributes:
        modalities: What is decoded; the other streams are not touched.
        image_size: Height and width of the frames handed out, pixels.
        frontend: Settings of the spectrogram.
        window: Length of a mel window, mel frames.
        reading: How shards of packed clips are read.
    """

    modalities: tuple[Modality, ...] = ("video", "audio")
    image_size: int = 224
    frontend: Frontend = field(default_factory=Frontend)
    window: int = 400
    reading: ShardReading = field(default_factory=ShardReading)


def needed_samples(clip: Clip, plans: Sequence[ClipPlan], spec: DecodeSpec) -> tuple[int, int]:
    """Returns first sample and the one after the last that some plans of a packed clip look at, at its packed rate.

    Where it is resampled first, every sample counts: the filter's length is not this function's to know.
    """
    if clip.sample_rate != spec.frontend.sample_rate:
        return 0, clip.num_samples
    starts_W = np.concatenate([plan.windows_W for plan in plans])
    return spec.frontend.needed_samples(starts_W, spec.window, clip.num_samples)


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded clip under one plan, on the CPU.

    Attributes:
        frames_TCHW: uint8, cropped, resized, flipped; None where the clip has no video or none was asked for.
        mel_WCML: float32 log-mel in dB, neither masked nor normalised; None where there is no audio or none asked for.
    """

    frames_TCHW: Tensor | None
    mel_WCML: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """A batch on the device, complete; `adopt` it in the consumer's thread.

    Attributes:
        frames_BTCHW: uint8; black where there is none. None in a run without video.
        mel_BWCML: float32 log-mel in dB; the floor where there is none. None in a run without audio.
        has_video_B: bool, on the CPU.
        has_audio_B: bool, on the CPU.
        errors: Why a clip could not be decoded, as `prepared` was ordered; its rows are blank.
    """

    frames_BTCHW: Tensor | None
    mel_BWCML: Tensor | None
    has_video_B: NDArray[np.bool_]
    has_audio_B: NDArray[np.bool_]
    errors: list[MediaError | None]

    def adopt(self) -> None:
        """Keeps the memory from being used again before the calling thread's current CUDA stream is done with it.

        The tensors were made on another stream, to which PyTorch would else return them as soon as they are forgotten.
        """
        for tensor in (self.frames_BTCHW, self.mel_BWCML):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


class UncertainSeek(Exception):
    """A short cut that might not lead to the planned frames or samples; the file is then read from its start."""


class Decoder(Protocol):
    """Reads planned frames and windows; called from many threads at once."""

    name: str

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        """Decodes a clip once and returns one `Sample` per plan.

        Args:
            clip: A probed row of a manifest.
            plans: The replicas of one clip: same frames and windows, their own crop and flip.

        Raises:
            MediaError: The file is not what the row promises; names file and stage.
        """
        ...


class ClipDecoder(Decoder, Protocol):
    """A decoder that says what it reads: the shape and the floor of a spectrogram that is missing."""

    spec: DecodeSpec


@runtime_checkable
class BatchDecoder(Protocol):
    """Decodes whole batches, on a device, of what was read clip by clip.

    Attributes:
        batches_at_once: How many calls of `decode` work at the same time.
    """

    name: str
    spec: DecodeSpec

    @property
    def batches_at_once(self) -> int:
        """See above."""
        ...

    def prepare(self, clip: Clip, plans: Sequence[ClipPlan]) -> Any:
        """Reads what decoding a clip needs; called from many threads at once; `MediaError` as in `Decoder.decode`."""
        ...

    def decode(
        self, prepared: Sequence[Any], rows: Sequence[Sequence[int]], *, size: int, frames: int, windows: int
    ) -> DecodedBatch:
        """Makes the tensors of a batch; see `fastav.media.dali.decoder.DaliDecoder.decode`."""
        ...

    def close(self) -> None:
        """Frees the device's decoders."""
        ...
