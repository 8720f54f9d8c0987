"""Any folder of videos, recordings, pictures or stored spectrograms (.npy), as class folders or one class a file.

Every media file below ROOT is a clip, whatever the case of its suffix; hidden files and folders are left out. A
sound file beside a video of the same name (bird.mp4, bird.wav) is a second clip, of the same group; a video file
without pictures is a recording. Folders named train, val and test directly below ROOT, and no others there, are the
splits.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fastav.core.errors import UserError, did_you_mean
from fastav.data.clip import Clip
from fastav.data.manifest import Problem
from fastav.datasets.listing import Listing

VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".asf", ".flv",
    ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".vob", ".y4m",
))  # fmt: skip
AUDIO_SUFFIXES = frozenset((
    ".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".aifc", ".wma",
    ".ac3", ".au", ".caf", ".w64", ".mka",
))  # fmt: skip
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"))
MEL_SUFFIXES = frozenset((".npy",))
SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

Classes = Literal["folder", "file"]


@dataclass(frozen=True, slots=True)
class HoldOut:
    """Which clips go to the test split.

    Attributes:
        kind: `none`; `every`: every `number`-th piece of each file; `fraction`: that share of each class's files.
        number: N of `every:N`, F of `fraction:F`.
    """

    kind: Literal["none", "every", "fraction"] = "none"
    number: float = 0.0

    @classmethod
    def parse(cls, text: str) -> HoldOut:
        """Parses `none`, `every:3` or `fraction:0.2`; `UserError` on anything else."""
        expected = "expected none, every:N with N of 2 or more, or fraction:F with 0 < F < 1"
        kind, _, given = text.partition(":")
        if kind not in ("none", "every", "fraction"):
            near = did_you_mean(kind, ["none", "every", "fraction"])
            raise UserError(f'--hold-out "{text}": {expected}{near}')
        if kind == "none" and not given:
            return cls()
        if kind == "every" and re.fullmatch(r"\d{1,9}", given) and int(given) >= 2:
            return cls("every", int(given))
        if kind == "fraction" and re.fullmatch(r"0?\.\d+", given) and float(given) > 0:
            return cls("fraction", float(given))
        raise UserError(f'--hold-out "{text}": {expected}')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this data set's options."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="the folder")
    parser.add_argument(
        "--classes",
        choices=("folder", "file"),
        default="folder",
        help="folder: ROOT/CLASS/.../file (default). file: each file is a class, named by its path without suffix",
    )
    parser.add_argument(
        "--piece-s",
        type=float,
        metavar="S",
        help="cut videos and recordings into pieces of S seconds. A rest of S/2 or more is a piece of its own, a\n"
        "shorter one is left out; a file shorter than that stays whole. A video is cut along its frames.",
    )
    parser.add_argument(
        "--hold-out",
        default="none",
        metavar="RULE",
        help="what goes to the test split where ROOT has no train/val/test folders: none (default);\n"
        "every:N, each N-th piece of each file; fraction:F, that share of the files of each class, chosen by a\n"
        "hash of the name (at least one of a class with two files, never its last training file)",
    )


def listing(args: argparse.Namespace) -> Listing:
    """Lists ROOT as the options say; see `rows`, `cut` and `hold_out`.

    Raises:
        UserError: No such folder, nothing in it, or options that contradict each other.
    """
    rule, piece_s = HoldOut.parse(args.hold_out), args.piece_s
    if piece_s is not None and not (math.isfinite(piece_s) and piece_s > 0):
        raise UserError(f"--piece-s {piece_s}: expected seconds, more than 0")
    if rule.kind == "every" and piece_s is None:
        raise UserError(f'--hold-out "{args.hold_out}": parts pieces, expected --piece-s with it')
    clips, problems, notes = rows(args.root, classes=args.classes)
    if rule.kind != "none" and (split := sorted({clip.split for clip in clips} - {"train"})):
        raise UserError(
            f'--hold-out "{args.hold_out}": {args.root} has folders for its splits ({", ".join(split)}); '
            "expected one or the other"
        )
    if rule.kind == "fraction":
        hold_out(clips, rule=rule)  # fails now rather than when all is probed
    if rule.kind == "every":
        notes.append(
            f"split by piece: each file gives one piece in {rule.number:.0f} to test, "
            "so train and test share their recordings"
        )
    options = {"classes": args.classes, "piece_s": str(piece_s), "hold_out": args.hold_out}
    return Listing(
        clips,
        problems,
        notes,
        cut=None if piece_s is None else partial(cut, piece_s=piece_s),
        split=None if rule.kind == "none" else partial(hold_out, rule=rule),
        metadata={"source": "fastav index folder", "root": str(args.root), **options},
    )


def rows(root: Path, *, classes: Classes = "folder") -> tuple[list[Clip], list[Problem], list[str]]:
    """Lists the media files below a folder, one clip each, in the order of their names.

    Args:
        root: The folder.
        classes: `folder`: the class is the first folder below ROOT (below the split's folder where there are
            splits), however deep the file lies. `file`: the class is the path without suffix.

    Returns:
        Unprobed clips (id: the path from ROOT; group: that path without suffix), files left out, and notes.

    Raises:
        UserError: No such folder, or no media file in it.
    """
    root = Path(root)
    if not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.glob("*/")]) if root.parent.is_dir() else ""
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}{near}")
    files = sorted(_files(root), key=lambda path: path.relative_to(root).parts)
    media, problems, notes = _media_only(root, files)
    if not media:
        held = f"{len(files)} files, none a" if files else "empty, expected"
        raise UserError(f"{root}: {held} video, recording, picture or .npy (looked into every folder below it)")
    tops = {path.relative_to(root).parts[0] for path in media if len(path.relative_to(root).parts) > 1}
    named = {top for top in tops if top.lower() in SPLIT_FOLDERS}
    flat = any(path.parent == root for path in media)
    splits = bool(named) and named == tops and not flat
    if named and not splits:
        notes.append(
            f"{', '.join(sorted(named))}: taken for ordinary folders, not for splits, as there are others beside"
        )
    clips = []
    for path in media:
        name = PurePosixPath(path.relative_to(root).as_posix())
        inner = name.relative_to(name.parts[0]) if splits else name
        if classes == "folder" and len(inner.parts) < 2:
            message = f"{path} lies in no class folder, expected {root}/CLASS/.../{path.name}, or --classes file"
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
            f"{root}: no class folders; expected {root}/CLASS/file, or --classes file to make each file a class"
        )
    return clips, problems, notes


def _files(root: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden; linked folders are followed, each real folder once."""
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        below[:] = sorted(name for name in below if not name.startswith("."))
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(folder) / name for name in names if not name.startswith("."))


def _media_only(root: Path, files: Sequence[Path]) -> tuple[list[Path], list[Problem], list[str]]:
    """Parts the media files from the others; each of these is a problem, and a note counts them by suffix."""
    media: list[Path] = []
    problems: list[Problem] = []
    unknown: Counter[str] = Counter()
    known = VIDEO_SUFFIXES | AUDIO_SUFFIXES | IMAGE_SUFFIXES | MEL_SUFFIXES
    for path in files:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        if shown != str(path):
            message = f"{shown}: the name is not UTF-8, rename it"
            problems.append(Problem("bad_name", "", shown, message, False))
        elif path.suffix.lower() in known:
            media.append(path)
        else:
            what = f'the suffix "{path.suffix}"' if path.suffix else "a name without suffix"
            problems.append(Problem("unknown_suffix", "", str(path), f"{path}: {what} is none of media", False))
            unknown[path.suffix.lower() or "no suffix"] += 1
    counts = ", ".join(f"{count} x {suffix}" for suffix, count in unknown.most_common())
    return media, problems, [f"left out, not media: {counts}"] if unknown else []


def _streams(path: Path) -> dict[str, Any]:
    """The fields of `Clip` that a file may fill, before anyone has looked into it."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return {"video": path, "audio": path}
    if suffix in AUDIO_SUFFIXES:
        return {"audio": path}
    return {"image": path} if suffix in IMAGE_SUFFIXES else {"mel": path}


def cut(clip: Clip, *, piece_s: float) -> list[Clip]:
    """Cuts a probed clip into pieces of `piece_s` seconds, numbered from 0 in their ids.

    A rest of half a piece or more is a piece of its own, a shorter one is left out; a clip shorter than half a piece
    stays whole. Pictures and stored spectrograms are not cut.
    """
    if clip.video is None and clip.audio is None:
        return [clip]
    # Neither 9.9999999 s nor 10.0000001 s may gain or lose a piece.
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

    `every:N` takes pieces N-1, 2N-1, ... of each file and clears the groups, as a recording is then in both splits
    on purpose. `fraction:F` takes whole groups: of each class that has n >= 2 of them F*n, rounded, but at least one
    and at most n - 1; those whose names have the smallest hashes.

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
                f"--hold-out every:{rule.number:.0f}: holds nothing out, the longest file has {max(count.values())} "
                "pieces; expected a shorter --piece-s, or fraction:F of whole files"
            )
        return moved
    groups: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for clip in clips:
        groups[clip.labels].add(clip.group)
    if all(len(names) < 2 for names in groups.values()):
        raise UserError(
            f"--hold-out fraction:{rule.number:g}: every class has one file only, which must stay in train; "
            "expected several files a class, or --piece-s S --hold-out every:N"
        )
    taken: set[str] = set()
    for names in groups.values():
        num = min(max(1, math.floor(rule.number * len(names) + 0.5)), len(names) - 1)
        taken.update(sorted(names, key=_hash)[:num])
    return [replace(clip, split="test") if clip.group in taken else clip for clip in clips]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
