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
from fastav.media.dali.decoder import Dali, ailing, device_kind, missing, takes
from fastav.media.pyav import PyAV

SAMPLED = 256
"""Rows of a manifest that are looked at."""

_ENOUGH = 0.9  # share of the clips with video that DALI must be able to take


class Auto(Kind, frozen=True, tag="auto"):
    """DALI where there is an NVIDIA GPU with its video decoder and it can take nine clips in ten; PyAV otherwise."""


@dataclass(frozen=True)
class Census:
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
    def of(cls, clips: Iterable[Clip]) -> Census:
        """Counts clips."""
        codecs: Counter[str] = Counter()
        sizes, rows = [], 0
        for clip in clips:
            rows += 1
            codecs[f"{clip.video_codec} packed" if clip.shard and clip.has_video else clip.video_codec] += 1
            if clip.has_video:
                sizes.append((clip.video_codec, clip.width, clip.height))
        return cls(codecs, tuple(sizes), rows)

    def told(self) -> str:
        """The codecs with their shares, the commonest first."""
        parts = [
            f"{name or 'no video'} {100 * count / self.num_rows:.0f} %" for name, count in self.codecs.most_common()
        ]
        return ", ".join(parts) or "no clips"


@dataclass(frozen=True)
class Choice:
    """A decoder and why.

    Attributes:
        config: Builds it.
        reason: One line for a person.
    """

    config: PyAV | Dali
    reason: str


def sampled(manifests: Sequence[Manifest]) -> list[Clip]:
    """Returns evenly spaced rows of each manifest."""
    clips = []
    for manifest in manifests:
        rows = np.unique(np.linspace(0, len(manifest) - 1, min(SAMPLED, len(manifest))).astype(np.int64))
        clips += manifest.clips(rows)
    return clips


def choose(config: Auto | PyAV | Dali, census: Census, looks: bool) -> Choice:
    """Decides what `auto` means here; what is asked for by name is taken, if it can do anything.

    Args:
        config: Of the recipe.
        census: Of the clips.
        looks: Whether the run looks at video at all.

    Raises:
        UserError: DALI is asked for and can decode none of the clips.
    """
    if isinstance(config, Dali):
        return Choice(config, _asked(config, census, looks))
    if isinstance(config, PyAV):
        return Choice(config, "asked for")
    lack = missing("gpu")
    if lack:
        return Choice(PyAV(), f"DALI cannot be used: {lack}")
    if not looks or not census.sizes:
        return Choice(PyAV(), "there is no video to decode")
    able = sum(takes("gpu", codec, width, height) for codec, width, height in census.sizes)
    share = able / len(census.sizes)
    if share < _ENOUGH:
        return Choice(PyAV(), f"the GPU can decode {100 * share:.0f} % of the clips ({census.told()})")
    ill = ailing("gpu")
    if ill:
        return Choice(PyAV(), f"DALI does not work here: {ill}")
    return Choice(Dali(device="gpu"), f"the GPU can decode {100 * share:.0f} % of the clips ({census.told()})")


def _asked(config: Dali, census: Census, looks: bool) -> str:
    """Why DALI, where it was asked for, and what is left to PyAV."""
    if not looks or not census.sizes:
        return "asked for"
    kind = device_kind(config.device)
    able = sum(takes(kind, codec, width, height) for codec, width, height in census.sizes)
    if not able:
        packing = "an MJPEG pack (fastav pack --codec mjpeg)" if kind == "cpu" else "an H.264 pack"
        raise UserError(
            f"decode.kind: dali on the {kind} was asked for and can decode none of the clips "
            f'({census.told()}); expected {packing}, or decode.kind "auto"'
        )
    left = 100 * (1 - able / len(census.sizes))
    return f"asked for; {left:.0f} % of the clips are left to PyAV" if left else "asked for"


DecoderConfig = Auto | PyAV | Dali
