"""Crew: processes that agree on what happens to files, over connections of their own.

What it gathers goes through gloo in a group of its own, so that a thread that writes a checkpoint never meets the
collectives of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fastav.core.errors import reason_of

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class HostGroup:
    """A process among others.

    Attributes:
        rank: Its number.
        world: How many there are.
        group: Their gloo group; None for one process.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    def gather(self, item: Value) -> list[Value]:
        """Collects one object of every rank, in rank order; every rank must call it."""
        if self.world == 1:
            return [item]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, item, group=self.group)
        return found

    def own_part(self, items: Sequence[Value]) -> Sequence[Value]:
        """This rank's part of something that all have."""
        return items[self.rank :: self.world]

    def run_all(self, do: Callable[[], Value], catch: tuple[type[BaseException], ...]) -> tuple[Value | None, str]:
        """Does something on every rank.

        Args:
            do: May fail on some ranks.
            catch: In these ways.

        Returns:
            What it returned here, and the first rank's reason why it failed there; empty where it failed nowhere.
        """
        result, reason = None, ""
        try:
            result = do()
        except catch as error:
            reason = reason_of(error)
        return result, next((told for told in self.gather(reason) if told), "")
