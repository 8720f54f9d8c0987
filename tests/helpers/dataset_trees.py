"""Lists and indexes made trees in the layouts of published data sets, for the tests of `fastav.datasets`."""

from __future__ import annotations

import argparse
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from rich.console import Console

from fastav.data.clip import Clip
from fastav.data.manifest import Manifest, Problem
from fastav.datasets.build_manifest import build_manifest
from fastav.datasets.clip_list import ClipList
from tests.helpers.media import write_media


def tree(root: Path, *names: str) -> Path:
    """Makes empty media files; listing clips opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def table(path: Path, *lines: str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def media(path: Path, seconds: float = 2, *, sound: bool = True, fps: int = 10) -> Path:
    """A real video of numbered frames, with a tone that differs from file to file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pitch = 200 + sum(path.name.encode()) % 1000
    wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * 8000)) / 8000, dtype=np.float32)
    return write_media(
        path, frames=round(seconds * fps), fps=fps, wave=wave[None] if sound else None, rate=8000, layout="mono"
    )


def listed(module: ModuleType, root: Path, *words: str) -> ClipList:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.list_clips(parser.parse_args([str(root), *words]))


def indexed(made: ClipList, out: Path) -> tuple[Manifest, dict[str, Clip], Counter[str]]:
    """The manifest of a clip list, its clips by id, and how many problems of which kind there are."""
    manifest, problems = build_manifest(
        made.clips, out, workers=1, console=Console(file=io.StringIO()), metadata=made.metadata, problems=made.problems
    )
    clips = {clip.id: clip for clip in manifest.clips(range(len(manifest)))}
    return manifest, clips, Counter(problem.kind for problem in problems)


def kinds(problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """Kind and clip of each problem."""
    return [(problem.kind, problem.clip_id) for problem in problems]
