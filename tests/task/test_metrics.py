from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.core.errors import FastavError, UserError
from fastav.task.metrics import (
    Evaluation,
    Metrics,
    bootstrap_gain,
    bootstrap_map,
    bootstrap_share,
    interval_key,
    measure,
)
from fastav.task.predictions import Predictions, join


def predictions(probabilities, targets, classes=None, **facts) -> Predictions:
    probabilities = np.asarray(probabilities, dtype=np.float32)
    num_clips, num_classes = probabilities.shape
    return Predictions(
        ids=[f"clip{n:05d}" for n in range(num_clips)],
        classes=tuple(classes or [f"class{k}" for k in range(num_classes)]),
        probabilities_NK=probabilities,
        targets_NK=np.asarray(targets, dtype=np.float32).reshape(num_clips, num_classes),
        has_video_N=facts.get("has_video", np.ones(num_clips, dtype=bool)),
        has_audio_N=facts.get("has_audio", np.ones(num_clips, dtype=bool)),
        num_broken=facts.get("num_broken", 0),
    )


def random_predictions(num_clips: int, num_classes: int, seed: int, several: bool = False) -> Predictions:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_clips, num_classes)) * 2
    if several:
        return predictions(1 / (1 + np.exp(-logits)), rng.random((num_clips, num_classes)) < 0.2)
    weights = np.exp(logits)
    return predictions(
        weights / weights.sum(axis=1, keepdims=True),
        np.eye(num_classes)[rng.integers(0, num_classes, num_clips)],
    )


def plain_ap(scores: np.ndarray, positive: np.ndarray) -> float:
    """Average precision by its definition: over the distinct thresholds, recall gained x precision."""
    total, before, found = positive.sum(), 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        above = scores >= threshold
        recall = positive[above].sum() / total
        found += (recall - before) * positive[above].mean()
        before = recall
    return found


def test_single_label_figures_equal_their_definitions():
    given_ = random_predictions(200, 7, seed=1)
    target = given_.targets_NK.argmax(axis=1)
    result = measure(given_, "single_label", "test")
    order = np.argsort(-given_.probabilities_NK, axis=1)
    for k, name in ((1, "top1"), (5, "top5")):
        hit = (order[:, :k] == target[:, None]).any(axis=1)
        assert result.metrics[f"{name}_micro_pct"] == pytest.approx(100 * hit.mean())
        assert result.metrics[f"{name}_macro_pct"] == pytest.approx(
            100 * np.mean([hit[target == c].mean() for c in range(7)])
        )
    ap = [100 * plain_ap(given_.probabilities_NK[:, c], target == c) for c in range(7)]
    assert result.metrics["map_macro_pct"] == pytest.approx(np.mean(ap), abs=1e-4)
    nats = -np.log(given_.probabilities_NK[np.arange(200), target])
    by_class = [nats[target == c].mean() for c in range(7)]
    assert result.metrics["log_loss_macro_nats"] == pytest.approx(np.mean(by_class), rel=1e-6)
    assert [row.clips for row in result.per_class] == np.bincount(target, minlength=7).tolist()
    assert [row.ap_pct for row in result.per_class] == pytest.approx(ap, abs=1e-4)
    assert [row.log_loss_nats for row in result.per_class] == pytest.approx(by_class, rel=1e-6)
    table = np.zeros((7, 7), dtype=int)
    np.add.at(table, (target, order[:, 0]), 1)
    assert result.confusion == table.tolist()
    low, high = result.interval
    assert low < result.value < high
    assert result.main == "top1_micro_pct"


def test_multi_label_figures_equal_their_definitions():
    given_ = random_predictions(150, 6, seed=2, several=True)
    given_.targets_NK[:3] = 0
    result = measure(given_, "multi_label", "test", resamples=200)
    p, t = given_.probabilities_NK.astype(np.float64), given_.targets_NK
    ap = [100 * plain_ap(given_.probabilities_NK[:, c], t[:, c]) for c in range(6)]
    assert result.value == pytest.approx(np.mean(ap), abs=1e-4)
    loss = -(t * np.log(p) + (1 - t) * np.log1p(-p)).mean(axis=0)
    assert result.metrics["log_loss_macro_nats"] == pytest.approx(loss.mean(), rel=1e-6)
    labelled = t.sum(axis=1) > 0
    hit = t[np.arange(150), p.argmax(axis=1)][labelled].mean()
    assert result.metrics["top1_micro_pct"] == pytest.approx(100 * hit)
    assert result.metrics["num_clips_without_label"] == (~labelled).sum() > 0
    low, high = result.interval
    assert low < result.value < high
    assert result.confusion == []


def test_an_absent_class_counts_in_no_macro_mean_even_when_it_is_predicted():
    given_ = predictions([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.3, 0.6, 0.1]], np.eye(3)[[0, 0, 1]])
    result = measure(given_, "single_label", "test")
    assert result.metrics["num_classes_absent"] == 1
    assert result.metrics["top1_macro_pct"] == pytest.approx(75)  # class 0: 1 of 2, class 1: 1 of 1
    assert result.metrics["top1_micro_pct"] == pytest.approx(200 / 3)
    absent = result.per_class[2]
    assert (absent.clips, absent.top1_pct, absent.ap_pct, absent.log_loss_nats) == (0, None, None, None)


def test_top5_of_few_classes_looks_at_all_of_them():
    result = measure(random_predictions(20, 3, seed=0), "single_label", "test")
    assert result.metrics["top_k"] == 3
    assert result.metrics["top5_micro_pct"] == 100


def test_a_single_class_is_always_right():
    result = measure(predictions([[1.0], [1.0]], [[1], [1]]), "single_label", "test")
    assert result.value == 100
    assert result.confusion == [[2]]
    assert [row.top1_pct for row in result.per_class] == [100]


def test_clips_without_a_label_are_left_out_and_counted():
    targets = np.eye(3)[[0, 1, 2]]
    targets[2] = 0
    result = measure(predictions([[0.8, 0.1, 0.1]] * 3, targets), "single_label", "test")
    assert result.metrics["num_clips"] == 3
    assert result.metrics["num_clips_without_label"] == 1
    assert result.value == 50
    assert sum(map(sum, result.confusion)) == 2


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_a_split_without_any_label_gives_counts_only(task):
    result = measure(predictions(np.full((4, 3), 0.3), np.zeros((4, 3))), task, "test")
    assert result.value is None
    assert result.interval is None
    assert result.metrics["num_clips_without_label"] == 4
    assert Evaluation.from_json(result.to_json()) == result


def test_several_labels_in_a_single_label_task_are_the_users_mistake():
    with pytest.raises(UserError, match=r'clip "clip00001" has 2 labels \(class0, class2\).*multi_label'):
        measure(predictions(np.full((2, 3), 0.3), [[0, 1, 0], [1, 0, 1]]), "single_label", "test")


def test_counts_of_missing_modalities():
    given_ = predictions(
        np.full((4, 3), 1 / 3),
        np.eye(3)[[0, 1, 2, 0]],
        has_video=np.array([1, 1, 1, 0], bool),
        has_audio=np.array([0, 1, 0, 1], bool),
        num_broken=5,
    )
    metrics = measure(given_, "single_label", "test").metrics
    assert metrics["num_clips_without_video"] == 1
    assert metrics["num_clips_without_audio"] == 2
    assert metrics["num_clips_broken"] == 5


def gather(rows: list[tuple[str, float]], batch: int) -> Metrics:
    """Feeds (id, weight) rows in batches; the probabilities follow from the id."""
    metrics = Metrics(["a", "b"])
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        p_B = torch.tensor([(int(name[4:]) % 7 + 1) / 10 for name, _ in part])
        flags_B = torch.tensor([int(name[4:]) % 3 > 0 for name, _ in part])
        metrics.update(
            [name for name, _ in part],
            torch.stack([p_B, 1 - p_B], dim=1).bfloat16(),
            torch.tensor([[1.0, 0.0]]).repeat(len(part), 1),
            torch.tensor([weight for _, weight in part]),
            flags_B,
            ~flags_B,
        )
    return metrics


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_ranks_and_padding_change_nothing(num_clips, world, batch):
    names = [f"clip{n:03d}" for n in range(num_clips)]
    alone = gather([(name, 1.0) for name in names], batch).predictions()
    gathered = Metrics(["a", "b"])
    for rank in range(world):
        share = [(name, 0.5) for name in names[rank::world]]
        share += [(names[0], 0.0)] * (3 + rank)  # padding repeats clip 0, on every rank
        share += share[:1]  # and a clip may come twice
        gathered.merge([gather(share, batch).rows()])
    found = gathered.predictions()
    assert found.ids == alone.ids == names
    assert found.num_broken == 0
    for name in ("probabilities_NK", "targets_NK", "has_video_N", "has_audio_N"):
        assert np.array_equal(getattr(found, name), getattr(alone, name))


def test_a_clip_that_never_has_a_weight_is_broken():
    found = gather([("clip001", 1.0), ("clip002", 0.0), ("clip001", 0.0), ("clip002", 0.0)], 2).predictions()
    assert found.ids == ["clip001"]
    assert found.num_broken == 1


def test_no_batch_at_all():
    found = Metrics(["a", "b"]).predictions()
    assert len(found) == 0
    assert measure(found, "single_label", "test").metrics["num_clips"] == 0


def test_probabilities_that_are_not_finite_are_named():
    metrics = Metrics(["a", "b"])
    yes = torch.ones(2)
    metrics.update(["x", "y"], torch.tensor([[0.5, 0.5], [math.nan, 0.5]]), torch.eye(2), yes, yes.bool(), yes.bool())
    with pytest.raises(FastavError, match=r'1 of 2 clips .* "y"'):
        metrics.predictions()


def test_the_batch_may_be_overwritten_after_the_update():
    metrics, p, yes = Metrics(["a", "b"]), torch.tensor([[0.9, 0.1]]), torch.ones(1)
    metrics.update(["x"], p, torch.tensor([[1.0, 0.0]]), yes, yes.bool(), yes.bool())
    p.zero_()
    assert metrics.predictions().probabilities_NK[0, 0] == np.float32(0.9)


def test_json_keeps_everything_and_is_strict_json():
    result = measure(predictions([[0.9, 0.1, 0.0]], [[1, 0, 0]]), "single_label", "test <x>")
    text = result.to_json()
    assert Evaluation.from_json(text) == result
    plain = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert plain["per_class"][0] == {
        "class": "class0",
        "clips": 1,
        "top1_pct": 100,
        "ap_pct": 100,
        "log_loss_nats": pytest.approx(0.105, abs=1e-3),
    }
    assert plain["per_class"][1]["top1_pct"] is None
    with pytest.raises(UserError, match=r"run/metrics\.json: not the metrics"):
        Evaluation.from_json("{}", "run/metrics.json")


def test_interval_of_a_share_is_that_of_resampled_clips():
    hits = np.r_[np.ones(37), np.zeros(63)]
    rng = np.random.default_rng(5)
    resampled = 100 * hits[rng.integers(0, 100, size=(20_000, 100))].mean(axis=1)
    expected = np.percentile(resampled, [2.5, 97.5])
    assert bootstrap_share(37, 100, seed=0, resamples=20_000) == pytest.approx(expected, abs=1)
    assert bootstrap_share(37, 100, seed=0) == bootstrap_share(37, 100, seed=0)
    assert bootstrap_share(10, 10, seed=0) == (100, 100)
    assert bootstrap_share(0, 0, seed=0) is None


def test_interval_of_a_gain_is_that_of_resampled_pairs():
    pairs = np.r_[np.ones(20), -np.ones(5), np.zeros(75)]
    rng = np.random.default_rng(5)
    resampled = 100 * pairs[rng.integers(0, 100, size=(20_000, 100))].mean(axis=1)
    expected = np.percentile(resampled, [2.5, 97.5])
    assert bootstrap_gain(20, 5, 100, seed=0, resamples=20_000) == pytest.approx(expected, abs=1)


def test_interval_of_map_is_that_of_resampled_clips():
    given_ = random_predictions(60, 3, seed=4, several=True)
    scores, targets = np.round(given_.probabilities_NK, 1), given_.targets_NK  # rounded: ties
    targets[:, 2] = 0
    targets[0, 2] = 1  # a rare class, absent from many resamples
    rng = np.random.default_rng(0)
    expected = []
    for _ in range(400):
        rows = rng.integers(0, 60, size=60)
        seen = [k for k in range(3) if targets[rows, k].any()]
        expected.append(100 * np.mean([plain_ap(scores[rows, k], targets[rows, k]) for k in seen]))
    assert bootstrap_map(scores, targets, seed=0, resamples=400) == pytest.approx(
        np.percentile(expected, [2.5, 97.5]), abs=1e-3
    )


def test_interval_of_map_is_the_same_in_pieces(monkeypatch):
    given_ = random_predictions(30, 4, seed=4, several=True)
    whole = bootstrap_map(given_.probabilities_NK, given_.targets_NK, seed=3, resamples=50)
    monkeypatch.setattr("fastav.task.metrics.BOOTSTRAP_CELLS", 30 * 7)
    assert bootstrap_map(given_.probabilities_NK, given_.targets_NK, seed=3, resamples=50) == whole


def test_join_takes_the_common_clips_in_one_order():
    one, two = random_predictions(6, 3, seed=0), random_predictions(6, 3, seed=1)
    two.ids[:] = [f"clip{n:05d}" for n in (9, 5, 1, 3, 0, 8)]
    common, (a, b) = join([one, two])
    assert common == a.ids == b.ids == ["clip00000", "clip00001", "clip00003", "clip00005"]
    assert np.array_equal(a.probabilities_NK, one.probabilities_NK[[0, 1, 3, 5]])
    assert np.array_equal(b.probabilities_NK, two.probabilities_NK[[4, 2, 3, 1]])
    with pytest.raises(UserError, match="only one of them has class3"):
        join([one, random_predictions(6, 4, seed=0)])
    two.ids[:] = [f"other{n}" for n in range(6)]
    with pytest.raises(UserError, match="no clip in common"):
        join([one, two])


def test_interval_key_keeps_the_unit_at_the_end():
    assert interval_key("map_macro_pct", "high") == "map_macro_high_pct"
