"""Draws the pictures of the README: `python docs/make_pictures.py data/synth/manifest.parquet runs/quickstart`.

The picture of the report needs Chromium; without it only the picture of the classes is drawn.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from fastav.data.clip import ClipPlan
from fastav.data.manifest import Manifest
from fastav.media.decoder import DecodeSpec
from fastav.media.pyav import PyAV
from fastav.media.spectrogram import Frontend

DOCS = Path(__file__).parent
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars")  # fmt: skip


def draw_classes(manifest: Manifest, out: Path) -> None:
    """Draws one clip per class: a frame above its spectrogram."""
    decoder = PyAV().build(DecodeSpec(image_size=96, frontend=Frontend(), window=400))
    clips = {clip.labels[0]: clip for clip in reversed(manifest.clips(range(len(manifest)))) if clip.has_audio}
    names = sorted(clips)
    figure, axes = plt.subplots(2, len(names), figsize=(12, 3.1), gridspec_kw={"height_ratios": [1, 1.1]})
    for column, name in enumerate(names):
        clip = clips[name]
        side = float(min(clip.width, clip.height))
        crop = ((clip.width - side) / 2, (clip.height - side) / 2, side, side)
        frames, windows = np.array([50], dtype=np.int32), np.array([0], dtype=np.int32)
        plan = ClipPlan(0, 0, clip.row, 0, frames, crop, False, windows, (0, 0), 1.0, 0, 1.0)
        (sample,) = decoder.decode(clip, [plan])
        assert sample.frames_TCHW is not None
        assert sample.mel_WCML is not None
        axes[0, column].imshow(sample.frames_TCHW[0].permute(1, 2, 0).numpy())
        axes[1, column].imshow(sample.mel_WCML[0, 0].numpy(), origin="lower", aspect="auto", cmap="magma")
        axes[0, column].set_title(name.replace(" ", "\n"), fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=90, pil_kwargs={"optimize": True})
    plt.close(figure)


def save_screenshot(page: Path, out: Path, size: tuple[int, int]) -> None:
    """Saves a screenshot of the top of an HTML page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("Chromium not found: the picture of the report was not changed", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            *QUIET,
            f"--user-data-dir={profile}",
            f"--screenshot={out}",
            "--window-size={},{}".format(*size),
        ]
        subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    draw_classes(Manifest.open(sys.argv[1], split="train"), DOCS / "classes.png")
    save_screenshot(Path(sys.argv[2]) / "report.html", DOCS / "report.png", (1000, 1150))
