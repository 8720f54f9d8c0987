"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import SHARED

# Files of minutes each, the longest first: two processes share the files out in this order, and end together.
LONG = ("readme", "pack", "graph", "index", "train", "benchmarks_train", "fuzz", "benchmarks", "launch", "kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take long first; the order within each stays."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real media; tests that want it skip where it is absent."""
    folder = Path(os.environ.get("FASTAV_REALDATA") or SHARED / "realdata")
    if not folder.is_dir():
        pytest.skip("no real media here (set FASTAV_REALDATA)")
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small made data set: 48 training and 16 test clips of real H.264 and AAC."""
    from fastav.__main__ import main

    folder = tmp_path_factory.mktemp("made")
    assert main(["synth", str(folder), "--train", "48", "--test", "16", "--workers", "2"]) == 0
    return folder / "manifest.parquet"


# A model of some ten thousand parameters: the tests are about what happens around it.
TOWER = (
    "{patch_size = 16, embed_dim = 16, depth = 2, num_heads = 2, class_token = false, "
    "global_pool = 'avg', fc_norm = false}"
)
TINY = [
    "--sampling.frames", "2", "--sampling.image_size", "32", "--sampling.eval_windows", "[0]",
    "--model.video.name", "vit_tiny_patch16_224", "--model.video.args", TOWER,
    "--model.audio.name", "vit_tiny_patch16_224", "--model.audio.args", TOWER,
    "--train.batch", "8", "--train.epochs", "2", "--train.eval_every", "0", "--log.every", "1", "--log.trackers", "[]",
    "--optim.lr", "1e-3", "--optim.clip_norm", "1.0", "--loading.max_broken", "0.5",
]  # fmt: skip


@pytest.fixture
def tiny(made: Path):
    """Returns the overrides of a tiny run: `tiny("late", out)` plus any others."""

    def words(kind: str, out: Path, *more: str) -> list[str]:
        fusion = ["--model.fusion.kind", kind, *(["--model.fusion.start", "1"] if kind == "bottleneck" else [])]
        return [*TINY, *fusion, "--data.manifest", str(made), "--out", str(out), *more]

    return words
