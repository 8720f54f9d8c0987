"""The recipe: every setting of a run, with type and default."""

from __future__ import annotations

from typing import Literal

from fastav.core.config import Config, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from fastav.data.plan import Sampling
from fastav.distributed.strategy import StrategyName
from fastav.loader.loader import Loading
from fastav.media.decoder_choice import Auto, DecoderConfig
from fastav.media.spectrogram import Frontend
from fastav.model.av_model import Model
from fastav.optim.loss_guard import GuardConfig
from fastav.optim.optimizer import Optim
from fastav.task.classification import SingleLabel, Task


class MixedManifest(Config, frozen=True):
    """An additional manifest to train on.

    Attributes:
        manifest: Path of the manifest (`.parquet`).
        weight: Share of the training samples, relative to `data.weight` and the other weights of `data.mix`.
        shards: Folder or URL (`s3://bucket/pack`) that contains `shards/` of the pack; empty for the manifest's folder.
    """

    manifest: str
    weight: PositiveFloat = 1.0
    shards: str = ""


class Data(Config, frozen=True):
    """Manifests and splits.

    Attributes:
        manifest: Path of the manifest (`.parquet`).
        weight: Share of the training samples from this manifest, relative to the weights in `data.mix`.
        mix: Additional manifests to train on. The shares of all manifests are exact within each block of samples.
        train: Split to train on.
        test: Split to evaluate on; empty for no evaluation.
        aliases: CSV file with lines `name,class` that map class names of other data sets to classes of this manifest.
        shards: Folder or URL (`s3://bucket/pack`) that contains `shards/` of the pack; empty for the manifest's folder.
    """

    manifest: str = ""
    weight: PositiveFloat = 1.0
    mix: tuple[MixedManifest, ...] = ()
    train: str = "train"
    test: str = "test"
    aliases: str = ""
    shards: str = ""


class Training(Config, frozen=True):
    """Length of the training, batch, precision and distribution over ranks.

    Attributes:
        epochs: Passes over the training split, fractions allowed; 0 skips training and only evaluates (score fusion).
        batch: Global batch: clips per optimizer step over all ranks.
        micro_batch: Clips per forward pass on each rank; 0 is `train.batch` / ranks. A smaller value accumulates
            gradients over several forward passes.
        precision: `fp32`, or `bf16` for autocast to bfloat16 (parameters stay float32).
        compile: Compile the model with torch.compile.
        deterministic: Use only deterministic kernels; required for bit-identical resume on a GPU.
        seed: Seed of the sample order, the augmentation, the initial weights and drop path.
        threads: Number of CPU threads for the operations of the model; 0 uses torch's default. The number is saved with
            the run and restored on resume.
        eval_every: Epochs between evaluations; 0 evaluates only at the end.
        num_processes: Required world size (number of ranks); 0 accepts any.
        strategy: Required distribution of the model over ranks, as set by the launcher; `any` accepts any.
        reduce_dtype: Data type of gradients in communication between ranks; `bf16` halves the traffic and rounds the
            gradients.
        bucket_mb: Size in MB of the gradient buckets that DDP reduces during the backward pass.
        activation_checkpointing: Recompute the transformer blocks in the backward pass instead of storing their
            activations: about a third more computation, a fraction of the memory.
        patience_s: Timeout of collectives in seconds: a rank that does not answer within it ends the run.
    """

    epochs: NonNegativeFloat = 10.0
    batch: PositiveInt = 64
    micro_batch: NonNegativeInt = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    deterministic: bool = False
    seed: NonNegativeInt = 0
    threads: NonNegativeInt = 0
    eval_every: NonNegativeFloat = 1.0
    num_processes: NonNegativeInt = 0
    strategy: Literal["any", StrategyName] = "any"
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    bucket_mb: PositiveFloat = 25.0
    activation_checkpointing: bool = False
    patience_s: PositiveFloat = 600.0


class Saving(Config, frozen=True):
    """Checkpoints.

    Attributes:
        every: Optimizer steps between checkpoints; 0 saves once per epoch.
        keep: Number of newest checkpoints to keep; the best one is kept in addition.
        best: Evaluation metric that decides which checkpoint is the best; empty is the main metric of the task (top-1
            or mAP).
        asynchronous: Write checkpoints in a background thread while training continues; false waits for each.
    """

    every: NonNegativeInt = 0
    keep: PositiveInt = 2
    best: str = ""
    asynchronous: bool = True


class Logging(Config, frozen=True):
    """Metrics during training.

    Attributes:
        every: Optimizer steps between rows of `metrics.jsonl`.
        trackers: Names of accelerate's trackers, such as `tensorboard` or `wandb`. `metrics.jsonl` is always written.
    """

    every: PositiveInt = 10
    trackers: tuple[str, ...] = ("tensorboard",)


class Recipe(Config, frozen=True):
    """All settings of a run.

    Attributes:
        out: Run folder; empty is `runs/` plus the name of the recipe file without its extension.
        data: Manifests and splits.
        sampling: Frames, crops, audio windows, masks and mixup.
        frontend: Log-mel spectrogram; `preset` selects the defaults.
        model: Towers and fusion.
        task: Loss and metrics.
        optim: Optimizer, schedule, gradient clipping and weight averaging (EMA).
        train: Length, batch, precision, seed and distribution.
        decode: Decoder.
        loading: Loader workers and prefetching.
        guard: Checks of losses, gradients, ranks and devices.
        saving: Checkpoints.
        log: Training metrics and trackers.

    Example:
        >>> from fastav.recipe.parse import load_recipe
        >>> recipe = load_recipe("launch/recipes/small.toml")
        >>> recipe.train.batch
        16
    """

    out: str = ""
    data: Data = Data()
    sampling: Sampling = Sampling()
    frontend: Frontend = Frontend()
    model: Model = Model()
    task: Task = SingleLabel()
    optim: Optim = Optim()
    train: Training = Training()
    decode: DecoderConfig = Auto()
    loading: Loading = Loading()
    guard: GuardConfig = GuardConfig()
    saving: Saving = Saving()
    log: Logging = Logging()
