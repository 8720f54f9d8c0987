"""Opens media files and stored spectrograms, and turns what FFmpeg says of a broken one into a `MediaError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av.error
import av.stream
import numpy as np
from numpy.typing import NDArray

from fastav.core.errors import MediaError


@contextmanager
def media_errors(path: Path | str, stage: str) -> Iterator[None]:
    """Turns what FFmpeg and the system raise into an error that names file and stage."""
    try:
        yield
    except MediaError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, explain_error(error, Path(path)), stage) from error


TIME_TOLERANCE_S = 1e-6
"""Two times nearer than this are the same: far below any frame, far above the rounding of float64 seconds."""


def open_mel(path: Path) -> NDArray[np.float32]:
    """Maps a stored spectrogram [1, M, L] into memory, unread.

    Raises:
        MediaError: As `probe_mel`.
    """
    return load_mel(path, path, mmap_mode="r")


def load_mel(file: Any, path: Path | str, mmap_mode: Literal["r"] | None = None) -> NDArray[np.float32]:
    """Loads a spectrogram, float32 [1, M, L], from a path or an open file; `path` is what errors name.

    Raises:
        MediaError: It cannot be read, or is something else.
    """
    try:
        mel_CML: Any = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError as error:
        raise MediaError(path, explain_error(error, Path(path)), "mel") from error
    except Exception as error:  # the header is Python source: tokenizer, parser and allocator have errors of their own
        raise MediaError(path, f"not a whole .npy array ({error})", "mel") from error
    fits = isinstance(mel_CML, np.ndarray) and mel_CML.ndim == 3 and mel_CML.shape[0] == 1 and mel_CML.size
    if not fits or mel_CML.dtype != np.float32:
        kind = f"{mel_CML.dtype} {list(mel_CML.shape)}" if isinstance(mel_CML, np.ndarray) else "an archive"
        raise MediaError(path, f"holds {kind}, expected a .npy of float32 [1, bands, frames]", "mel")
    return mel_CML


def open_media(path: Path) -> Any:
    """Opens a container for reading; local files only, whatever a playlist in disguise may name.

    Raises:
        MediaError: It cannot be opened.
    """
    try:
        # Absolute, or FFmpeg takes a name such as `12:30.mp4` for an address.
        name = str(path.absolute())
        return av.open(name, metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, explain_error(error, path), "open") from error


def first_stream(container: Any, kind: str, path: Path) -> Any:
    """Returns the first stream of a kind ("video" or "audio") that is not cover art, or None.

    Raises:
        MediaError: There is one, but nothing says how it is coded.
    """
    for stream in getattr(container.streams, kind):
        if kind == "video" and stream.disposition & av.stream.Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise MediaError(path, f"nothing says how its {kind} stream is coded, or no decoder for it", kind)
        return stream
    return None


def explain_error(error: BaseException, path: Path) -> str:
    """Says in a person's words what an error of FFmpeg or the operating system means for a file."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, expected a file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if path.is_file() and path.stat().st_size == 0:
        return "an empty file"
    if isinstance(error, av.error.InvalidDataError | av.error.EOFError):
        return "damaged, cut off or not media (FFmpeg: invalid data)"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def frame_times_s(pts: NDArray[np.int64], start_pts: int, time_base: Fraction) -> NDArray[np.float64]:
    """Turns timestamps into seconds from the first presented frame, always by the same rounding."""
    return (pts - start_pts) * time_base.numerator / time_base.denominator
