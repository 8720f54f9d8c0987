"""GlooGroup: processes that coordinate work on files, over a process group of their own.

It communicates through a separate gloo group, so that the thread that writes a checkpoint cannot interfere with the
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
class GlooGroup:
    """One process of a group.

    Attributes:
        rank: Rank of this process.
        world: World size.
        group: gloo process group; None for a single process.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    def gather(self, item: Value) -> list[Value]:
        """Gathers one object from every rank, in rank order. Collective: every rank must call it."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(items, item, group=self.group)
        return items

    def own_part(self, items: Sequence[Value]) -> Sequence[Value]:
        """Returns this rank's part of a sequence that is the same on all ranks."""
        return items[self.rank :: self.world]

    def run_all(self, work: Callable[[], Value], catch: tuple[type[BaseException], ...]) -> tuple[Value | None, str]:
        """Runs a function on every rank, and lets all ranks know if it failed on any. Collective.

        Args:
            work: Function that may fail on some ranks.
            catch: Exceptions that count as failure; all others are raised.

        Returns:
            The result of this rank (None if it failed here), and the reason of the lowest rank that failed, the same on
            every rank (empty if none failed).
        """
        result, reason = None, ""
        try:
            result = work()
        except catch as error:
            reason = reason_of(error)
        return result, next((text for text in self.gather(reason) if text), "")
