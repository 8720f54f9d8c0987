"""Opens media files and stored spectrograms; converts errors of FFmpeg into `MediaError` with a plain explanation."""

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
    """Converts errors of FFmpeg and of the operating system into `MediaError`, which names file and stage."""
    try:
        yield
    except MediaError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, explain_error(error, Path(path)), stage) from error


TIME_TOLERANCE_S = 1e-6
"""Times closer than this are equal, seconds: much shorter than a frame, much longer than rounding errors of float64."""


def open_mel(path: Path) -> NDArray[np.float32]:
    """Memory-maps a stored spectrogram, float32 [1, M, L].

    Raises:
        MediaError: The file cannot be read or is not a spectrogram.
    """
    return load_mel(path, path, mmap_mode="r")


def load_mel(file: Any, path: Path | str, mmap_mode: Literal["r"] | None = None) -> NDArray[np.float32]:
    """Loads a spectrogram, float32 [1, M, L].

    Args:
        file: Path or open file.
        path: Path to name in errors.
        mmap_mode: Mode of numpy's memory mapping; None to read the data.

    Raises:
        MediaError: The file cannot be read or is not a spectrogram.
    """
    try:
        mel_CML: Any = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError as error:
        raise MediaError(path, explain_error(error, Path(path)), "mel") from error
    except Exception as error:  # numpy parses the header as Python source, which can raise almost anything
        raise MediaError(path, f"is not a complete .npy array ({error})", "mel") from error
    fits = isinstance(mel_CML, np.ndarray) and mel_CML.ndim == 3 and mel_CML.shape[0] == 1 and mel_CML.size
    if not fits or mel_CML.dtype != np.float32:
        kind = f"{mel_CML.dtype} {list(mel_CML.shape)}" if isinstance(mel_CML, np.ndarray) else "an archive"
        raise MediaError(path, f"contains {kind}, expected a .npy array of float32 [1, bands, frames]", "mel")
    return mel_CML


def open_media(path: Path) -> Any:
    """Opens a media file for reading. Only local files can be read, even if the file is a playlist of URLs.

    Raises:
        MediaError: The file cannot be opened.
    """
    try:
        # An absolute path, because FFmpeg would read a name such as `12:30.mp4` as a URL.
        name = str(path.absolute())
        return av.open(name, metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, explain_error(error, path), "open") from error


def first_stream(container: Any, kind: str, path: Path) -> Any:
    """Returns the first stream of a kind ("video" or "audio") that is not cover art, or None.

    Raises:
        MediaError: There is such a stream, but its codec is not known or has no decoder.
    """
    for stream in getattr(container.streams, kind):
        if kind == "video" and stream.disposition & av.stream.Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise MediaError(path, f"the codec of its {kind} stream is unknown or has no decoder", kind)
        return stream
    return None


def explain_error(error: BaseException, path: Path) -> str:
    """Returns a plain explanation of an error of FFmpeg or the operating system."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, expected a file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if path.is_file() and path.stat().st_size == 0:
        return "is an empty file"
    if isinstance(error, av.error.InvalidDataError | av.error.EOFError):
        return "is damaged, truncated or not a media file (FFmpeg: invalid data)"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def frame_times_s(pts: NDArray[np.int64], start_pts: int, time_base: Fraction) -> NDArray[np.float64]:
    """Converts timestamps into seconds from the first presented frame. All callers thus round in the same way."""
    return (pts - start_pts) * time_base.numerator / time_base.denominator
