"""Small recordings and pictures, and manifests of listings that are still to be cut, for the tests of data sets."""

from __future__ import annotations

import io
import wave
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from fastav.data.clip import Clip
from fastav.data.manifest import Manifest
from fastav.datasets.build_manifest import build_manifest
from fastav.datasets.clip_list import ClipList


def wav(
    path: Path, seconds: float = 1.0, *, rate: int = 8000, channels: int = 1, bits: int = 16, seed: int = 0
) -> Path:
    """A WAV of noise, 16 or 24 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-(2**14), 2**14, (round(seconds * rate), channels), np.int32)
    data = (noise << 16).astype("<i4").view(np.uint8).reshape(-1, 4)[:, 4 - bits // 8 :]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        file.writeframes(data.tobytes())
    return path


def picture(path: Path, width: int = 48, height: int = 32, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(path)
    return path


def probed(made: ClipList, out: Path) -> tuple[Manifest, dict[str, Clip], Counter[str]]:
    """The manifest of a clip list, cut and split as it says; its clips by id; how many problems of which kind."""
    manifest, problems = build_manifest(
        made.clips, out, workers=1, metadata=made.metadata, console=Console(file=io.StringIO()),
        cut=made.cut, split=made.split, problems=made.problems,
    )  # fmt: skip
    clips = {clip.id: clip for clip in manifest.clips(range(len(manifest)))}
    return manifest, clips, Counter(problem.kind for problem in problems)
