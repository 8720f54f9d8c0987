"""Which decoder: by what this machine has and what the clips are, and said in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastav.core.config import Kind
from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.data.manifest import Manifest
from fastav.media.dali.decoder import Dali, can_decode, device_kind, missing_requirement, self_test_failure
from fastav.media.pyav import PyAV

SAMPLED = 256
"""Rows of a manifest that are looked at."""

_ENOUGH = 0.9  # share of the clips with video that DALI must be able to take


class Auto(Kind, frozen=True, tag="auto"):
    """DALI where there is an NVIDIA GPU with its video decoder and it can take nine clips in ten; PyAV otherwise."""


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

    config: PyAV | Dali
    reason: str


def sample_clips(manifests: Sequence[Manifest]) -> list[Clip]:
    """Returns evenly spaced rows of each manifest."""
    clips = []
    for manifest in manifests:
        rows = np.unique(np.linspace(0, len(manifest) - 1, min(SAMPLED, len(manifest))).astype(np.int64))
        clips += manifest.clips(rows)
    return clips


def choose_decoder(config: Auto | PyAV | Dali, clip_stats: ClipStats, looks: bool) -> DecoderChoice:
    """Decides what `auto` means here; what is asked for by name is taken, if it can do anything.

    Args:
        config: Of the recipe.
        clip_stats: Of the clips.
        looks: Whether the run looks at video at all.

    Raises:
        UserError: DALI is asked for and can decode none of the clips.
    """
    if isinstance(config, Dali):
        return DecoderChoice(config, _asked(config, clip_stats, looks))
    if isinstance(config, PyAV):
        return DecoderChoice(config, "asked for")
    lack = missing_requirement("gpu")
    if lack:
        return DecoderChoice(PyAV(), f"DALI cannot be used: {lack}")
    if not looks or not clip_stats.sizes:
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


def _asked(config: Dali, clip_stats: ClipStats, looks: bool) -> str:
    """Why DALI, where it was asked for, and what is left to PyAV."""
    if not looks or not clip_stats.sizes:
        return "asked for"
    kind = device_kind(config.device)
    able = sum(can_decode(kind, codec, width, height) for codec, width, height in clip_stats.sizes)
    if not able:
        packing = "an MJPEG pack (fastav pack --codec mjpeg)" if kind == "cpu" else "an H.264 pack"
        raise UserError(
            f"decode.kind: dali on the {kind} was asked for and can decode none of the clips "
            f'({clip_stats.describe()}); expected {packing}, or decode.kind "auto"'
        )
    left = 100 * (1 - able / len(clip_stats.sizes))
    return f"asked for; {left:.0f} % of the clips are left to PyAV" if left else "asked for"


DecoderConfig = Auto | PyAV | Dali
