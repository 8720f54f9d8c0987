"""Fusion kind `mbt`: MBT (Nagrani et al., "Attention Bottlenecks for Multimodal Fusion", 2021) as in its authors' code.

It differs from kind `bottleneck`, which combines any two ViTs: frames are embedded as tubelets; all tokens of a clip
are one sequence; the spectrogram is read as [time, mel]; position embeddings cover whole sequences; both modalities
share one final norm and one head; each modality's class token has its own loss; both modalities read the old
bottleneck, and the new one is the mean of their results. Only the blocks of the towers are used.

`launch/recipes/mbt_b.toml` has the authors' settings; `fastav convert scenic` converts their checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from fastav.core.config import NonNegativeInt, PositiveInt
from fastav.core.errors import UserError
from fastav.data.clip import Modality
from fastav.model.bottleneck_block import BottleneckBlock, check_attention, describe_attention, use_bottleneck_blocks
from fastav.model.fusion.base import FusionKind
from fastav.model.fusion.inputs import FusionInputs, mean_over_windows, presence
from fastav.model.fusion.mbt_init import start_from_image_vit
from fastav.model.tower import Tower, TowerConfig, block_flops, linear_flops
from fastav_kernels.bottleneck_attention import Segments


class MBT(FusionKind, frozen=True, tag="mbt"):
    """MBT as in its authors' code: tubelets, joint space-time tokens, one head for both modalities.

    Attributes:
        start: First layer with fusion, counted from 0. The towers' depth means late fusion.
        mixing: How modalities are mixed in fusion layers. `bottleneck`: through bottleneck tokens. `cross`: each
            modality has its own weights, and its queries attend to the tokens of both. `joint`: one self-attention of
            all tokens (paper, section 3.2).
        tokens: Number of bottleneck tokens. With head `token` there is one more, as in the authors' code.
        head: What is classified. `token`: a class token of each modality; training averages their losses, evaluation
            their logits. `gap`, `gmp`, `gsp`: the mean, maximum or sum of all tokens.
        shared: Whether both modalities use the video tower's blocks in all layers; `joint` always does in its
            fusion layers.
        tubelet: Frames per tubelet, the 3-D patch of the video. `sampling.frames` must be a multiple of it.
        sampled: Number of evenly spaced frames that are embedded as 2-D patches, in place of tubelets; 0 for tubelets.
        patch: Side of a square patch: pixels of a frame; mel frames and mel bands of the spectrogram.
        hidden: Width of a linear layer with tanh before the head; 0 for none.
        order: Which modality comes first where the tokens of both are concatenated.
        evaluate_fused: Whether the bottleneck is used in evaluation, too; false: the modalities are not fused there.
        rescale: Whether stochastic depth scales the branches it keeps by 1 / (1 - rate). The authors' code does not.
        image_vit: A `.safetensors` file of an image ViT (timm's parameter names) from which both encoders are
            initialised; empty for none.
        frame_kernel: How the patch kernel of `image_vit` becomes a tubelet kernel. `central`: the middle frame has the
            kernel, the others zeros. `average`: each of n frames has the kernel divided by n.
        attention: Implementation of the attention in fusion layers: `sdpa`, `masked`, `flex`, `reference` or `triton`.
            `auto`: `triton` where it was measured to be faster than `sdpa` for this GPU and shape, otherwise `sdpa`.
    """

    start: NonNegativeInt = 8
    mixing: Literal["bottleneck", "cross", "joint"] = "bottleneck"
    tokens: PositiveInt = 4
    head: Literal["token", "gap", "gmp", "gsp"] = "token"
    shared: bool = False
    tubelet: PositiveInt = 2
    sampled: NonNegativeInt = 0
    patch: PositiveInt = 16
    hidden: NonNegativeInt = 0
    order: Literal["audio_video", "video_audio"] = "audio_video"
    evaluate_fused: bool = True
    rescale: bool = True
    image_vit: str = ""
    frame_kernel: Literal["central", "average"] = "central"
    attention: str = "auto"

    @property
    @override
    def tower_heads(self) -> bool:
        return False

    @override
    def build(self, video: Tower, audio: Tower, num_classes: int, num_frames: int) -> nn.Module:
        self._check_towers(video, audio, num_frames)
        frames_size = (num_frames, *video.input_size)
        mel_size = (audio.input_size[1], audio.input_size[0])
        fusion = MBTFusion(self, video.width, num_classes, frames_size, mel_size, depth=len(video.blocks))
        fusion.take_blocks({"video": video, "audio": audio})
        if self.image_vit:
            start_from_image_vit(fusion, {"video": video, "audio": audio}, self.image_vit)
        return fusion

    def _check_towers(self, video: Tower, audio: Tower, num_frames: int) -> None:
        """Raises a UserError if the towers do not fit together or the inputs are not whole patches."""
        for tower in (video, audio):
            tower.require_blocks("mbt")
        depth = len(video.blocks)
        if len(audio.blocks) != depth or audio.width != video.width:
            raise UserError(
                f"{audio.where}: has {len(audio.blocks)} layers of width {audio.width}, the video tower {depth} of "
                f'width {video.width}; fusion "mbt" needs them equal'
            )
        if self.start > depth:
            raise UserError(f"model.fusion.start = {self.start}: the towers have only {depth} layers")
        check_attention(self.attention)
        sides = {"sampling.image_size": video.input_size[0], "frontend.num_mels": audio.input_size[0]}
        for key, side in sides.items():
            if side % self.patch:
                raise UserError(f"{key} = {side}: expected a multiple of model.fusion.patch ({self.patch})")
        if self.sampled > num_frames or (not self.sampled and num_frames % self.tubelet):
            raise UserError(
                f"sampling.frames = {num_frames}: expected a multiple of model.fusion.tubelet ({self.tubelet}), or at "
                f"least model.fusion.sampled ({self.sampled})"
            )

    @override
    def check(self, towers: Mapping[Modality, TowerConfig], classes: Sequence[str]) -> None:
        for name, tower in towers.items():
            if self.image_vit and (tower.weights or tower.init_from):
                raise UserError(
                    f"model.fusion.image_vit and model.{name}.weights or .init_from are both set; set only one of them"
                )
            if tower.freeze:
                raise UserError(
                    f'model.{name}.freeze = {tower.freeze}: fusion "mbt" trains its own embeddings and needs 0'
                )

    @override
    def without_sources(self) -> Self:
        return msgspec.structs.replace(self, image_vit="")

    @override
    def describe_attention(self, fusion: Any, video: Any, num_frames: int, device: str, dtype: str) -> str:
        if not hasattr(fusion, "bottleneck"):
            return "PyTorch's"
        segments = Segments(1, 1, fusion.position["video"].shape[1], fusion.bottleneck.shape[1], "joint")
        return describe_attention(self.attention, video, segments, device, dtype)


class MBTFusion(nn.Module):
    """Module of kind `mbt`: embeddings, bottleneck, final norm and head. The blocks stay in the towers.

    Attributes:
        embed: Patch embedding of each modality.
        position: Position embeddings of each modality, [1, N, D], or [1, 1 + N, D] with a class token.
        class_token: Class token of each modality, [1, 1, D]; only with head `token`.
        bottleneck: Bottleneck tokens [1, Z, D].
        norm, hidden, head: Final norm and classification layers, shared by both modalities.

    Args:
        config: Settings.
        width: Token width D.
        num_classes: Number of classes K.
        frames_size: T, H, W of the frames.
        mel_size: L, M of the spectrogram: mel frames and mel bands.
        used: Modalities, in the order in which their tokens are concatenated; None for both, in the config's order.
        depth: Number of layers of the towers; None: more than `config.start`.
    """

    def __init__(
        self,
        config: MBT,
        width: int,
        num_classes: int,
        frames_size: tuple[int, int, int],
        mel_size: tuple[int, int],
        used: tuple[Modality, ...] | None = None,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.frames_size, self.mel_size = config, frames_size, mel_size
        both: tuple[Modality, ...] = ("audio", "video") if config.order == "audio_video" else ("video", "audio")
        self.used = used or both
        P = config.patch
        patches: dict[str, nn.Module] = {
            "video": nn.Conv2d(3, width, P, P)
            if config.sampled
            else nn.Conv3d(3, width, (config.tubelet, P, P), (config.tubelet, P, P)),
            "audio": nn.Conv2d(3, width, P, P),
        }
        self.frame_grid = (
            len(sampled_frames(frames_size[0], config.sampled)) if config.sampled else frames_size[0] // config.tubelet,
            frames_size[1] // P,
            frames_size[2] // P,
        )
        self.mel_grid = (mel_size[0] // P, mel_size[1] // P)
        counts = {"video": math.prod(self.frame_grid), "audio": math.prod(self.mel_grid)}
        self.prefix = int(config.head == "token")
        self.embed = nn.ModuleDict({name: patches[name] for name in self.used})
        lengths = {name: self.prefix + counts[name] for name in self.used}
        self.position = nn.ParameterDict({n: nn.Parameter(torch.empty(1, lengths[n], width)) for n in self.used})
        self.class_token = nn.ParameterDict()
        if self.prefix:
            self.class_token = nn.ParameterDict({n: nn.Parameter(torch.zeros(1, 1, width)) for n in self.used})
        # No unused parameters: distributed training waits for the gradient of each.
        fused_layers = depth is None or config.start < depth
        self.fuses = config.mixing == "bottleneck" and len(self.used) > 1 and fused_layers
        if self.fuses:
            self.bottleneck = nn.Parameter(torch.empty(1, config.tokens + self.prefix, width))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.hidden = nn.Linear(width, config.hidden) if config.hidden else nn.Identity()
        self.head = nn.Linear(config.hidden or width, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Initialises as the authors do: LeCun for patches, N(0, 0.02) for positions and bottleneck, 0 for the head."""
        for embed in self.embed.values():
            weight: Any = embed.weight
            nn.init.trunc_normal_(weight, std=(weight[0].numel()) ** -0.5)
            nn.init.zeros_(embed.bias)  # type: ignore[arg-type]
        for position in self.position.values():
            nn.init.normal_(position, std=0.02)
        if self.fuses:
            nn.init.normal_(self.bottleneck, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def take_blocks(self, towers: dict[Modality, Tower]) -> None:
        """Reduces the towers to their blocks, prepares these for the bottleneck, and sets their stochastic depth."""
        for name, tower in towers.items():
            tower.mean = tower.std = (0.5, 0.5, 0.5)  # frames from -1 to 1, whatever the tower was pretrained on
            shares = self.config.shared and name == "audio" and len(self.used) > 1
            kept = 0 if shares else len(tower.blocks)
            if self.config.mixing == "joint" and name == "audio" and len(self.used) > 1:
                kept = min(kept, self.config.start)  # joint layers use the video tower's blocks
            tower.keep_blocks(kept)
            if self.fuses and not shares:
                use_bottleneck_blocks(
                    tower, self.config.start, "joint", self.config.attention, last_needs_bottleneck=False
                )
            tower.rescale(self.config.rescale)

    @property
    def decay_free(self) -> list[str]:
        """Names of the parameters without weight decay."""
        names = [f"{kind}.{n}" for kind in ("position", "class_token") for n in getattr(self, kind)]
        return [*names, *(["bottleneck"] if self.fuses else [])]

    def forward(self, video: Tower, audio: Tower, inputs: FusionInputs) -> Tensor:
        """Returns logits [B, K]; in training with head `token` the logits of each modality, [B, 2, K].

        Each modality then has its own loss. A modality that a clip lacks gets the logits of the other one.
        """
        x = {name: self._embedded(name, inputs) for name in self.used}
        windows = 1 if inputs.mel_BWCML is None else inputs.mel_BWCML.shape[1]
        clips = next(iter(x.values())).shape[0] // windows
        has = self._present(inputs, windows)
        x = self._encoded(x, {"video": video, "audio": audio}, clips, windows, has)
        encoded = {name: self.norm(tokens) for name, tokens in x.items()}
        if self.prefix:
            return self._by_token(encoded, clips, windows, has, inputs)
        return mean_over_windows(
            self._logits(self._pooled(encoded, has)).unflatten(0, (clips, windows)), inputs.window_BW
        )

    def _embedded(self, name: Modality, inputs: FusionInputs) -> Tensor:
        """Returns a modality's tokens with position embeddings, [B * W, N, D], or 1 + N with a class token."""
        embed = self.embed[name]
        if name == "audio":
            assert inputs.mel_BWCML is not None
            patches = embed(inputs.mel_BWCML.flatten(0, 1).transpose(2, 3))  # [time, mel], as in the authors' code
        else:
            patches = self._frames(inputs, embed)
        tokens = patches.flatten(2).transpose(1, 2)
        if self.prefix:
            tokens = torch.cat([self.class_token[name].expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.position[name]
        if name == "video" and inputs.mel_BWCML is not None:
            tokens = tokens.repeat_interleave(inputs.mel_BWCML.shape[1], dim=0)
        return tokens

    def _frames(self, inputs: FusionInputs, embed: nn.Module) -> Tensor:
        """Returns the embedded patches of frames or tubelets, [B, D, time, height, width]."""
        assert inputs.frames_BTCHW is not None
        frames_BCTHW = inputs.frames_BTCHW.transpose(1, 2)
        if not self.config.sampled:
            return embed(frames_BCTHW)
        frames = frames_BCTHW.shape[2]
        chosen = sampled_frames(frames, self.config.sampled)
        picked = frames_BCTHW[:, :, chosen].transpose(1, 2)
        return embed(picked.flatten(0, 1)).unflatten(0, picked.shape[:2]).transpose(1, 2)

    def _present(self, inputs: FusionInputs, windows: int) -> dict[str, Tensor] | None:
        """Returns masks [B * W, 1, 1] of the sequences that have each modality; None if all have both.

        A clip with neither modality counts as having both.
        """
        has = presence(inputs) if len(self.used) > 1 else None
        if has is None:
            return None
        neither_B = ~(has[0] | has[1])
        both = {"video": has[0] | neither_B, "audio": has[1] | neither_B}
        return {name: has_B.repeat_interleave(windows)[:, None, None] for name, has_B in both.items()}

    def _encoded(
        self,
        x: dict[Modality, Tensor],
        towers: dict[Modality, Tower],
        clips: int,
        windows: int,
        has: dict[str, Tensor] | None,
    ) -> dict[Modality, Tensor]:
        """Runs the tokens through all layers."""
        for tower in towers.values():
            if tower is not None:
                tower.rows_per_clip(windows)
        shared = self.config.shared or len(self.used) == 1
        stacks = {n: (towers["video"] if shared and len(self.used) > 1 else towers[n]).blocks for n in self.used}
        z = None
        if self.fuses:
            z = self.bottleneck.expand(clips * windows, -1, -1)
            if not self.training and not self.config.evaluate_fused:
                z = z[:, :0]
        for number in range(max(map(len, stacks.values()))):
            blocks = {name: stack[number] for name, stack in stacks.items() if number < len(stack)}
            if len(self.used) == 1 or number < self.config.start:
                x = {name: block(x[name]) for name, block in blocks.items()}
            elif z is not None:
                x, z = self._by_bottleneck(blocks, x, z, clips, has)
            else:
                x = self._by_attention(blocks, x, has)
        return x

    def _by_bottleneck(
        self,
        blocks: dict[Modality, Any],
        x: dict[Modality, Tensor],
        z: Tensor,
        clips: int,
        has: dict[str, Tensor] | None,
    ) -> tuple[dict[Modality, Tensor], Tensor]:
        """Runs one layer with bottleneck; the new bottleneck is the mean of the results of the modalities present."""
        new_x, new_z = {}, {}
        for name, block in blocks.items():
            tokens, new_z[name] = block(x[name].unsqueeze(1), z, clips)
            new_x[name] = tokens.squeeze(1)
        one, two = (new_z[name] for name in self.used)
        mean = (one + two) / 2
        if has is not None:
            first, second = (has[name] for name in self.used)
            mean = torch.where(first & second, mean, torch.where(first, one, two))
        return new_x, mean

    def _by_attention(
        self, blocks: dict[Modality, Any], x: dict[Modality, Tensor], has: dict[str, Tensor] | None
    ) -> dict[Modality, Tensor]:
        """Runs one layer of attention over the tokens of both modalities, for mixing `joint` or `cross`."""
        lengths = [x[name].shape[1] for name in self.used]
        if self.config.mixing == "joint":
            tokens = blocks["video"](
                torch.cat([x[name] for name in self.used], dim=1), attn_mask=_mask(has, self.used, lengths)
            )
            return dict(zip(self.used, tokens.split(lengths, dim=1), strict=True))
        new_x = {}
        for name, length in zip(self.used, lengths, strict=True):
            names = (*(other for other in self.used if other != name), name)
            mask = _mask(has, names, [x[n].shape[1] for n in names])
            new_x[name] = blocks[name](torch.cat([x[n] for n in names], dim=1), attn_mask=mask)[:, -length:]
        return new_x

    def _by_token(
        self,
        encoded: dict[Modality, Tensor],
        clips: int,
        windows: int,
        has: dict[str, Tensor] | None,
        inputs: FusionInputs,
    ) -> Tensor:
        """Returns the logits of the class tokens."""
        by_modality = [self._logits(encoded[name][:, 0]) for name in self.used]
        if has is not None:
            one, two = by_modality
            first, second = (has[name][:, :, 0] for name in self.used)
            by_modality = [torch.where(first, one, two), torch.where(second, two, one)]
        logits_BWMK = torch.stack(by_modality, dim=1).unflatten(0, (clips, windows))
        if self.training and len(self.used) > 1:
            return logits_BWMK[:, 0]
        return mean_over_windows(logits_BWMK.mean(2), inputs.window_BW)

    def _pooled(self, encoded: dict[Modality, Tensor], has: dict[str, Tensor] | None) -> Tensor:
        """Returns the mean, maximum or sum of all tokens of the modalities that a clip has, [B * W, D]."""
        tokens = torch.cat([encoded[name] for name in self.used], dim=1)
        if has is None:
            mask = torch.ones_like(tokens[:, :, :1], dtype=torch.bool)
        else:
            mask = torch.cat([has[n].expand(-1, encoded[n].shape[1], -1) for n in self.used], dim=1)
        if self.config.head == "gmp":
            return tokens.masked_fill(~mask, float("-inf")).amax(1)
        total = torch.where(mask, tokens, 0).sum(1)
        return total if self.config.head == "gsp" else total / mask.sum(1)

    def _logits(self, features: Tensor) -> Tensor:
        return self.head(self.hidden(features).tanh() if self.config.hidden else features)

    def flops(self, video: Tower, audio: Tower, frames: int, windows: int) -> int:
        """Returns the floating point operations of one clip.

        Frames are embedded once; all layers run once per window.
        """
        lengths = {name: self.position[name].shape[1] for name in self.used}
        once = total = 0
        for name, embed in self.embed.items():
            weight: Any = embed.weight
            patches = 2 * weight.numel() * (lengths[name] - self.prefix)  # type: ignore[index]
            once, total = (once + patches, total) if name == "video" else (once, total + patches)
        stacks = {"video": video.blocks, "audio": video.blocks if self.config.shared else audio.blocks}
        for number in range(len(stacks["video"])):
            for name in self.used:
                stack = stacks[name if number < len(stacks[name]) else "video"]
                total += self._layer_flops(stack[number], number, lengths, name)
        heads = linear_flops(self.hidden) + linear_flops(self.head)
        return once + windows * (total + heads * (len(self.used) if self.prefix else 1))

    def _layer_flops(self, block: Any, number: int, lengths: dict[Modality, int], name: Modality) -> int:
        N, total = lengths[name], sum(lengths.values())
        if isinstance(block, BottleneckBlock):
            return block.flops(1, N, self.bottleneck.shape[1])
        if number < self.config.start:
            return block_flops(block, N, N, N * N)
        if self.config.mixing == "joint":
            return block_flops(block, total, total, total * total) // len(self.used)
        return block_flops(block, total, total, total * total)


def sampled_frames(num_frames: int, wanted: int) -> list[int]:
    """Returns the indices of evenly spaced frames, as the authors' `temporal_sampling` (rounded half to even).

    As in their code, rounding can give one index more than wanted: 2 of 4 frames gives 1, 3 and 3.
    """
    if wanted >= num_frames:
        return list(range(num_frames))
    step = num_frames / (wanted + 1)
    return np.minimum(np.round(np.arange(step, num_frames, step)), num_frames - 1).astype(int).tolist()


def _mask(has: dict[str, Tensor] | None, names: tuple[Modality, ...], lengths: list[int]) -> Tensor | None:
    """Returns the attention mask, bool [sequences, 1, 1, keys], True where a key may be attended; None if all may."""
    if has is None:
        return None
    parts = [has[name][:, :, 0].expand(-1, length) for name, length in zip(names, lengths, strict=True)]
    return torch.cat(parts, dim=1)[:, None, None]
