"""Predictions: the probabilities of a model for each clip of a split, and their Parquet file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastav.core.atomic_files import written_beside
from fastav.core.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Predictions for N clips, one row per clip, ascending by id.

    Attributes:
        ids: N distinct clip ids.
        classes: K class names.
        probabilities_NK: float32 probabilities; rows sum to 1 in a single-label task.
        targets_NK: float32 labels as zeros and ones; a row of zeros is a clip without a label.
        has_video_N: bool, whether the clip has video.
        has_audio_N: bool, whether the clip has audio.
        num_broken: Number of clips of the split that could not be read and have no row.
    """

    ids: list[str]
    classes: tuple[str, ...]
    probabilities_NK: NDArray[np.float32]
    targets_NK: NDArray[np.float32]
    has_video_N: NDArray[np.bool_]
    has_audio_N: NDArray[np.bool_]
    num_broken: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def join(parts: Sequence[Predictions]) -> tuple[list[str], list[Predictions]]:
    """Restricts predictions over the same classes to the clips that all of them have, in the same order.

    Returns:
        The common ids, ascending, and the predictions for them.

    Raises:
        UserError: The predictions have different classes, or no clip in common.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.classes != first.classes:
            missing = sorted(set(first.classes) ^ set(part.classes))
            what = f"only one of them has {', '.join(missing[:5])}" if missing else "their order differs"
            raise UserError(f"predictions of different classes cannot be joined: {what}")
    common = sorted(set(first.ids).intersection(*(part.ids for part in parts[1:])))
    if not common:
        raise UserError(f"predictions to be joined have no clip in common (such as {', '.join(first.ids[:3])})")
    return common, [_select(part, common) for part in parts]


def _select(part: Predictions, ids: list[str]) -> Predictions:
    row_of = {clip_id: row for row, clip_id in enumerate(part.ids)}
    rows = np.array([row_of[clip_id] for clip_id in ids])
    return Predictions(
        ids=ids,
        classes=part.classes,
        probabilities_NK=part.probabilities_NK[rows],
        targets_NK=part.targets_NK[rows],
        has_video_N=part.has_video_N[rows],
        has_audio_N=part.has_audio_N[rows],
        num_broken=part.num_broken,
    )


PREDICTIONS_VERSION = 1


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """Writes predictions atomically as Parquet, one row per clip.

    Columns: `id`, `labels` (list of strings), `predicted` (the most probable class), `probabilities` (list of
    float32, in the order of `classes` in the schema metadata), `has_video`, `has_audio`.
    """
    num_clips, num_classes = predictions.probabilities_NK.shape
    names = np.array(predictions.classes, dtype=object)
    flat = pa.array(np.ascontiguousarray(predictions.probabilities_NK).reshape(-1), type=pa.float32())
    offsets = pa.array(np.arange(num_clips + 1) * num_classes, type=pa.int32())
    labels = [names[np.flatnonzero(row)].tolist() for row in predictions.targets_NK]
    predicted = names[predictions.probabilities_NK.argmax(axis=1)].tolist() if num_classes else [""] * num_clips
    columns = {
        "id": pa.array(predictions.ids, type=pa.string()),
        "labels": pa.array(labels, type=pa.list_(pa.string())),
        "predicted": pa.array(predicted, type=pa.string()),
        "probabilities": pa.ListArray.from_arrays(offsets, flat),
        "has_video": pa.array(predictions.has_video_N),
        "has_audio": pa.array(predictions.has_audio_N),
    }
    facts = {
        "fastav_predictions": str(PREDICTIONS_VERSION),
        "classes": json.dumps(list(predictions.classes)),
        "num_broken": str(predictions.num_broken),
    }
    table = pa.table(columns).replace_schema_metadata(facts)
    with written_beside(path) as beside:
        pq.write_table(table, beside, compression="zstd")


def read_predictions(path: str | Path) -> Predictions:
    """Reads the file of `write_predictions`, bit for bit.

    Raises:
        UserError: The file is missing, or is not a Parquet file of predictions.

    Example:
        predictions = read_predictions("runs/a/predictions.parquet")
        print(predictions.ids[0], predictions.probabilities_NK[0].max())
    """
    try:
        table = pq.read_table(path)
        facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        classes = tuple(json.loads(facts["classes"]))
        probabilities = table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        probabilities_NK = probabilities.astype(np.float32).reshape(table.num_rows, len(classes))
        index = {name: k for k, name in enumerate(classes)}
        targets_NK = np.zeros_like(probabilities_NK)
        for row, labels in enumerate(table["labels"].to_pylist()):
            targets_NK[row, [index[label] for label in labels]] = 1
        return Predictions(
            ids=table["id"].to_pylist(),
            classes=classes,
            probabilities_NK=probabilities_NK,
            targets_NK=targets_NK,
            has_video_N=table["has_video"].to_numpy().astype(np.bool_),
            has_audio_N=table["has_audio"].to_numpy().astype(np.bool_),
            num_broken=int(facts["num_broken"]),
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected a Parquet file of predictions") from None
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a file of predictions: {error}") from None
