"""Metrics: gathers the predictions of an evaluation, and computes metrics, per-class tables and intervals.

`Metrics` takes the batches of one evaluation. Padding rows have weight 0, ranks merge their `rows()`, and every clip
counts once. `measure` turns the gathered `Predictions` into an `Evaluation`, the content of `metrics.json`. Keys of
percentages end in `_pct`, those of natural-log losses in `_nats`.

Macro means are over the classes that have a clip in the split; `num_classes_absent` counts the others. In a
single-label task a clip without a label cannot be scored: it is excluded and counted. In a multi-label task it is a
negative example of every class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastav.core.errors import FastavError, UserError
from fastav.task.predictions import Predictions

TaskName = Literal["single_label", "multi_label"]
Interval = tuple[float, float]
TOP_K = 5
RESAMPLES = 1_000
RANKING: dict[str, tuple[str, ...]] = {
    "single_label": ("top1_micro_pct", "top5_micro_pct", "top1_macro_pct", "top5_macro_pct", "map_macro_pct"),
    "multi_label": ("map_macro_pct", "top1_micro_pct"),
}
"""Metrics of each task that can rank models, for `saving.best`; higher is better."""
MAIN: dict[str, str] = {"single_label": "top1_micro_pct", "multi_label": "map_macro_pct"}
BOOTSTRAP_CELLS = 2_000_000
"""Resampled counts held at a time: bounds the memory of the bootstrap to tens of MiB."""


@dataclass(slots=True)
class MetricRows:
    """The rows of one process, with duplicates and padding, as NumPy arrays that can be sent to other processes."""

    ids: list[str] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class Metrics:
    """Gathers the rows of one evaluation.

    Args:
        classes: K class names, in the order of the model's outputs.

    Example:
        metrics = Metrics(classes)
        for batch in batches:
            metrics.update(batch.ids, probabilities_BK, batch.targets_BK, batch.weight_B,
                           batch.has_video_B, batch.has_audio_B)
        evaluation = measure(metrics.predictions(), "single_label", "test")
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._ids: list[str] = []
        self._parts: list[dict[str, NDArray[Any]]] = []

    def update(
        self,
        ids: Sequence[str],
        probabilities_BK: Tensor,
        targets_BK: Tensor,
        weight_B: Tensor,
        has_video_B: Tensor,
        has_audio_B: Tensor,
    ) -> None:
        """Adds one batch.

        Args:
            ids: B clip ids.
            probabilities_BK: Predicted probabilities, any float dtype and device.
            targets_BK: Labels as zeros and ones, before smoothing and mixup.
            weight_B: 0 for padding and placeholders, which are not scored; all other weights count the same.
            has_video_B: bool, whether the clip has video.
            has_audio_B: bool, whether the clip has audio.
        """
        assert len(ids) == len(probabilities_BK) == len(targets_BK) == len(weight_B)
        named = {
            "probabilities": probabilities_BK.float(),
            "targets": targets_BK.float(),
            "weight": weight_B.float(),
            "has_video": has_video_B.bool(),
            "has_audio": has_audio_B.bool(),
        }
        self._ids += ids
        # Copied, because the memory of the batch may be reused for the next one.
        self._parts.append({name: tensor.detach().cpu().numpy().copy() for name, tensor in named.items()})

    def rows(self) -> MetricRows:
        """Returns the rows of this process, to be gathered."""
        if not self._parts:
            return MetricRows()
        names = self._parts[0].keys()
        return MetricRows(list(self._ids), {n: np.concatenate([part[n] for part in self._parts]) for n in names})

    def merge(self, others: Iterable[MetricRows]) -> None:
        """Adds the rows of other processes."""
        for rows in others:
            if rows.ids:
                self._ids += rows.ids
                self._parts.append(rows.arrays)

    def predictions(self) -> Predictions:
        """Returns the scored clips, each once, sorted by id. Independent of the number of ranks and the batch size.

        Raises:
            FastavError: Some probabilities are not finite; the message counts the clips and names the first one.
        """
        rows = self.rows()
        num_classes = len(self.classes)
        if not rows.ids:
            empty = np.zeros((0, num_classes), dtype=np.float32)
            none = np.zeros(0, dtype=np.bool_)
            return Predictions([], self.classes, empty, empty, none, none)
        ids = np.array(rows.ids)
        valid = np.flatnonzero(rows.arrays["weight"] > 0)
        kept_ids, first = np.unique(ids[valid], return_index=True)
        kept = valid[first]
        # Padding has no id or the id of a clip that is scored elsewhere. An id that never has weight could not be read.
        num_broken = len(np.setdiff1d(ids[ids != ""], kept_ids))
        probabilities = rows.arrays["probabilities"][kept]
        bad = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
        if len(bad):
            raise FastavError(
                f"{len(bad)} of {len(kept)} clips have probabilities that are not finite, the first one is "
                f'"{kept_ids[bad[0]]}": the model has diverged'
            )
        return Predictions(
            ids=kept_ids.tolist(),
            classes=self.classes,
            probabilities_NK=probabilities,
            targets_NK=rows.arrays["targets"][kept],
            has_video_N=rows.arrays["has_video"][kept],
            has_audio_N=rows.arrays["has_audio"][kept],
            num_broken=num_broken,
        )


class ClassScore(msgspec.Struct, frozen=True):
    """Metrics of one class; they are None if the split has no clip of the class.

    Attributes:
        name: Class name; the key is `class` in JSON.
        clips: Number of clips of this class in the split.
        top1_pct: Share of these clips for which the class is the most probable one, percent; None in a multi-label
            task.
        ap_pct: Average precision of this class against the rest, percent.
        log_loss_nats: Mean log-loss of these clips (single-label), or mean binary cross-entropy of the class over all
            clips (multi-label), nats.
    """

    name: str = msgspec.field(name="class")
    clips: int = 0
    top1_pct: float | None = None
    ap_pct: float | None = None
    log_loss_nats: float | None = None


class Evaluation(msgspec.Struct, frozen=True):
    """The result of one evaluation: the content of `metrics.json`.

    Attributes:
        split: Name of the evaluated split.
        task: `single_label` or `multi_label`.
        main: Key of the main metric, which ranks runs.
        metrics: Metrics, with the unit in the key. A metric that cannot be computed (no labelled clip) is absent.
            `*_low_pct` and `*_high_pct` are the ends of the main metric's 95 % interval. `top5_*` use the `top_k` most
            probable classes: 5, or all classes if there are fewer.
        per_class: Metrics of each of the K classes, in the order of `classes`.
        confusion: K x K clip counts, rows true, columns predicted; empty in a multi-label task.
        classes: K class names.
    """

    split: str
    task: TaskName
    main: str
    metrics: dict[str, float]
    per_class: list[ClassScore]
    confusion: list[list[int]]
    classes: list[str]

    @property
    def value(self) -> float | None:
        """Value of the main metric; None if it cannot be computed."""
        return self.metrics.get(self.main)

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the main metric; None if it was not computed."""
        low, high = (self.metrics.get(interval_key(self.main, end)) for end in ("low", "high"))
        return None if low is None or high is None else (low, high)

    def to_json(self) -> str:
        """Returns the evaluation as indented JSON, the content of `metrics.json`."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = "metrics.json") -> Evaluation:
        """Reads the JSON of `to_json`.

        Raises:
            UserError: The text is not valid; the message names `origin` and the place in it.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise UserError(f"{origin}: not the metrics of an evaluation: {error}") from None


def interval_key(metric: str, end: Literal["low", "high"]) -> str:
    """Returns the key of an end of an interval: `top1_micro_pct`, `low` -> `top1_micro_low_pct`."""
    stem, _, unit = metric.rpartition("_")
    return f"{stem}_{end}_{unit}"


def measure(
    predictions: Predictions, task: TaskName, split: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> Evaluation:
    """Computes all metrics of one evaluation.

    Args:
        predictions: The scored clips.
        task: Task, which determines the metrics.
        split: Name of the split in the result.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples of clips for the main metric's 95 % interval; 0 omits the interval.

    Raises:
        UserError: A clip of a single-label task has several labels; the message names it.
    """
    labelled = predictions.targets_NK.sum(axis=1)
    metrics: dict[str, float] = {
        "num_clips": len(predictions),
        "num_clips_without_video": int((~predictions.has_video_N).sum()),
        "num_clips_without_audio": int((~predictions.has_audio_N).sum()),
        "num_clips_without_label": int((labelled == 0).sum()),
        "num_clips_broken": predictions.num_broken,
        "num_classes": len(predictions.classes),
        "num_classes_absent": int((predictions.targets_NK.sum(axis=0) == 0).sum()),
    }
    scored = single_label if task == "single_label" else multi_label
    figures, per_class, confusion = scored(predictions, seed, resamples)
    return Evaluation(
        split=split,
        task=task,
        main=MAIN[task],
        metrics=metrics | figures,
        per_class=per_class,
        confusion=confusion,
        classes=list(predictions.classes),
    )


Scores = tuple[dict[str, float], list[ClassScore], list[list[int]]]


def single_label(predictions: Predictions, seed: int, resamples: int) -> Scores:
    """Computes top-1, top-5, mAP, log-loss, per-class table and confusion matrix of a single-label task.

    The macro log-loss is that of the DCASE audiovisual scene task (2021, 1B): for each class the mean of
    -ln(p of the true class) over its clips, then the mean over classes. p is clipped to the resolution of float32.
    """
    _check_single_labels(predictions)
    # Imported here, because it takes seconds and only an evaluation needs it.
    from torchmetrics.functional import classification as scores

    num_classes, names = len(predictions.classes), predictions.classes
    keep = predictions.targets_NK.sum(axis=1) == 1
    probabilities_NK = torch.from_numpy(predictions.probabilities_NK[keep])
    target_N = torch.from_numpy(predictions.targets_NK[keep].argmax(axis=1))
    counts_K = torch.bincount(target_N, minlength=num_classes)
    if not len(target_N):
        return {}, [ClassScore(name) for name in names], [[0] * num_classes for _ in names]
    if num_classes == 1:  # torchmetrics needs two classes; with one class every prediction is right
        probabilities_NK = torch.cat([probabilities_NK, torch.zeros_like(probabilities_NK)], dim=1)
        counts_K = torch.cat([counts_K, counts_K.new_zeros(1)])
    width, top_k = probabilities_NK.shape[1], min(TOP_K, num_classes)
    present_K = counts_K > 0

    def hits(k: int) -> Tensor:
        """Counts the clips of each class with that class among the k most probable ones, [K]; exact integers."""
        counted = scores.multiclass_stat_scores(probabilities_NK, target_N, width, average="none", top_k=k)
        return counted[:, 0].double()

    hits_K, top_hits_K = hits(1), hits(top_k)
    top1_K, topk_K = 100 * hits_K / counts_K, 100 * top_hits_K / counts_K
    ap_K = torch.full((width,), torch.nan, dtype=torch.float64)
    one_hot_NK = torch.nn.functional.one_hot(target_N, width)
    ap_K[present_K] = 100 * average_precision(probabilities_NK[:, present_K], one_hot_NK[:, present_K])
    true_N = probabilities_NK.gather(1, target_N[:, None])[:, 0].double()
    loss_N = -true_N.clamp(min=torch.finfo(torch.float32).eps).log()
    loss_K = torch.zeros(width, dtype=torch.float64).index_add_(0, target_N, loss_N) / counts_K
    confusion_KK = scores.multiclass_confusion_matrix(probabilities_NK, target_N, width)
    figures = {
        "top1_micro_pct": 100 * hits_K.sum().item() / len(target_N),
        "top5_micro_pct": 100 * top_hits_K.sum().item() / len(target_N),
        "top1_macro_pct": top1_K[present_K].mean().item(),
        "top5_macro_pct": topk_K[present_K].mean().item(),
        "map_macro_pct": ap_K[present_K].mean().item(),
        "log_loss_macro_nats": loss_K[present_K].mean().item(),
        "top_k": float(top_k),
    }
    right = int(confusion_KK.diagonal().sum())
    figures |= _interval("top1_micro_pct", bootstrap_share(right, len(target_N), seed, resamples))
    per_class = [
        ClassScore(name, int(counts_K[k]), top1_K[k].item(), ap_K[k].item(), loss_K[k].item())
        if present_K[k]
        else ClassScore(name)
        for k, name in enumerate(names)
    ]
    return figures, per_class, confusion_KK[:num_classes, :num_classes].tolist()


def _check_single_labels(predictions: Predictions) -> None:
    """Raises UserError if a clip has several labels."""
    several = np.flatnonzero(predictions.targets_NK.sum(axis=1) > 1)
    if len(several):
        row = several[0]
        named = np.flatnonzero(predictions.targets_NK[row])
        raise UserError(
            f'clip "{predictions.ids[row]}" has {len(named)} labels '
            f"({', '.join(predictions.classes[k] for k in named[:5])}); "
            'a single-label task expects one; use task.kind = "multi_label"'
        )


def multi_label(predictions: Predictions, seed: int, resamples: int) -> Scores:
    """Computes macro mAP, macro log-loss (mean binary cross-entropy of each class) and the top-1 hit rate.

    `top1_micro_pct` is the share of labelled clips whose most probable class is one of their labels.
    """
    names = predictions.classes
    probabilities_NK = torch.from_numpy(predictions.probabilities_NK)
    targets_NK = torch.from_numpy(predictions.targets_NK)
    counts_K = targets_NK.sum(dim=0).long()
    present_K, labelled_N = counts_K > 0, targets_NK.sum(dim=1) > 0
    if not present_K.any():
        return {}, [ClassScore(name) for name in names], []
    ap_K = torch.full((len(names),), torch.nan, dtype=torch.float64)
    ap_K[present_K] = 100 * average_precision(probabilities_NK[:, present_K], targets_NK[:, present_K].long())
    eps = torch.finfo(torch.float32).eps
    p_NK = probabilities_NK.double().clamp(eps, 1 - eps)
    loss_K = -(targets_NK * p_NK.log() + (1 - targets_NK) * (1 - p_NK).log()).mean(dim=0)
    hit_N = targets_NK.gather(1, probabilities_NK.argmax(dim=1, keepdim=True))[labelled_N]
    figures = {
        "map_macro_pct": ap_K[present_K].mean().item(),
        "log_loss_macro_nats": loss_K[present_K].mean().item(),
        "top1_micro_pct": 100 * hit_N.mean().item(),
    }
    if resamples:
        ends = bootstrap_map(predictions.probabilities_NK, predictions.targets_NK, seed, resamples)
        figures |= _interval("map_macro_pct", ends)
    per_class = [
        ClassScore(name, int(counts_K[k]), None, ap_K[k].item(), loss_K[k].item()) if present_K[k] else ClassScore(name)
        for k, name in enumerate(names)
    ]
    return figures, per_class, []


def average_precision(probabilities_NK: Tensor, targets_NK: Tensor) -> Tensor:
    """Returns the average precision of each class against the rest, float64 [K]; each class needs a positive clip."""
    from torchmetrics.functional.classification import binary_average_precision

    pairs = zip(probabilities_NK.unbind(dim=1), targets_NK.unbind(dim=1), strict=True)
    return torch.stack([binary_average_precision(p_N, t_N).double() for p_N, t_N in pairs])


def bootstrap_share(hits: int, total: int, seed: int, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """Returns the 95 % percentile interval of a share, in percent; None without clips or resamples.

    If `hits` of `total` clips are right, the number of right clips in a resample with replacement is distributed
    exactly as Binomial(total, hits / total). So that number is drawn instead of clips.
    """
    if not resamples or not total:
        return None
    draws = np.random.default_rng(seed).binomial(total, hits / total, size=resamples)
    low, high = np.percentile(100 * draws / total, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_gain(better: int, worse: int, total: int, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """Returns the 95 % percentile interval of the difference in top-1 of two models on the same clips.

    Args:
        better: Number of clips that only the second model predicts right.
        worse: Number of clips that only the first model predicts right.
        total: Number of all clips.
        seed: Seed of the bootstrap.
        resamples: Number of resamples.

    Returns:
        Both ends in percentage points, second model minus first; None without clips or resamples.
    """
    if not resamples or not total:
        return None
    shares = np.array([better, worse, total - better - worse]) / total
    draws = np.random.default_rng(seed).multinomial(total, shares, size=resamples)
    low, high = np.percentile(100 * (draws[:, 0] - draws[:, 1]) / total, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_map(
    probabilities_NK: NDArray[np.float32],
    targets_NK: NDArray[np.float32],
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Returns the 95 % percentile interval of the macro mAP over resampled clips, in percent.

    Each class is sorted once; a resample only changes how often each clip counts. A class without a positive clip in a
    resample is excluded from the mean of that resample.
    """
    num_clips = len(targets_NK)
    present = np.flatnonzero(targets_NK.sum(axis=0) > 0)
    rng = np.random.default_rng(seed)
    found: list[NDArray[np.float64]] = []
    chunk = max(1, min(resamples, BOOTSTRAP_CELLS // max(num_clips, 1)))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, num_clips, size=(size, num_clips)) + num_clips * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_clips).reshape(size, num_clips)
        counts_NR = np.ascontiguousarray(counts.T.astype(np.float32))
        ap_KR = np.stack([_weighted_ap(probabilities_NK[:, k], targets_NK[:, k] > 0, counts_NR) for k in present])
        counted_KR = ~np.isnan(ap_KR)
        found.append(np.where(counted_KR, ap_KR, 0).sum(axis=0) / np.maximum(counted_KR.sum(axis=0), 1))
    low, high = np.percentile(100 * np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def _weighted_ap(
    score_N: NDArray[np.float32], positive_N: NDArray[np.bool_], counts_NR: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Returns the average precision of one class in R resamples; counts_NR[i, r] is how often resample r has clip i.

    AP is the sum over thresholds of (gain in recall) x (precision at the threshold). Recall increases only at
    thresholds with a positive clip, so cumulative counts are computed only there. Equal scores share one threshold.
    """
    from scipy.sparse import csr_array

    num_clips = len(score_N)
    order = np.argsort(-score_N, kind="stable")
    last = np.flatnonzero(np.r_[np.diff(score_N[order]) != 0, True])  # last row of each group of equal scores
    positive = np.flatnonzero(positive_N[order])
    ends, first = np.unique(last[np.searchsorted(last, positive)], return_index=True)

    def count(rows: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Sums the counts of `rows` between consecutive bounds, then accumulates: [thresholds, R]."""
        ones = np.ones(len(rows), dtype=np.float32)
        sums = csr_array((ones, rows, bounds), shape=(len(bounds) - 1, num_clips)) @ counts_NR
        return sums.astype(np.float64).cumsum(axis=0)

    predicted = count(order[: ends[-1] + 1], np.r_[0, ends + 1])
    right = count(order[positive], np.r_[first, len(positive)])
    gained, total = np.diff(right, axis=0, prepend=0), right[-1]
    precision = right / np.maximum(predicted, 1)
    return np.where(total > 0, (gained * precision).sum(axis=0) / np.maximum(total, 1), np.nan)


def _interval(metric: str, ends: Interval | None) -> dict[str, float]:
    if ends is None:
        return {}
    return {interval_key(metric, "low"): ends[0], interval_key(metric, "high"): ends[1]}
