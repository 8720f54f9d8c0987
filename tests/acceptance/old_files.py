"""Files of an older version: what its code makes, from its own folder, for `old_rows.py` to compare.

The code is taken from the history. It is only called by its command lines and by `from fastav import AVModel`, so that
it makes no difference where modules lie.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.acceptance.rows import Failed, call, last_step

OLD = "2eb522e4c3868a4321074a090b285f9d11de5a8b"
REPOSITORY = Path(__file__).resolve().parents[2]
RUNS = ("video", "audio", "score", "whole", "packed")
STOP_AFTER = 6  # of 24 steps
PACKING = ("--shard-mib", "1", "--workers", "1")

# One thread, fp32 and deterministic kernels; all that a checkpoint can hold: EMA, a best evaluation, mixup, a schedule.
TINY = """base = {base}
out = {out}
[data]
manifest = {manifest}
[sampling]
frames = 2
image_size = 32
eval_windows = [0]
mixup = 0.3
[model.video.args]
depth = 2
embed_dim = 32
[model.audio.args]
depth = 2
embed_dim = 32
[optim]
ema = 0.9
[train]
batch = 8
epochs = {epochs}
eval_every = 3
threads = 1
seed = 3
deterministic = true
[loading]
workers = 1
[saving]
every = 5
keep = 2
[log]
every = 1
trackers = []
"""
FUSION = '[model.fusion]\nkind = "bottleneck"\nstart = 1\ntokens = 4\n'
KINDS = {
    "video": '[model.fusion]\nkind = "video"\n',
    "audio": '[model.fusion]\nkind = "audio"\n',
    "score": '[model.fusion]\nkind = "score"\n[model.video]\ninit_from = "video"\n[model.audio]\ninit_from = "audio"\n',
    "whole": FUSION,
    "packed": FUSION,
}
EPOCHS = {"video": 1, "audio": 1, "score": 0, "whole": 6, "packed": 2}

# What a model says of made input, and all of its numbers, as digests.
ASK = """
import hashlib, sys, torch
from fastav import AVModel
torch.set_num_threads(1)
model = AVModel.from_pretrained(sys.argv[1]).eval()
inputs, made = model.inputs, torch.Generator().manual_seed(5)
size = inputs.image_size
frames = torch.randint(0, 256, (2, inputs.frames, 3, size, size), dtype=torch.uint8, generator=made)
mel = 20 * torch.randn((2, 1, 1, inputs.num_mels, inputs.window), generator=made) - 40
with torch.no_grad():
    logits = model(frames, mel)
assert logits.shape == (2, len(model.classes)) and bool(torch.isfinite(logits).all())
for name, tensor in [*sorted(model.state_dict().items()), ("logits", logits)]:
    print(name, hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
print(*model.classes)
"""

# Where Python takes the package from.
WHERE = """
import importlib.util, os, fastav
kernels = importlib.util.find_spec("fastav_kernels")
print(*(os.path.realpath(file) for file in [fastav.__file__, *([kernels.origin] if kernels else [])]), sep="\\n")
"""


@dataclass(frozen=True)
class Code:
    """The package as it lies in one tree."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Where Python finds this package before any other."""
        return {"PYTHONPATH": os.pathsep.join([str(self.root), str(self.root / "kernels")])}

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs Python in the tree."""
        return call(sys.executable, *words, env=self.environment, cwd=self.root, timeout=600)

    def fastav(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Runs a verb."""
        return self.python("-m", "fastav", *map(str, words))

    def start(self, *words: object, **options: Any) -> subprocess.Popen[str]:
        """Starts a verb, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "fastav", *map(str, words)], cwd=self.root, text=True, start_new_session=True,
            env={**os.environ, **self.environment}, **options,
        )  # fmt: skip

    def check_place(self) -> None:
        """Refuses to go on where Python would take the package from elsewhere."""
        for file in self.python("-c", WHERE).stdout.splitlines():
            inside = Path(file).relative_to(self.root).parts if self.root in Path(file).parents else ("acceptance",)
            if inside[0] == "acceptance":
                raise Failed(f"Python in {self.root} takes the package from {file}")


@dataclass(frozen=True)
class Case:
    """What every check is given: both codes, what the old one made, and a folder for what the new one makes."""

    old: Code
    new: Code
    made: Path
    ours: Path

    def run(self, name: str) -> Path:
        """A run of the old code."""
        return self.made / "runs" / name

    def recipe(self, name: str) -> Path:
        """A run's recipe."""
        return self.made / f"{name}.toml"

    def copied(self, what: str, name: str) -> Path:
        """A copy of something that the old code made, which may be changed."""
        shutil.copytree(self.made / what, self.ours / name)
        return self.ours / name


def export_tree(folder: Path) -> Path:
    """Writes the tree of the old commit into a folder."""
    git = ["git", "-C", str(REPOSITORY)]
    known = subprocess.run([*git, "cat-file", "-e", f"{OLD}^{{commit}}"], capture_output=True, text=True)
    if known.returncode:
        raise Failed(
            f"the history here lacks commit {OLD}, whose files are to be read; in a shallow clone run "
            f"`git fetch --unshallow` first ({known.stderr.strip()})"
        )
    archive = subprocess.run([*git, "archive", "--format=tar", OLD], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def make(case: Case) -> None:
    """Makes everything with the old code."""
    old, made = case.old, case.made
    made.mkdir()
    synth = made / "synth"
    old.fastav("synth", synth, "--train", "32", "--test", "16", "--size", "64", "--workers", "1")
    arrange(synth, made / "media")
    old.fastav("index", "folder", made / "media", "--out", made / "folder.parquet", "--workers", "1")
    old.fastav("pack", synth / "manifest.parquet", made / "pack", *PACKING)
    kill_pack(case)
    for name in RUNS:
        write_recipe(case, name)
    old.fastav("train", *(case.recipe(name) for name in RUNS))
    stop_run(case)
    old.fastav("evaluate", case.run("whole"), made / "folder.parquet", "train")
    shown = old.fastav("recipe", "show", case.run("whole") / "recipe.toml").stdout
    (made / "shown.toml").write_text(shown)
    for name in ("whole", "stopped"):
        old.fastav("export", "weights", case.run(name), "--out", made / f"exported_{name}")
    (made / "asked.txt").write_text(old.python("-c", ASK, str(case.run("whole") / "model")).stdout)
    shutil.copytree(made / "runs", made / "reported", ignore=shutil.ignore_patterns("checkpoints", "stopped"))
    old.fastav("report", made / "reported", "--clips", "2")


def arrange(synth: Path, media: Path) -> None:
    """Copies a made data set into a folder for each split and class, as `index folder` reads them."""
    for row in pq.read_table(synth / "manifest.parquet", columns=["video", "split", "labels"]).to_pylist():
        if row["video"]:
            folder = media / row["split"] / row["labels"][0]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(synth / row["video"], folder)


def write_recipe(case: Case, name: str) -> None:
    """Writes the recipe of a run, on top of one that lies in the old tree."""
    manifest = case.made / ("pack" if name == "packed" else "synth") / "manifest.parquet"
    places = {
        "base": case.old.root / "launch" / "recipes" / "quickstart.toml", "out": case.run(name), "manifest": manifest,
    }  # fmt: skip
    quoted = {key: json.dumps(str(value)) for key, value in places.items()}
    case.recipe(name).write_text(TINY.format(**quoted, epochs=EPOCHS[name]) + KINDS[name])


def kill_pack(case: Case) -> None:
    """Leaves `half`, a pack that was killed after its third shard."""
    half = case.made / "half"
    words = ("pack", case.made / "synth" / "manifest.parquet", half, *PACKING)
    process = case.old.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait(process, lambda: len(list(half.glob("parts/[0-9]*.parquet"))) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if (half / "manifest.parquet").exists():
        raise Failed("the pack was finished before it could be killed")


def stop_run(case: Case) -> None:
    """Leaves `stopped`, the run `whole` as SIGTERM has ended it half-way."""
    stopped = case.run("stopped")
    process = case.old.start("train", case.recipe("whole"), "--out", stopped, stderr=subprocess.PIPE)
    wait(process, lambda: last_step(stopped) >= STOP_AFTER)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=300)
    if process.returncode != 75:
        raise Failed(f"SIGTERM ended the run with {process.returncode}, not 75: {log[-800:]}")


def wait(process: subprocess.Popen[str], come: Callable[[], bool]) -> None:
    """Waits until something has come while a process runs."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if come():
            return
        time.sleep(0.005)
    process.kill()
    raise Failed(f"{process.args!r}: ended before it was to be stopped")
