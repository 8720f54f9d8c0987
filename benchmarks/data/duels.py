"""Ours against the fastest peers on the same packed files, two at a time.

In the long rounds of the tables a variant's turns are half a minute apart, and a shared machine changes in between; the
two of a duel take turns of a fraction of a second, and each pair gives a ratio of its own.
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
    """Returns the peers that gave most clips per CPU-second on a pack."""
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
    """Yields the names, the ratio and its metric of each duel: by CPU in one thread, and by the clock in `workers`.

    Args:
        readers: Name -> clip and reader.
        plans_of: Draws a clip's plans.
        turns: Of the tables: who is fastest.
        packs: Which packs.
        workers: Threads.
        rounds: Of the tables; there are three pairs for each.
        clips: In a turn.
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
