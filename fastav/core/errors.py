"""The errors that users see, each with its exit code.

A message is one line: the file or option, the value it got, the value expected, and the nearest match.
`fastav.core.command_runner` prints it without a traceback and returns `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path


class FastavError(Exception):
    """A failure that its message explains without a traceback, such as a full disk (exit 1)."""

    exit_code = 1


class UserError(FastavError, ValueError):
    """A mistake in a recipe, an option or the data (exit 2)."""

    exit_code = 2


class TooManyBroken(FastavError):
    """The share of broken clips exceeded the limit (exit 3)."""

    exit_code = 3


class Stopped(FastavError):
    """A signal stopped the run after a checkpoint; the same command resumes it (exit 75, EX_TEMPFAIL)."""

    exit_code = 75


class MediaError(FastavError):
    """A media file cannot be read, or differs from its manifest row.

    Args:
        path: The file.
        reason: What is wrong with it; newlines are removed.
        stage: Stage at which it failed: `open`, `probe`, `video`, `audio`, `image` or `mel`.
    """

    def __init__(self, path: str | Path, reason: str, stage: str = "open") -> None:
        self.path, self.reason, self.stage = str(path), " ".join(reason.split()), stage
        super().__init__(f"{self.path}: {self.stage}: {self.reason}")

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str, str]]:
        return type(self), (self.path, self.reason, self.stage)  # so that it can be sent between processes


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns `; did you mean "x"?` for the nearest option.

    If no option is similar, returns `; known: ...` for up to 20 options, else an empty string.
    """
    known = sorted(set(options))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 20 else ""


def listed(names: Collection[str], most: int = 6) -> str:
    """Joins the first `most` names with commas and counts the rest: `a, b and 3 more`."""
    shown = ", ".join(list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def reason_of(error: BaseException) -> str:
    """Returns the message of an error on one line, or its type if it has no message."""
    failures = getattr(error, "failures", None)  # of torch.distributed.checkpoint: rank -> (error, traceback)
    if isinstance(failures, dict) and failures:
        return reason_of(next(iter(failures.values()))[0])
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
