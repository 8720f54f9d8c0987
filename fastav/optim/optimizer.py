"""The optimizer and its parameter groups.

Parameter groups follow timm's (after BEiT): biases, norms and other 1-D parameters, position embeddings and class,
register and bottleneck tokens are not decayed; a network's blocks can have a learning rate that falls by
`layer_decay` per block from the head down; each tower has its own factor; what is frozen is left out. A group's
learning rate is the schedule's times its `lr_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from fastav.core.config import Config, NonNegativeFloat, PositiveFloat
from fastav.core.errors import UserError
from fastav.optim.schedule import Cosine, Schedule, ScheduleConfig, make_schedule

# The last part of the names of parameters that are tables of positions or single tokens, whatever their shape.
_TOKEN_OR_POSITION = re.compile(r".*(pos_embed|pos_emb|position|positions|tokens?|bottleneck|bias_table)")
_BELOW_ONE = Annotated[float, Meta(ge=0, lt=1)]


class Optim(Config, frozen=True):
    """Optimizer and schedule.

    Attributes:
        name: `adamw`, `sgd`, `adam`, `rmsprop` or `adagrad` of torch, made by timm's factory. AdamW's weight decay is
            decoupled, that of the others is added to the gradient.
        lr: Peak learning rate for the nominal global batch; nothing scales it.
        weight_decay: For the parameters that are decayed at all (see `fastav.optim.optimizer`).
        betas: Of adamw and adam.
        momentum: Of sgd and rmsprop.
        nesterov: Nesterov's momentum in sgd.
        eps: Of all but sgd; absent: the optimizer's own default.
        layer_decay: Factor of the learning rate from each block of a tower to the one below; 1 is off.
        clip_norm: Global norm to which gradients are clipped; 0 is off.
        ema: Decay of the averaged weights that are evaluated and saved; 0 is off.
        schedule: Course of the learning rate.
    """

    name: Literal["adamw", "sgd", "adam", "rmsprop", "adagrad"] = "adamw"
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[_BELOW_ONE, _BELOW_ONE] = (0.9, 0.999)
    momentum: _BELOW_ONE = 0.9
    nesterov: bool = True
    eps: PositiveFloat | None = None
    layer_decay: Annotated[float, Meta(gt=0, le=1)] = 1.0
    clip_norm: NonNegativeFloat = 0.0
    ema: _BELOW_ONE = 0.0
    schedule: ScheduleConfig = Cosine()

    def build(
        self, model: nn.Module, total_steps: int, lr_scales: Mapping[str, float] | None = None
    ) -> tuple[Optimizer, Schedule]:
        """Makes the optimizer of a model's trainable parameters and its schedule.

        Args:
            model: Any module; parameters of networks with timm's `group_matcher()` get layer-wise rates.
            total_steps: Optimizer steps of the whole run, at least 1.
            lr_scales: Name of a submodule, such as `video` -> factor of its learning rate.

        Raises:
            UserError: Everything is frozen, but there are steps to train.
        """
        groups = parameter_groups(model, self.weight_decay, self.layer_decay, lr_scales or {})
        if not groups and total_steps > 1:
            raise UserError("nothing to train: every parameter is frozen (model.video.freeze, model.audio.freeze)")
        extra: dict[str, Any] = {}
        if self.name == "sgd":
            extra["nesterov"] = self.nesterov and self.momentum > 0
        if self.name in ("adamw", "adam"):
            extra["betas"] = self.betas
        if self.name in ("adamw", "adam", "sgd"):
            extra["fused"] = True  # one kernel for a whole step, on a GPU as on a CPU
        if self.eps is not None and self.name != "sgd":
            extra["eps"] = self.eps
        optimizer = create_optimizer_v2(
            groups or [{"params": [], "name": "none", "param_names": []}],
            opt=self.name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            **extra,
        )
        return optimizer, make_schedule(self.schedule, optimizer, total_steps, self.lr)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, lr_scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Sorts a model's trainable parameters into groups of equal decay and learning-rate factor.

    Returns:
        Groups with `name`, `params`, `param_names`, `weight_decay` and `lr_scale`, in the model's order.
    """
    layers, undecayed = _layers(model), _undecayed(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next((p for p in lr_scales if f".{p}." in f".{name}"), "")
        network, layer, last = layers.get(name, ("", 0, 0))
        scale = lr_scales.get(part, 1.0) * layer_decay ** (last - layer)
        token = name in undecayed or _TOKEN_OR_POSITION.fullmatch(name.rpartition(".")[2])
        decayed = parameter.ndim > 1 and not token
        words = [network or part or name.partition(".")[0]]
        if layer_decay != 1 and last:
            words.append(f"layer{layer:02d}")
        words.append("decay" if decayed else "no_decay")
        group = groups.setdefault(
            ".".join(words),
            {
                "name": ".".join(words),
                "params": [],
                "param_names": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": scale,
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def _undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that the model or a network in it says are not to be decayed (timm's convention)."""
    return {
        (f"{path}." if path else "") + name
        for path, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }


def _layers(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Parameter name -> (its network, its layer, the layer of the head), for all networks that know their layers.

    As in timm, layer 0 is the embedding and a final norm belongs to the last block.
    """
    found: dict[str, tuple[str, int, int]] = {}
    head = "\0"  # a name no matcher knows: timm puts it behind the last block, where heads are
    for path, module in model.named_modules():
        if hasattr(module, "group_matcher"):
            parameters = [*module.named_parameters(), (head, None)]
            layer = group_with_matcher(iter(parameters), module.group_matcher(), reverse=True)
            prefix = f"{path}." if path else ""
            found |= {prefix + name: (path, at, layer[head]) for name, at in layer.items() if name != head}
    return found
