"""The optimizer and its parameter groups.

Parameter groups follow timm's (after BEiT):

* Weight decay is not applied to biases, norms and other 1-D parameters, position embeddings, and class, register and
  bottleneck tokens.
* The learning rate of a network's blocks can fall by `layer_decay` per block, from the head down.
* Each tower has its own learning-rate factor.
* Frozen parameters are in no group.

The learning rate of a group is that of the schedule times the group's `lr_scale`.
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

# Last part of the names of position embeddings and tokens, which are not decayed whatever their shape.
_TOKEN_OR_POSITION = re.compile(r".*(pos_embed|pos_emb|position|positions|tokens?|bottleneck|bias_table)")
_BELOW_ONE = Annotated[float, Meta(ge=0, lt=1)]


class Optim(Config, frozen=True):
    """Optimizer and learning-rate schedule.

    Attributes:
        name: Optimizer of torch. The weight decay of adamw is decoupled; that of the others is added to the gradient.
        lr: Peak learning rate for the global batch `train.batch`. It is not scaled by the batch size or the number of
            processes.
        weight_decay: Weight decay. Biases, norms, position embeddings and tokens are not decayed.
        betas: The two beta coefficients of adamw and adam; other optimizers ignore them.
        momentum: Momentum of sgd and rmsprop; other optimizers ignore it.
        nesterov: Whether sgd uses Nesterov momentum.
        eps: Constant added to the denominator for numerical stability, in all optimizers but sgd. If absent, the
            default of the optimizer.
        layer_decay: Factor of the learning rate from each block of a tower to the block below it; 1 disables it.
        clip_norm: Largest global gradient norm; larger gradients are scaled down to it. 0 disables clipping.
        ema: Decay of the exponentially averaged weights, which are evaluated and saved instead of the trained ones; 0
            disables averaging.
        schedule: Learning-rate schedule: `cosine`, `plateau`, `constant` or `step`.
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
        """Makes the optimizer of a model's trainable parameters, and its schedule.

        Args:
            model: Any module. With `layer_decay`, networks with timm's `group_matcher()` get layer-wise learning rates.
            total_steps: Optimizer steps of the whole run, at least 1.
            lr_scales: Name of a submodule, such as `video` -> factor of its learning rate.

        Returns:
            The optimizer and its schedule.

        Raises:
            UserError: All parameters are frozen although there are steps to train.

        Example:
            optimizer, schedule = Optim(lr=1e-3).build(model, total_steps=1000)
            for step in range(1000):
                schedule.set_step(step)
                ...
                optimizer.step()
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
        key = [network or part or name.partition(".")[0]]
        if layer_decay != 1 and last:
            key.append(f"layer{layer:02d}")
        key.append("decay" if decayed else "no_decay")
        group = groups.setdefault(
            ".".join(key),
            {
                "name": ".".join(key),
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
    """Returns names of parameters that the model or its networks exclude from decay (timm's `no_weight_decay()`)."""
    return {
        (f"{path}." if path else "") + name
        for path, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }


def _layers(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Returns parameter name -> (network, layer, layer of the head) for networks with timm's `group_matcher()`.

    As in timm, layer 0 is the embedding, and a final norm belongs to the last block.
    """
    found: dict[str, tuple[str, int, int]] = {}
    head = "\0"  # matches no pattern, so timm places it after the last block, where heads are
    for path, module in model.named_modules():
        if hasattr(module, "group_matcher"):
            parameters = [*module.named_parameters(), (head, None)]
            layer = group_with_matcher(iter(parameters), module.group_matcher(), reverse=True)
            prefix = f"{path}." if path else ""
            found |= {prefix + name: (path, at, layer[head]) for name, at in layer.items() if name != head}
    return found
