"""`AVModel`: towers and fusion as one module that maps batches from the loader to logits.

The model itself normalises the uint8 frames and the spectrogram (in dB), masks mel bands and applies mixup, on the
device. An exported model therefore takes plain frames and spectrograms. A saved model is a folder of two files:

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
from fastav.core.plugin import is_external
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
        video: Network of the frames; unused by fusion kind `audio`.
        audio: Network of the spectrogram; unused by fusion kind `video`.
        fusion: How the two towers are combined into logits.
        init_from: Folder of a run or of a saved model with the same towers, fusion and input sizes; all weights start
            from it. The classification heads are taken over only if its classes are the same. Empty: not used.
    """

    video: TowerConfig = TowerConfig()
    audio: TowerConfig = TowerConfig()
    fusion: Fusion = Bottleneck()
    init_from: str = ""


class Inputs(Config, frozen=True):
    """Input sizes of a model.

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
    """Maps frames and spectrograms of clips to logits.

    Args:
        config: Towers and fusion. Each tower is loaded from its `weights` or `init_from`.
        classes: Class names in the order of the logits.
        inputs: Input sizes.
        frontend: Spectrogram settings, including the mean and the standard deviation that normalise it.

    Raises:
        UserError: Towers, fusion and input sizes do not fit together.

    Attributes:
        video: Tower of the frames; None for fusion kind `audio`.
        audio: Tower of the spectrogram; None for fusion kind `video`.
        fusion: Module of the fusion, with its own parameters.

    Example:
        model = AVModel.from_pretrained("runs/birds")
        logits_BK = model(frames_BTCHW, mel_BWCML)
        print(model.classes[logits_BK[0].argmax()])
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
        """Builds the model of a new run and loads the weights that the config names.

        Args:
            config: Towers and fusion.
            classes: Class names in the order of the logits.
            sampling: Frames per clip, frame size and audio window of the run.
            frontend: Spectrogram settings with statistics.

        Raises:
            UserError: Towers, fusion and input sizes do not fit together, or weights cannot be loaded.
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
        """Builds the model of a run without loading any weights; the caller loads them, as from a checkpoint.

        Raises:
            UserError: Towers, fusion and input sizes do not fit together.
        """
        model = cls(without_sources(config), classes, _inputs(sampling, frontend), frontend)
        model.config = config
        return model

    def attention(self, precision: str = "fp32") -> str:
        """Describes the attention implementation that the model uses on its current device.

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
        """Computes the logits of B clips. The arguments are fields of `fastav.loader.batch.Batch`.

        Args:
            frames_BTCHW: uint8 frames; not needed by fusion kind `audio`.
            mel_BWCML: float32 log-mel spectrogram in dB with one or three channels; not needed by fusion kind `video`.
            window_BW: bool; False marks a window that is padding. None: all are real.
            has_video_B: bool; whether a clip has video. None: all have.
            has_audio_B: bool; whether a clip has audio. None: all have.
            band_B2: int64 first masked mel band and number of masked bands; None in evaluation.
            mix_B: float32 mixup weight of the clip itself; None in evaluation. A mixed clip has a modality if either of
                the two clips has it.
            partner_B: int64 row of the mixup partner.

        Returns:
            float32 logits [B, K]; [B, 2, K] in training with fusion `mbt` and head `token`.
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
        inputs = FusionInputs(frames_BTCHW, mel_BWCML, window_BW, has_video_B, has_audio_B)
        return self.fusion(self.video, self.audio, inputs).float()

    def _mel(self, mel_BWCML: Tensor, band_B2: Tensor | None) -> Tensor:
        """Returns the normalised and masked spectrogram."""
        assert self.frontend.mean is not None
        assert self.frontend.std is not None
        mel_BWCML = normalise_mel(mel_BWCML, self.frontend.mean, self.frontend.std)
        return mel_BWCML if band_B2 is None else mask_bands(mel_BWCML, band_B2)

    def flops(self, windows: int = 1) -> int:
        """Returns the floating point operations of a forward pass of one clip (a multiply-add counts as two).

        Matrix products and convolutions count, as in PyTorch's `FlopCounterMode`. ViT towers and fusions are counted by
        formula; a tower of another kind is run once under that counter on the meta device.

        Args:
            windows: Number of audio windows; 1 in training.
        """
        return int(self.fusion.flops(self.video, self.audio, self.inputs.frames, windows))

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters with several axes but without weight decay: embeddings and bottleneck."""
        names = {f"fusion.{name}" for name in ("bottleneck", "time_embed", *getattr(self.fusion, "decay_free", ()))}
        for modality, tower in (("video", self.video), ("audio", self.audio)):
            if tower is not None and hasattr(tower.net, "no_weight_decay"):
                names |= {f"{modality}.net.{name}" for name in tower.net.no_weight_decay()}
        return names & {name for name, _ in self.named_parameters()}

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Saves the model atomically: writes a temporary folder and renames it to `folder`, replacing an older model.

        Args:
            folder: Folder to write, such as `model/` of a run.
            state: Tensors that replace the model's own under the same names, such as averaged parameters.
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
        """Loads a saved model on the CPU, in evaluation mode.

        Only safetensors and JSON are read. Towers and fusions named `module:attribute` run third-party code, so each
        name has to be allowed in `factories`.

        Args:
            source: Folder of a saved model or of a run. If no such folder exists: `organisation/name` on the Hugging
                Face hub.
            factories: The `module:attribute` names that may be imported and called.

        Raises:
            UserError: No model was found, its files do not match, or it names code that is not allowed.

        Example:
            model = AVModel.from_pretrained("runs/birds")
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
    """Returns the third-party code that building the model runs, as {recipe key: `module:attribute`}."""
    if isinstance(config.fusion, ExternalFusion):
        names = {"model.fusion.kind": config.fusion.factory}
        used: tuple[Modality, ...] = ("video", "audio")  # the modalities in use are known only once that code has run
    else:
        names, used = {}, config.fusion.modalities
    names |= {f"model.{modality}.name": getattr(config, modality).name for modality in used}
    return {key: name for key, name in names.items() if is_external(name)}


def _inputs(sampling: Sampling, frontend: Frontend) -> Inputs:
    return Inputs(sampling.frames, sampling.image_size, frontend.num_mels, sampling.window)


def without_sources(config: Model) -> Model:
    """Returns the config without weights to load, for a model whose weights are loaded afterwards."""
    empty: dict[str, Any] = {"init_from": ""} | {
        name: msgspec.structs.replace(getattr(config, name), weights="", init_from="") for name in ("video", "audio")
    }
    return msgspec.structs.replace(config, fusion=config.fusion.without_sources(), **empty)


def _start_from(model: AVModel, source: str) -> None:
    """Loads a saved model's weights into `model`; heads keep their initial values if the classes differ.

    Raises:
        UserError: There is no such model, or its parameters do not match.
    """
    where = "model.init_from"
    folder = model_folder(_folder_of(source))
    same = tuple(read_description(folder, where).get("classes", ())) == model.classes
    state = read_safetensors(folder / WEIGHTS, where)
    kept = {} if same else {name: model.state_dict()[name] for name in _heads(model)}
    load_strictly(model, state | kept, f'{where}: the model in "{folder}"')


def _heads(model: AVModel) -> set[str]:
    """Returns the names of the parameters of the classification heads."""
    modules: list[Any] = [getattr(model.fusion, "head", None)]
    modules += [tower.net.get_classifier() for tower in (model.video, model.audio) if tower is not None]
    heads = {id(p) for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in heads}


def _folder_of(source: str) -> Path:
    """Returns the folder of a saved model; downloads it from the hub if there is no such folder."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise UserError(f'model "{source}": no such folder')
    try:
        return Path(snapshot_download(source, allow_patterns=[DESCRIPTION, WEIGHTS]))
    except Exception as error:  # network, cache and hub raise many types
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f'model "{source}": no such folder, and no model of that name could be loaded from the hub ({reason})'
        ) from error


def load_strictly(model: AVModel, state: Mapping[str, Tensor], where: str) -> None:
    """Loads tensors whose names and shapes must match the model exactly.

    Args:
        model: Model to load into.
        state: Tensors by parameter or buffer name.
        where: Source of the tensors, for messages.

    Raises:
        UserError: Names or shapes differ.
    """
    own = model.state_dict()
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own if name in state}
    wrong = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "with another shape": [
            f"{name}: got {given}, expected {expected}"
            for name, (given, expected) in shapes.items()
            if given != expected
        ],
    }
    text = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in wrong.items() if names)
    if text:
        raise UserError(f"{where}: its parameters do not match this model: {text}")
    model.load_state_dict(state)
