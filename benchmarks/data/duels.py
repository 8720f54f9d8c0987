"""Compares fastav with the fastest other readers of the same packed files, in pairs.

In the long rounds of the tables, the turns of one variant are half a minute apart, and the load of a shared machine
changes in between. Here two readers alternate in turns of a fraction of a second, and each pair of turns gives a ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.data.peers import Peer
from benchmarks.timing import MedianInterval, Turn, interleave, paired_ratio, per_cpu_second, per_second
from fastav.data.clip import Clip, ClipPlan

PEERS = 2
_PAIRS_A_ROUND = 3


def fastest(pack: str, turns: dict[str, list[Turn]]) -> list[str]:
    """Returns the other readers with the most clips per CPU-second on a pack."""
    others = [name for name in turns if name.startswith(f"{pack} through ") and not name.endswith("ours")]
    return sorted(others, key=lambda name: -float(np.median(per_cpu_second(turns[name]))))[:PEERS]


def duels(
    readers: dict[str, tuple[Clip, Peer]],
    plans_of: Callable[[Clip], Iterator[ClipPlan]],
    turns: dict[str, list[Turn]],
    packs: Sequence[str],
    workers: int,
    rounds: int,
    clips: int,
) -> Iterator[tuple[tuple[str, str], MedianInterval, str]]:
    """Yields the names, the ratio and the metric of each pair: CPU time in one thread, wall time in `workers` threads.

    Args:
        readers: Name -> clip and reader.
        plans_of: Returns the plans of a clip.
        turns: Turns of the tables, from which the fastest readers are chosen.
        packs: Names of the packs.
        workers: Number of threads.
        rounds: Rounds of the tables; each stands for three pairs.
        clips: Clips per turn.
    """
    with ThreadPoolExecutor(workers) as pool:
        for pack in packs:
            ours = f"{pack} through ours"
            for peer in fastest(pack, turns):
                for threads in (1, workers):
                    metric: Any = per_cpu_second if threads == 1 else per_second
                    both = {
                        name: _turn(*readers[name], plans_of, clips * threads, None if threads == 1 else pool)
                        for name in (ours, peer)
                    }
                    found = interleave(both, _PAIRS_A_ROUND * rounds)
                    interval = paired_ratio(metric(found[ours]), metric(found[peer]))
                    yield (
                        (ours, peer),
                        interval,
                        "clips_per_cpu_s" if threads == 1 else f"clips_per_s_{threads}_threads",
                    )


def _turn(
    clip: Clip, peer: Peer, plans_of: Callable[[Clip], Iterator[ClipPlan]], clips: int, pool: ThreadPoolExecutor | None
) -> Callable[[], int]:
    plans = plans_of(clip)

    def run() -> int:
        drawn = [next(plans) for _ in range(clips)]
        for _ in map(peer.frames, drawn) if pool is None else pool.map(peer.frames, drawn):
            pass
        return clips

    return run
