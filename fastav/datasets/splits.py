"""Cuts recordings into pieces, and holds out clips for the test split."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip


@dataclass(frozen=True, slots=True)
class HoldOut:
    """The rule that moves clips to the test split.

    Attributes:
        kind: `none`; `every`: every `number`-th piece of each file; `fraction`: that fraction of each class's files.
        number: N of `every:N`, F of `fraction:F`; 0 for `none`.

    Example:
        >>> HoldOut.parse("fraction:0.2")
        HoldOut(kind='fraction', number=0.2)
    """

    kind: Literal["none", "every", "fraction"] = "none"
    number: float = 0.0

    @classmethod
    def parse(cls, text: str) -> HoldOut:
        """Parses `none`, `every:3` or `fraction:0.2`; raises `UserError` for any other text."""
        expected = "expected none, every:N with N of 2 or more, or fraction:F with 0 < F < 1"
        kind, _, number = text.partition(":")
        if kind not in ("none", "every", "fraction"):
            near = did_you_mean(kind, ["none", "every", "fraction"])
            raise UserError(f'--hold-out "{text}": {expected}{near}')
        if kind == "none" and not number:
            return cls()
        if kind == "every" and re.fullmatch(r"\d{1,9}", number) and int(number) >= 2:
            return cls("every", int(number))
        if kind == "fraction" and re.fullmatch(r"0?\.\d+", number) and float(number) > 0:
            return cls("fraction", float(number))
        raise UserError(f'--hold-out "{text}": {expected}')


def cut(clip: Clip, *, piece_s: float) -> list[Clip]:
    """Cuts a probed clip into pieces of `piece_s` seconds, whose ids end with their numbers from 0.

    A remainder of half a piece or more becomes a piece of its own; a shorter one is dropped. A clip shorter than half a
    piece stays whole. Pictures and stored spectrograms are not cut.
    """
    if clip.video is None and clip.audio is None:
        return [clip]
    # Rounding errors in the duration, such as 9.9999999 s or 10.0000001 s, must not change the number of pieces.
    num = max(1, math.floor(clip.duration_s / piece_s + 0.5 + 1e-6))
    return [
        replace(
            clip,
            id=f"{clip.id}#{k}",
            start_s=clip.start_s + k * piece_s,
            duration_s=min(piece_s, clip.duration_s - k * piece_s),
        )
        for k in range(num)
    ]


def hold_out(clips: Sequence[Clip], *, rule: HoldOut) -> list[Clip]:
    """Moves clips from train to test.

    `every:N` takes pieces N-1, 2N-1, ... of each file. It also clears the groups, as each recording is then in both
    splits on purpose. `fraction:F` takes whole groups: of the n >= 2 groups of a class, F*n, rounded, but at least one
    and at most n - 1. It takes the groups whose names have the smallest hashes.

    Raises:
        UserError: With `fraction`, no class has two groups; with `every`, no file has N pieces.
    """
    if rule.kind == "every":
        count: Counter[str] = Counter()
        moved = []
        for clip in clips:
            file = clip.id.rpartition("#")[0] or clip.id
            count[file] += 1
            split = "test" if count[file] % int(rule.number) == 0 else clip.split
            moved.append(replace(clip, split=split, group=""))
        if all(clip.split != "test" for clip in moved):
            raise UserError(
                f"--hold-out every:{rule.number:.0f}: leaves the test split empty, as no file has more than "
                f"{max(count.values())} pieces; use a shorter --piece-s, or fraction:F to hold out whole files"
            )
        return moved
    groups: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for clip in clips:
        groups[clip.labels].add(clip.group)
    if all(len(names) < 2 for names in groups.values()):
        raise UserError(
            f"--hold-out fraction:{rule.number:g}: each class has only one file, which must stay in train; "
            "expected several files per class, or --piece-s S --hold-out every:N"
        )
    taken: set[str] = set()
    for names in groups.values():
        num = min(max(1, math.floor(rule.number * len(names) + 0.5)), len(names) - 1)
        taken.update(sorted(names, key=_hash)[:num])
    return [replace(clip, split="test") if clip.group in taken else clip for clip in clips]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
