"""A folder of videos, recordings, pictures or stored spectrograms (.npy), with one folder or one file per class.

Every media file in ROOT or its subfolders becomes a clip. The case of the suffix does not matter; hidden files and
folders are ignored. An audio file next to a video of the same name (bird.mp4, bird.wav) becomes a second clip in the
same group. A video file without a video stream becomes an audio clip. Folders directly in ROOT named train, val and
test are the splits, if ROOT has no other folders or files with media.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.data.manifest import Problem
from fastav.datasets.clip_list import ClipList
from fastav.datasets.splits import HoldOut, cut, hold_out
from fastav.datasets.suffixes import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from fastav.media.probe import IMAGE_SUFFIXES, MEL_SUFFIXES

SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

Classes = Literal["folder", "file"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this kind."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder with the media files")
    parser.add_argument(
        "--classes",
        choices=("folder", "file"),
        default="folder",
        help="folder (default): the class is the folder, ROOT/CLASS/.../file. file: each file is a class, named by\n"
        "its path without suffix",
    )
    parser.add_argument(
        "--piece-s",
        type=float,
        metavar="S",
        help="cut videos and recordings into pieces of S seconds. A remainder of S/2 or more becomes a piece of its\n"
        "own, a shorter one is dropped; a file shorter than S/2 stays whole. Videos are cut at whole frames",
    )
    parser.add_argument(
        "--hold-out",
        default="none",
        metavar="RULE",
        help="which clips go to the test split if ROOT has no train/val/test folders. none (default); every:N: every\n"
        "N-th piece of each file; fraction:F: that fraction of the files of each class, chosen by a hash of the name\n"
        "(at least one file of a class with two or more, never all of them)",
    )


def list_clips(args: argparse.Namespace) -> ClipList:
    """Lists the clips in ROOT; see `rows`, `cut` and `hold_out`.

    Raises:
        UserError: The folder does not exist or has no media, or the options contradict each other.
    """
    rule, piece_s = HoldOut.parse(args.hold_out), args.piece_s
    if piece_s is not None and not (math.isfinite(piece_s) and piece_s > 0):
        raise UserError(f"--piece-s {piece_s}: expected a number of seconds above 0")
    if rule.kind == "every" and piece_s is None:
        raise UserError(f'--hold-out "{args.hold_out}": needs --piece-s S, the length of the pieces')
    clips, problems, notes = rows(args.root, classes=args.classes)
    if rule.kind != "none" and (split := sorted({clip.split for clip in clips} - {"train"})):
        raise UserError(
            f'--hold-out "{args.hold_out}": {args.root} has folders for splits ({", ".join(split)}); '
            "drop the option, or move the files out of these folders"
        )
    if rule.kind == "fraction":
        hold_out(clips, rule=rule)  # checks the rule now rather than after probing
    if rule.kind == "every":
        notes.append(
            f"split by piece: one piece in {rule.number:.0f} of each file is in test, "
            "so train and test share recordings"
        )
    options = {"classes": args.classes, "piece_s": str(piece_s), "hold_out": args.hold_out}
    return ClipList(
        clips,
        problems,
        notes,
        cut=None if piece_s is None else partial(cut, piece_s=piece_s),
        split=None if rule.kind == "none" else partial(hold_out, rule=rule),
        metadata={"source": "fastav index folder", "root": str(args.root), **options},
    )


def rows(root: Path, *, classes: Classes = "folder") -> tuple[list[Clip], list[Problem], list[str]]:
    """Lists the media files in a folder and its subfolders, one clip each, sorted by path.

    Args:
        root: The folder.
        classes: `folder`: the class is the first folder of the path below ROOT (below the split's folder if there are
            splits). `file`: the class is the path without suffix.

    Returns:
        Unprobed clips (id: the path relative to ROOT; group: that path without suffix), problems of files that were
        left out, and notes.

    Raises:
        UserError: The folder does not exist, or has no media file.
    """
    root = Path(root)
    if not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.glob("*/")]) if root.parent.is_dir() else ""
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}{near}")
    files = sorted(_files(root), key=lambda path: path.relative_to(root).parts)
    media, problems, notes = _media_only(root, files)
    if not media:
        found = f"none of its {len(files)} files is a" if files else "the folder is empty; expected at least one"
        raise UserError(f"{root}: {found} video, recording, picture or .npy file (subfolders included)")
    tops = {path.relative_to(root).parts[0] for path in media if len(path.relative_to(root).parts) > 1}
    named = {top for top in tops if top.lower() in SPLIT_FOLDERS}
    flat = any(path.parent == root for path in media)
    splits = bool(named) and named == tops and not flat
    if named and not splits:
        notes.append(
            f"{', '.join(sorted(named))}: treated as ordinary folders, not as splits, as ROOT has other media "
            "files or folders"
        )
    clips = []
    for path in media:
        name = PurePosixPath(path.relative_to(root).as_posix())
        inner = name.relative_to(name.parts[0]) if splits else name
        if classes == "folder" and len(inner.parts) < 2:
            message = f"{path} is not in a class folder; expected {root}/CLASS/.../{path.name}, or --classes file"
            problems.append(Problem("no_class", "", str(path), message, False))
            continue
        label = inner.parts[0] if classes == "folder" else inner.with_suffix("").as_posix()
        clips.append(
            Clip(
                id=name.as_posix(),
                labels=(label,),
                split=SPLIT_FOLDERS[name.parts[0].lower()] if splits else "train",
                group=name.with_suffix("").as_posix(),
                **_streams(path),
            )
        )
    if not clips:
        raise UserError(
            f"{root}: has no class folders; expected {root}/CLASS/file, or --classes file to make each file a class"
        )
    return clips, problems, notes


def _files(root: Path) -> Iterator[Path]:
    """Yields all files in a folder and its subfolders except hidden ones; follows links, visits each folder once."""
    visited = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        below[:] = sorted(name for name in below if not name.startswith("."))
        if real in visited:
            below.clear()
            continue
        visited.add(real)
        yield from (Path(folder) / name for name in names if not name.startswith("."))


def _media_only(root: Path, files: Sequence[Path]) -> tuple[list[Path], list[Problem], list[str]]:
    """Separates media files from others; each other file is a problem, and a note counts them by suffix."""
    media: list[Path] = []
    problems: list[Problem] = []
    unknown: Counter[str] = Counter()
    known = VIDEO_SUFFIXES | AUDIO_SUFFIXES | IMAGE_SUFFIXES | MEL_SUFFIXES
    for path in files:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        if shown != str(path):
            message = f"{shown}: the name is not UTF-8; rename it"
            problems.append(Problem("bad_name", "", shown, message, False))
        elif path.suffix.lower() in known:
            media.append(path)
        else:
            what = f'the suffix "{path.suffix}" is not that of' if path.suffix else "the name has no suffix of"
            problems.append(Problem("unknown_suffix", "", str(path), f"{path}: {what} a media file", False))
            unknown[path.suffix.lower() or "no suffix"] += 1
    counts = ", ".join(f"{count} x {suffix}" for suffix, count in unknown.most_common())
    return media, problems, [f"left out, not media files: {counts}"] if unknown else []


def _streams(path: Path) -> dict[str, Any]:
    """Returns the path fields of `Clip` for a file that is not probed yet."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return {"video": path, "audio": path}
    if suffix in AUDIO_SUFFIXES:
        return {"audio": path}
    return {"image": path} if suffix in IMAGE_SUFFIXES else {"mel": path}
