"""The model: towers and fusion behind one call that takes a batch as the loader made it.

The first operation, on the device, normalises the uint8 frames and the spectrogram in dB, masks mel bands and mixes
clips, so that an exported model takes plain frames and spectrograms. A saved model is a folder of two files:

    model.safetensors     parameters and buffers: video.net.*, audio.net.*, fusion.*
    model.json            {"format", "model", "classes", "inputs", "frontend"}
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn

from fastav.core.atomic_files import flush
from fastav.core.config import Config, PositiveInt
from fastav.core.errors import UserError
from fastav.core.external import is_external
from fastav.data.clip import Modality
from fastav.data.plan import Sampling
from fastav.media.spectrogram import Frontend
from fastav.model.fusion import Bottleneck, ExternalFusion, Fusion, FusionInputs
from fastav.model.tower import Tower, TowerConfig
from fastav.model.transforms import mask_bands, mix, normalise_frames, normalise_mel
from fastav.model.weights import DESCRIPTION, WEIGHTS, model_folder, read_description, read_safetensors

FORMAT = 1


class Model(Config, frozen=True):
    """Towers and fusion.

    Attributes:
        video: Of the frames; unused by fusion kind `audio`.
        audio: Of the spectrogram; unused by fusion kind `video`.
        fusion: How they meet.
        init_from: A run or a saved model, of the same towers, fusion and sizes, that all of it starts from; the heads
            where its classes are the same.
    """

    video: TowerConfig = TowerConfig()
    audio: TowerConfig = TowerConfig()
    fusion: Fusion = Bottleneck()
    init_from: str = ""


class Inputs(Config, frozen=True):
    """The sizes a model is made for.

    Attributes:
        frames: Frames per clip T.
        image_size: Height and width of a frame, pixels.
        num_mels: Mel bands M.
        window: Mel frames L of an audio window.
    """

    frames: PositiveInt = 8
    image_size: PositiveInt = 224
    num_mels: PositiveInt = 128
    window: PositiveInt = 400


class AVModel(nn.Module):
    """Frames and spectrogram of clips to logits.

    Args:
        config: Towers and fusion; the towers are filled from what their `weights` or `init_from` name.
        classes: Class names in the order of the logits.
        inputs: Sizes.
        frontend: Settings of the spectrogram, with the statistics that normalise it.

    Raises:
        UserError: where towers, fusion and inputs do not fit together.

    Attributes:
        video: The frames' tower, None for fusion kind `audio`.
        audio: The spectrogram's tower, None for fusion kind `video`.
        fusion: What joins them; its own parameters.
    """

    fusion: Any
    video_mean_C: Tensor
    video_std_C: Tensor

    def __init__(self, config: Model, classes: Sequence[str], inputs: Inputs, frontend: Frontend) -> None:
        super().__init__()
        if not classes:
            raise UserError("model: the list of classes is empty; expected at least one")
        self.config, self.classes, self.inputs, self.frontend = config, tuple(classes), inputs, frontend
        self.modalities = config.fusion.modalities
        K = len(self.classes)
        sizes = {
            "video": (inputs.image_size, inputs.image_size),
            "audio": (inputs.num_mels, inputs.window),
        }
        towers: dict[str, Any] = {"video": None, "audio": None}
        for modality in self.modalities:
            tower: TowerConfig = getattr(config, modality)
            towers[modality] = tower.build(
                modality=modality,
                input_size=sizes[modality],
                num_classes=K if config.fusion.tower_heads else 0,
                classes=self.classes,
            )
        self.fusion = config.fusion.build(towers["video"], towers["audio"], K, inputs.frames)
        self.video: Tower | None = towers["video"]
        self.audio: Tower | None = towers["audio"]
        if self.audio is not None and (frontend.mean is None or frontend.std is None):
            raise UserError(
                "frontend.mean and frontend.std are not set; a model with audio needs both (a run measures them when "
                "it starts)"
            )
        video = self.video
        self.register_buffer("video_mean_C", torch.tensor(video.mean if video else ()), persistent=False)
        self.register_buffer("video_std_C", torch.tensor(video.std if video else ()), persistent=False)

    @classmethod
    def build(cls, config: Model, classes: Sequence[str], sampling: Sampling, frontend: Frontend) -> AVModel:
        """Makes the model of a run.

        Raises:
            UserError: as the class; also where score fusion, which trains nothing, has nothing to start from.
        """
        config.fusion.check({"video": config.video, "audio": config.audio}, classes)
        if not config.init_from:
            return cls(config, classes, _inputs(sampling, frontend), frontend)
        for key in ("model.video", "model.audio"):
            tower: TowerConfig = getattr(config, key.rpartition(".")[2])
            if tower.weights or tower.init_from:
                raise UserError(f"model.init_from and {key}.weights or .init_from are both set; set only one of them")
        model = cls.empty(config, classes, sampling, frontend)
        _start_from(model, config.init_from)
        return model

    @classmethod
    def empty(cls, config: Model, classes: Sequence[str], sampling: Sampling, frontend: Frontend) -> AVModel:
        """Makes the model of a run that is filled from elsewhere: what it started from is not read.

        Raises:
            UserError: as the class.
        """
        model = cls(without_sources(config), classes, _inputs(sampling, frontend), frontend)
        model.config = config
        return model

    def attention(self, precision: str = "fp32") -> str:
        """Which implementation of the attention is in force, and where.

        Args:
            precision: `train.precision` of the recipe.
        """
        device = str(next(self.parameters()).device)
        dtype = "bfloat16" if precision == "bf16" else "float32"
        return self.config.fusion.describe_attention(self.fusion, self.video, self.inputs.frames, device, dtype)

    def forward(
        self,
        frames_BTCHW: Tensor | None = None,
        mel_BWCML: Tensor | None = None,
        window_BW: Tensor | None = None,
        has_video_B: Tensor | None = None,
        has_audio_B: Tensor | None = None,
        band_B2: Tensor | None = None,
        mix_B: Tensor | None = None,
        partner_B: Tensor | None = None,
    ) -> Tensor:
        """Computes the logits of B clips; fields as in `clip.Batch`.

        Args:
            frames_BTCHW: uint8; not needed by fusion kind `audio`.
            mel_BWCML: float32 log-mel in dB, one channel or three; not needed by fusion kind `video`.
            window_BW: bool, which windows are real; None: all.
            has_video_B: bool; None: all clips have video.
            has_audio_B: bool; None: all clips have audio.
            band_B2: int64 mel bands to mask; None in evaluation.
            mix_B: float32 mixup weights; None in evaluation. A mixed clip has what either of the two has.
            partner_B: int64 rows of the mixup partners.

        Returns:
            float32 [B, K].
        """
        if self.video is None:
            frames_BTCHW = has_video_B = None
        elif frames_BTCHW is None:
            raise ValueError("frames_BTCHW is required by this model (got None)")
        else:
            frames_BTCHW = normalise_frames(frames_BTCHW, self.video_mean_C, self.video_std_C)
        if self.audio is None:
            mel_BWCML = window_BW = has_audio_B = None
        elif mel_BWCML is None:
            raise ValueError("mel_BWCML is required by this model (got None)")
        else:
            mel_BWCML = self._mel(mel_BWCML, band_B2)
        if mix_B is not None and partner_B is not None:
            frames_BTCHW = None if frames_BTCHW is None else mix(frames_BTCHW, mix_B, partner_B)
            mel_BWCML = None if mel_BWCML is None else mix(mel_BWCML, mix_B, partner_B)
            has_video_B, has_audio_B = (
                None if has_B is None else has_B | (has_B[partner_B] & (mix_B < 1))
                for has_B in (has_video_B, has_audio_B)
            )
        if mel_BWCML is not None:
            mel_BWCML = mel_BWCML.expand(-1, -1, 3, -1, -1)  # three equal channels (SSW60, section 4.1)
        streams = FusionInputs(frames_BTCHW, mel_BWCML, window_BW, has_video_B, has_audio_B)
        return self.fusion(self.video, self.audio, streams).float()

    def _mel(self, mel_BWCML: Tensor, band_B2: Tensor | None) -> Tensor:
        """Returns the normalised and masked spectrogram."""
        assert self.frontend.mean is not None
        assert self.frontend.std is not None
        mel_BWCML = normalise_mel(mel_BWCML, self.frontend.mean, self.frontend.std)
        return mel_BWCML if band_B2 is None else mask_bands(mel_BWCML, band_B2)

    def flops(self, windows: int = 1) -> int:
        """Floating point operations of a forward pass of one clip (a multiplication and an addition are two).

        Matrix products and convolutions, as PyTorch's `FlopCounterMode` counts them: computed for ViT towers and
        fusions; a tower of another kind is run on the meta device under that counter, once.

        Args:
            windows: Audio windows: 1 in training.
        """
        return int(self.fusion.flops(self.video, self.audio, self.inputs.frames, windows))

    def no_weight_decay(self) -> set[str]:
        """Returns names of parameters with several axes that should not decay: embeddings and bottleneck."""
        names = {f"fusion.{name}" for name in ("bottleneck", "time_embed", *getattr(self.fusion, "decay_free", ()))}
        for modality, tower in (("video", self.video), ("audio", self.audio)):
            if tower is not None and hasattr(tower.net, "no_weight_decay"):
                names |= {f"{modality}.net.{name}" for name in tower.net.no_weight_decay()}
        return names & {name for name, _ in self.named_parameters()}

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the model beside `folder` and renames it into place; a saved one that was there is replaced.

        Args:
            folder: Such as `model/` of a run.
            state: Other values by the same names, such as averaged parameters; None: the model's own.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        values = self.state_dict() | dict(state or {})
        description = {
            "format": FORMAT,
            "model": msgspec.to_builtins(self.config),
            "classes": list(self.classes),
            "inputs": msgspec.to_builtins(self.inputs),
            "frontend": msgspec.to_builtins(self.frontend),
        }
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            beside.chmod(0o755)
            new = beside / "new"
            new.mkdir()
            save_file({name: value.detach().cpu().contiguous() for name, value in values.items()}, new / WEIGHTS)
            (new / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            for path in (new / WEIGHTS, new / DESCRIPTION, new):
                flush(path)
            if folder.exists():
                os.replace(folder, beside / "old")
            os.replace(new, folder)
            flush(folder.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, factories: Sequence[str] = ()) -> AVModel:
        """Loads a saved model, in evaluation mode, on the CPU.

        Only safetensors and JSON are read. Towers and fusions named `module:attribute` run code of that name, so each
        has to be allowed.

        Args:
            source: The saved folder, the folder of a run, or, where there is no such folder, an `organisation/name`
                on the Hugging Face hub.
            factories: The `module:attribute` names that may be called.

        Raises:
            UserError: where there is no model or it does not fit its description.
        """
        where = f'model "{source}"'
        folder = model_folder(_folder_of(str(source)))
        description = read_description(folder, where)
        if description.get("format") != FORMAT:
            raise UserError(f"{where}: its format is {description.get('format')}, this version reads format {FORMAT}")
        try:
            saved = msgspec.convert(description.get("model"), Model)
            classes = msgspec.convert(description.get("classes"), list[str])
            inputs = msgspec.convert(description.get("inputs"), Inputs)
            frontend = msgspec.convert(description.get("frontend"), Frontend)
        except msgspec.ValidationError as error:
            raise UserError(f"{where}: {folder / DESCRIPTION}: {error}") from error
        for key, name in external_names(saved).items():
            if name not in factories:
                raise UserError(
                    f'{where}: loading it runs code of "{name}" ({key}), which is not part of fastav; if you trust it, '
                    f'pass factories=["{name}"]'
                )
        model = cls(without_sources(saved), classes, inputs, frontend)
        model.config = saved
        load_strictly(model, read_safetensors(folder / WEIGHTS, where), where)
        return model.eval()


def external_names(config: Model) -> dict[str, str]:
    """Returns the code outside this project that building the model runs: key of the recipe -> `module:attribute`."""
    if isinstance(config.fusion, ExternalFusion):
        names = {"model.fusion.kind": config.fusion.factory}
        used: tuple[Modality, ...] = ("video", "audio")  # which of them is known only once that code has run
    else:
        names, used = {}, config.fusion.modalities
    names |= {f"model.{modality}.name": getattr(config, modality).name for modality in used}
    return {key: name for key, name in names.items() if is_external(name)}


def _inputs(sampling: Sampling, frontend: Frontend) -> Inputs:
    return Inputs(sampling.frames, sampling.image_size, frontend.num_mels, sampling.window)


def without_sources(config: Model) -> Model:
    """Returns the config with towers that start from nothing: they are filled afterwards."""
    empty: dict[str, Any] = {"init_from": ""} | {
        name: msgspec.structs.replace(getattr(config, name), weights="", init_from="") for name in ("video", "audio")
    }
    return msgspec.structs.replace(config, fusion=config.fusion.without_sources(), **empty)


def _start_from(model: AVModel, source: str) -> None:
    """Fills a model from a saved one; heads are left alone where the classes are others.

    Raises:
        UserError: There is no such model, or it is another one.
    """
    where = "model.init_from"
    folder = model_folder(_folder_of(source))
    same = tuple(read_description(folder, where).get("classes", ())) == model.classes
    state = read_safetensors(folder / WEIGHTS, where)
    kept = {} if same else {name: model.state_dict()[name] for name in _heads(model)}
    load_strictly(model, state | kept, f'{where}: the model in "{folder}"')


def _heads(model: AVModel) -> set[str]:
    """Names of the parameters whose shape is that of the classes."""
    modules: list[Any] = [getattr(model.fusion, "head", None)]
    modules += [tower.net.get_classifier() for tower in (model.video, model.audio) if tower is not None]
    heads = {id(p) for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in heads}


def _folder_of(source: str) -> Path:
    """Returns the folder of a saved model, fetched from the hub where there is none of that name."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise UserError(f'model "{source}": no such folder')
    try:
        return Path(snapshot_download(source, allow_patterns=[DESCRIPTION, WEIGHTS]))
    except Exception as error:  # whatever the network, the cache or the hub raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f'model "{source}": no such folder, and no model of that name could be loaded from the hub ({reason})'
        ) from error


def load_strictly(model: AVModel, state: Mapping[str, Tensor], where: str) -> None:
    """Loads tensors that must be the model's, each one and no other.

    Raises:
        UserError: They are not, naming `where` they come from.
    """
    own = model.state_dict()
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own if name in state}
    wrong = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [
            f"{name}: got {given}, expected {expected}"
            for name, (given, expected) in shapes.items()
            if given != expected
        ],
    }
    text = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in wrong.items() if names)
    if text:
        raise UserError(f"{where}: its parameters do not match this model: {text}")
    model.load_state_dict(state)
