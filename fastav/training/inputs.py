"""From a recipe to batches: opens the manifests, makes the plan, chooses the decoder, and makes the loader."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from fastav.core.errors import FastavError, MediaError, UserError
from fastav.data.clip import Clip, Modality
from fastav.data.manifest import Manifest
from fastav.data.plan import Plan
from fastav.loader.loader import Loader
from fastav.media.decoder import DecodeSpec
from fastav.media.decoder_choice import ClipStats, DecoderChoice, ExternalDecoder, choose_decoder, sample_clips
from fastav.media.shards import ShardReader
from fastav.media.spectrogram import Frontend
from fastav.model.weights import model_folder, read_description
from fastav.recipe.parse import to_table
from fastav.recipe.schema import Recipe

MEASURED_CLIPS = 64  # enough to measure mean and deviation of the spectrogram to a few tenths of a dB


@dataclass(frozen=True)
class SplitSource:
    """The data of one split: rows of one or more manifests.

    Attributes:
        manifests: (manifest, weight) pairs; a single one for evaluation.
        classes: Class names, in the order of the model's outputs.
        aliases: Label in the manifest -> class name.
        files: Paths of the manifests and of the file of aliases; empty for evaluation.
    """

    manifests: tuple[tuple[Manifest, float], ...]
    classes: tuple[str, ...]
    aliases: dict[str, str]
    files: tuple[Path, ...] = ()

    @property
    def num_clips(self) -> int:
        """Number of clips in all manifests."""
        return sum(len(manifest) for manifest, _ in self.manifests)


def training_source(recipe: Recipe) -> SplitSource:
    """Opens the training split of a recipe.

    Raises:
        UserError: `data.manifest` is not set, a manifest or its shards cannot be read, or the split has no usable clip.
    """
    data = recipe.data
    if not data.manifest:
        raise UserError(
            "data.manifest is not set: expected the path of a .parquet manifest (see `fastav index --help`)"
        )
    main = Manifest.open(data.manifest).with_shards(data.shards)
    others = ((Manifest.open(mix.manifest).with_shards(mix.shards), mix.weight) for mix in data.mix)
    parts = [(main, data.weight), *others]
    chosen = tuple((_usable(manifest.split(data.train), recipe), weight) for manifest, weight in parts)
    for manifest, _ in chosen:
        _check_shards(manifest, recipe)
    aliases = (Path(data.aliases),) if data.aliases else ()
    files = (*(manifest.path for manifest, _ in chosen), *aliases)
    return SplitSource(chosen, main.classes, read_aliases(data.aliases), files)


def evaluation_source(
    recipe: Recipe,
    manifest: str | Path | None = None,
    split: str | None = None,
    classes: tuple[str, ...] | None = None,
) -> SplitSource:
    """Opens the data to evaluate on: the recipe's test split, or another manifest or split.

    Args:
        recipe: The run's recipe.
        manifest: Another manifest; None for the recipe's.
        split: Another split; None for the recipe's `data.test`. If another manifest has a single split, None means
            that one.
        classes: The model's classes; None for those of the manifest.

    Raises:
        UserError: The manifest or its shards cannot be read, or the split is missing or has no usable clip.
    """
    opened = Manifest.open(manifest or recipe.data.manifest)
    if manifest is None:
        opened = opened.with_shards(recipe.data.shards)
    name = split or recipe.data.test
    if manifest is not None and split is None and name not in opened.splits and len(opened.splits) == 1:
        (name,) = opened.splits  # a manifest of new clips, without a held-out split
    chosen = _usable(opened.split(name), recipe)
    _check_shards(chosen, recipe)
    return SplitSource(((chosen, 1.0),), classes or opened.classes, read_aliases(recipe.data.aliases))


def modalities(recipe: Recipe) -> tuple[Modality, ...]:
    """Returns the modalities that the recipe's model uses: `video`, `audio` or both."""
    return recipe.model.fusion.modalities


def make_plan(recipe: Recipe, source: SplitSource) -> Plan:
    """Makes the sampling plan over a source."""
    frontend = recipe.frontend
    return Plan(
        source.manifests,
        recipe.sampling,
        seed=recipe.train.seed,
        mel_bands=frontend.num_mels,
        mel_frames=frontend.num_frames_s,
    )


def decode_spec(recipe: Recipe, used: tuple[Modality, ...]) -> DecodeSpec:
    """Returns the decoder's settings: image size, spectrogram and window of the recipe, for these modalities."""
    return DecodeSpec(
        modalities=used,
        image_size=recipe.sampling.image_size,
        frontend=recipe.frontend,
        window=recipe.sampling.window,
        reading=recipe.loading.shards,
    )


def make_loader(
    recipe: Recipe, source: SplitSource, on_broken: Callable[[Clip, MediaError], None], *, pin_memory: bool = False
) -> Loader:
    """Makes the loader of a source, with the recipe's plan and decoder.

    Args:
        recipe: The resolved recipe.
        source: Data of the split.
        on_broken: Called in the consumer's thread, once for each clip that cannot be read.
        pin_memory: Whether batches are in page-locked memory.
    """
    used = modalities(recipe)
    spec = decode_spec(recipe, used)
    return Loader(
        make_plan(recipe, source),
        chosen_decoder(recipe, source).config.build(spec),
        recipe.loading,
        modalities=used,
        classes=source.classes,
        aliases=source.aliases,
        on_broken=on_broken,
        pin_memory=pin_memory,
    )


def measured_frontend(recipe: Recipe, source: SplitSource) -> Frontend:
    """Returns the recipe's frontend with mean and standard deviation filled in.

    Values that the recipe does not set come from the run in `model.audio.init_from`, or are measured on the first
    training windows of the plan. So they depend on the recipe and the data only.

    Raises:
        FastavError: None of the measured clips has audio.
    """
    frontend = recipe.frontend
    if "audio" not in modalities(recipe) or (frontend.mean is not None and frontend.std is not None):
        return frontend
    start = recipe.model.audio.init_from
    if start:
        # A trained tower expects spectrograms that are normalised as in its training.
        saved = read_description(model_folder(Path(start)), "model.audio.init_from").get("frontend") or {}
        given = {"mean": frontend.mean, "std": frontend.std}
        found = {name: saved.get(name) if value is None else value for name, value in given.items()}
        return msgspec.structs.replace(frontend, **found)
    step = 2 * recipe.sampling.repeat
    count = -(-MEASURED_CLIPS // step) * step
    with make_loader(recipe, source, lambda clip, error: None) as loader:
        batch = next(iter(loader.batches([("train", 0, count)])))
    assert batch.mel_BWCML is not None
    mel = batch.mel_BWCML[batch.has_audio_B & (batch.weight_B > 0)].double()
    if not mel.numel():
        raise FastavError(
            f"{recipe.data.manifest}: none of {count} training clips has audio; set frontend.mean and frontend.std"
        )
    mean = recipe.frontend.mean if recipe.frontend.mean is not None else round(float(mel.mean()), 3)
    std = recipe.frontend.std if recipe.frontend.std is not None else round(max(float(mel.std()), 1e-3), 3)
    return msgspec.structs.replace(frontend, mean=mean, std=std)


def read_aliases(path: str | Path) -> dict[str, str]:
    """Reads a CSV file of `name,class` lines.

    Args:
        path: Path of the file; empty for no aliases.

    Returns:
        Label in the manifest -> class name.

    Raises:
        UserError: The file cannot be read, or a line does not have two columns.
    """
    if not str(path):
        return {}
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{path}: cannot read the aliases: {error.strerror}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UserError(f"{path}:{number}: got {len(row)} columns, expected two: name,class")
    return {name.strip(): class_name.strip() for name, class_name in rows}


def chosen_decoder(recipe: Recipe, source: SplitSource) -> DecoderChoice:
    """Chooses the decoder for the recipe, this machine and the clips."""
    clips = sample_clips([manifest for manifest, _ in source.manifests])
    return choose_decoder(recipe.decode, ClipStats.of(clips), "video" in modalities(recipe), cpu_only(recipe))


def cpu_only(recipe: Recipe) -> str:
    """Returns why this recipe's clips must be decoded on the CPU; empty if they need not be."""
    return "frontend.factory is computed on the CPU" if recipe.frontend.factory else ""


def describe_decoder(recipe: Recipe, source: SplitSource) -> str:
    """Describes the chosen decoder, the reason, its workers and the clips, for the first log line."""
    choice, clip_stats = (
        chosen_decoder(recipe, source),
        ClipStats.of(sample_clips([manifest for manifest, _ in source.manifests])),
    )
    threads = recipe.loading.num_workers()
    kind = choice.config.factory if isinstance(choice.config, ExternalDecoder) else to_table(choice.config)["kind"]
    return f"{kind} ({choice.reason}), {threads} threads; clips: {clip_stats.describe()}"


def choose_pin_memory(device: torch.device) -> bool:
    """Returns whether batches should be in page-locked memory: on CUDA, whose copy engine reads it asynchronously."""
    return device.type == "cuda"


def _check_shards(manifest: Manifest, recipe: Recipe) -> None:
    """Reads the index of one clip, so that a missing folder or server of shards ends the run at its start.

    Raises:
        UserError: The shard cannot be read.
    """
    clip = manifest.clip(0)
    if not clip.shard:
        return
    try:
        ShardReader(recipe.loading.shards).units(clip)
    except MediaError as error:
        raise UserError(
            f"{manifest.path}: its shards cannot be read ({error}); if they have been moved, set --data.shards to "
            "their folder or URL"
        ) from None


def _usable(manifest: Manifest, recipe: Recipe) -> Manifest:
    """Selects the rows that have at least one modality of the recipe's model."""
    chosen = manifest.select(modalities(recipe), "any")
    if not len(chosen):
        needed = " or ".join(modalities(recipe))
        raise UserError(f"{manifest.path}: no clip of the split has {needed}")
    return chosen


def describe_unknown_classes(source: SplitSource) -> str:
    """Returns one line that lists classes of the data that are unknown to the model; empty if there are none."""
    known = set(source.classes)
    unknown = [
        name
        for manifest, _ in source.manifests
        for name in manifest.classes
        if source.aliases.get(name, name) not in known
    ]
    if not unknown:
        return ""
    named = ", ".join(unknown[:10])
    return f"{len(unknown)} classes of the data are unknown to the model, their clips count as unlabelled: {named}"
