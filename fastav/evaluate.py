"""Evaluation of a model on a split: predictions and metrics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch

from fastav.core.errors import MediaError, Stopped
from fastav.core.log_lines import Console
from fastav.data.clip import Clip
from fastav.loader.batch import Batch
from fastav.model.av_model import AVModel
from fastav.recipe.schema import Recipe
from fastav.task.metrics import Evaluation, Metrics
from fastav.task.predictions import Predictions
from fastav.training.batch_split import BatchSplit
from fastav.training.inputs import SplitSource, choose_pin_memory, make_loader
from fastav.training.process_setup import Ranks


def evaluate(
    model: AVModel,
    recipe: Recipe,
    source: SplitSource,
    ranks: Ranks,
    console: Console,
    *,
    split: str,
    on_broken: Callable[[Clip, MediaError], None],
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[Evaluation, Predictions]:
    """Runs a model over every clip of a source once, distributed over the ranks. Collective.

    Every rank reads the same number of full batches. Padding is not scored, and each clip is scored once.

    Args:
        model: The model, on the device of this rank.
        recipe: Recipe with sampling, loading, task and batch size.
        source: Data to evaluate on.
        ranks: The processes of the run.
        console: Console for the progress line.
        split: Name of the split in the results.
        on_broken: Called for every clip that cannot be read.
        stopping: Returns whether this rank has received a signal to stop.

    Returns:
        Metrics and predictions, the same on every rank.

    Raises:
        Stopped: A rank received a signal to stop.
        TooManyBroken: More than `loading.max_broken` of the samples cannot be read.
    """
    requests = evaluation_split(recipe, ranks).evaluation(source.num_clips)
    metrics = Metrics(source.classes)
    was_training = model.training
    model.eval()
    ranks.broadcast_buffers(model)
    precision = torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
    with (
        make_loader(recipe, source, on_broken, pin_memory=choose_pin_memory(ranks.device)) as loader,
        closing(loader.batches(requests)) as batches,
        torch.no_grad(),  # not inference_mode: sharded parameters that are gathered temporarily need version counters
        precision,
    ):
        for number, host in enumerate(batches, 1):
            batch = host.to(ranks.device)
            probabilities_BK = recipe.task.probabilities(forward(model, batch))
            has_video_B, has_audio_B = _modalities_of(source, host)
            metrics.update(host.ids, probabilities_BK, host.targets_BK, host.weight_B, has_video_B, has_audio_B)
            console.progress(f"evaluating {split}: {number}/{len(requests)} batches", last=number == len(requests))
            if ranks.total([float(stopping())])[0]:
                model.train(was_training)
                raise Stopped("stopped by a signal during an evaluation; the same command resumes")
        loader.check_broken(*(int(count) for count in ranks.total([loader.broken, loader.seen])))
    model.train(was_training)
    gathered = Metrics(source.classes)
    gathered.merge(ranks.gather(metrics.rows()))
    metrics = gathered
    predictions = metrics.predictions()
    return recipe.task.evaluate(predictions, split, seed=recipe.train.seed), predictions


def _modalities_of(source: SplitSource, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns whether each clip has video and audio in the manifest, also for modalities the model does not use."""
    manifest, _ = source.manifests[0]
    has = manifest.columns(batch.row_B.numpy(), ["has_video", "has_audio"])
    return torch.from_numpy(has["has_video"]), torch.from_numpy(has["has_audio"])


def forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Calls a model with the tensors of a batch; masking and mixup are passed in training only. Returns the logits."""
    mixing = (batch.band_B2, batch.mix_B, batch.partner_B) if model.training else (None, None, None)
    return model(batch.frames_BTCHW, batch.mel_BWCML, batch.window_BW, batch.has_video_B, batch.has_audio_B, *mixing)


def evaluation_split(recipe: Recipe, ranks: Ranks) -> BatchSplit:
    """Returns the batch split of an evaluation: the rank's micro-batch, without the constraints of training."""
    micro = recipe.train.micro_batch or max(recipe.train.batch // ranks.world, 1)
    return BatchSplit(micro * ranks.world, micro, 1, ranks.rank, ranks.world)


def summary(evaluation: Evaluation) -> str:
    """Formats the main metric and its interval in one line."""
    if evaluation.value is None:
        return f"split {evaluation.split} has no labelled clip to score"
    ends = evaluation.interval
    interval = f" (95 % interval {ends[0]:.1f} to {ends[1]:.1f})" if ends else ""
    return f"{evaluation.main} {evaluation.value:.2f}{interval} on {evaluation.split}"
