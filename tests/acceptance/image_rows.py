"""The row of the container image: built from the Dockerfile without docker, and used as its own user."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastav.data.manifest import Manifest
from fastav.synth.dataset import Synth
from tests.acceptance.rows import TINY, Failed, Result, fresh

_TOOLS = ("buildah", "debootstrap")
_SUITE = "bookworm"
_FREE_GIB = 8.0  # kept free; below it the build is stopped
_NEEDED_GIB = 35.0
# What pip's settings say of where packages come from; the others are this machine's own business.
_PIP_KEYS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "cert", "timeout",
             "default-timeout", "retries")  # fmt: skip
_CERT = "/run/pip-cert.pem"  # where the build sees it
_ALIEN = "12345:0"  # a user id that the image does not know, as OpenShift gives them
_RUN = (
    "run",
    "--hostname",
    "localhost",
)  # the name that buildah gives resolves to nothing, and ranks want one that does
_TESTS = ("tests/launch/test_image.py", "tests/launch/test_scripts.py", "tests/benchmarks/test_suites.py")
_REVISION = "f" * 40  # what an image is told of its commit
_TOLD = Path("runs/told")
_FIND_TOOLS = "for tool in g++ c++ clang make cmake git; do command -v $tool; done; true"


@dataclass(frozen=True)
class Store:
    """A folder of images and containers of its own.

    Attributes:
        words: buildah and the options that every call takes.
        environment: Of every call.
    """

    words: tuple[str, ...]
    environment: dict[str, str]

    def call(self, *words: str, expect: int = 0, timeout: float = 3600) -> str:
        """Runs a verb of buildah; returns what it printed.

        Raises:
            Failed: It ended with another code.
        """
        done = subprocess.run(
            [*self.words, *words], env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode != expect:
            told = f"{done.stdout[-1000:]}{done.stderr[-2000:]}"
            raise Failed(f"buildah {' '.join(words[:6])} ended with {done.returncode}, not {expect}: {told}")
        return done.stdout


@contextlib.contextmanager
def store(work: Path) -> Iterator[Store]:
    """Storage below a folder, on overlayfs where the kernel and the disk allow it; nothing of it is left.

    Raises:
        Failed: Tools, rights or disk are missing.
    """
    missing = [tool for tool in _TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        raise Failed(
            f"{', '.join(missing)} not found: apt-get install --no-install-recommends buildah debootstrap crun"
        )
    if os.geteuid() != 0:
        raise Failed("needs root: debootstrap and chroot isolation change the root folder")
    if _free_gib(work) < _NEEDED_GIB:
        raise Failed(f"needs {_NEEDED_GIB:.0f} GiB of free disk, {_free_gib(work):.0f} are free")
    (work / "tmp").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment |= {"TMPDIR": str(work / "tmp"), "BUILDAH_ISOLATION": "chroot"}
    stores = [
        Store(("buildah", "--root", f"{work}/storage", "--runroot", f"{work}/run", "--storage-driver", driver),
              environment)
        for driver in ("overlay", "vfs")
    ]  # fmt: skip
    try:
        for found in stores:
            if subprocess.run([*found.words, "images"], env=environment, capture_output=True).returncode == 0:
                yield found
                return
            shutil.rmtree(work / "storage", ignore_errors=True)
        raise Failed("buildah can use neither overlay nor vfs here")
    finally:
        for verb in ("umount", "rm"):
            subprocess.run([*found.words, verb, "--all"], env=environment, capture_output=True)
        subprocess.run(["umount", str(work / "storage" / "overlay")], capture_output=True)
        for name in ("storage", "run", "tmp", "base"):
            shutil.rmtree(work / name, ignore_errors=True)


def _free_gib(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 2**30


def pip_settings(listed: str) -> tuple[str, list[str]]:
    """Turns what `pip config list` says into (a pip.conf for the build, the volumes that it needs).

    Folders keep their paths; of an index the folder above it is mounted, as its pages may point beside themselves.
    """
    rows = [line.partition("=")[::2] for line in listed.splitlines() if "=" in line]
    found: dict[str, str] = {}
    for scope in ("global.", "install.", ":env:."):  # the later ones count for more
        for name, value in rows:
            key = name.removeprefix(scope)
            if name.startswith(scope) and key in _PIP_KEYS:
                found[key] = str(ast.literal_eval(value))
    volumes: list[str] = []
    if "cert" in found:
        volumes.append(f"{found['cert']}:{_CERT}:ro")
        found["cert"] = _CERT
    for key in ("index-url", "extra-index-url", "find-links"):
        for word in found.get(key, "").split():
            path = Path(unquote(urlsplit(word).path) if word.startswith("file:") else word)
            if path.is_absolute() and path.is_dir():
                folder = path if key == "find-links" else path.parent
                volumes.append(f"{folder}:{folder}:ro")
    lines = ["[global]", *(f"{key} = {' '.join(value.split())}" for key, value in found.items())]
    return "\n".join(lines) + "\n", list(dict.fromkeys(volumes))


def _build(images: Store, work: Path) -> str:
    """Builds base and image; returns the name of a container of it."""
    base = work / "base"
    command = ["debootstrap", "--variant=minbase", _SUITE, str(base)]
    if subprocess.run(command, stdout=(work / "debootstrap.log").open("w")).returncode:
        raise Failed(f"debootstrap: see {work}/debootstrap.log")
    scratch = images.call("from", "scratch").strip()
    images.call("add", scratch, str(base), "/")
    images.call("commit", "--disable-compression", "--rm", scratch, "localhost/fastav-base")
    shutil.rmtree(base)
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings, volumes = pip_settings(listed)
    (work / "tmp" / "pip.conf").write_text(settings)  # it may hold a password, and is removed with the folder
    command = [*images.words, "bud", "--isolation", "chroot", "--network", "host", "--layers=false",
               "--disable-compression", "--secret", f"id=pip,src={work}/tmp/pip.conf",
               *(word for volume in volumes for word in ("--volume", volume)),
               "--build-arg", "BASE=localhost/fastav-base", "--build-arg", f"REVISION={_REVISION}",
               "--tag", "localhost/fastav", "."]  # fmt: skip
    log = work / "build.log"
    with log.open("w") as file:
        build = subprocess.Popen(command, env=images.environment, stdout=file, stderr=subprocess.STDOUT)
        while build.poll() is None:
            time.sleep(1)
            if _free_gib(work) < _FREE_GIB:
                build.kill()
                raise Failed(f"less than {_FREE_GIB:.0f} GiB of disk left; see {log}")
    if build.returncode:
        raise Failed(f"the build ended with {build.returncode}: {log.read_text()[-1500:]}")
    return images.call("from", "localhost/fastav").strip()


def image(work: Path) -> Result:
    """The image, built by buildah on a debootstrap base: doctor, the quickstart's data, SIGTERM, tests inside."""
    fresh(work)
    with store(work.resolve()) as images:
        started = time.time()
        name = _build(images, work.resolve())
        figures: dict[str, object] = {"build_s": round(time.time() - started), "driver": images.words[-1]}
        mount = Path(images.call("mount", name).strip())
        size = subprocess.run(["du", "-sxk", str(mount)], capture_output=True, text=True).stdout.split()[0]
        figures["image_gib"] = round(int(size) / 2**20, 2)

        def inside(*words: str, user: str = "", expect: int = 0) -> str:
            return images.call(*_RUN, *(["--user", user] if user else []), name, "--", *words, expect=expect)

        figures["user"] = inside("id", "-u").strip()
        inside("fastav", "doctor", "--no-gpu")
        inside("fastav", "doctor", "--no-gpu", user=_ALIEN)
        figures["doctor_exit"] = 0  # `inside` fails on any other
        started = time.time()
        inside("fastav", "synth", "data/synth")  # as in the Makefile
        figures["synth_s"] = round(time.time() - started)
        made = mount / "opt/fastav/data/synth"
        figures["files"] = len(list(made.rglob("*.mp4")))  # two of them are broken from the start, and in no manifest
        figures["clips"] = len(Manifest.open(made / "manifest.parquet"))
        figures["triton"] = inside("python", "-m", "tests.helpers.launcher_stub").strip()
        inside("sh", "-c", 'python -m tests.helpers.launcher_stub && touch "$HOME/mine" data.txt', user=_ALIEN)
        figures["build_tools"] = inside("sh", "-c", _FIND_TOOLS).split()
        figures["index_in_a_layer"] = (mount / "etc/pip.conf").exists()
        figures["sigterm"] = _told_to_end(images, name, mount, work)
        environment = json.loads((mount / "opt/fastav" / _TOLD / "env.json").read_text())
        figures["revision"] = environment["git"]["commit"]
        tested = subprocess.run(
            [*images.words, *_RUN, name, "--", "python", "-m", "pytest", "-q", *_TESTS],
            env=images.environment, capture_output=True, text=True,
        )  # fmt: skip
        (work / "tests.log").write_text(tested.stdout + tested.stderr)
        figures |= {"tests_exit": tested.returncode, "tests": tested.stdout.strip().splitlines()[-1]}
    wanted = {"user": "1000", "build_tools": [], "index_in_a_layer": False, "sigterm": [75, "stopped"],
              "tests_exit": 0, "revision": _REVISION}  # fmt: skip
    good = all(figures[key] == value for key, value in wanted.items())
    return figures, good and figures["clips"] == Synth().train + Synth().test


def _told_to_end(images: Store, name: str, mount: Path, work: Path) -> list[object]:
    """Sends SIGTERM to the entrypoint in the middle of a run, as a cluster does; returns exit code and state."""
    entrypoint = json.loads(images.call("inspect", "--type", "container", name))["OCIv1"]["config"]["Entrypoint"]
    words = ["launch/node.sh", str(_TOLD), "launch/recipes/quickstart_video.toml", *TINY, "--train.epochs", "100",
             "--log.every", "1", "--train.threads", "1"]  # fmt: skip
    log = work / "told.log"
    with log.open("w") as file:
        command = [*images.words, *_RUN, name, "--", *entrypoint, *words]
        job = subprocess.Popen(command, env=images.environment, stdout=file, stderr=file)
        patience = threading.Timer(300, job.kill)
        patience.start()
        steps = mount / "opt/fastav" / _TOLD / "metrics.jsonl"
        while not steps.exists() and job.poll() is None:
            time.sleep(0.2)
        for process in _below(job.pid):
            if Path(f"/proc/{process}/comm").read_text().strip() == Path(entrypoint[0]).name:
                os.kill(process, signal.SIGTERM)
        code = job.wait()
        patience.cancel()
    if not steps.exists():
        return [code, f"no step was made: {log.read_text()[-1500:]}"]
    return [code, json.loads((steps.parent / "status.json").read_text())["state"]]


def _below(process: int) -> list[int]:
    """The processes that descend from one."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found[1:]


IMAGE_ROWS = {"image": image}
