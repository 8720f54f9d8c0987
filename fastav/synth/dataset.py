"""Makes a small data set of real mp4 files on which only fusion can win.

Birds with four plumage patterns and four calls. Task `pairs`: each pattern and each call is shared by exactly
two of the eight classes, and every test video stream stands with both its calls, every test audio stream with
both its patterns: by construction, seeing alone or hearing alone is right in half the test clips at most.
Task `modular`: the class is (pattern + call) mod 4: one modality says nothing, nor does any sum of what each
says.

Files are H.264 (high profile, B-frames, GOP 250) and AAC (44.1 kHz stereo), 4 s at 25 frames a second. A few
training clips have no sound, a few break while they are decoded, and two files cannot be opened at all.
The same seed and library versions give the same bytes on CPUs of one kind: streams are encoded alike on every x86-64
machine, but sounds are drawn by numpy, whose last bits differ between instruction sets.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.markup import escape

from fastav.core.atomic_files import write_text
from fastav.core.config import Config, NonNegativeInt, PositiveInt
from fastav.core.errors import FastavError, UserError
from fastav.core.machine import num_cores
from fastav.core.progress import progress
from fastav.data.clip import Clip
from fastav.data.manifest import Manifest, Problem
from fastav.datasets.build_manifest import build_manifest
from fastav.synth.render import (
    CALLS,
    PATTERNS,
    Damage,
    OutputFile,
    RenderJob,
    StreamSpec,
    damage,
    leave_interrupts_to_the_parent,
    run_job,
)

FORMAT = 1  # raised whenever the same settings make other clips
NUM_RECORDERS = {"train": 16, "test": 5}
SILENT_SHARE, BROKEN_SHARE = 0.02, 0.01
MIN_FOR_BROKEN = 24  # below, a single broken clip is more than the share a run tolerates by default
UNREADABLE: tuple[Damage, ...] = ("cut", "empty")
HABITATS = ("forest", "marsh", "meadow", "coast")


class Synth(Config, frozen=True):
    """What is made.

    Attributes:
        task: `pairs` (8 classes) or `modular` (4 classes).
        train: Training clips.
        test: Test clips; a multiple of the combinations of pattern and call (8 or 16).
        seed: Another seed is another data set.
        width: Pixels, even.
        height: Pixels, even.
    """

    task: Literal["pairs", "modular"] = "pairs"
    train: PositiveInt = 384
    test: PositiveInt = 160
    seed: NonNegativeInt = 0
    width: PositiveInt = 96
    height: PositiveInt = 96


class Combination(NamedTuple):
    """A pattern and a call that occur together, and the class that they make_dataset."""

    pattern: int
    call: int
    label: str


def combinations(task: str) -> tuple[Combination, ...]:
    """Returns what occurs together: `pairs` the edges of a ring of patterns and calls, `modular` everything."""
    if task == "pairs":
        edges = [(k // 2, (k + 1) // 2 % len(CALLS)) for k in range(2 * len(PATTERNS))]
        return tuple(Combination(p, c, f"{PATTERNS[p]} {CALLS[c]}") for p, c in edges)
    num = len(CALLS)
    return tuple(Combination(p, c, HABITATS[(p + c) % num]) for p in range(len(PATTERNS)) for c in range(num))


def classes(task: str) -> tuple[str, ...]:
    """Returns the class names of a task, in order."""
    return tuple(dict.fromkeys(c.label for c in combinations(task)))


class Layout(NamedTuple):
    """What is going to be written: the jobs, the unprobed clips of their files, and what breaks afterwards."""

    jobs: list[RenderJob]
    clips: list[Clip]
    breaks: dict[Path, Damage]


def lay_out(settings: Synth, out: Path) -> Layout:
    """Decides which stream goes into which file; draws nothing yet.

    Args:
        settings: What is made.
        out: The data set's folder.

    Returns:
        Jobs, clips (those of the `UNREADABLE` files are no part of `settings.train`), and the files that are
        to be broken once they are in the manifest, and how.
    """
    train, test = _train(settings, out), _test(settings, out)
    return Layout(train.jobs + test.jobs, train.clips + test.clips, train.breaks)


def _clip(path: Path, label: str, split: str, recorder: int) -> Clip:
    """Returns the unprobed row of a file; recorders are numbered through both splits."""
    number = recorder + 1 + (NUM_RECORDERS["train"] if split == "test" else 0)
    group = f"recorder-{number:02}"
    return Clip(path.stem, video=path, audio=path, labels=(label,), split=split, group=group)


def _path(out: Path, split: str, number: int, label: str) -> Path:
    """Returns where a clip goes; the name says what it is."""
    return out / split / f"{split}-{number:05}-{label.replace(' ', '-')}.mp4"


def _stream(settings: Synth, split: str, kind: str, content: int, recorder: int, number: int) -> StreamSpec:
    """Returns one stream: recorders and streams of both splits and kinds have keys of their own."""
    part = ("train", "test").index(split)
    purpose = ("recorder", "video", "audio").index(kind)
    return StreamSpec(content, (settings.seed, 0, part, recorder), (settings.seed, purpose, part, number))


def _harm(settings: Synth) -> tuple[set[int], dict[int, Damage]]:
    """Draws which training clips have no sound, and which are broken and how."""
    order = np.random.default_rng((settings.seed, 3)).permutation(settings.train).tolist()
    num_silent = max(1, round(SILENT_SHARE * settings.train)) if settings.train > 1 else 0
    num_broken = max(1, round(BROKEN_SHARE * settings.train)) if settings.train >= MIN_FOR_BROKEN else 0
    kinds: tuple[Damage, ...] = ("blank", "torn")
    broken = {row: kinds[i % 2] for i, row in enumerate(order[num_silent : num_silent + num_broken])}
    return set(order[:num_silent]), broken


def _train(settings: Synth, out: Path) -> Layout:
    """Every clip has streams of its own."""
    table = combinations(settings.task)
    silent, broken = _harm(settings)
    jobs, clips, breaks = [], [], {}
    for i in range(settings.train + len(UNREADABLE)):
        pattern, call, label = table[i % len(table)]
        recorder = i // len(table) % NUM_RECORDERS["train"]
        path = _path(out, "train", i + 1, label)
        video = _stream(settings, "train", "video", pattern, recorder, i)
        audio = () if i in silent else (_stream(settings, "train", "audio", call, recorder, i),)
        harm = UNREADABLE[i - settings.train] if i >= settings.train else ""
        output = OutputFile(str(path), 0, 0 if audio else None, harm)
        jobs.append(RenderJob((video,), audio, (output,), (settings.width, settings.height)))
        clips.append(_clip(path, label, "train", recorder))
        if i in broken:
            breaks[path] = broken[i]
    return Layout(jobs, clips, breaks)


def _test(settings: Synth, out: Path) -> Layout:
    """Clips come in sets: a video stream of each pattern and an audio stream of each call, muxed in every way.

    So each video stream stands in equally many clips of each class that shares its pattern, with the same
    packets, and likewise each audio stream: whatever a single modality answers, it is right in at most one of
    2 (`pairs`), in exactly one of 4 (`modular`).
    """
    table = combinations(settings.task)
    jobs, clips = [], []
    for part in range(settings.test // len(table)):
        recorder, first = part % NUM_RECORDERS["test"], part * len(PATTERNS)
        videos, audios = (
            tuple(_stream(settings, "test", kind, n, recorder, first + n) for n in range(len(names)))
            for kind, names in (("video", PATTERNS), ("audio", CALLS))
        )
        outputs = []
        for k, (pattern, call, label) in enumerate(table):
            path = _path(out, "test", part * len(table) + k + 1, label)
            outputs.append(OutputFile(str(path), pattern, call))
            clips.append(_clip(path, label, "test", recorder))
        jobs.append(RenderJob(videos, audios, tuple(outputs), (settings.width, settings.height)))
    return Layout(jobs, clips, {})


def _run(jobs: list[RenderJob], workers: int, console: Console) -> None:
    """Runs the jobs, in this process when there is one worker only."""
    with progress(console, "making", sum(len(job.outputs) for job in jobs), "files") as advance:
        if workers == 1:
            for job in jobs:
                advance(run_job(job))
            return
        # A fork server loads the drawing code once; a fork of this process would inherit torch's threads.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["fastav.synth.render"])
        with ProcessPoolExecutor(workers, context, leave_interrupts_to_the_parent) as pool:
            futures = [pool.submit(run_job, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    advance(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _note(settings: Synth, complete: bool) -> str:
    """Returns the text of `synth.json`."""
    note = {
        "format": FORMAT,
        "complete": complete,
        "settings": msgspec.to_builtins(settings),
        "classes": list(classes(settings.task)),
        "versions": {name: importlib.metadata.version(name) for name in ("av", "numpy")},
    }
    return json.dumps(note, indent=2) + "\n"


def _found(out: Path, settings: Synth, *, force: bool) -> bool:
    """Looks at what is in the folder.

    Returns:
        Whether the same data set was completed there and is not to be overwritten.

    Raises:
        UserError: The folder holds something else and `force` is not set.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; expected a folder to write the data set into")
    if force or not out.exists() or not any(out.iterdir()):
        return False
    way_out = "give another folder, or --force"
    try:
        note = json.loads((out / "synth.json").read_text(encoding="utf-8"))
        there, version, complete = dict(note["settings"]), note["format"], bool(note["complete"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: is not empty and holds no made data set; {way_out}") from None
    wanted = msgspec.to_builtins(settings)
    differs = [f"{k} {there.get(k)} in the folder, {v} requested" for k, v in wanted.items() if there.get(k) != v]
    if version != FORMAT:
        differs.append(f"format {version} there, {FORMAT} now")
    if differs:
        raise UserError(f"{out}: holds another made data set ({'; '.join(differs)}); {way_out}")
    return complete


def make_dataset(
    out: Path, settings: Synth, *, workers: int = 0, force: bool = False, console: Console | None = None
) -> Manifest:
    """Writes the data set: mp4 files, `manifest.parquet` and `synth.json`.

    Args:
        out: Folder; made when missing.
        settings: What is made.
        workers: Processes; 0 for one a core.
        force: Overwrites what is in the folder; only files of a made data set are removed.
        console: Where to print; standard output by default.

    Returns:
        The manifest. Where the same data set is already there it is only opened.

    Raises:
        UserError: Settings that cannot be met, or a folder with something else in it.
        FastavError: A file cannot be written.
    """
    console = console or Console()
    _check(settings)
    planned = lay_out(settings, out)
    files = [Path(output.path) for job in planned.jobs for output in job.outputs]
    manifest = out / "manifest.parquet"
    if _found(out, settings, force=force) and all(path.exists() for path in (manifest, *files)):
        console.print(
            f"{escape(str(out))}: the same data set is already there; nothing to do", highlight=False, soft_wrap=True
        )
        return Manifest.open(manifest)
    started = time.monotonic()
    try:
        made, problems = _write(planned, out, manifest, settings, workers, console)
    except OSError as error:
        raise FastavError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from error
    unreadable = sum(problem.kind == "unreadable" for problem in problems)
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    console.print(
        f"{escape(str(out))}: {settings.train} training and {settings.test} test clips of {len(made.classes)}"
        f" classes, {size_mb:.0f} MB, {time.monotonic() - started:.0f} s; on purpose, {len(planned.breaks)} break"
        f" while they are decoded and {unreadable} cannot be opened",
        highlight=False,
        soft_wrap=True,
    )
    return made


def _write(
    planned: Layout, out: Path, manifest: Path, settings: Synth, workers: int, console: Console
) -> tuple[Manifest, list[Problem]]:
    """Writes everything; `synth.json` says in the end that it is complete."""
    for split in ("train", "test"):
        (out / split).mkdir(parents=True, exist_ok=True)
        for old in (out / split).glob(f"{split}-?????-*.mp4*"):
            old.unlink()
    write_text(out / "synth.json", _note(settings, complete=False))
    _run(planned.jobs, workers or num_cores(), console)
    metadata = {name: str(value) for name, value in msgspec.to_builtins(settings).items()}
    made, problems = build_manifest(
        planned.clips, manifest, workers=workers, metadata={"source": "fastav synth", **metadata}, console=console
    )
    # Indexing decodes every file, so a file that is to stay in the manifest goes bad only now.
    for path, kind in planned.breaks.items():
        path.write_bytes(damage(path.read_bytes(), kind))
    write_text(out / "synth.json", _note(settings, complete=True))
    return made, problems


def _check(settings: Synth) -> None:
    """Raises UserError where the settings cannot be met."""
    num = len(combinations(settings.task))
    if settings.train < num:
        raise UserError(f"--train {settings.train}: expected at least {num}, one of each combination")
    if settings.test % num:
        nearest = max(num, round(settings.test / num) * num)
        raise UserError(
            f"--test {settings.test}: expected a multiple of {num} (every stream meets all its partners);"
            f" the nearest is {nearest}"
        )
    for side in (settings.width, settings.height):
        if side % 2 or not 48 <= side <= 1024:
            raise UserError(f"--size {settings.width}x{settings.height}: expected even numbers of 48 to 1024")
