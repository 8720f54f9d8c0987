"""Which part of the global batch each rank takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """How a global batch falls apart: `batch = world * accumulation * micro_batch`.

    Attributes:
        batch: Clips per optimizer step over all ranks.
        micro_batch: Clips per forward pass and rank.
        accumulation: Forward passes per optimizer step.
        rank: This process.
        world: Processes.
    """

    batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world: int

    def requests(self, first_step: int, last_step: int) -> Iterator[tuple[str, int, int]]:
        """Yields the (kind, first sample, count) of every micro-batch of this rank, in order."""
        for step in range(first_step, last_step):
            for part in range(self.accumulation):
                offset = (part * self.world + self.rank) * self.micro_batch
                yield "train", step * self.batch + offset, self.micro_batch

    def evaluation(self, num_clips: int) -> list[tuple[str, int, int]]:
        """Returns the requests of this rank that cover `num_clips`; every rank gets equally many, all full."""
        rounds = -(-num_clips // (self.world * self.micro_batch))
        starts = ((part * self.world + self.rank) * self.micro_batch for part in range(rounds))
        return [("evaluate", start, self.micro_batch) for start in starts]
