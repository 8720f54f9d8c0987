"""The errors a person sees, and the exit code of each.

Every message is one line: what was given, what was expected, the nearest match, and the file or flag it came from.
`fastav.__main__` prints it without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path


class FastavError(Exception):
    """A failure that is explained by its message alone (exit 1), such as a full disk."""

    exit_code = 1


class UserError(FastavError, ValueError):
    """A mistake in a recipe, a flag or the given data (exit 2)."""

    exit_code = 2


class TooManyBroken(FastavError):
    """The share of broken clips passed the limit (exit 3)."""

    exit_code = 3


class Stopped(FastavError):
    """A signal ended the run after a clean checkpoint; the same command goes on from there (exit 75, EX_TEMPFAIL)."""

    exit_code = 75


class MediaError(FastavError):
    """One file cannot be read as its manifest row promises.

    Args:
        path: The file.
        reason: What is wrong with it, one line.
        stage: Where it showed: `open`, `probe`, `video`, `audio`, `image`, `mel`.
    """

    def __init__(self, path: str | Path, reason: str, stage: str = "open") -> None:
        self.path, self.reason, self.stage = str(path), " ".join(reason.split()), stage
        super().__init__(f"{self.path}: {self.stage}: {self.reason}")

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str, str]]:
        return type(self), (self.path, self.reason, self.stage)  # between processes


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns `; did you mean "x"?` for the nearest option, or the options when none is near, or nothing."""
    known = sorted(set(options))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 20 else ""


def listed(names: Collection[str], most: int = 6) -> str:
    """Returns the first names, and how many more there are."""
    shown = ", ".join(list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def reason_of(error: BaseException) -> str:
    """An error in a few words, on one line."""
    failures = getattr(error, "failures", None)  # of torch.distributed.checkpoint: rank -> (error, traceback)
    if isinstance(failures, dict) and failures:
        return reason_of(next(iter(failures.values()))[0])
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
