"""What the Dockerfile promises, read from it; `python -m tests.acceptance image` builds it."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest
import yaml

from tests import ROOT
from tests.acceptance.image_rows import pip_settings

FILE = ROOT / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"


@dataclass(frozen=True)
class Line:
    """An instruction, such as `RUN` and the text behind it."""

    verb: str
    text: str


def stages(text: str) -> list[list[Line]]:
    """The instructions of each stage; before the first `FROM`, those of the file."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M))
    found: list[list[Line]] = [[]]
    for line in filter(None, map(str.strip, joined.splitlines())):
        verb, _, rest = line.partition(" ")
        found += [[]] if verb == "FROM" else []
        found[-1].append(Line(verb, " ".join(rest.split())))
    return found


@pytest.fixture(scope="module")
def head() -> list[Line]:
    return stages(FILE.read_text())[0]


@pytest.fixture(scope="module")
def last() -> list[Line]:
    return stages(FILE.read_text())[-1]


def texts(stage: list[Line], verb: str) -> list[str]:
    return [line.text for line in stage if line.verb == verb]


def environment(stage: list[Line]) -> dict[str, str]:
    return dict(pair.split("=", 1) for text in texts(stage, "ENV") for pair in text.split())


def test_hadolint_finds_nothing_and_finds_what_is_broken(tmp_path):
    def lint(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "Dockerfile").write_text(text)
        return subprocess.run([HADOLINT, str(tmp_path / "Dockerfile")], capture_output=True, text=True)

    text = FILE.read_text()
    done = lint(text)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""
    assert "DL3025" in lint(text.replace('ENTRYPOINT ["tini", "--"]', "ENTRYPOINT tini --")).stdout
    assert "DL3015" in lint(text.replace("--no-install-recommends", "")).stdout
    assert lint(text.replace("WORKDIR /opt", "WORKDIRR /opt")).returncode != 0


def test_the_base_is_an_argument_of_both_stages(head):
    assert "BASE=debian:bookworm-slim" in texts(head, "ARG")
    froms = [line.text for stage in stages(FILE.read_text()) for line in stage if line.verb == "FROM"]
    assert [text.split()[0] for text in froms] == ["${BASE}"] * 2


def test_it_runs_as_the_user_of_the_kubernetes_job(last):
    *_, job = yaml.safe_load_all((ROOT / "launch" / "k8s" / "train.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    asked = pod["securityContext"]
    assert texts(last, "USER") == [f"{asked['runAsUser']}:{asked['runAsGroup']}"], "numbers: runAsNonRoot needs them"
    (container,) = pod["containers"]
    assert "command" not in container, "it would replace the entrypoint, and nobody would reap or pass signals on"
    (folder,) = texts(last, "WORKDIR")
    assert PurePosixPath(folder).is_absolute()
    assert container["args"][0] == "launch/node.sh", "found from the working folder, where the source is"
    assert ". ." in texts(last, "COPY")
    assert (ROOT / "launch" / "node.sh").stat().st_mode & 0o111


def test_signals_arrive(last):
    entrypoint = json.loads(*texts(last, "ENTRYPOINT"))
    assert entrypoint[0] == "tini"
    assert "-g" not in entrypoint, "torchrun would be told before its ranks, and kill them after 30 s"
    assert isinstance(json.loads(*texts(last, "CMD")), list)


def test_a_gpu_and_its_video_decoder_are_asked_for(last):
    found = environment(last)
    assert found["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert set(found["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == {"compute", "video", "utility"}


def test_any_user_has_a_home_that_can_be_written(last):
    found = environment(last)
    assert found["USER"], "Python asks for the name of a user who may not be in /etc/passwd"
    assert any(f"chmod 1777 {found['HOME']}" in text for text in texts(last, "RUN"))


def test_doctor_is_asked_while_it_is_built_and_by_the_user(last):
    verbs = [(line.verb, line.text) for line in last]
    asked = verbs.index(("RUN", "fastav doctor --no-gpu"))
    assert asked > [verb for verb, _ in verbs].index("USER")
    assert ("COPY", ". .") in verbs[:asked]


def test_the_last_stage_has_a_c_compiler_and_no_other_build_tool(last):
    installed = {word for text in texts(last, "RUN") if "apt-get install" in text for word in text.split()}
    assert {"gcc", "libpython3-dev", "python3", "tini"} <= installed, "Triton compiles its launchers"
    assert not {"build-essential", "g++", "make", "cmake", "git", "python3-pip", "python3-venv", "clang"} & installed
    assert not any("pip install" in text for text in texts(last, "RUN"))


def test_a_change_of_the_source_leaves_the_dependencies_alone():
    _, dependencies, last = stages(FILE.read_text())
    assert texts(dependencies, "COPY") == ["pyproject.toml constraints.txt ./"]
    (install,) = [text for text in texts(dependencies, "RUN") if "pip install" in text]
    parts = [part for part in install.split("&&") if "pip install" in part]
    assert all("--constraint constraints.txt" in part for part in parts)
    copies = texts(last, "COPY")
    assert copies.index("--from=dependencies /opt/venv /opt/venv") < copies.index(". .")
    roots = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["where"]
    packages = {path.parent.relative_to(ROOT) for root in roots for path in (ROOT / root).glob("fastav*/__init__.py")}
    assert len(packages) == len(roots), "each has one"
    assert all(f"{package}/__init__.py" in install for package in packages), "stand-ins of all that is installed"


def test_an_index_of_ones_own_is_in_no_layer():
    for stage in stages(FILE.read_text()):
        for text in texts(stage, "RUN"):
            assert ("pip install" in text) == ("--mount=type=secret,id=pip,target=/etc/pip.conf" in text)
        assert not any("index" in text.lower() for verb in ("ARG", "ENV", "COPY") for text in texts(stage, verb))


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: patterns start at the root, and a folder's are its files'."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert not any(pattern.startswith("!") for pattern in patterns), "not read here"
    parents = [PurePosixPath(path), *PurePosixPath(path).parents][:-1]
    for pattern in patterns:
        anywhere = pattern.removeprefix("**/")
        for parent in parents:
            deep = len(parent.parts) == len(PurePosixPath(pattern).parts)
            if (deep and fnmatch.fnmatch(str(parent), pattern)) or (
                anywhere != pattern and fnmatch.fnmatch(parent.name, anywhere)
            ):
                return True
    return False


def test_what_is_copied_is_there_and_reaches_the_build():
    for stage in stages(FILE.read_text())[1:]:
        for text in texts(stage, "COPY"):
            *sources, _ = [word for word in text.split() if not word.startswith("--")]
            for source in sources if "--from" not in text else ():
                assert (ROOT / source).exists(), source
                assert source == "." or not ignored(source), source
    folders = ("fastav", "kernels", "launch", "benchmarks", "tests", "docs")
    kept = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = [path for path in kept if "__pycache__" not in path.parts]
    assert len(kept) > 200
    lost = [str(path) for path in kept if ignored(path.relative_to(ROOT).as_posix())]
    assert not lost
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "Makefile", "Dockerfile"):
        assert not ignored(name), name


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", "runs/first/status.json", "data/synth/manifest.parquet", "fastav.egg-info/top",
     "acceptance/image/storage", "fastav/__pycache__/clip.cpython-311.pyc", ".coverage.host.1", ".hypothesis/x"],
)  # fmt: skip
def test_what_a_checkout_gathers_stays_out(path):
    assert ignored(path)


def test_pips_settings_reach_the_build(tmp_path):
    (tmp_path / "index" / "simple").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    listed = "\n".join([
        "global.cert='/etc/ca.pem'",
        f"global.extra-index-url='file://{tmp_path}/index/simple https://a.invalid/simple'",
        "global.find-links='/no/such/folder'", f":env:.find-links='{tmp_path}/wheels'", ":env:.cache-dir='/elsewhere'",
    ])  # fmt: skip
    config, volumes = pip_settings(listed)
    assert config.splitlines() == [
        "[global]", "cert = /run/pip-cert.pem",
        f"extra-index-url = file://{tmp_path}/index/simple https://a.invalid/simple", f"find-links = {tmp_path}/wheels",
    ]  # fmt: skip
    folders = [f"{tmp_path}/index", f"{tmp_path}/wheels"]
    assert volumes == ["/etc/ca.pem:/run/pip-cert.pem:ro", *(f"{folder}:{folder}:ro" for folder in folders)]
    assert pip_settings("") == ("[global]\n", [])


@pytest.mark.skipif(shutil.which("gcc") is None, reason="wants a C compiler")
def test_the_check_of_tritons_compiler_can_fail():
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.launcher_stub"], cwd=ROOT, env={"CC": "false", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "returned non-zero exit status 1" in done.stderr
