"""Every command of the README and of docs/ runs as it stands; training is cut short by overrides at the end."""

from __future__ import annotations

import importlib
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.__main__ import SUITES
from benchmarks.__main__ import main as benchmarks_main
from fastav.recipe.parse import load_recipe
from tests import ROOT
from tests.helpers import in_process
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


class Page:
    """Runs the lines of a page in a folder with a few clips of one's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("owl", "wren"):
            for number in range(2):
                wave_CS = np.random.default_rng(number).normal(0, 0.1, (2, 7 * 16_000)).astype(np.float32)
                file = folder / "my" / "clips" / name / f"{number}.mp4"
                file.parent.mkdir(parents=True, exist_ok=True)
                write_media(file, frames=175, wave=wave_CS, rate=16_000)
        (folder / "launch").symlink_to(ROOT / "launch")

    def run(self, line: str) -> None:
        """Runs verbs in this process, launchers in theirs; of benchmarks, which have tests of their own, the words."""
        words = shlex.split(line)
        if words[0] == "fastav":
            assert in_process.call([*words[1:], *(SHORT if words[1] == "train" else [])], self.folder) == 0, line
        elif words[:3] == ["python", "-m", "benchmarks"]:
            with in_process.restored():
                os.chdir(self.folder)
                read_benchmark(words[3:])
        else:
            self.start([*words, *(SHORT if "fastav.train" in words else [])])

    def start(self, words: list[str]) -> None:
        """Runs a line in a process, as a shell does."""
        scripts = Path(sys.executable).parent
        env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(ROOT)  # the suites are run from the repository, and are not installed
        done = subprocess.run(
            ["env", *words], cwd=self.folder, capture_output=True, text=True, timeout=240, env=env
        )  # `env` reads settings before the command
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-2000:]}"


def read_benchmark(words: list[str]) -> None:
    """Reads a suite's options and recipe; on paper it is so quick that it is run."""
    args = importlib.import_module(SUITES[words[0]][0]).arguments(words[1:])
    if "--paper" in words:
        assert benchmarks_main(words) == 0
    else:
        assert Path(load_recipe(args.recipe, args.overrides).data.manifest).is_file()


@pytest.fixture
def page(tmp_path):
    return Page(tmp_path)


def test_a_command_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(in_process, "main", lambda words: change(words) or 5)
    before = state()
    assert in_process.call(["train"], tmp_path) == 5
    assert state() == before


def change(words):
    """Does to the process whatever a verb may do."""
    os.environ["FASTAV_LEFT_BEHIND"] = "1"
    os.environ.pop("PATH")
    Path("here").mkdir()
    os.chdir("here")
    sys.argv.append("more")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    assert state() != words


def state():
    """What a verb might change."""
    return (
        dict(os.environ), Path.cwd(), list(sys.argv), signal.getsignal(signal.SIGTERM), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(), random.getstate(),
        np.random.get_state()[1].tolist(),
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_every_command_of_the_readme_runs(page, tmp_path):
    for line in commands():
        page.run(line)
    page.start(["fastav", "recipe", "show", "launch/recipes/small.toml"])  # the installed script is the same command
    for block in blocks("python"):
        with in_process.restored():
            os.chdir(tmp_path)
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "runs" / "mine" / "report.html").exists()


@pytest.mark.timeout(900)
def test_every_command_of_the_page_on_clusters_runs(page, tmp_path):
    page.run(next(line for line in commands() if line.startswith("fastav index")))
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert len(commands(text)) >= 3
    for line in commands(text):
        page.run(line)
    assert list((tmp_path / "runs" / "fsdp" / "exported").iterdir())
    for file in re.findall(r"launch/[\w/.-]+\.(?:yaml|sbatch|toml|json)", text + README):
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
