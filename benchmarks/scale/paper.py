"""Scaling on paper: how long a step takes on more ranks than there are at hand, from what can be measured on few.

Benchmarks/scaling.md says what goes in, where each formula is from, and what it has been held against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Link:
    """What one rank sends and receives through.

    Attributes:
        gb_per_s: In one direction, for large messages, 1e9 bytes per second.
        latency_us: Of the smallest message.
    """

    gb_per_s: float
    latency_us: float

    def seconds(self, mb: float) -> float:
        """Of one message."""
        return mb * 1e6 / (self.gb_per_s * 1e9) + self.latency_us * 1e-6


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes that are alike.

    Attributes:
        inside: Between the ranks of a node.
        between: Between nodes, the share of one rank.
        per_node: Ranks of a node.
        cores: Of a node, if the ranks compute on them, a thread each; None for GPUs.
    """

    inside: Link
    between: Link
    per_node: int = 8
    cores: float | None = None

    def crowding(self, ranks: int) -> float:
        """How many times as long a computation takes because ranks share cores."""
        return 1.0 if self.cores is None else max(1.0, min(ranks, self.per_node) / self.cores)


@dataclass(frozen=True, slots=True)
class Work:
    """A step of one rank.

    Attributes:
        compute_s: Forward and backward pass and optimizer, without other ranks.
        fixed_s: What of it does not shrink with fewer clips.
        gradient_mb: What is reduced in a step.
        bucket_mb: In pieces of this size.
        backward: Share of `compute_s` that is the backward pass.
        passes: Traffic as a multiple of one all-reduce of `gradient_mb`: 1.5 where parameters are sharded (FSDP,
            ZeRO-3), 2.5 if only their gradients are sent in half as many bytes.
        hidden: Share of the transfers that may go on beside the backward pass; 0 where both need the same cores.
        jitter_s: Standard deviation of a rank's step.
    """

    compute_s: float
    gradient_mb: float
    fixed_s: float = 0.0
    bucket_mb: float = 25.0
    backward: float = 0.6
    passes: float = 1.0
    hidden: float = 1.0
    jitter_s: float = 0.0

    def shared(self, ranks: int) -> Work:
        """The same step with its clips shared by so many ranks."""
        return replace(self, compute_s=self.fixed_s + (self.compute_s - self.fixed_s) / ranks)


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step on some ranks.

    Attributes:
        ranks: How many.
        seconds: Of the step.
        communication_s: All transfers, hidden or not.
        exposed_s: What of them the step waits for.
        straggling_s: What it waits for the slowest rank.
    """

    ranks: int
    seconds: float
    communication_s: float
    exposed_s: float
    straggling_s: float


def all_reduce_s(mb: float, ranks: int, cluster: Cluster) -> float:
    """Seconds to sum a tensor over ranks.

    Inside a node a ring: 2 (k - 1) messages of 1/k of the tensor (Patarasuk and Yuan 2009, section 3). Between
    nodes each rank sums its 1/k with its like on all others, by a ring or by two trees at once, whichever is faster:
    2 ceil(log2 n) latencies and twice the piece (Sanders, Speck and Träff 2009; without their pipeline's filling).
    """
    inside = min(ranks, cluster.per_node)
    nodes = -(-ranks // cluster.per_node)
    total = 2 * (inside - 1) * cluster.inside.seconds(mb / inside)
    if nodes > 1:
        piece = mb / inside
        ring = 2 * (nodes - 1) * cluster.between.seconds(piece / nodes)
        link = cluster.between
        tree = 2 * piece * 1e6 / (link.gb_per_s * 1e9) + 2 * math.ceil(math.log2(nodes)) * link.latency_us * 1e-6
        total += min(ring, tree)
    return total


def step(work: Work, ranks: int, cluster: Cluster) -> StepTime:
    """A step of so many ranks, each of which does `work`.

    A bucket is sent when the backward pass has filled it and the one before is through; the step waits for what is
    still on its way when the backward pass ends (the order of PyTorch's DDP: Li et al. 2020, section 3.2.3). Of N
    ranks whose steps scatter normally, the slowest takes about sqrt(2 ln N) standard deviations longer than the mean.
    """
    compute = work.compute_s * cluster.crowding(ranks)
    if ranks == 1:
        return StepTime(1, compute, 0.0, 0.0, 0.0)
    buckets = max(1, math.ceil(work.gradient_mb / work.bucket_mb))
    each = work.passes * all_reduce_s(work.gradient_mb / buckets, ranks, cluster)
    backward = work.backward * compute
    through = 0.0  # counted from the beginning of the backward pass
    for bucket in range(1, buckets + 1):
        through = max(through, backward * bucket / buckets) + each
    behind, whole = through - backward, buckets * each
    exposed = work.hidden * behind + (1 - work.hidden) * whole
    straggling = work.jitter_s * math.sqrt(2 * math.log(ranks))
    return StepTime(ranks, compute + exposed + straggling, whole, exposed, straggling)


def weak(work: Work, counts: Sequence[int], cluster: Cluster) -> list[tuple[StepTime, float]]:
    """Steps with as many clips for each rank, and their efficiency: one rank's step over theirs."""
    alone = step(work, 1, cluster).seconds
    steps = [step(work, count, cluster) for count in counts]
    return [(one, alone / one.seconds) for one in steps]


def strong(work: Work, counts: Sequence[int], cluster: Cluster) -> list[tuple[StepTime, float]]:
    """Steps whose clips the ranks share, and their efficiency: one rank's step over so many times theirs."""
    alone = step(work, 1, cluster).seconds
    steps = [step(work.shared(count), count, cluster) for count in counts]
    return [(one, alone / (count * one.seconds)) for count, one in zip(counts, steps, strict=True)]


def fitted(times: Sequence[tuple[float, float]], ranks: int) -> Link:
    """The link that all-reduces of some sizes show.

    Args:
        times: (MB, seconds) of each size; relative errors are made small, so that small sizes count as well.
        ranks: That took part, in one node.
    """
    # seconds = 2 (k - 1) / k * mb / bandwidth + 2 (k - 1) * latency, each row divided by its seconds.
    rows = [(2 * (ranks - 1) / ranks * mb * 1e6 / took, 2 * (ranks - 1) / took) for mb, took in times]
    aa, ab, bb = (sum(x[i] * x[j] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = (sum(x[i] for x in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    slope, latency = (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant
    if latency < 0:  # the sizes do not tell them apart: all of it is bandwidth
        slope, latency = a1 / aa, 0.0
    elif slope <= 0:  # large ones are as fast as small ones: all of it is latency
        slope, latency = 0.0, b1 / bb
    return Link(1 / slope / 1e9 if slope else math.inf, latency * 1e6)


def fitted_between(times: Sequence[tuple[float, float]], nodes: int, per_node: int, inside: Link) -> Link:
    """The link between nodes that all-reduces over some of them show, less what they take inside each.

    Args:
        times: (MB, seconds) of each size.
        nodes: That took part; few, as rings are assumed.
        per_node: Ranks of each.
        inside: Between these; what is returned if the nodes cost no time beside it.
    """
    alone = Cluster(inside, inside, per_node)
    rest = [(mb / per_node, took - all_reduce_s(mb, per_node, alone)) for mb, took in times]
    seen = [(mb, took) for mb, took in rest if took > 0]
    return fitted(seen, nodes) if len(seen) > 1 else inside
