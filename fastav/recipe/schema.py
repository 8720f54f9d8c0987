"""Recipe: every key of a run, with its type and default."""

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
    """A further manifest to train on.

    Attributes:
        manifest: Path of its `.parquet` file.
        weight: Share of the training samples, relative to the other weights.
        shards: As in `Data`.
    """

    manifest: str
    weight: PositiveFloat = 1.0
    shards: str = ""


class Data(Config, frozen=True):
    """What is trained and tested on.

    Attributes:
        manifest: Path of the `.parquet` file.
        weight: Its share of the training samples when `mix` names further manifests.
        mix: Further manifests; exact shares within each block of samples.
        train: Split to train on.
        test: Split to evaluate on; empty for none.
        aliases: CSV file of `name,class` lines that map other data sets' class names onto this one's.
        shards: Folder or URL (`s3://bucket/pack`) that holds a pack's `shards/`; empty for the manifest's own folder.
    """

    manifest: str = ""
    weight: PositiveFloat = 1.0
    mix: tuple[MixedManifest, ...] = ()
    train: str = "train"
    test: str = "test"
    aliases: str = ""
    shards: str = ""


class Training(Config, frozen=True):
    """How long, how large and how exactly.

    Attributes:
        epochs: Passes over the training split; 0 trains nothing and evaluates (score fusion).
        batch: Clips per optimizer step over all ranks.
        micro_batch: Clips per forward pass and rank; 0 is batch / ranks, smaller accumulates gradients.
        precision: `fp32` or `bf16` (autocast; parameters stay fp32).
        compile: Compile the model with torch.compile.
        deterministic: Only deterministic kernels; needed for bit-identical resume on a GPU.
        seed: Of the order, the augmentation, the initial weights and the dropped paths.
        threads: CPU threads of the model's operations; 0 leaves torch's choice. Recorded and restored on resume.
        eval_every: Epochs between evaluations; 0 evaluates at the end only.
        num_processes: World size that must be in force; 0 accepts any.
        strategy: How the launcher must have spread the model over ranks; `any` accepts any.
        reduce_dtype: Of gradients as they are sent between ranks; `bf16` halves the traffic, and rounds.
        bucket_mb: Size of the buckets in which DDP sends gradients while the backward pass goes on, MB.
        activation_checkpointing: Compute the transformer blocks again in the backward pass instead of keeping their
            activations: about a third more work for a fraction of the memory.
        patience_s: Seconds within which another rank must answer a collective.
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
        every: Optimizer steps between checkpoints; 0 is once per epoch.
        keep: Newest checkpoints kept, the best one beside them.
        best: Evaluation metric that marks the best; empty is the task's own (top-1 or mAP).
        asynchronous: Whether the training goes on while a checkpoint is written.
    """

    every: NonNegativeInt = 0
    keep: PositiveInt = 2
    best: str = ""
    asynchronous: bool = True


class Logging(Config, frozen=True):
    """What is shown and kept.

    Attributes:
        every: Optimizer steps between rows of `metrics.jsonl`.
        trackers: accelerate trackers by name, such as `tensorboard`, `wandb`; `metrics.jsonl` is always written.
    """

    every: PositiveInt = 10
    trackers: tuple[str, ...] = ("tensorboard",)


class Recipe(Config, frozen=True):
    """One run.

    Attributes:
        out: Run folder; empty is `runs/` plus the recipe file's name.
        data: Manifests and splits.
        sampling: Frames, crops, windows, masks, mixup.
        frontend: Log-mel settings; `preset` picks the base.
        model: Towers and fusion.
        task: Loss and metrics.
        optim: Optimizer, schedule, clipping, EMA.
        train: Length, batch, precision, seed.
        decode: Decoder.
        loading: Workers and prefetch.
        guard: Losses, gradients and ranks that are out of bounds.
        saving: Checkpoints.
        log: Rows and trackers.
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
