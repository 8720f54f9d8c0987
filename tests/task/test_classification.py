from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from fastav.core.errors import UserError
from fastav.task.classification import MultiLabel, SingleLabel, Task
from fastav.task.predictions import Predictions, read_predictions, write_predictions


def batch(num_rows: int = 6, num_classes: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "logits_BK": torch.randn(num_rows, num_classes) * 3,
        "targets_BK": functional.one_hot(torch.randint(num_classes, (num_rows,)), num_classes).float(),
        "weight_B": torch.ones(num_rows),
        "mix_B": torch.ones(num_rows),
        "partner_B": torch.arange(num_rows) ^ 1,
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_single_label_loss_is_the_sum_of_torchs(smoothing):
    given = batch()
    expected = functional.cross_entropy(
        given["logits_BK"], given["targets_BK"].argmax(dim=1), label_smoothing=smoothing, reduction="sum"
    )
    assert torch.allclose(SingleLabel(label_smoothing=smoothing).loss(**given), expected)


def test_rows_of_weight_zero_add_nothing_and_weights_scale():
    given = batch()
    each = [SingleLabel().loss(**{**given, "weight_B": torch.eye(6)[row]}) for row in range(6)]
    given["weight_B"] = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5, 1.0])
    assert torch.allclose(
        SingleLabel().loss(**given), sum(w * loss for w, loss in zip(given["weight_B"], each, strict=True))
    )


@pytest.mark.parametrize("task", [SingleLabel(label_smoothing=0.1), MultiLabel(label_smoothing=0.1)])
def test_mixed_targets_give_the_mixed_loss(task):
    """Both losses are linear in the target, so mixing targets is mixing losses."""
    given = batch()
    mix = torch.tensor([0.3, 0.7, 1.0, 1.0, 0.5, 0.5])
    own = task.loss(**{**given, "weight_B": mix})
    swapped = {**given, "targets_BK": given["targets_BK"][given["partner_B"]], "weight_B": 1 - mix}
    assert torch.allclose(task.loss(**{**given, "mix_B": mix}), own + task.loss(**swapped))


@pytest.mark.parametrize("task", [SingleLabel(label_smoothing=0.1), MultiLabel()])
def test_several_heads_have_the_mean_of_their_losses(task):
    given = batch()
    other = {**given, "logits_BK": torch.randn_like(given["logits_BK"])}
    both = {**given, "logits_BK": torch.stack([given["logits_BK"], other["logits_BK"]], 1)}
    torch.testing.assert_close(task.loss(**both), (task.loss(**given) + task.loss(**other)) / 2)


def test_loss_in_pieces_is_the_loss_of_the_whole():
    given = batch()
    pieces = [
        {k: v[rows] if k != "partner_B" else v[:2] for k, v in given.items()} for rows in torch.arange(6).split(2)
    ]
    assert torch.allclose(sum(SingleLabel().loss(**piece) for piece in pieces), SingleLabel().loss(**given))


def test_a_row_without_a_label_adds_nothing_to_a_single_label_loss():
    given = batch()
    given["targets_BK"][2] = 0
    without = SingleLabel(label_smoothing=0.2).loss(**given)
    given["weight_B"][2] = 0
    assert torch.equal(SingleLabel(label_smoothing=0.2).loss(**given), without)


def test_multi_label_loss_is_mbts():
    given = batch()
    given["targets_BK"][:2] = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    smooth = given["targets_BK"] * 0.7 + 0.3 / 4
    expected = functional.binary_cross_entropy_with_logits(given["logits_BK"], smooth, reduction="sum")
    assert torch.allclose(MultiLabel(label_smoothing=0.3).loss(**given), expected)
    assert torch.allclose(MultiLabel(label_smoothing=0.3, reduce="mean").loss(**given), expected / 4)


@pytest.mark.parametrize("task", [SingleLabel(), MultiLabel()])
def test_half_precision_logits_are_computed_in_float32(task):
    given = batch()
    given["logits_BK"] = given["logits_BK"].bfloat16()
    loss = task.loss(**given)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, task.loss(**{**given, "logits_BK": given["logits_BK"].float()}))
    assert task.probabilities(given["logits_BK"]).dtype == torch.float32


def test_probabilities():
    logits = torch.tensor([[0.0, 0.0, 0.0, 200.0]])
    assert SingleLabel().probabilities(logits).tolist() == [[0, 0, 0, 1]]
    assert MultiLabel().probabilities(logits).tolist() == [[0.5, 0.5, 0.5, 1]]


@pytest.mark.parametrize(("kind", "cls"), [("single_label", SingleLabel), ("multi_label", MultiLabel)])
def test_kinds_are_read_by_their_tag(kind, cls):
    task = msgspec.convert({"kind": kind, "label_smoothing": 0.1}, Task)
    assert task == cls(label_smoothing=0.1)
    assert task.name == kind
    assert task.evaluate(predictions(), "test").main == task.main


@pytest.mark.parametrize(
    "wrong", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"smoothing": 0.1}, {"reduce": "sum"}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kind": "single_label", **wrong}, Task)


def predictions() -> Predictions:
    rng = np.random.default_rng(0)
    return Predictions(
        ids=["a", "b", "ç/<d>"],
        classes=("one", "two, three", "<script>"),
        probabilities_NK=rng.random((3, 3), dtype=np.float32),
        targets_NK=np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=np.float32),
        has_video_N=np.array([True, False, True]),
        has_audio_N=np.array([True, True, False]),
        num_broken=2,
    )


def test_predictions_come_back_bit_for_bit(tmp_path):
    path, given = tmp_path / "run" / "predictions.parquet", predictions()
    write_predictions(path, given)
    found = read_predictions(path)
    assert (found.ids, found.classes, found.num_broken) == (given.ids, given.classes, 2)
    for name in ("probabilities_NK", "targets_NK", "has_video_N", "has_audio_N"):
        assert np.array_equal(getattr(found, name), getattr(given, name))
    assert [p.name for p in path.parent.iterdir()] == ["predictions.parquet"]
    table = pq.read_table(path)
    assert table.schema.field("probabilities").type == pa.list_(pa.field("item", pa.float32()))
    assert table["labels"].to_pylist() == [["one"], ["<script>"], []]
    best = given.probabilities_NK.argmax(axis=1)
    assert table["predicted"].to_pylist() == [given.classes[k] for k in best]


def test_empty_predictions_come_back(tmp_path):
    none, empty = np.zeros(0, dtype=bool), np.zeros((0, 2), dtype=np.float32)
    write_predictions(tmp_path / "p.parquet", Predictions([], ("a", "b"), empty, empty, none, none))
    assert len(read_predictions(tmp_path / "p.parquet")) == 0


def test_files_that_are_no_predictions_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file, expected a Parquet file of predictions"):
        read_predictions(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match=r"text\.parquet: not a file of predictions"):
        read_predictions(tmp_path / "text.parquet")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet: not a file of predictions"):
        read_predictions(tmp_path / "other.parquet")
