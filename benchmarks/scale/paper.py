"""Analytical scaling model: predicts the step time on many ranks from measurements on few.

Benchmarks/scaling.md describes the inputs, the source of each formula, and the measurements it was compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Link:
    """Network link of one rank.

    Attributes:
        gb_per_s: Bandwidth in one direction for large messages, 1e9 bytes per second.
        latency_us: Latency of the smallest message, microseconds.
    """

    gb_per_s: float
    latency_us: float

    def seconds(self, mb: float) -> float:
        """Returns the seconds for one message of `mb` MB."""
        return mb * 1e6 / (self.gb_per_s * 1e9) + self.latency_us * 1e-6


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster of identical nodes.

    Attributes:
        inside: Link between the ranks of a node.
        between: Link between nodes, the share of one rank.
        per_node: Ranks per node.
        cores: Cores per node if the ranks compute on CPUs with one thread each; None for GPUs.
    """

    inside: Link
    between: Link
    per_node: int = 8
    cores: float | None = None

    def crowding(self, ranks: int) -> float:
        """Returns the factor by which computation is slower because ranks share cores."""
        return 1.0 if self.cores is None else max(1.0, min(ranks, self.per_node) / self.cores)


@dataclass(frozen=True, slots=True)
class Work:
    """A step of one rank.

    Attributes:
        compute_s: Seconds of forward pass, backward pass and optimizer, without other ranks.
        gradient_mb: Size of the gradients that are reduced in a step, MB.
        fixed_s: Part of `compute_s` that does not shrink with fewer clips.
        bucket_mb: Size of a bucket of gradients, MB.
        backward: Fraction of `compute_s` that is the backward pass.
        passes: Traffic as a multiple of one all-reduce of `gradient_mb`: 1.5 if parameters are sharded (FSDP, ZeRO-3),
            2.5 if in addition only gradients are sent in half as many bytes.
        hidden: Fraction of the transfers that can overlap with the backward pass; 0 if both need the same cores.
        jitter_s: Standard deviation of the step time of a rank.
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
        """Returns the work of one rank if the clips of the step are divided among `ranks` ranks."""
        return replace(self, compute_s=self.fixed_s + (self.compute_s - self.fixed_s) / ranks)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Predicted time of a step.

    Attributes:
        ranks: Number of ranks.
        seconds: Duration of the step.
        communication_s: Duration of all transfers, hidden or not.
        exposed_s: Time for which the step waits for transfers.
        straggling_s: Time for which the step waits for the slowest rank.
    """

    ranks: int
    seconds: float
    communication_s: float
    exposed_s: float
    straggling_s: float


def all_reduce_s(mb: float, ranks: int, cluster: Cluster) -> float:
    """Predicts the seconds of an all-reduce.

    Within a node it is a ring: 2 (k - 1) messages of 1/k of the tensor (Patarasuk and Yuan 2009, section 3). Between
    nodes each rank reduces its 1/k with the corresponding ranks of all other nodes, by a ring or by two concurrent
    trees, whichever is faster. The trees take 2 ceil(log2 n) latencies and twice the piece (Sanders, Speck and Träff
    2009; without filling the pipeline).
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
    """Predicts a step of `ranks` ranks, each of which does `work`.

    A bucket is sent when the backward pass has filled it and the previous one has been sent. The step waits for the
    transfers that are not finished when the backward pass ends (as in PyTorch's DDP: Li et al. 2020, section 3.2.3).
    The slowest of N ranks with normally distributed step times takes about sqrt(2 ln N) standard deviations longer than
    the mean.
    """
    compute = work.compute_s * cluster.crowding(ranks)
    if ranks == 1:
        return StepTime(1, compute, 0.0, 0.0, 0.0)
    buckets = max(1, math.ceil(work.gradient_mb / work.bucket_mb))
    each = work.passes * all_reduce_s(work.gradient_mb / buckets, ranks, cluster)
    backward = work.backward * compute
    through = 0.0  # seconds since the start of the backward pass
    for bucket in range(1, buckets + 1):
        through = max(through, backward * bucket / buckets) + each
    behind, whole = through - backward, buckets * each
    exposed = work.hidden * behind + (1 - work.hidden) * whole
    straggling = work.jitter_s * math.sqrt(2 * math.log(ranks))
    return StepTime(ranks, compute + exposed + straggling, whole, exposed, straggling)


def weak(work: Work, counts: Sequence[int], cluster: Cluster) -> list[tuple[StepTime, float]]:
    """Predicts weak scaling, with the same clips per rank: steps, and their efficiency relative to one rank."""
    alone = step(work, 1, cluster).seconds
    steps = [step(work, count, cluster) for count in counts]
    return [(one, alone / one.seconds) for one in steps]


def strong(work: Work, counts: Sequence[int], cluster: Cluster) -> list[tuple[StepTime, float]]:
    """Predicts strong scaling, with the same clips in total: steps, and their efficiency relative to one rank."""
    alone = step(work, 1, cluster).seconds
    steps = [step(work.shared(count), count, cluster) for count in counts]
    return [(one, alone / (count * one.seconds)) for count, one in zip(counts, steps, strict=True)]


def fitted(times: Sequence[tuple[float, float]], ranks: int) -> Link:
    """Fits a link to measured all-reduces within a node.

    Args:
        times: (MB, seconds) of each size. The fit minimises relative errors, so that small sizes count, too.
        ranks: Number of ranks that took part.
    """
    # seconds = 2 (k - 1) / k * mb / bandwidth + 2 (k - 1) * latency, each row divided by its seconds.
    rows = [(2 * (ranks - 1) / ranks * mb * 1e6 / took, 2 * (ranks - 1) / took) for mb, took in times]
    aa, ab, bb = (sum(x[i] * x[j] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = (sum(x[i] for x in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    slope, latency = (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant
    if latency < 0:  # cannot be separated: bandwidth only
        slope, latency = a1 / aa, 0.0
    elif slope <= 0:  # large sizes are as fast as small ones: latency only
        slope, latency = 0.0, b1 / bb
    return Link(1 / slope / 1e9 if slope else math.inf, latency * 1e6)


def fitted_between(times: Sequence[tuple[float, float]], nodes: int, per_node: int, inside: Link) -> Link:
    """Fits the link between nodes to measured all-reduces, after subtracting the time within each node.

    Args:
        times: (MB, seconds) of each size.
        nodes: Number of nodes that took part; few, because rings are assumed.
        per_node: Ranks per node.
        inside: Link within a node; returned if no time is left for the link between nodes.
    """
    alone = Cluster(inside, inside, per_node)
    rest = [(mb / per_node, took - all_reduce_s(mb, per_node, alone)) for mb, took in times]
    positive = [(mb, took) for mb, took in rest if took > 0]
    return fitted(positive, nodes) if len(positive) > 1 else inside
