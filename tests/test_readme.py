"""Every command of the README and of docs/ runs as it stands; training is cut short by overrides at the end."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import ROOT
from tests.helpers.media import write_media

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = ["--train.epochs", "0.5", "--train.eval_every", "0", "--train.batch", "4"]
# `make` is what runs this test; several GPUs are not at hand.
ELSEWHERE = (
    "make quickstart",
    "make test",
    "make acceptance",
    "accelerate launch --config_file launch/accelerate/gpu_8",
)


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.S)


def commands(page: str = README) -> list[str]:
    lines = [line for block in blocks("console", page) for line in block.splitlines() if line]
    return [line for line in lines if not line.startswith(ELSEWHERE)]


def test_the_readme_has_commands():
    assert any(line.startswith("fastav index") for line in commands())
    assert any(line.startswith("torchrun") for line in commands())


@pytest.fixture
def call(tmp_path):
    """Runs a line in a folder with a few clips of one's own."""
    for name in ("owl", "wren"):
        for number in range(2):
            wave_CS = np.random.default_rng(number).normal(0, 0.1, (2, 7 * 16_000)).astype(np.float32)
            file = tmp_path / "my" / "clips" / name / f"{number}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_media(file, frames=175, wave=wave_CS, rate=16_000)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    scripts = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(ROOT)  # the suites are run from the repository, and are not installed

    def run(line: str) -> None:
        words = ["env", *shlex.split(line)]
        if "train" in words or "fastav.train" in words:
            words += SHORT
        if "benchmarks" in words and "--paper" not in words:
            words += ["--quick", "--out", str(tmp_path / "result.json")]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=env)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"

    return run


@pytest.mark.timeout(600)
def test_every_command_of_the_readme_runs(call, tmp_path):
    for line in commands():
        call(line)
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mine" / "report.html").exists()


@pytest.mark.timeout(900)
def test_every_command_of_the_page_on_clusters_runs(call, tmp_path):
    call(next(line for line in commands() if line.startswith("fastav index")))
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert len(commands(page)) >= 3
    for line in commands(page):
        call(line)
    assert list((tmp_path / "runs" / "fsdp" / "exported").iterdir())
    for file in re.findall(r"launch/[\w/.-]+\.(?:yaml|sbatch|toml|json)", page + README):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("target", ["quickstart", "test", "acceptance"])
def test_the_make_targets_of_the_readme_exist(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md"])
def test_commands_that_need_a_cluster_are_at_least_well_formed(page):
    """Their syntax, the files and modules that they name, and the options of what is ours."""
    found = blocks("bash", (ROOT / page).read_text(encoding="utf-8"))
    for block in found:
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for file in re.findall(r"(?:launch|benchmarks|docs)/[\w/.-]+\.\w+", block):
            assert (ROOT / file).is_file(), file
        for module in re.findall(r"-m ((?:fastav|benchmarks)[\w.]*)", block):
            path = ROOT.joinpath(*module.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    assert found or page == "README.md"
