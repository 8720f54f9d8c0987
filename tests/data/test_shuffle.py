"""The blocked order: every clip once, neighbours near each other, other neighbours in each epoch."""

from __future__ import annotations

import numpy as np
import pytest

from fastav.data.shuffle import blocked


def rows(size, key, block, window):
    position = np.arange(size)
    sizes, keys = np.full(size, size), np.full(size, key, np.uint64)
    return blocked(position, sizes, keys, block=block, window=window)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 65, 1000, 1023])
@pytest.mark.parametrize(("block", "window"), [(1, 1), (4, 3), (64, 16), (2000, 2)])
def test_every_clip_once(size, block, window):
    assert sorted(rows(size, 12345, block, window)) == list(range(size))


def test_a_window_is_made_of_few_runs_of_neighbours():
    size, block, window = 10_000, 50, 4
    found = rows(size, 99, block, window)
    for begin in range(0, size - block * window, block * window):
        part = np.sort(found[begin : begin + block * window])
        runs = 1 + int((np.diff(part) > 1).sum())
        assert runs <= window + 1  # one more where the turn tears a block in two
        shuffled = found[begin : begin + block * window]
        assert (np.diff(shuffled) == 1).mean() < 0.1
    spread = [abs(int(a) - int(b)) for a, b in zip(found[::200], found[200::200], strict=False)]
    assert np.mean(spread) > size / 8


def test_epochs_differ_and_cut_elsewhere():
    one, two = rows(4096, 1, 64, 4), rows(4096, 2, 64, 4)
    assert (one != two).mean() > 0.9
    starts = {int(np.sort(rows(4096, key, 64, 1)[:64])[0]) % 64 for key in range(8)}
    assert len(starts) > 4


def test_any_position_alone_is_the_same():
    whole = rows(1000, 7, 16, 4)
    alone = [
        int(blocked(np.array([p]), np.array([1000]), np.array([7], np.uint64), block=16, window=4)[0])
        for p in range(0, 1000, 37)
    ]
    assert alone == whole[::37].tolist()
