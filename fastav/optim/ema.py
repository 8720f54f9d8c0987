"""Ema: exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastav.optim.optimizer_state import check_names

NUM_UPDATES = "num_updates"


class Ema:
    """Exponential moving average of the weights in float32: average <- d average + (1 - d) weight after each step.

    d = min(decay, (1 + n) / (10 + n)) at the n-th step, so that short runs are not dominated by their initial weights.
    Buffers (BatchNorm statistics) are copied. All operations are elementwise, so they work on shards (DTensors).

    Args:
        model: Model whose trainable parameters are averaged. The parameters must stay the same objects.
        decay: Upper bound of d.
        shards: Name -> this rank's shard of each trainable parameter; None for the parameters themselves.
        refresh: Called after the shards were overwritten, to update the model from them.

    Example:
        ema = Ema(model, decay=0.999)
        ema.update()  # after each optimizer step
        with ema.swap():
            evaluate(model)
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        shards: Mapping[str, Tensor] | None = None,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self.decay, self.num_updates, self._refresh = decay, 0, refresh
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = trainable if shards is None else dict(shards)
        saved = model.state_dict().keys()
        self._buffers = {name: b for name, b in model.named_buffers() if name in saved}
        self._average = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self._copied = {name: b.detach().clone() for name, b in self._buffers.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Updates the averages with the current weights. Call it after each optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [p.detach().float() for p in self._parameters.values()]
        if weights:
            torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)
        self._copy(self._copied, self._buffers)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Context manager in which the model holds the averages. On exit its own weights are restored bit for bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        own_buffers = {name: b.detach().clone() for name, b in self._buffers.items()}
        try:
            self._copy(self._parameters, self._average)
            self._copy(self._buffers, self._copied)
            self._refresh()
            yield
        finally:
            self._copy(self._parameters, own)
            self._copy(self._buffers, own_buffers)
            self._refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns averages and buffers by their names in the model, and `num_updates`. The tensors are not copies."""
        return {**self._average, **self._copied, NUM_UPDATES: torch.tensor(self.num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a `state_dict`.

        Raises:
            FastavError: The state belongs to another model.
        """
        own = {**self._average, **self._copied}
        check_names(own.keys(), state.keys() - {NUM_UPDATES}, "averaged weights")
        self._copy(own, state)
        self.num_updates = int(state[NUM_UPDATES])

    @staticmethod
    @torch.no_grad()
    def _copy(to: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
        for name, tensor in to.items():
            tensor.copy_(source[name])
