"""Task: what is predicted of a clip: exactly one class (`single_label`) or any number (`multi_label`).

A task defines the loss and the metrics. Losses are sums over the rows of a micro-batch. The trainer divides them by the
nominal global batch, which keeps them exact for any number of ranks and accumulation steps.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor
from torch.nn import functional

from fastav.core.config import Kind
from fastav.task.metrics import MAIN, RESAMPLES, TaskName, measure
from fastav.task.metrics import Evaluation as Evaluation
from fastav.task.metrics import Metrics as Metrics
from fastav.task.predictions import Predictions as Predictions

Smoothing = Annotated[float, Meta(ge=0, lt=1)]


class AnyTask(Kind, frozen=True):
    """Base of both tasks.

    Attributes:
        label_smoothing: Share s of each target t that is spread over all K classes: t (1 - s) + s / K.
    """

    name: ClassVar[TaskName]
    label_smoothing: Smoothing = 0.0

    def loss(self, logits_BK: Tensor, targets_BK: Tensor, weight_B: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
        """Computes the sum over the rows of weight x loss, with smoothed and mixed targets.

        Mixup (Zhang et al., 2018, eq. 1): target = mix x own target + (1 - mix) x target of the partner.

        Args:
            logits_BK: Logits of any float dtype; the loss is computed in float32. Or [B, M, K], one head per class
                token of M modalities as in MBT's code: then the loss is the mean of the M losses.
            targets_BK: One-hot or multi-hot labels, before smoothing and mixup.
            weight_B: Weight of each row; 0 for placeholders and padding.
            mix_B: Mixup weight of the row itself; 1 means no mixup.
            partner_B: Row of the mixup partner.

        Returns:
            A float32 scalar.
        """
        heads = logits_BK.float().unbind(1) if logits_BK.ndim == 3 else [logits_BK.float()]
        target_BK = self._target(targets_BK.float(), mix_B, partner_B)
        loss_B = torch.stack([self._loss(head_BK, target_BK) for head_BK in heads]).mean(0)
        return (loss_B * weight_B).sum()

    def _target(self, targets_BK: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
        """Returns smoothed and mixed targets."""
        raise NotImplementedError

    def _loss(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        """Returns the loss of each row."""
        raise NotImplementedError

    @property
    def main(self) -> str:
        """Key of the main metric, which ranks runs; higher is better."""
        return MAIN[self.name]

    def evaluate(
        self, predictions: Predictions, split: str, *, seed: int = 0, resamples: int = RESAMPLES
    ) -> Evaluation:
        """Computes all metrics of gathered predictions; see `fastav.task.metrics.measure`."""
        return measure(predictions, self.name, split, seed=seed, resamples=resamples)


class SingleLabel(AnyTask, frozen=True, tag="single_label"):
    """Exactly one class per clip: softmax and cross-entropy.

    Attributes:
        label_smoothing: Share s of each target t that is spread over all K classes: t (1 - s) + s / K.
    """

    name: ClassVar[TaskName] = "single_label"

    def _target(self, targets_BK: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
        """Returns smoothed and mixed targets. A row without a label gets zeros, and so adds nothing to the loss."""
        labelled_B1 = targets_BK.sum(dim=1, keepdim=True)
        smooth = self.label_smoothing
        return mix_targets(targets_BK * (1 - smooth) + labelled_B1 * (smooth / targets_BK.shape[1]), mix_B, partner_B)

    def _loss(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        return -(target_BK * functional.log_softmax(logits_BK, dim=1)).sum(dim=1)

    def probabilities(self, logits_BK: Tensor) -> Tensor:
        """Returns the softmax over the classes, float32."""
        return logits_BK.float().softmax(dim=1)


class MultiLabel(AnyTask, frozen=True, tag="multi_label"):
    """Any number of classes per clip: a sigmoid and a binary cross-entropy for each class.

    Attributes:
        label_smoothing: Share s of each target t that is spread over all K classes: t (1 - s) + s / K, as in MBT.
        reduce: How the losses of a clip's classes are combined: `sum` (as in MBT's code) or `mean`.
    """

    name: ClassVar[TaskName] = "multi_label"
    reduce: Literal["sum", "mean"] = "sum"

    def _target(self, targets_BK: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
        """Returns smoothed and mixed targets. A row without a label is a negative example of every class."""
        smooth = self.label_smoothing
        return mix_targets(targets_BK * (1 - smooth) + smooth / targets_BK.shape[1], mix_B, partner_B)

    def _loss(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        loss_BK = functional.binary_cross_entropy_with_logits(logits_BK, target_BK, reduction="none")
        return loss_BK.sum(dim=1) if self.reduce == "sum" else loss_BK.mean(dim=1)

    def probabilities(self, logits_BK: Tensor) -> Tensor:
        """Returns the sigmoid of each logit, float32."""
        return logits_BK.float().sigmoid()


def mix_targets(targets_BK: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
    """Returns mix x own target + (1 - mix) x target of the partner. Rows with mix = 1 are unchanged bit for bit."""
    mix_B1 = mix_B.to(targets_BK.dtype)[:, None]
    return targets_BK * mix_B1 + targets_BK[partner_B] * (1 - mix_B1)


Task = SingleLabel | MultiLabel
