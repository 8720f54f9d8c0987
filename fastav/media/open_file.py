"""Opens media files and stored spectrograms; converts errors of FFmpeg into `MediaError` with a plain explanation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import av.error
import av.stream
import numpy as np
from numpy.typing import NDArray

from fastav.core.errors import MediaError
from fastav.core.regular_file import check_regular

_NO_FILE = 1  # FFmpeg's AVFMT_NOFILE: devices, network protocols and sequences of pictures
_OPENS_MORE = frozenset(
    {"concat", "dash", "ffmetadata", "hls", "imf", "live_flv", "mlv", "sbg", "sdp", "vobsub", "webm_dash_manifest"}
)
"""Formats whose files name other files or streams to open, or contain scripts, by FFmpeg's names."""

_HEAD_BYTES, _BLANKS = 64, b"\xef\xbb\xbf \t\r\n"
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"v=0\r\n", b"v=0\n", b"<MPD", b"[playlist]", b"# VobSub index file")
"""First bytes of playlists and descriptions of streams, which are reported as such. (`_formats` excludes them.)"""


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
    with media_errors(path, "mel"):
        check_regular(path)
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
    """Opens a media file for reading, and nothing else: no URL, and no other file that its content names.

    Raises:
        MediaError: The file cannot be opened, or its format would open other files (a playlist).
    """
    with media_errors(path, "open"):
        check_regular(path)
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        if any(head.lstrip(_BLANKS).startswith(start) for start in _PLAYLISTS):
            raise MediaError(path, "is a playlist or a description of streams, expected a media file", "open")
        options = {"protocol_whitelist": "file", "format_whitelist": _formats()}
        # An absolute path, because FFmpeg would read a name such as `12:30.mp4` as a URL.
        try:
            return av.open(str(path.absolute()), metadata_errors="ignore", options=options)
        except av.error.ArgumentError as error:  # FFmpeg recognised a format that is not in the list
            raise MediaError(path, "its format is not one of media files, or opens other files", "open") from error


@functools.cache
def _formats() -> str:
    """Returns the names of the formats that FFmpeg may recognise, separated by commas."""
    names = []
    for name in sorted(av.formats_available):
        try:
            container_format = av.ContainerFormat(name, "r")
        except ValueError:  # a format that can only be written
            continue
        if not (container_format.is_input and container_format.flags & _NO_FILE) and name not in _OPENS_MORE:
            names.append(name)
    return ",".join(names)


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
