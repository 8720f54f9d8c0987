"""BatchSplit: which samples of the global batch each rank loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """Division of the global batch: `batch = world * accumulation * micro_batch`.

    Attributes:
        batch: Clips per optimizer step, over all ranks.
        micro_batch: Clips per forward pass and rank.
        accumulation: Forward passes per optimizer step and rank.
        rank: Rank of this process.
        world: World size.

    Example:
        >>> split = BatchSplit(batch=8, micro_batch=2, accumulation=2, rank=1, world=2)
        >>> list(split.requests(0, 1))
        [('train', 2, 2), ('train', 6, 2)]
    """

    batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world: int

    def requests(self, first_step: int, last_step: int) -> Iterator[tuple[str, int, int]]:
        """Yields (kind, first sample, count) of this rank's micro-batches for steps `first_step` to `last_step` - 1."""
        for step in range(first_step, last_step):
            for part in range(self.accumulation):
                offset = (part * self.world + self.rank) * self.micro_batch
                yield "train", step * self.batch + offset, self.micro_batch

    def evaluation(self, num_clips: int) -> list[tuple[str, int, int]]:
        """Returns this rank's requests of an evaluation over `num_clips`.

        Every rank gets the same number of full micro-batches; samples beyond `num_clips` are padding.
        """
        rounds = -(-num_clips // (self.world * self.micro_batch))
        starts = ((part * self.world + self.rank) * self.micro_batch for part in range(rounds))
        return [("evaluate", start, self.micro_batch) for start in starts]
