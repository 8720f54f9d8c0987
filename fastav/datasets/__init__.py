"""Data sets: one file each, from its published files to unprobed clips. Probing them is `fastav index`'s work.

A data set's module has `add_arguments(parser)` for its own options and `listing(args) -> Listing`; its line in
`fastav.datasets.build_manifest.DATASETS` gives it its word on the command line.
"""

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
