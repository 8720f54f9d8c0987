"""Towers: the network of one modality, a timm model or any network with timm's methods.

A tower maps images [R, 3, H, W] to features [R, F] and logits. A spectrogram is an image of M x L. The R rows are the
frames or the audio windows of clips, those of one clip in consecutive rows. Without fusion the logits equal timm's.

Parameter names are timm's names under `net.`, whatever the fusion does with the tower.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import timm
import torch
from msgspec import Meta
from timm.layers import DropPath
from timm.models import group_parameters
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastav.core.config import Config, Fraction, NonNegativeFloat
from fastav.core.errors import UserError, did_you_mean, reason_of
from fastav.core.plugin import is_external, load_external
from fastav.data.clip import Modality
from fastav.model.weights import fill, read_run, read_safetensors

_RESERVED = {
    "img_size": "the size follows from sampling.image_size, sampling.window and frontend.num_mels",
    "num_classes": "the classes are the manifest's",
    "drop_path_rate": "use the key drop_path",
    "pretrained": 'use the key weights = "timm"',
    "checkpoint_path": "use the key weights",
    "pretrained_cfg": "use the key weights",
    "pretrained_cfg_overlay": "use the key weights",
    "cache_dir": "set the environment variable HF_HOME",
}


class TowerConfig(Config, frozen=True):
    """Settings of one tower.

    `name = "module:factory"` names a function outside this project. It is called as
    `factory(input_size=(H, W), num_classes=K, **args)`, with `drop_path_rate` added if `drop_path` is above 0. It
    returns a module with timm's methods:

    - `forward_features(images)`, the feature maps or tokens of images [R, 3, H, W];
    - `forward_head(x, pre_logits=False)` of these; with `pre_logits=True` it returns features [R, F];
    - `get_classifier()`, a module [R, F] -> [R, K], the identity for K = 0;
    - `num_features`, the number F.

    Optional are `pretrained_cfg["mean"]` and `["std"]` for the normalisation of images (ImageNet's otherwise), and
    `group_matcher()`, needed only to freeze single blocks.

    Attributes:
        name: Name of a timm model, with or without a pretrained tag, or `module:factory` of a function of your own.
        weights: Initial weights. Empty: random. `timm`: timm's pretrained weights, which timm downloads. Or a
            `.safetensors` file with timm's parameter names: position and patch embeddings are resampled to the input
            size, and a warning lists what does not fit (except the head, which may differ).
        init_from: Folder of another run, or of its `model`: the weights of its tower of the same modality are the
            initial ones. Empty: not used. Set at most one of `weights` and `init_from`.
        args: Further arguments of the model, such as `patch_size`, `embed_dim`, `depth`, `num_heads`, `class_token`,
            `global_pool` or `drop_rate`.
        drop_path: Rate of stochastic depth in the last block, 0 to 1; it grows linearly from 0 in the first block. One
            draw per clip.
        freeze: Number of first blocks that are not trained, together with the embedding; 0 trains everything. The final
            norm belongs to the last block. -1 freezes everything but the head (a linear probe). Frozen parts stay in
            evaluation mode.
        lr_scale: Factor on the learning rate of this tower.
    """

    name: str = "vit_base_patch16_224"
    weights: str = ""
    init_from: str = ""
    args: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
    drop_path: Fraction = 0.0
    freeze: Annotated[int, Meta(ge=-1)] = 0
    lr_scale: NonNegativeFloat = 1.0

    def build(
        self,
        *,
        modality: Modality,
        input_size: tuple[int, int],
        num_classes: int,
        classes: Iterable[str] = (),
    ) -> Tower:
        """Builds the tower and loads its weights from `weights` or `init_from`.

        Args:
            modality: Which tower of the run in `init_from` is loaded; also used in messages.
            input_size: H, W of the input: pixels of a frame, or mel bands and mel frames of a window.
            num_classes: Number of classes K of the tower's head; 0 for no head.
            classes: Class names. The head of `init_from` is loaded only if its run had the same classes.

        Raises:
            UserError: The name or an argument is wrong, or the weights cannot be loaded.
        """
        where = f"model.{modality}"
        for key, instead in _RESERVED.items():
            if key in self.args:
                raise UserError(f"{where}.args.{key}: cannot be given here; {instead}")
        if self.weights and self.init_from:
            raise UserError(f"{where}: weights and init_from are both set; set only one of them")
        make = _from_factory if is_external(self.name) else _from_timm
        net = make(self, where, input_size, num_classes)
        if self.weights not in ("", "timm"):
            fill(net, read_safetensors(Path(self.weights), f"{where}.weights"), where=f"{where}.weights")
        elif self.init_from:
            start = read_run(Path(self.init_from), modality, f"{where}.init_from")
            same = start.classes == tuple(classes)
            fill(net, start.state, where=f"{where}.init_from", grid=start.grid, head=same)
        tower = Tower(net, name=self.name, input_size=input_size, where=where)
        tower.freeze(self.freeze)
        return tower


class ClipDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) as in timm, with one draw for all rows of a clip.

    Args:
        rate: Probability that the residual branch of a clip is dropped.
        rows_per_clip: Number of consecutive rows (frames, windows) that belong to one clip.
        rescale: Whether branches that are kept are scaled by 1 / (1 - rate); MBT's code does not.
    """

    def __init__(self, rate: float, rows_per_clip: int = 1, rescale: bool = True) -> None:
        super().__init__()
        self.rate = rate
        self.rows_per_clip = rows_per_clip
        self.rescale = rescale

    def draw(self, clips: int, like: Tensor) -> Tensor | None:
        """Draws the factor of each clip's branch, [clips]; None if nothing is dropped."""
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        factor_B = like.new_empty(clips).bernoulli_(keep)
        return factor_B.div_(keep) if keep > 0.0 and self.rescale else factor_B

    def forward(self, x: Tensor) -> Tensor:
        """Applies the drawn factors to a branch [clips * rows_per_clip, ...]."""
        factor_B = self.draw(x.shape[0] // self.rows_per_clip, x)
        if factor_B is None:
            return x
        assert x.shape[0] % self.rows_per_clip == 0, "the number of rows is not a multiple of rows_per_clip"
        factor_R = factor_B.repeat_interleave(self.rows_per_clip)
        return x * factor_R.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        """Returns the settings that `print` shows."""
        return f"rate={self.rate:.3f}"


class Tower(nn.Module):
    """Network of one modality, with access to the parts that a fusion needs.

    Args:
        net: The network, see `TowerConfig`.
        name: Name of the network, for messages.
        input_size: H, W of the input images.
        where: Recipe key of the tower, such as `model.video`, for messages.

    Raises:
        UserError: The network has several heads, or does not pool its features.

    Attributes:
        width: Number F of features that the head takes (for a ViT, the token width).
        is_vit: Whether the network is timm's `VisionTransformer` with plain `Block`s. Only then can `embed`, `blocks`,
            `pool`, `num_prefix`, `num_patches` and the methods that change blocks be used.
        mean: Mean of the three colour channels for normalisation, in 0 to 1.
        std: Standard deviation of the three colour channels for normalisation, in 0 to 1.
    """

    net: Any  # nn.Module with timm's methods, for which there is no type

    def __init__(self, net: nn.Module, *, name: str, input_size: tuple[int, int], where: str) -> None:
        super().__init__()
        self.net = net
        self.name, self.where, self.input_size = name, where, input_size
        self.width = int(getattr(net, "head_hidden_size", None) or self.net.num_features)
        self.is_vit = isinstance(net, VisionTransformer) and all(type(b) is Block for b in self.net.blocks)
        cfg = getattr(net, "pretrained_cfg", None) or {}
        self.mean = tuple(float(v) for v in cfg.get("mean") or (0.485, 0.456, 0.406))
        self.std = tuple(float(v) for v in cfg.get("std") or (0.229, 0.224, 0.225))
        if not isinstance(self.net.get_classifier(), nn.Module) or getattr(net, "global_pool", None) == "":
            raise UserError(
                f'{where}.name: "{name}" has several heads or no pooling; a network of one feature vector and one head '
                "expected"
            )
        self._drop_paths = tuple(_use_clip_drop_path(net))
        self._frozen: tuple[nn.Module, ...] = ()

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of a ViT."""
        return list(self.net.blocks)

    def replace_block(self, number: int, block: nn.Module) -> None:
        """Replaces a block of a ViT."""
        self.net.blocks[number] = block
        self.update_frozen()

    def require_blocks(self, fusion: str) -> None:
        """Raises a UserError unless this is a ViT of plain timm blocks, which the fusion of that name needs."""
        if not self.is_vit:
            raise UserError(
                f'{self.where}.name: "{self.name}" is not a plain timm ViT, which fusion "{fusion}" needs; use one '
                'such as vit_base_patch16_224, or fusion "late" or "score", which take any tower'
            )

    def rows_per_clip(self, rows: int) -> None:
        """Sets how many consecutive rows belong to one clip, for stochastic depth.

        Call it before running `blocks` directly; `features` does it itself.
        """
        if self.training:
            for drop in self._drop_paths:
                drop.rows_per_clip = rows

    def features(self, images_RCHW: Tensor, rows_per_clip: int = 1) -> Tensor:
        """Computes the features that the head takes, [R, F].

        Args:
            images_RCHW: Normalised images, R = clips * rows_per_clip.
            rows_per_clip: Number of consecutive images that belong to one clip.
        """
        self.rows_per_clip(rows_per_clip)
        return self.net.forward_head(self.net.forward_features(images_RCHW), pre_logits=True)

    def head(self, features: Tensor) -> Tensor:
        """Returns logits [..., K] from features [..., F]."""
        return self.net.get_classifier()(features)

    def embed(self, images_RCHW: Tensor) -> Tensor:
        """Returns the input of a ViT's first block: tokens [R, P + N, D], P class and register tokens first."""
        net = self.net
        return net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images_RCHW))))

    @property
    def num_prefix(self) -> int:
        """Number P of class and register tokens of a ViT."""
        return int(self.net.num_prefix_tokens)

    @property
    def num_patches(self) -> int:
        """Number N of patches of a ViT's image."""
        return int(self.net.patch_embed.num_patches)

    def pool(self, tokens_RND: Tensor) -> Tensor:
        """Returns the features that the head takes, [R, F], from the tokens after a ViT's last block."""
        return self.net.forward_head(self.net.norm(tokens_RND), pre_logits=True)

    def keep_embedding(self) -> None:
        """Removes everything from a ViT except what `embed` needs."""
        self.net.blocks = nn.Sequential()
        self.net.norm, self.net.fc_norm, self.net.head = nn.Identity(), nn.Identity(), nn.Identity()
        self.net.attn_pool = None
        self.update_frozen()

    def keep_blocks(self, count: int) -> None:
        """Removes everything from a ViT except its first `count` blocks."""
        self.net.blocks = nn.Sequential(*self.blocks[:count])
        for name in ("patch_embed", "norm", "fc_norm", "head"):
            setattr(self.net, name, nn.Identity())
        self.net.cls_token = self.net.reg_token = self.net.pos_embed = self.net.attn_pool = None
        self.update_frozen()

    def rescale(self, enabled: bool) -> None:
        """Sets whether stochastic depth scales the branches that it keeps, see `ClipDropPath`."""
        for drop in self._drop_paths:
            drop.rescale = enabled

    def freeze(self, blocks: int) -> None:
        """Freezes the embedding and the first blocks; -1 freezes everything but the head, see `TowerConfig.freeze`.

        Raises:
            UserError: The network has fewer blocks, or its blocks are unknown.
        """
        if blocks == 0:
            return
        head = {id(p) for p in self.net.get_classifier().parameters()}
        names = {name for name, p in self.net.named_parameters() if id(p) not in head}
        if blocks > 0:
            names = self._first(blocks, names)
        for name, parameter in self.net.named_parameters():
            if name in names:
                parameter.requires_grad_(False)
        self.update_frozen()

    def update_frozen(self) -> None:
        """Finds the parts whose parameters are all frozen; they stay in evaluation mode.

        Call it after freezing parameters or replacing modules of `net`.
        """
        frozen = []
        for module in self.net.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                frozen.append(module)
        self._frozen = tuple(frozen)
        self.train(self.training)

    def _first(self, blocks: int, names: set[str]) -> set[str]:
        """Returns the names of the parameters of the embedding and of the first blocks."""
        if not hasattr(self.net, "group_matcher"):
            raise UserError(
                f'{self.where}.freeze = {blocks}: "{self.name}" has no group_matcher(), so single blocks cannot be '
                "frozen; use 0 or -1"
            )
        # timm assigns names that its matcher does not know (neck and head) to the layer after the last block. A made-up
        # name gives the number of that layer.
        rest = "\0"
        parameters = [*self.net.named_parameters(), (rest, None)]
        listing = SimpleNamespace(named_parameters=lambda: iter(parameters))
        layer = group_parameters(listing, self.net.group_matcher(), reverse=True)
        most = layer[rest] - 1
        if blocks > most:
            raise UserError(f'{self.where}.freeze = {blocks}: "{self.name}" has only {most} blocks')
        return {name for name in names if layer[name] <= blocks}

    def train(self, mode: bool = True) -> Tower:
        """Sets training or evaluation mode as `nn.Module.train`, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def feature_flops(self) -> int:
        """Returns the floating point operations of `features` for one image (a multiply-add counts as two).

        Counted by formula for a ViT; any other network is run once on the meta device under PyTorch's counter.
        """
        if not self.is_vit:
            return _count_flops(self.net, (1, 3, *self.input_size))
        length = self.num_prefix + self.num_patches
        blocks = sum(block_flops(block, length, length, length * length) for block in self.blocks)
        return self.embed_flops() + blocks + self.pool_flops(length)

    def embed_flops(self) -> int:
        """Returns the operations of `embed` for one image."""
        return 2 * self.net.patch_embed.proj.weight.numel() * self.num_patches

    def pool_flops(self, length: int) -> int:
        """Returns the operations of `pool` for one image of `length` tokens; 0 without attention pooling."""
        pool = self.net.attn_pool
        return 0 if pool is None else _count_flops(pool, (1, length, self.net.embed_dim))

    def head_flops(self) -> int:
        """Returns the operations of `head` for one row."""
        return linear_flops(self.net.get_classifier())


def linear_flops(module: nn.Module) -> int:
    """Returns the operations of all linear layers of a module for one row."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def block_flops(block: nn.Module, rows_in: int, rows_out: int, pairs: int) -> int:
    """Returns the operations of a transformer block.

    Args:
        block: Block with `attn` and `mlp` as in timm's `Block`.
        rows_in: Number of rows from which queries, keys and values are computed.
        rows_out: Number of rows that the output projection and the MLP process.
        pairs: Number of query-key pairs of the attention, per head.
    """
    attn: Any = block.attn
    mlp: Any = block.mlp
    rows = rows_in * linear_flops(attn.qkv) + rows_out * (linear_flops(attn.proj) + linear_flops(mlp))
    return rows + 4 * pairs * attn.num_heads * attn.head_dim


def _count_flops(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Counts the operations of a network's features, or of another module's output, with PyTorch's counter."""
    shadow: Any = copy.deepcopy(module).to("meta").eval().requires_grad_(False)
    images = torch.empty(shape, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if hasattr(shadow, "forward_features"):
            shadow.forward_head(shadow.forward_features(images), pre_logits=True)
        else:
            shadow(images)
    return int(counter.get_total_flops())


def _use_clip_drop_path(net: nn.Module) -> list[ClipDropPath]:
    """Replaces every `DropPath` of a network by a `ClipDropPath` and returns these."""
    drops = []
    for module in net.modules():
        for name, child in module.named_children():
            if type(child) is DropPath:
                rate: Any = child.drop_prob
                drops.append(ClipDropPath(float(rate)))
                setattr(module, name, drops[-1])
    return drops


def _from_timm(config: TowerConfig, where: str, input_size: tuple[int, int], num_classes: int) -> nn.Module:
    """Creates the timm model of that name for images of that size."""
    if not timm.is_model(config.name):
        near = did_you_mean(config.name, timm.list_models())
        raise UserError(
            f'{where}.name: "{config.name}" is not a model of timm {timm.__version__}{near}; '
            "a function of your own is named module:function"
        )
    kwargs: dict[str, Any] = {"num_classes": num_classes, **config.args}
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    cfg = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    if cfg is not None and cfg.fixed_input_size:
        kwargs["img_size"] = input_size
    if config.weights == "timm":
        return _pretrained(config, where, kwargs)
    try:
        return timm.create_model(config.name, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{where}.args: {_reason(error)}") from error


def _pretrained(config: TowerConfig, where: str, kwargs: dict[str, Any]) -> nn.Module:
    """Creates a timm model with pretrained weights, which timm downloads and adapts to the image size."""
    try:
        return timm.create_model(config.name, pretrained=True, **kwargs)
    except Exception as error:  # network, cache and arguments raise many types
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f'{where}.weights = "timm": the weights of "{config.name}" could not be loaded ({reason}); '
            "without a network, give a .safetensors file"
        ) from error


def _from_factory(config: TowerConfig, where: str, input_size: tuple[int, int], num_classes: int) -> nn.Module:
    """Creates a network by calling a function outside this project, see `TowerConfig`."""
    factory: Callable[..., nn.Module] = load_external(config.name, f"{where}.name")
    if config.weights == "timm":
        raise UserError(f'{where}.weights = "timm": "{config.name}" is not a timm model')
    kwargs = dict(config.args) | ({"drop_path_rate": config.drop_path} if config.drop_path else {})
    try:
        net = factory(input_size=input_size, num_classes=num_classes, **kwargs)
    except TypeError as error:
        raise UserError(f"{where}.args: {_reason(error)}") from error
    for name in ("forward_features", "forward_head", "get_classifier", "num_features"):
        if not hasattr(net, name):
            raise UserError(f'{where}.name: the module returned by "{config.name}" has no {name}, which a tower needs')
    return net


def _reason(error: Exception) -> str:
    """Returns an error's text on one line, with the nearest argument of a ViT if one is misspelt."""
    text = reason_of(error)
    match = re.search(r"^VisionTransformer\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    near = did_you_mean(match[1], inspect.signature(VisionTransformer).parameters) if match else ""
    return text + near
