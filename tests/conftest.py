"""Fixtures that several test files share."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT, SHARED

# Threads of PyTorch that wait for one another at full speed take the cores from the other test processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Files of minutes each, the longest first: two processes share the files out in this order, and end together.
LONG = (
    "test_readme", "pack/test_build", "model/test_compiled_graph", "datasets/test_build_manifest", "test_train",
    "benchmarks/test_train_and_scale", "media/test_fuzz", "benchmarks/test_suites", "launch/test_scripts",
    "kernels/test_bottleneck_attention",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take long first; the order within each stays."""
    places = {ROOT / "tests" / f"{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def shared_field() -> Path:
    """The folder of files that people's own recordings stand for; tests that want it skip where it is absent."""
    folder = SHARED / "field"
    if not folder.is_dir():
        pytest.skip("no files from the field here")
    return folder


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real media; tests that want it skip where it is absent."""
    folder = Path(os.environ.get("FASTAV_REALDATA") or SHARED / "realdata")
    if not folder.is_dir():
        pytest.skip("no real media here (set FASTAV_REALDATA)")
    return folder


def shared(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder that the first test process to come makes, and that all of them use."""
    base = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each of the processes has a folder of its own in it
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed over it
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small made data set: 48 training and 16 test clips of real H.264 and AAC."""
    from fastav.__main__ import main

    def make(folder: Path) -> None:
        assert main(["synth", str(folder), "--train", "48", "--test", "16", "--workers", "2"]) == 0

    return shared(tmp_path_factory, "made", make) / "manifest.parquet"


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, made: Path) -> Path:
    """The manifest of a pack of that data set: as good to train on, and read at a fraction of the cost."""
    from fastav.__main__ import main

    def make(folder: Path) -> None:
        assert main(["pack", str(made), str(folder), "--workers", "2"]) == 0

    return shared(tmp_path_factory, "packed", make) / "manifest.parquet"


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


def tiny_words(manifest: Path) -> Callable[..., list[str]]:
    """Returns a function that makes the overrides of a tiny run: `words("late", out)` plus any others."""

    def words(kind: str, out: Path, *more: str) -> list[str]:
        fusion = ["--model.fusion.kind", kind, *(["--model.fusion.start", "1"] if kind == "bottleneck" else [])]
        return [*TINY, *fusion, "--data.manifest", str(manifest), "--out", str(out), *more]

    return words


@pytest.fixture
def tiny(made: Path) -> Callable[..., list[str]]:
    """Returns `tiny_words` of the made files themselves."""
    return tiny_words(made)


@pytest.fixture
def tiny_packed(packed: Path) -> Callable[..., list[str]]:
    """Returns `tiny_words` of their pack, for tests that are not about decoding."""
    return tiny_words(packed)
