"""ClipList: the clips of a data set according to its published files, before probing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastav.data.clip import Clip
from fastav.data.manifest import Problem


@dataclass(frozen=True, slots=True)
class ClipList:
    """The clips of a data set according to its published files, before probing.

    Attributes:
        clips: Unprobed rows: paths, labels and spans (`start_s`, `duration_s`; 0 for the whole file).
        problems: Clips and files that were left out, and why.
        notes: Lines to print after indexing.
        cut: Turns one probed clip into the clips to keep; None to keep it unchanged.
        split: Assigns splits to all probed clips; None if they have splits already.
        published_splits: Whether the splits were published with the data set. Leaks between published splits and
            classes missing in one of them are warnings instead of errors.
        metadata: Notes to store in the manifest.
    """

    clips: Sequence[Clip]
    problems: Sequence[Problem] = ()
    notes: Sequence[str] = ()
    cut: Callable[[Clip], list[Clip]] | None = None
    split: Callable[[list[Clip]], list[Clip]] | None = None
    published_splits: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
