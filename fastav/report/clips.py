"""Example clips of a report: the best and the worst predictions, with their frames and spectrograms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastav.core.errors import FastavError, MediaError
from fastav.data.clip import Clip, ClipPlan, Modality
from fastav.data.manifest import Manifest
from fastav.data.plan import segment_centres
from fastav.media.decoder import DecodeSpec
from fastav.media.pyav import PyAV
from fastav.recipe.schema import Recipe
from fastav.report.plots import frame_uri, spectrogram_uri
from fastav.task.predictions import Predictions

FRAMES = 4
IMAGE_SIZE = 128
MAX_MEL_FRAMES = 1_250  # ten seconds of the ssw60 preset
_CHUNK = 4_096


@dataclass(frozen=True, slots=True)
class Example:
    """One prediction to show.

    Attributes:
        id: Clip id.
        labels: Names of the true classes.
        predicted: The most probable class.
        probability_pct: Probability of `predicted`, percent.
        label_probability_pct: Probability of the true class, percent (of several, the least probable one); None without
            a label.
        right: Whether `predicted` is a true class.
    """

    id: str
    labels: tuple[str, ...]
    predicted: str
    probability_pct: float
    label_probability_pct: float | None
    right: bool


@dataclass(frozen=True, slots=True)
class ClipPictures:
    """Frames and spectrogram of a clip.

    Attributes:
        frames: JPEG data URIs of the frames.
        spectrogram: JPEG data URI of the spectrogram; empty if there is none.
        note: What is missing, and why.
    """

    frames: list[str] = field(default_factory=list)
    spectrogram: str = ""
    note: str = ""


def best_and_worst(predictions: Predictions, count: int) -> tuple[list[Example], list[Example]]:
    """Selects the clips with the lowest and the highest loss (binary cross-entropy over all classes).

    Clips of different classes come first, so that the examples vary.

    Returns:
        Up to `count` correctly classified clips, best first, and up to `count` misclassified ones, worst first.
    """
    labelled = np.flatnonzero(predictions.targets_NK.sum(axis=1) > 0)
    if not len(labelled) or not count:
        return [], []
    targets_NK = predictions.targets_NK[labelled]
    p_NK = np.clip(predictions.probabilities_NK[labelled].astype(np.float64), 1e-7, 1 - 1e-7)
    loss_N = -(targets_NK * np.log(p_NK) + (1 - targets_NK) * np.log1p(-p_NK)).sum(axis=1)
    right_N = np.take_along_axis(targets_NK, p_NK.argmax(axis=1)[:, None], axis=1)[:, 0] > 0
    order = np.argsort(loss_N, kind="stable")
    class_N = targets_NK.argmax(axis=1)
    best = _varied(order[right_N[order]], class_N, count)
    worst = _varied(order[::-1][~right_N[order[::-1]]], class_N, count)
    return [_example(predictions, labelled[n]) for n in best], [_example(predictions, labelled[n]) for n in worst]


def _varied(order: NDArray[np.int64], class_N: NDArray[np.int64], count: int) -> list[int]:
    """Returns the first `count` rows; the first row of each class comes before all others."""
    _, first = np.unique(class_N[order], return_index=True)
    ahead = sorted(first.tolist())
    rest = sorted(set(range(len(order))) - set(ahead))
    return [int(order[n]) for n in [*ahead, *rest][:count]]


def _example(predictions: Predictions, row: int) -> Example:
    p_K, labels = predictions.probabilities_NK[row], np.flatnonzero(predictions.targets_NK[row])
    best = int(p_K.argmax())
    return Example(
        id=predictions.ids[row],
        labels=tuple(predictions.classes[k] for k in labels),
        predicted=predictions.classes[best],
        probability_pct=100 * float(p_K[best]),
        label_probability_pct=100 * float(p_K[labels].min()) if len(labels) else None,
        right=best in labels,
    )


def pictures(recipe: Recipe, folder: Path, split: str, ids: Sequence[str]) -> tuple[dict[str, ClipPictures], str]:
    """Decodes frames and spectrograms of clips.

    Args:
        recipe: Recipe of the run, which names the manifest and the frontend.
        folder: Folder of the run. A relative manifest path that does not exist in the current folder is looked up here
            and in all parent folders.
        split: Split that contains the clips.
        ids: Clip ids.

    Returns:
        Clip id -> pictures, and a note if no pictures can be shown (such as a missing manifest).
    """
    try:
        path = next((p for p in _places(recipe.data.manifest, folder) if p.is_file()), None)
        if path is None:
            return {}, f"no pictures: the manifest {recipe.data.manifest} no longer exists"
        clips = _find(Manifest.open(path, split=split), set(ids))
    except FastavError as error:
        return {}, f"no pictures: {error}"
    shown = {clip_id: _pictures(recipe, clips[clip_id]) for clip_id in ids if clip_id in clips}
    missing = [clip_id for clip_id in ids if clip_id not in clips]
    shown |= {clip_id: ClipPictures(note="no longer in the manifest") for clip_id in missing}
    return shown, ""


def _places(manifest: str, folder: Path) -> list[Path]:
    return [Path(manifest), *(above / manifest for above in (folder.absolute(), *folder.absolute().parents))]


def _find(manifest: Manifest, wanted: set[str]) -> dict[str, Clip]:
    """Looks clips up by id, a chunk of rows at a time."""
    found: dict[str, Clip] = {}
    for start in range(0, len(manifest), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(manifest)))
        found |= {clip.id: clip for clip in manifest.clips(rows) if clip.id in wanted}
        if len(found) == len(wanted):
            break
    return found


def _pictures(recipe: Recipe, clip: Clip) -> ClipPictures:
    """Decodes the centre frames of equal segments, cropped to their central square, and the spectrogram from 0 s on."""
    frontend = recipe.frontend
    length = clip.num_mel_frames or int(frontend.num_frames_s(clip.duration_s))
    window = max(1, min(length, MAX_MEL_FRAMES))
    has_modality: tuple[tuple[Modality, bool], ...] = (("video", clip.has_video), ("audio", clip.has_audio))
    spec = DecodeSpec(
        modalities=tuple(modality for modality, has in has_modality if has),
        image_size=IMAGE_SIZE,
        frontend=frontend,
        window=window,
    )
    side = float(min(clip.width, clip.height))
    plan = ClipPlan(
        sample=0,
        source=0,
        row=clip.row,
        replica=0,
        frames_T=segment_centres(np.array([clip.num_frames]), FRAMES)[0],
        crop=((clip.width - side) / 2, (clip.height - side) / 2, side, side),
        flip=False,
        windows_W=np.zeros(1, dtype=np.int32),
        band=(0, 0),
        mix=1.0,
        partner=0,
        weight=1.0,
    )
    try:
        sample = PyAV().build(spec).decode(clip, [plan])[0]
    except (MediaError, OSError) as error:
        return ClipPictures(note=f"cannot be read: {error}")
    frames = [] if sample.frames_TCHW is None else [frame_uri(frame) for frame in sample.frames_TCHW.numpy()]
    spectrogram = "" if sample.mel_WCML is None else spectrogram_uri(sample.mel_WCML[0].mean(dim=0).numpy())
    absent = [modality for modality, has in has_modality if not has]
    return ClipPictures(frames, spectrogram, f"the clip has no {' and no '.join(absent)}" if absent else "")
