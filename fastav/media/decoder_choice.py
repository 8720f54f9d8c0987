"""Which decoder: by what this machine has and what the clips are, and said in one line."""

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
"""Rows of a manifest that are looked at."""

_ENOUGH = 0.9  # share of the clips with video that DALI must be able to take


class Auto(Kind, frozen=True, tag="auto"):
    """DALI where there is an NVIDIA GPU with its video decoder and it can take nine clips in ten; PyAV otherwise."""


class ExternalDecoder(Kind, frozen=True, tag="external"):
    """A decoder from outside this project; `kind = "module:attribute"` is short for it.

    Attributes:
        factory: `module:attribute` of a config class or function; what it returns has `build(spec)`, which takes a
            `fastav.media.decoder.DecodeSpec` and returns a `fastav.media.decoder.ClipDecoder`.
        args: Its settings; a recipe may also write them beside `kind`.
    """

    factory: str = ""
    args: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it

    def build(self, spec: DecodeSpec) -> ClipDecoder:
        """Returns the decoder for a run.

        Raises:
            UserError: It cannot be imported, does not take the arguments, or makes something else.
        """
        made = make_external(self.factory, self.args, "decode")
        decoder = made.build(spec) if hasattr(made, "build") else made
        if not hasattr(decoder, "decode"):
            raise UserError(
                f'decode.kind: "{self.factory}" makes a {type(decoder).__name__} without decode(clip, plans)'
            )
        return decoder


@dataclass(frozen=True)
class ClipStats:
    """What kinds of clips there are, from evenly spaced rows.

    Attributes:
        codecs: Video codec -> rows; `h264 packed` for packed ones; empty for rows without video.
        sizes: Codec, width and height of each row with video.
        num_rows: Rows looked at.
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
        """The codecs with their shares, the commonest first."""
        parts = [
            f"{name or 'no video'} {100 * count / self.num_rows:.0f} %" for name, count in self.codecs.most_common()
        ]
        return ", ".join(parts) or "no clips"


@dataclass(frozen=True)
class DecoderChoice:
    """A decoder and why.

    Attributes:
        config: Builds it.
        reason: One line for a person.
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
    """Decides what `auto` means here; what is asked for by name is taken, if it can do anything.

    Args:
        config: Of the recipe.
        clip_stats: Of the clips.
        uses_video: Whether the run decodes video.
        cpu_only: Why the CPU must decode whatever there is; empty where it need not.

    Raises:
        UserError: DALI is asked for and can decode none of the clips.
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
        return DecoderChoice(PyAV(), "there is no video to decode")
    able = sum(can_decode("gpu", codec, width, height) for codec, width, height in clip_stats.sizes)
    share = able / len(clip_stats.sizes)
    if share < _ENOUGH:
        return DecoderChoice(PyAV(), f"the GPU can decode {100 * share:.0f} % of the clips ({clip_stats.describe()})")
    ill = self_test_failure("gpu")
    if ill:
        return DecoderChoice(PyAV(), f"DALI does not work here: {ill}")
    return DecoderChoice(
        Dali(device="gpu"), f"the GPU can decode {100 * share:.0f} % of the clips ({clip_stats.describe()})"
    )


def _requested(config: Dali, clip_stats: ClipStats, uses_video: bool) -> str:
    """Why DALI, where it was asked for, and what is left to PyAV."""
    if not uses_video or not clip_stats.sizes:
        return "requested"
    kind = device_kind(config.device)
    able = sum(can_decode(kind, codec, width, height) for codec, width, height in clip_stats.sizes)
    if not able:
        packing = "an MJPEG pack (fastav pack --codec mjpeg)" if kind == "cpu" else "an H.264 pack"
        raise UserError(
            f"decode.kind: dali on the {kind} was asked for and can decode none of the clips "
            f'({clip_stats.describe()}); expected {packing}, or decode.kind "auto"'
        )
    left = 100 * (1 - able / len(clip_stats.sizes))
    return f"requested; {left:.0f} % of the clips are left to PyAV" if left else "requested"


DecoderConfig = Auto | PyAV | Dali | ExternalDecoder
