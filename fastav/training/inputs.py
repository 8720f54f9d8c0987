"""From a recipe to a stream of batches: open the manifests, make the plan, choose the decoder, start the loader."""

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

MEASURED_CLIPS = 64  # enough for mean and deviation of a spectrogram to a few tenths of a dB


@dataclass(frozen=True)
class SplitSource:
    """What a split of the recipe's data is.

    Attributes:
        manifests: Manifests with their shares; one for evaluation.
        classes: Class names, in the order of the model's outputs.
        aliases: Other names of classes.
        files: Manifests and the file of aliases: what is read from.
    """

    manifests: tuple[tuple[Manifest, float], ...]
    classes: tuple[str, ...]
    aliases: dict[str, str]
    files: tuple[Path, ...] = ()

    @property
    def num_clips(self) -> int:
        """Clips of all manifests."""
        return sum(len(manifest) for manifest, _ in self.manifests)


def training_source(recipe: Recipe) -> SplitSource:
    """Opens what is trained on.

    Raises:
        UserError: No manifest is named, it cannot be read, or nothing in the split can be used.
    """
    data = recipe.data
    if not data.manifest:
        raise UserError(
            "data.manifest is not set; expected the path of a .parquet manifest (see `fastav index --help`)"
        )
    main = Manifest.open(data.manifest).with_shards(data.shards)
    others = ((Manifest.open(mix.manifest).with_shards(mix.shards), mix.weight) for mix in data.mix)
    parts = [(main, data.weight), *others]
    chosen = tuple((_usable(manifest.split(data.train), recipe), weight) for manifest, weight in parts)
    for manifest, _ in chosen:
        _reach_shards(manifest, recipe)
    aliases = (Path(data.aliases),) if data.aliases else ()
    files = (*(manifest.path for manifest, _ in chosen), *aliases)
    return SplitSource(chosen, main.classes, read_aliases(data.aliases), files)


def evaluation_source(
    recipe: Recipe,
    manifest: str | Path | None = None,
    split: str | None = None,
    classes: tuple[str, ...] | None = None,
) -> SplitSource:
    """Opens what is evaluated on: the recipe's test split, or another manifest or split.

    Args:
        recipe: The run's recipe.
        manifest: Another manifest; None for the recipe's.
        split: Another split; None for the recipe's `data.test`, or the only one of another manifest.
        classes: The model's classes; None for those of the manifest.

    Raises:
        UserError: As for `training_source`.
    """
    opened = Manifest.open(manifest or recipe.data.manifest)
    if manifest is None:
        opened = opened.with_shards(recipe.data.shards)
    name = split or recipe.data.test
    if manifest is not None and split is None and name not in opened.splits and len(opened.splits) == 1:
        (name,) = opened.splits  # new clips, which nobody has held out from anything
    chosen = _usable(opened.split(name), recipe)
    _reach_shards(chosen, recipe)
    return SplitSource(((chosen, 1.0),), classes or opened.classes, read_aliases(recipe.data.aliases))


def modalities(recipe: Recipe) -> tuple[Modality, ...]:
    """What the recipe's model looks at: `video`, `audio` or both."""
    return recipe.model.fusion.modalities


def make_plan(recipe: Recipe, source: SplitSource) -> Plan:
    """The sampling plan over a source."""
    frontend = recipe.frontend
    return Plan(
        source.manifests,
        recipe.sampling,
        seed=recipe.train.seed,
        mel_bands=frontend.num_mels,
        mel_frames=frontend.num_frames_s,
    )


def decoder_read(recipe: Recipe, used: tuple[Modality, ...]) -> DecodeSpec:
    """What a decoder reads for a recipe of some modalities."""
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
    """The loader of a source's plan, with the recipe's decoder."""
    used = modalities(recipe)
    read = decoder_read(recipe, used)
    return Loader(
        make_plan(recipe, source),
        chosen_decoder(recipe, source).config.build(read),
        recipe.loading,
        modalities=used,
        classes=source.classes,
        aliases=source.aliases,
        on_broken=on_broken,
        pin_memory=pin_memory,
    )


def measured_frontend(recipe: Recipe, source: SplitSource) -> Frontend:
    """The recipe's frontend with the mean and deviation of its spectrogram, measured where they are not given.

    The measure is over the first windows that training would see, so it depends on the recipe and the data alone.

    Raises:
        FastavError: None of the clips could be read.
    """
    frontend = recipe.frontend
    if "audio" not in modalities(recipe) or (frontend.mean is not None and frontend.std is not None):
        return frontend
    start = recipe.model.audio.init_from
    if start:
        # A trained tower expects what it was trained on, normalised as there.
        saved = read_description(model_folder(Path(start)), "model.audio.init_from").get("frontend") or {}
        given = {"mean": frontend.mean, "std": frontend.std}
        found = {name: saved.get(name) if value is None else value for name, value in given.items()}
        return msgspec.structs.replace(frontend, **found)
    step = 2 * recipe.sampling.repeat
    count = -(-MEASURED_CLIPS // step) * step
    with make_loader(recipe, source, lambda clip, error: None) as loader:
        batch = next(iter(loader.batches([("train", 0, count)])))
    assert batch.mel_BWCML is not None
    heard = batch.mel_BWCML[batch.has_audio_B & (batch.weight_B > 0)].double()
    if not heard.numel():
        raise FastavError(
            f"{recipe.data.manifest}: none of {count} training clips has sound; set frontend.mean and frontend.std"
        )
    mean = recipe.frontend.mean if recipe.frontend.mean is not None else round(float(heard.mean()), 3)
    std = recipe.frontend.std if recipe.frontend.std is not None else round(max(float(heard.std()), 1e-3), 3)
    return msgspec.structs.replace(frontend, mean=mean, std=std)


def read_aliases(path: str | Path) -> dict[str, str]:
    """Reads a CSV of `name,class` lines; an empty path gives no aliases.

    Raises:
        UserError: The file is missing or a line has not two columns.
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
            raise UserError(f"{path}:{number}: {len(row)} columns given, expected two: name,class")
    return {name.strip(): known.strip() for name, known in rows}


def chosen_decoder(recipe: Recipe, source: SplitSource) -> DecoderChoice:
    """The decoder that the recipe, this machine and the clips make."""
    clips = sample_clips([manifest for manifest, _ in source.manifests])
    return choose_decoder(recipe.decode, ClipStats.of(clips), "video" in modalities(recipe), cpu_only(recipe))


def cpu_only(recipe: Recipe) -> str:
    """Why this recipe's clips must be decoded on the CPU; empty where they need not."""
    return "frontend.factory is computed on the CPU" if recipe.frontend.factory else ""


def describe_decoder(recipe: Recipe, source: SplitSource) -> str:
    """The decoder in force and why, for the first log line."""
    choice, clip_stats = (
        chosen_decoder(recipe, source),
        ClipStats.of(sample_clips([manifest for manifest, _ in source.manifests])),
    )
    threads = recipe.loading.num_workers()
    kind = choice.config.factory if isinstance(choice.config, ExternalDecoder) else to_table(choice.config)["kind"]
    return f"{kind} ({choice.reason}), {threads} threads; clips: {clip_stats.describe()}"


def choose_pin_memory(device: torch.device) -> bool:
    """Page-locked batches pay where a copy engine fetches them."""
    return device.type == "cuda"


def _reach_shards(manifest: Manifest, recipe: Recipe) -> None:
    """Reads one clip's table: a server or folder of shards that is not there ends the run before it begins.

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
            f"{manifest.path}: its shards cannot be read ({error}); where they have been moved, name their folder or "
            "URL by --data.shards"
        ) from None


def _usable(manifest: Manifest, recipe: Recipe) -> Manifest:
    """The rows that a model of these modalities can use."""
    chosen = manifest.select(modalities(recipe), "any")
    if not len(chosen):
        wanted = " or ".join(modalities(recipe))
        raise UserError(f"{manifest.path}: no clip of the split has {wanted}")
    return chosen


def unmapped(source: SplitSource) -> str:
    """One line on the classes of the data that the model does not know; empty when it knows them all."""
    known = set(source.classes)
    strange = [
        name
        for manifest, _ in source.manifests
        for name in manifest.classes
        if source.aliases.get(name, name) not in known
    ]
    if not strange:
        return ""
    named = ", ".join(strange[:10])
    return f"{len(strange)} classes of the data are unknown to the model, their clips count as unlabelled: {named}"
