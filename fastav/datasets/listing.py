"""Listing: what a data set's published files say before anything is probed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastav.data.clip import Clip
from fastav.data.manifest import Problem


@dataclass(frozen=True, slots=True)
class Listing:
    """What a data set's files say before anything is probed.

    Attributes:
        clips: Rows whose spans are given (`start_s`, `duration_s`; 0 for the whole file) and nothing is counted.
        problems: What was left out already, and why.
        notes: Lines for the report.
        cut: Turns one probed clip into the clips to keep; None where the rows are final.
        split: Assigns splits to all of them in the end; None where they have theirs.
        published_splits: Whether the splits are the data set's own: what two of them share, or one
            lacks, is told and ends nothing.
        metadata: Notes to keep with the manifest.
    """

    clips: Sequence[Clip]
    problems: Sequence[Problem] = ()
    notes: Sequence[str] = ()
    cut: Callable[[Clip], list[Clip]] | None = None
    split: Callable[[list[Clip]], list[Clip]] | None = None
    published_splits: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
