"""Makes a small synthetic data set of mp4 files that can only be classified from video and audio together.

The clips show birds with one of four plumage patterns and one of four calls. Task `pairs`: each pattern and each call
belongs to exactly two of the eight classes. Each test video stream is combined with both of its calls, each test audio
stream with both of its patterns. So a model that uses one modality alone is right in at most half of the test clips.
Task `modular`: the class is (pattern + call) mod 4, so a single modality carries no information about the class, and
neither does a sum of two single-modality scores.

Files are H.264 (high profile, B-frames, GOP 250) and AAC (44.1 kHz stereo), 4 s at 25 frames per second. On purpose, a
few training clips have no audio, a few fail while they are decoded, and two files cannot be opened. The same seed and
library versions give the same bytes on CPUs of one kind: the encoders give the same bytes on every x86-64 machine, but
numpy computes the audio, and its last bits differ between instruction sets.
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
    ignore_interrupts,
    run_job,
)

FORMAT = 1  # increase whenever the same settings give different clips
NUM_RECORDERS = {"train": 16, "test": 5}
SILENT_SHARE, BROKEN_SHARE = 0.02, 0.01
MIN_FOR_BROKEN = 24  # with fewer clips, one broken clip exceeds the fraction that a run tolerates by default
UNREADABLE: tuple[Damage, ...] = ("cut", "empty")
HABITATS = ("forest", "marsh", "meadow", "coast")


class Synth(Config, frozen=True):
    """Settings of a synthetic data set.

    Attributes:
        task: `pairs` (8 classes) or `modular` (4 classes).
        train: Number of training clips.
        test: Number of test clips; a multiple of the number of combinations of pattern and call (8 or 16).
        seed: Each seed gives a different data set.
        width: Width of the pictures in pixels; even, 48 to 1024.
        height: Height of the pictures in pixels; even, 48 to 1024.
    """

    task: Literal["pairs", "modular"] = "pairs"
    train: PositiveInt = 384
    test: PositiveInt = 160
    seed: NonNegativeInt = 0
    width: PositiveInt = 96
    height: PositiveInt = 96


class Combination(NamedTuple):
    """A pattern and a call that occur together, and their class."""

    pattern: int
    call: int
    label: str


def combinations(task: str) -> tuple[Combination, ...]:
    """Returns the combinations of a task: for `pairs` the edges of a ring of patterns and calls, for `modular` all."""
    if task == "pairs":
        edges = [(k // 2, (k + 1) // 2 % len(CALLS)) for k in range(2 * len(PATTERNS))]
        return tuple(Combination(p, c, f"{PATTERNS[p]} {CALLS[c]}") for p, c in edges)
    num = len(CALLS)
    return tuple(Combination(p, c, HABITATS[(p + c) % num]) for p in range(len(PATTERNS)) for c in range(num))


def classes(task: str) -> tuple[str, ...]:
    """Returns the class names of a task, in order."""
    return tuple(dict.fromkeys(c.label for c in combinations(task)))


class Layout(NamedTuple):
    """The plan of a data set: the jobs, the unprobed clips of their files, and the files to damage afterwards."""

    jobs: list[RenderJob]
    clips: list[Clip]
    breaks: dict[Path, Damage]


def lay_out(settings: Synth, out: Path) -> Layout:
    """Plans which stream goes into which file; renders nothing.

    Args:
        settings: Settings of the data set.
        out: Folder of the data set.

    Returns:
        Jobs, clips (those of the `UNREADABLE` files do not count in `settings.train`), and the files to damage after
        the manifest is written, and how.
    """
    train, test = _train(settings, out), _test(settings, out)
    return Layout(train.jobs + test.jobs, train.clips + test.clips, train.breaks)


def _clip(path: Path, label: str, split: str, recorder: int) -> Clip:
    """Returns the unprobed clip of a file; recorders are numbered across both splits."""
    number = recorder + 1 + (NUM_RECORDERS["train"] if split == "test" else 0)
    group = f"recorder-{number:02}"
    return Clip(path.stem, video=path, audio=path, labels=(label,), split=split, group=group)


def _path(out: Path, split: str, number: int, label: str) -> Path:
    """Returns the path of a clip; the name has its split, number and label."""
    return out / split / f"{split}-{number:05}-{label.replace(' ', '-')}.mp4"


def _stream(settings: Synth, split: str, kind: str, content: int, recorder: int, number: int) -> StreamSpec:
    """Returns one stream; each recorder and each stream of each split and kind has its own random key."""
    part = ("train", "test").index(split)
    purpose = ("recorder", "video", "audio").index(kind)
    return StreamSpec(content, (settings.seed, 0, part, recorder), (settings.seed, purpose, part, number))


def _draw_damage(settings: Synth) -> tuple[set[int], dict[int, Damage]]:
    """Draws which training clips have no audio, and which are damaged and how."""
    order = np.random.default_rng((settings.seed, 3)).permutation(settings.train).tolist()
    num_silent = max(1, round(SILENT_SHARE * settings.train)) if settings.train > 1 else 0
    num_broken = max(1, round(BROKEN_SHARE * settings.train)) if settings.train >= MIN_FOR_BROKEN else 0
    kinds: tuple[Damage, ...] = ("blank", "torn")
    broken = {row: kinds[i % 2] for i, row in enumerate(order[num_silent : num_silent + num_broken])}
    return set(order[:num_silent]), broken


def _train(settings: Synth, out: Path) -> Layout:
    """Plans the training clips; each has its own streams."""
    table = combinations(settings.task)
    silent, broken = _draw_damage(settings)
    jobs, clips, breaks = [], [], {}
    for i in range(settings.train + len(UNREADABLE)):
        pattern, call, label = table[i % len(table)]
        recorder = i // len(table) % NUM_RECORDERS["train"]
        path = _path(out, "train", i + 1, label)
        video = _stream(settings, "train", "video", pattern, recorder, i)
        audio = () if i in silent else (_stream(settings, "train", "audio", call, recorder, i),)
        damage_kind = UNREADABLE[i - settings.train] if i >= settings.train else ""
        output = OutputFile(str(path), 0, 0 if audio else None, damage_kind)
        jobs.append(RenderJob((video,), audio, (output,), (settings.width, settings.height)))
        clips.append(_clip(path, label, "train", recorder))
        if i in broken:
            breaks[path] = broken[i]
    return Layout(jobs, clips, breaks)


def _test(settings: Synth, out: Path) -> Layout:
    """Plans the test clips in sets: a video stream per pattern and an audio stream per call, in all combinations.

    So each video stream occurs, with the same packets, in equally many clips of each class that has its pattern. The
    same holds for each audio stream and its call. A prediction from a single modality is therefore right in at most one
    of 2 clips (`pairs`), in exactly one of 4 (`modular`).
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
    """Runs the jobs, with one worker in this process."""
    with progress(console, "rendering", sum(len(job.outputs) for job in jobs), "files") as advance:
        if workers == 1:
            for job in jobs:
                advance(run_job(job))
            return
        # A fork server imports the drawing code once; a fork of this process would inherit torch's threads.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["fastav.synth.render"])
        with ProcessPoolExecutor(workers, context, ignore_interrupts) as pool:
            futures = [pool.submit(run_job, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    advance(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _description(settings: Synth, complete: bool) -> str:
    """Returns the text of `synth.json`."""
    description = {
        "format": FORMAT,
        "complete": complete,
        "settings": msgspec.to_builtins(settings),
        "classes": list(classes(settings.task)),
        "versions": {name: importlib.metadata.version(name) for name in ("av", "numpy")},
    }
    return json.dumps(description, indent=2) + "\n"


def _is_complete(out: Path, settings: Synth, *, force: bool) -> bool:
    """Checks the contents of the output folder.

    Returns:
        Whether the folder has the complete data set of these settings, which is to be kept.

    Raises:
        UserError: The folder has other contents and `force` is not set.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; expected a folder for the data set")
    if force or not out.exists() or not any(out.iterdir()):
        return False
    remedy = "choose another folder, or use --force"
    try:
        note = json.loads((out / "synth.json").read_text(encoding="utf-8"))
        existing, version, complete = dict(note["settings"]), note["format"], bool(note["complete"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: is not empty and does not contain a data set of fastav synth; {remedy}") from None
    wanted = msgspec.to_builtins(settings)
    differs = [f"{k} is {existing.get(k)}, requested {v}" for k, v in wanted.items() if existing.get(k) != v]
    if version != FORMAT:
        differs.append(f"format is {version}, this fastav writes {FORMAT}")
    if differs:
        raise UserError(f"{out}: contains a data set with other settings ({'; '.join(differs)}); {remedy}")
    return complete


def make_dataset(
    out: Path, settings: Synth, *, workers: int = 0, force: bool = False, console: Console | None = None
) -> Manifest:
    """Writes the data set: mp4 files, `manifest.parquet` and `synth.json`.

    Args:
        out: Output folder; created if it does not exist.
        settings: Settings of the data set.
        workers: Number of processes; 0 for one per core.
        force: Whether to write into a folder with other contents; only files of a synthetic data set are removed.
        console: Where to print; standard output by default.

    Returns:
        The manifest. A complete data set with the same settings is only opened.

    Raises:
        UserError: The settings are impossible, or the folder has other contents.
        FastavError: A file cannot be written.

    Example:
        >>> manifest = make_dataset(Path("birds"), Synth(task="pairs", train=64, test=16))
    """
    console = console or Console()
    _check(settings)
    planned = lay_out(settings, out)
    files = [Path(output.path) for job in planned.jobs for output in job.outputs]
    manifest = out / "manifest.parquet"
    if _is_complete(out, settings, force=force) and all(path.exists() for path in (manifest, *files)):
        console.print(
            f"{escape(str(out))}: already contains this data set; nothing to do", highlight=False, soft_wrap=True
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
        f" classes, {size_mb:.0f} MB, {time.monotonic() - started:.0f} s; on purpose, {len(planned.breaks)} fail"
        f" while they are decoded and {unreadable} cannot be opened",
        highlight=False,
        soft_wrap=True,
    )
    return made


def _write(
    planned: Layout, out: Path, manifest: Path, settings: Synth, workers: int, console: Console
) -> tuple[Manifest, list[Problem]]:
    """Writes all files; marks the data set as complete in `synth.json` at the end."""
    for split in ("train", "test"):
        (out / split).mkdir(parents=True, exist_ok=True)
        for old in (out / split).glob(f"{split}-?????-*.mp4*"):
            old.unlink()
    write_text(out / "synth.json", _description(settings, complete=False))
    _run(planned.jobs, workers or num_cores(), console)
    metadata = {name: str(value) for name, value in msgspec.to_builtins(settings).items()}
    made, problems = build_manifest(
        planned.clips, manifest, workers=workers, metadata={"source": "fastav synth", **metadata}, console=console
    )
    # Indexing decodes every file; damage these files only now, so that they stay in the manifest.
    for path, kind in planned.breaks.items():
        path.write_bytes(damage(path.read_bytes(), kind))
    write_text(out / "synth.json", _description(settings, complete=True))
    return made, problems


def _check(settings: Synth) -> None:
    """Raises `UserError` if the settings are impossible."""
    num = len(combinations(settings.task))
    if settings.train < num:
        raise UserError(f"--train {settings.train}: expected at least {num}, one per combination of pattern and call")
    if settings.test % num:
        nearest = max(num, round(settings.test / num) * num)
        raise UserError(
            f"--test {settings.test}: expected a multiple of {num} (one clip per combination of pattern and call);"
            f" the nearest is {nearest}"
        )
    for side in (settings.width, settings.height):
        if side % 2 or not 48 <= side <= 1024:
            raise UserError(f"--size {settings.width}x{settings.height}: expected even numbers from 48 to 1024")
