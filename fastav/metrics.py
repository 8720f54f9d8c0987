"""Metrics: predictions gathered clip by clip, and the figures, tables and intervals computed of them.

`Metrics` takes the batches of one evaluation; padding rows carry weight 0, several ranks merge their
`rows()`, and every clip counts once. `measure` turns the gathered `Predictions` into an `Evaluation`, which
is what `metrics.json` holds. Percentages end in `_pct`, natural-log losses in `_nats`.

Macro means go over the classes that have a clip in the split, and `num_classes_absent` says how many have
none. A clip without a label cannot be scored in a single-label task: it is left out and counted; in a
multi-label task it is a negative of every class.
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

from fastav.errors import FastavError, UserError

TaskName = Literal["single_label", "multi_label"]
Interval = tuple[float, float]
TOP_K = 5
RESAMPLES = 1_000
RANKING: dict[str, tuple[str, ...]] = {
    "single_label": ("top1_micro_pct", "top5_micro_pct", "top1_macro_pct", "top5_macro_pct", "map_macro_pct"),
    "multi_label": ("map_macro_pct", "top1_micro_pct"),
}
"""Metrics of each task by which one model can be better than another: higher is better."""
MAIN: dict[str, str] = {"single_label": "top1_micro_pct", "multi_label": "map_macro_pct"}
BOOTSTRAP_CELLS = 2_000_000
"""Resampled counts held at a time: bounds the memory of the bootstrap to tens of MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What a model said of N clips, one row a clip, ascending by id.

    Attributes:
        ids: N clip ids, distinct.
        classes: K class names.
        probabilities_NK: float32; rows sum to 1 in a single-label task.
        targets_NK: float32 zeros and ones; a row of zeros is a clip without a label.
        has_video_N: bool, whether the clip could be seen.
        has_audio_N: bool, whether the clip could be heard.
        num_broken: Clips of the split that could not be read and have no row.
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
    """Cuts predictions over the same classes down to the clips that all of them have, in the same order.

    Returns:
        The common ids, ascending, and the parts cut to them.

    Raises:
        UserError: The parts have different classes, or no clip in common.
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
    return common, [_cut(part, common) for part in parts]


def _cut(part: Predictions, ids: list[str]) -> Predictions:
    where = {clip_id: row for row, clip_id in enumerate(part.ids)}
    rows = np.array([where[clip_id] for clip_id in ids])
    return Predictions(
        ids=ids,
        classes=part.classes,
        probabilities_NK=part.probabilities_NK[rows],
        targets_NK=part.targets_NK[rows],
        has_video_N=part.has_video_N[rows],
        has_audio_N=part.has_audio_N[rows],
        num_broken=part.num_broken,
    )


@dataclass(slots=True)
class Rows:
    """The rows one process has seen, duplicates and padding included; plain arrays, to be sent to others."""

    ids: list[str] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class Metrics:
    """Gathers the rows of one evaluation.

    Args:
        classes: K class names, in the order of the model's outputs.
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
        """Adds one batch. Rows of weight 0 are padding or placeholders: they are not scored.

        Args:
            ids: B clip ids.
            probabilities_BK: Any float dtype and device.
            targets_BK: Zeros and ones, before smoothing and mixup.
            weight_B: 0 for rows that do not count; other weights all count alike.
            has_video_B: bool.
            has_audio_B: bool.
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
        # A copy, as the batch's memory may be used again for the next one.
        self._parts.append({name: tensor.detach().cpu().numpy().copy() for name, tensor in named.items()})

    def rows(self) -> Rows:
        """This process's rows, for gathering."""
        if not self._parts:
            return Rows()
        names = self._parts[0].keys()
        return Rows(list(self._ids), {n: np.concatenate([part[n] for part in self._parts]) for n in names})

    def merge(self, others: Iterable[Rows]) -> None:
        """Adds the rows of other processes."""
        for rows in others:
            if rows.ids:
                self._ids += rows.ids
                self._parts.append(rows.arrays)

    def predictions(self) -> Predictions:
        """The scored clips, each once, sorted by id: the same for any number of ranks and any batch size.

        Raises:
            FastavError: Some probabilities are not finite; the message counts them and names the first clip.
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
        # Padding has no id, or that of a clip scored elsewhere; an id that never has a weight could not be read.
        num_broken = len(np.setdiff1d(ids[ids != ""], kept_ids))
        probabilities = rows.arrays["probabilities"][kept]
        bad = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
        if len(bad):
            raise FastavError(
                f"{len(bad)} of {len(kept)} clips have probabilities that are not finite, the first is "
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
    """One class's figures; None where the split has none of its clips.

    Attributes:
        name: The class, `class` in JSON.
        clips: Its clips in the split.
        top1_pct: Share of its clips whose most probable class it is; None in a multi-label task.
        ap_pct: Average precision, this class against the rest.
        log_loss_nats: Mean log-loss of its clips (single-label), or mean binary cross-entropy over all clips.
    """

    name: str = msgspec.field(name="class")
    clips: int = 0
    top1_pct: float | None = None
    ap_pct: float | None = None
    log_loss_nats: float | None = None


class Evaluation(msgspec.Struct, frozen=True):
    """The result of one evaluation: the content of `metrics.json`.

    Attributes:
        split: Split that was evaluated.
        task: `single_label` or `multi_label`.
        main: Key of the metric that ranks runs.
        metrics: Figures with their unit in the key. What cannot be computed (no labelled clip) is absent.
            `*_low_pct` and `*_high_pct` bound the main metric's 95 % interval. `top5_*` look at the `top_k`
            most probable classes: 5, or all of them where there are fewer.
        per_class: K rows, in the order of `classes`.
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
        """The main metric."""
        return self.metrics.get(self.main)

    @property
    def interval(self) -> Interval | None:
        """The main metric's 95 % interval."""
        low, high = (self.metrics.get(interval_key(self.main, end)) for end in ("low", "high"))
        return None if low is None or high is None else (low, high)

    def to_json(self) -> str:
        """One JSON object, indented."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = "metrics.json") -> Evaluation:
        """Reads what `to_json` wrote.

        Raises:
            UserError: The text is no such object; the message names `origin` and the place in it.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise UserError(f"{origin}: not the metrics of an evaluation: {error}") from None


def interval_key(metric: str, end: Literal["low", "high"]) -> str:
    """Key of an interval's end: `top1_micro_pct`, `low` -> `top1_micro_low_pct`."""
    stem, _, unit = metric.rpartition("_")
    return f"{stem}_{end}_{unit}"


def measure(
    predictions: Predictions, task: TaskName, split: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> Evaluation:
    """Computes every figure of one evaluation.

    Args:
        predictions: The scored clips.
        task: Which figures apply.
        split: Name to file them under.
        seed: Of the bootstrap.
        resamples: Bootstrap resamples of clips for the main metric's 95 % interval; 0 leaves it out.

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
    """Top-1, top-5, mAP, log-loss, per-class table and confusion matrix of a single-label task.

    Macro log-loss is that of the DCASE audiovisual scene task (2021, 1B): the mean over classes of the mean
    -ln(p of the true class) of the class's clips, p clipped to the resolution of float32.
    """
    _refuse_several(predictions)
    # Here and not at the top: it takes seconds to import, and only an evaluation needs it.
    from torchmetrics.functional import classification as scores

    num_classes, names = len(predictions.classes), predictions.classes
    keep = predictions.targets_NK.sum(axis=1) == 1
    probabilities_NK = torch.from_numpy(predictions.probabilities_NK[keep])
    target_N = torch.from_numpy(predictions.targets_NK[keep].argmax(axis=1))
    counts_K = torch.bincount(target_N, minlength=num_classes)
    if not len(target_N):
        return {}, [ClassScore(name) for name in names], [[0] * num_classes for _ in names]
    if num_classes == 1:  # torchmetrics takes no single class; whatever is said is right
        probabilities_NK = torch.cat([probabilities_NK, torch.zeros_like(probabilities_NK)], dim=1)
        counts_K = torch.cat([counts_K, counts_K.new_zeros(1)])
    width, top_k = probabilities_NK.shape[1], min(TOP_K, num_classes)
    present_K = counts_K > 0

    def hits(k: int) -> Tensor:
        """Clips of each class that has it among its k most probable ones, [K]; whole numbers, so nothing is rounded."""
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


def _refuse_several(predictions: Predictions) -> None:
    """A single-label task takes one label a clip."""
    several = np.flatnonzero(predictions.targets_NK.sum(axis=1) > 1)
    if len(several):
        row = several[0]
        named = np.flatnonzero(predictions.targets_NK[row])
        raise UserError(
            f'clip "{predictions.ids[row]}" has {len(named)} labels '
            f"({', '.join(predictions.classes[k] for k in named[:5])}); "
            'a single-label task takes one, use task.kind = "multi_label"'
        )


def multi_label(predictions: Predictions, seed: int, resamples: int) -> Scores:
    """Macro mAP, macro log-loss (mean binary cross-entropy of each class) and the top-1 hit rate.

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
    """Average precision of each class against the rest, float64 [K]; every class needs a positive."""
    from torchmetrics.functional.classification import binary_average_precision

    pairs = zip(probabilities_NK.unbind(dim=1), targets_NK.unbind(dim=1), strict=True)
    return torch.stack([binary_average_precision(p_N, t_N).double() for p_N, t_N in pairs])


def bootstrap_share(hits: int, total: int, seed: int, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """95 % percentile interval of a share, in percent.

    Resampling `total` clips with replacement, of which `hits` are right, gives a number of right ones that is
    Binomial(total, hits / total) exactly, so that number is drawn instead of the clips.
    """
    if not resamples or not total:
        return None
    draws = np.random.default_rng(seed).binomial(total, hits / total, size=resamples)
    low, high = np.percentile(100 * draws / total, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_gain(better: int, worse: int, total: int, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """95 % percentile interval of the difference of two models' top-1 on the same clips, percentage points.

    Args:
        better: Clips that only the second model has right.
        worse: Clips that only the first one has right.
        total: All clips.
        seed: Of the draws.
        resamples: Number of draws.
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
    """95 % percentile interval of the macro mAP over resampled clips, in percent.

    Each class is sorted once; a resample only changes how often each clip counts. A class that a resample
    leaves without a positive is left out of that resample's mean.
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
    """Average precision of one class in R resamples; counts_NR[i, r] is how often clip i is in resample r.

    AP = sum over thresholds of (recall gained) x (precision there); only thresholds with a positive gain
    recall, so the cumulative counts are needed at those alone. Equal scores share one threshold.
    """
    from scipy.sparse import csr_array

    num_clips = len(score_N)
    order = np.argsort(-score_N, kind="stable")
    last = np.flatnonzero(np.r_[np.diff(score_N[order]) != 0, True])  # last row of each group of equal scores
    positive = np.flatnonzero(positive_N[order])
    ends, first = np.unique(last[np.searchsorted(last, positive)], return_index=True)

    def count(rows: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Sums the counts of `rows` between one bound and the next, then cumulates: [thresholds, R]."""
        ones = np.ones(len(rows), dtype=np.float32)
        sums = csr_array((ones, rows, bounds), shape=(len(bounds) - 1, num_clips)) @ counts_NR
        return sums.astype(np.float64).cumsum(axis=0)

    seen = count(order[: ends[-1] + 1], np.r_[0, ends + 1])
    right = count(order[positive], np.r_[first, len(positive)])
    gained, total = np.diff(right, axis=0, prepend=0), right[-1]
    precision = right / np.maximum(seen, 1)
    return np.where(total > 0, (gained * precision).sum(axis=0) / np.maximum(total, 1), np.nan)


def _interval(metric: str, ends: Interval | None) -> dict[str, float]:
    if ends is None:
        return {}
    return {interval_key(metric, "low"): ends[0], interval_key(metric, "high"): ends[1]}
