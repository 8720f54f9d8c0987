"""Task: what a clip is to be told: exactly one class (`single_label`) or any number (`multi_label`).

A task is its loss and its figures. Losses are sums over the rows of a micro-batch; the trainer divides by the
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
    """What both tasks share.

    Attributes:
        label_smoothing: Share s of a target that is spread over all K classes: t (1 - s) + s / K.
    """

    name: ClassVar[TaskName]
    label_smoothing: Smoothing = 0.0

    def loss(self, logits_BK: Tensor, targets_BK: Tensor, weight_B: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
        """Sum over the rows of weight x the task's loss with smoothed and mixed targets, a float32 scalar.

        Mixup (Zhang et al., 2018, eq. 1): the target is mix x own + (1 - mix) x the partner's.

        Args:
            logits_BK: Any float dtype, computed in float32; or [B, M, K], of which the mean of M losses is taken
                (one for each modality's class token, as in MBT's code).
            targets_BK: One-hot or multi-hot.
            weight_B: 0 for placeholders and padding.
            mix_B: Weight of the row itself; 1 for no mixup.
            partner_B: Row it is mixed with.
        """
        heads = logits_BK.float().unbind(1) if logits_BK.ndim == 3 else [logits_BK.float()]
        target_BK = self._target(targets_BK.float(), mix_B, partner_B)
        loss_B = torch.stack([self._loss(head_BK, target_BK) for head_BK in heads]).mean(0)
        return (loss_B * weight_B).sum()

    def _target(self, targets_BK: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
        """Smoothed and mixed targets."""
        raise NotImplementedError

    def _loss(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        """The loss of each row."""
        raise NotImplementedError

    @property
    def main(self) -> str:
        """Key of the metric that ranks runs; higher is better."""
        return MAIN[self.name]

    def evaluate(
        self, predictions: Predictions, split: str, *, seed: int = 0, resamples: int = RESAMPLES
    ) -> Evaluation:
        """All figures of the gathered predictions; see `fastav.task.metrics.measure`."""
        return measure(predictions, self.name, split, seed=seed, resamples=resamples)


class SingleLabel(AnyTask, frozen=True, tag="single_label"):
    """Exactly one class per clip: softmax and cross-entropy.

    Attributes:
        label_smoothing: Share s of a target that is spread over all K classes: t (1 - s) + s / K.
    """

    name: ClassVar[TaskName] = "single_label"

    def _target(self, targets_BK: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
        """A row without a label has a target of zeros, smoothed or not, and adds nothing."""
        labelled_B1 = targets_BK.sum(dim=1, keepdim=True)
        smooth = self.label_smoothing
        return mix_targets(targets_BK * (1 - smooth) + labelled_B1 * (smooth / targets_BK.shape[1]), mix_B, partner_B)

    def _loss(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        return -(target_BK * functional.log_softmax(logits_BK, dim=1)).sum(dim=1)

    def probabilities(self, logits_BK: Tensor) -> Tensor:
        """Softmax, float32."""
        return logits_BK.float().softmax(dim=1)


class MultiLabel(AnyTask, frozen=True, tag="multi_label"):
    """Any number of classes per clip: a sigmoid and a binary cross-entropy for each class.

    Attributes:
        label_smoothing: Share s of a target that is spread over all K classes: t (1 - s) + s / K, as MBT.
        reduce: Over a clip's classes: `sum` (MBT's code) or `mean`.
    """

    name: ClassVar[TaskName] = "multi_label"
    reduce: Literal["sum", "mean"] = "sum"

    def _target(self, targets_BK: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
        """A row of zeros has no label and is a negative of every class."""
        smooth = self.label_smoothing
        return mix_targets(targets_BK * (1 - smooth) + smooth / targets_BK.shape[1], mix_B, partner_B)

    def _loss(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        loss_BK = functional.binary_cross_entropy_with_logits(logits_BK, target_BK, reduction="none")
        return loss_BK.sum(dim=1) if self.reduce == "sum" else loss_BK.mean(dim=1)

    def probabilities(self, logits_BK: Tensor) -> Tensor:
        """Sigmoid, float32."""
        return logits_BK.float().sigmoid()


def mix_targets(targets_BK: Tensor, mix_B: Tensor, partner_B: Tensor) -> Tensor:
    """Mix x own + (1 - mix) x the partner's; rows with mix = 1 keep their bits."""
    mix_B1 = mix_B.to(targets_BK.dtype)[:, None]
    return targets_BK * mix_B1 + targets_BK[partner_B] * (1 - mix_B1)


Task = SingleLabel | MultiLabel
