"""Chooses the decoder from the hardware of this machine and the codecs of the clips, and explains the choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastav.core.config import Kind
from fastav.core.errors import UserError
from fastav.core.plugin import make_external
from fastav.data.clip import Clip
from fastav.data.manifest import Manifest
from fastav.media.dali.decoder import Dali, can_decode, device_kind, missing_requirement, self_test_failure
from fastav.media.decoder import ClipDecoder, DecodeSpec
from fastav.media.pyav import PyAV

SAMPLED = 256
"""Number of manifest rows that are checked."""

_ENOUGH = 0.9  # minimum share of the clips with video that DALI must be able to decode


class Auto(Kind, frozen=True, tag="auto"):
    """DALI on an NVIDIA GPU with a video decoder if it can decode 90 % of the clips with video; PyAV otherwise."""


class ExternalDecoder(Kind, frozen=True, tag="external"):
    """A decoder from outside this project; can also be written as `kind = "module:attribute"`.

    Attributes:
        factory: `module:attribute` of a config class or function that makes the decoder. Its result must have a method
            `build(spec)`, which receives a `fastav.media.decoder.DecodeSpec` and returns a
            `fastav.media.decoder.ClipDecoder`.
        args: Keyword arguments of `factory`; a recipe may also write them beside `kind`.
    """

    factory: str = ""
    args: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it

    def build(self, spec: DecodeSpec) -> ClipDecoder:
        """Returns the decoder for a run.

        Raises:
            UserError: The decoder cannot be imported, does not accept the arguments, or has no `decode` method.
        """
        made = make_external(self.factory, self.args, "decode")
        decoder = made.build(spec) if hasattr(made, "build") else made
        if not hasattr(decoder, "decode"):
            raise UserError(
                f'decode.kind: "{self.factory}" returns a {type(decoder).__name__}, expected an object with '
                "decode(clip, plans)"
            )
        return decoder


@dataclass(frozen=True)
class ClipStats:
    """Codecs and sizes of the clips in evenly spaced rows of a manifest.

    Attributes:
        codecs: Video codec -> number of rows; `h264 packed` for packed clips, an empty name for rows without video.
        sizes: Codec, width and height of each row with video.
        num_rows: Number of checked rows.
    """

    codecs: Counter[str]
    sizes: tuple[tuple[str, int, int], ...]
    num_rows: int

    @classmethod
    def of(cls, clips: Iterable[Clip]) -> ClipStats:
        """Counts clips."""
        codecs: Counter[str] = Counter()
        sizes, rows = [], 0
        for clip in clips:
            rows += 1
            codecs[f"{clip.video_codec} packed" if clip.shard and clip.has_video else clip.video_codec] += 1
            if clip.has_video:
                sizes.append((clip.video_codec, clip.width, clip.height))
        return cls(codecs, tuple(sizes), rows)

    def describe(self) -> str:
        """Returns the codecs and their shares, the most frequent first."""
        parts = [
            f"{name or 'no video'} {100 * count / self.num_rows:.0f} %" for name, count in self.codecs.most_common()
        ]
        return ", ".join(parts) or "no clips"


@dataclass(frozen=True)
class DecoderChoice:
    """The chosen decoder and the reason.

    Attributes:
        config: Settings of the decoder.
        reason: One line for the log.
    """

    config: PyAV | Dali | ExternalDecoder
    reason: str


def sample_clips(manifests: Sequence[Manifest]) -> list[Clip]:
    """Returns evenly spaced rows of each manifest."""
    clips = []
    for manifest in manifests:
        rows = np.unique(np.linspace(0, len(manifest) - 1, min(SAMPLED, len(manifest))).astype(np.int64))
        clips += manifest.clips(rows)
    return clips


def choose_decoder(
    config: Auto | PyAV | Dali | ExternalDecoder, clip_stats: ClipStats, uses_video: bool, cpu_only: str = ""
) -> DecoderChoice:
    """Chooses the decoder for kind `auto`. A decoder that is requested by name is returned unchanged.

    Args:
        config: Settings in the recipe.
        clip_stats: Codecs and sizes of the clips.
        uses_video: Whether the run decodes video.
        cpu_only: Reason why clips must be decoded on the CPU; empty if they need not be.

    Raises:
        UserError: DALI is requested, but it can decode none of the clips.
    """
    if isinstance(config, Dali):
        return DecoderChoice(config, _requested(config, clip_stats, uses_video))
    if isinstance(config, PyAV | ExternalDecoder):
        return DecoderChoice(config, "requested")
    if cpu_only:
        return DecoderChoice(PyAV(), cpu_only)
    lack = missing_requirement("gpu")
    if lack:
        return DecoderChoice(PyAV(), f"DALI cannot be used: {lack}")
    if not uses_video or not clip_stats.sizes:
        return DecoderChoice(PyAV(), "no video to decode")
    able = sum(can_decode("gpu", codec, width, height) for codec, width, height in clip_stats.sizes)
    share = able / len(clip_stats.sizes)
    if share < _ENOUGH:
        return DecoderChoice(PyAV(), f"the GPU can decode {100 * share:.0f} % of the clips ({clip_stats.describe()})")
    failure = self_test_failure("gpu")
    if failure:
        return DecoderChoice(PyAV(), f"DALI does not work on this machine: {failure}")
    return DecoderChoice(
        Dali(device="gpu"), f"the GPU can decode {100 * share:.0f} % of the clips ({clip_stats.describe()})"
    )


def _requested(config: Dali, clip_stats: ClipStats, uses_video: bool) -> str:
    """Returns the reason for a requested DALI decoder, with the share of clips that PyAV decodes."""
    if not uses_video or not clip_stats.sizes:
        return "requested"
    kind = device_kind(config.device)
    able = sum(can_decode(kind, codec, width, height) for codec, width, height in clip_stats.sizes)
    if not able:
        packing = "an MJPEG pack (fastav pack --codec mjpeg)" if kind == "cpu" else "an H.264 pack"
        raise UserError(
            f'decode.kind: "dali" on the {kind} can decode none of the clips ({clip_stats.describe()}); '
            f'use {packing}, or decode.kind "auto"'
        )
    left = 100 * (1 - able / len(clip_stats.sizes))
    return f"requested; PyAV decodes {left:.0f} % of the clips" if left else "requested"


DecoderConfig = Auto | PyAV | Dali | ExternalDecoder
