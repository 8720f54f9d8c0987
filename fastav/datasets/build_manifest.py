"""Builds a manifest: probes each media file, fills the rows with its properties and reports problems."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fastav.core.atomic_files import write_text
from fastav.core.errors import MediaError, UserError
from fastav.core.machine import num_cores
from fastav.core.process_pool import run_jobs
from fastav.core.progress import progress
from fastav.data.clip import Clip
from fastav.data.manifest import Extent, Manifest, Problem, check, write_manifest
from fastav.media.probe import MediaInfo, probe, probe_image, probe_mel

OVERRUN_S = 0.1
"""Spans that end after their file are shortened; if by more than this, in seconds, they are also reported."""

_PATHS = ("video", "audio", "image", "mel")
_UNPROBED: dict[str, Any] = {
    f.name: f.default
    for f in fields(Clip)
    if f.name in (
        "video", "audio", "start_frame", "num_frames", "fps", "width", "height", "rotation", "mirrored", "video_codec",
        "start_sample", "num_samples", "sample_rate", "channels", "audio_codec", "audio_offset_s",
    )
}  # fmt: skip


def build_manifest(
    clips: Sequence[Clip],
    out: Path,
    *,
    workers: int = 0,
    metadata: Mapping[str, str] | None = None,
    console: Console | None = None,
    cut: Callable[[Clip], list[Clip]] | None = None,
    split: Callable[[list[Clip]], list[Clip]] | None = None,
    problems: Sequence[Problem] = (),
) -> tuple[Manifest, list[Problem]]:
    """Probes every media file once, fills the rows with the results, and writes the manifest.

    Clips of files that cannot be read are left out and reported. The problems include those that `check` finds in the
    finished manifest; all of them are written next to it as `.problems.csv`.

    Args:
        clips: Rows with media paths, ids, labels, splits and spans (`start_s`, `duration_s`; 0 for to the end). The
            same path in `video` and `audio` is a container that may lack one of the two streams.
        out: The `.parquet` file.
        workers: Number of processes; 0 for one per core.
        metadata: Notes to store in the manifest.
        console: Where to print the progress; standard output by default.
        cut: Turns one probed clip into the clips to keep; only their spans may differ.
        split: Assigns splits to the probed clips.
        problems: Problems known before, written with the others.

    Returns:
        The manifest and all problems.

    Raises:
        UserError: No media file can be read.
        FastavError: The manifest cannot be written.

    Example:
        >>> clips = [Clip("a", audio=Path("a.wav"), labels=("owl",)), Clip("b", audio=Path("b.wav"), labels=("crow",))]
        >>> manifest, problems = build_manifest(clips, Path("birds.parquet"))
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise UserError(f'--out {out}: expected a name that ends in ".parquet"')
    filler = _ClipFiller(clips, cut)
    with progress(console or Console(), "probing", len(filler.jobs), "files") as advance:
        for path, result in probe_all(filler.jobs, workers):
            filler.add(path, result)
            advance()
    filled, found = filler.result()
    every = [*problems, *found]
    if not filled:
        _write_problems(out, every)
        first = f"; the first: {found[0].message}" if found else ""
        raise UserError(f"none of the {len(filler.jobs)} media files can be read (see {problems_path(out)}){first}")
    manifest = write_manifest(out, split(filled) if split else filled, None, metadata, filler.extents)
    every += [*_lost_classes(clips, manifest), *check(manifest)]
    _write_problems(out, every)
    return manifest, every


def problems_path(out: Path) -> Path:
    """Returns the file for the problems of a manifest: `manifest.parquet` -> `manifest.problems.csv`."""
    return out.with_suffix(".problems.csv")


class _ClipFiller:
    """Fills each clip once all its files are probed; drops a file's results after its last clip, to save memory."""

    def __init__(self, clips: Sequence[Clip], cut: Callable[[Clip], list[Clip]] | None) -> None:
        self._clips, self._cut = clips, cut
        self._made: list[list[Clip]] = [[] for _ in clips]
        self._problems: list[list[Problem]] = [[] for _ in clips]
        self._found: dict[Path, MediaInfo | MediaError] = {}
        self.extents: dict[Path, Extent] = {}
        wanted: dict[Path, set[str]] = defaultdict(set)
        self._users: dict[Path, list[int]] = defaultdict(list)
        for number, clip in enumerate(clips):
            for name in _PATHS:
                if (path := getattr(clip, name)) is not None:
                    wanted[path].add(name)
            for path in _files_of(clip):
                self._users[path].append(number)
        self._left = {path: len(users) for path, users in self._users.items()}
        self.jobs: list[ProbeJob] = [(path, tuple(sorted(names))) for path, names in wanted.items()]

    def add(self, path: Path, found: MediaInfo | MediaError) -> None:
        """Adds the result of one file, and fills the clips that have now all of their files."""
        self._found[path] = found
        users = self._users[path]
        if isinstance(found, MediaError):
            more = f" ({len(users)} clips)" if len(users) > 1 else ""
            clip = self._clips[users[0]].id
            self._problems[users[0]].append(Problem("unreadable", clip, str(path), f"{found}{more}", False))
        else:
            self.extents[path] = (found.num_frames, found.num_samples)
        for number in users:
            files = _files_of(self._clips[number])
            if all(file in self._found for file in files):
                self._finish(number)
                for file in files:
                    self._left[file] -= 1
                    if not self._left[file]:
                        del self._found[file]

    def result(self) -> tuple[list[Clip], list[Problem]]:
        """Returns the filled clips and the problems, both in the order of the clips."""
        for number, clip in enumerate(self._clips):
            if not _files_of(clip):
                message = f'clip "{clip.id}" has no video, audio, image or mel file'
                self._problems[number].append(Problem("no_media", clip.id, "", message, False))
        return [c for made in self._made for c in made], [p for found in self._problems for p in found]

    def _finish(self, number: int) -> None:
        clip = self._clips[number]
        infos = {}
        for path in _files_of(clip):
            info = self._found[path]
            if isinstance(info, MediaError):
                return
            infos[path] = info
        filled = self._fill(number, clip, infos)
        if filled is not None and self._cut is not None:
            pieces = [self._fill(number, piece, infos) for piece in self._cut(filled)]
            self._made[number] = [piece for piece in pieces if piece is not None]
        elif filled is not None:
            self._made[number] = [filled]

    def _fill(self, number: int, clip: Clip, infos: Mapping[Path, MediaInfo]) -> Clip | None:
        filled, problem = fill(clip, infos)
        if problem is not None:
            self._problems[number].append(problem)
        return filled


def _files_of(clip: Clip) -> list[Path]:
    """Returns the files of a clip, each once."""
    return list(dict.fromkeys(p for name in _PATHS if (p := getattr(clip, name)) is not None))


def fill(clip: Clip, infos: Mapping[Path, MediaInfo]) -> tuple[Clip | None, Problem | None]:
    """Fills a clip with the properties of its files within its span.

    Spans refer to the times of the video frames, or to the audio if there is no video. Streams that do not exist, or
    have nothing within the span, are removed from the clip.

    Args:
        clip: The unprobed clip.
        infos: Probe results of all files of the clip.

    Returns:
        The filled clip, or None if nothing of it is left; and a problem of the clip, or None.
    """
    video, audio, image, mel = (infos[p] if (p := getattr(clip, name)) else None for name in _PATHS)
    video = video if video is not None and video.has_video else None
    audio = audio if audio is not None and audio.has_audio else None
    path = str(clip.video or clip.audio or clip.image or clip.mel or "")
    if video is None and audio is None and image is None and mel is None:
        return None, Problem("no_media", clip.id, path, f"{path}: has none of the expected streams", False)
    filled: Clip | None = clip
    problem = None
    if video is not None or audio is not None:
        if audio is not None and (video is None or clip.audio != clip.video):
            offset_s = clip.audio_offset_s if video is not None else 0.0
            length_s = audio.num_samples / audio.sample_rate
            audio = replace(audio, audio_offset_s=offset_s, duration_s=length_s)
        filled, problem = _cut_span(clip, path, video, audio)
    if filled is not None and image is not None:
        filled = replace(
            filled, num_frames=1, width=image.width, height=image.height,
            rotation=image.rotation, video_codec=image.video_codec,
        )  # fmt: skip
    if filled is not None and mel is not None:
        filled = replace(filled, num_mel_frames=mel.num_mel_frames, channels=mel.channels)
    return filled, problem


def _cut_span(
    clip: Clip, path: str, video: MediaInfo | None, audio: MediaInfo | None
) -> tuple[Clip | None, Problem | None]:
    """Fills a clip with the frames and samples of its span."""
    total_s = video.duration_s if video is not None else audio.duration_s if audio is not None else 0.0
    length_s = clip.duration_s or total_s - clip.start_s
    span = f'clip "{clip.id}": span {clip.start_s:.3f} s + {length_s:.3f} s'
    problem = None
    if not (clip.start_s >= 0 and length_s > 0 and clip.start_s < total_s):
        return None, Problem(
            "bad_span", clip.id, path, f"{span} is outside {path}, which is {total_s:.3f} s long", False
        )
    if (over_s := clip.start_s + length_s - total_s) > OVERRUN_S:
        message = f"{span} ends {over_s:.3f} s after the end of {path}; shortened"
        problem = Problem("bad_span", clip.id, path, message, False)
    to_end = over_s >= 0
    length_s = min(length_s, total_s - clip.start_s)
    frames = video.cut(clip.start_s, None if to_end else length_s) if video is not None else None
    end_s = None if to_end and (audio is video or video is None) else length_s
    samples = audio.cut(clip.start_s, end_s) if audio is not None else None
    filled = replace(clip, duration_s=length_s, **_UNPROBED)
    if video is not None and frames is not None and frames.num_frames:
        filled = replace(
            filled, video=clip.video, start_frame=frames.start_frame, num_frames=frames.num_frames, fps=video.fps,
            width=video.width, height=video.height, rotation=video.rotation, mirrored=video.mirrored,
            video_codec=video.video_codec,
        )  # fmt: skip
    if audio is not None and samples is not None and samples.num_samples:
        filled = replace(
            filled, audio=clip.audio, start_sample=samples.start_sample, num_samples=samples.num_samples,
            sample_rate=audio.sample_rate, channels=audio.channels, audio_codec=audio.audio_codec,
            audio_offset_s=audio.audio_offset_s,
        )  # fmt: skip
    if filled.video is None and filled.audio is None:
        message = f"{span} contains no frame and no sample of {path}"
        return None, Problem("bad_span", clip.id, path, message, False)
    return filled, problem


def _lost_classes(clips: Sequence[Clip], manifest: Manifest) -> Iterator[Problem]:
    """Reports classes without a readable clip: they are not in the manifest, so `check` cannot report them."""
    counts = Counter(label for clip in clips for label in clip.labels)
    for name in sorted(set(counts) - set(manifest.classes)):
        message = f'class "{name}" is left out: none of its {counts[name]} clips can be read'
        yield Problem("lost_class", "", "", message, False)


def _write_problems(out: Path, problems: Sequence[Problem]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("kind", "path", "clip", "message"))
    writer.writerows((p.kind, p.path, p.clip_id, p.message) for p in problems)
    write_text(problems_path(out), text.getvalue())


ProbeJob = tuple[Path, tuple[str, ...]]
"""A file, and what to probe: "video", "audio" or both, or "image", or "mel"."""


ProbeResult = tuple[Path, "MediaInfo | MediaError"]


def probe_all(jobs: Sequence[ProbeJob], workers: int = 0) -> Iterator[ProbeResult]:
    """Yields the properties of each file, or why it cannot be read, in the order of completion.

    A file that kills its process (a crash in FFmpeg, out of memory) is reported like any other unreadable file.

    Args:
        jobs: The files, each once.
        workers: Number of processes; 0 for one per core.
    """
    for done in run_jobs(jobs, probe_one, max(1, min(workers or num_cores(), len(jobs)))):
        path, found = done.job[0], done.result
        if done.died or found is None:
            yield path, MediaError(path, "the decoder crashed on this file", "probe")
        else:
            yield path, MediaError(path, *found) if isinstance(found, tuple) else found


def probe_one(job: ProbeJob) -> MediaInfo | tuple[str, str]:
    """Probes one file; returns reason and stage if it cannot be read."""
    path, wanted = job
    try:
        if "image" in wanted:
            return probe_image(path)
        return probe_mel(path) if "mel" in wanted else probe(path, wanted)
    except MediaError as error:
        return error.reason, error.stage
    except Exception as error:  # any failure concerns this file only; the others go on
        return f"{type(error).__name__}: {error}", "probe"
