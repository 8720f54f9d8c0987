"""In which order the clips of a data set are visited: pure functions of the position, for any number of clips.

`global` is a keyed bijection over all clips (`fastav.data.rng.permute`). `blocked` keeps neighbours near each other,
for shards that are far away: blocks of neighbouring clips are shuffled, and within windows of a few blocks the clips
are. A reader then touches no more than a window's worth of shards at a time, and what it fetched coarsely is used up
before it is dropped. Each epoch cuts the blocks elsewhere, so that clips meet other neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastav.data.rng import permute, philox4x32, split_words

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

_SHIFT, _BLOCKS, _WINDOW = range(3)  # streams of an epoch's key


def blocked(position_B: Ints, size_B: Ints, key_B: Keys, *, block: int, window: int) -> Ints:
    """Returns the row at each position of a blocked epoch.

    Position p is in window p // (block * window), which holds the clips of `window` blocks, shuffled; the blocks are
    those of a shuffle of all whole blocks, the rows that fill no block come last; and all of it is turned by a random
    shift, so that blocks begin elsewhere in each epoch.

    Args:
        position_B: 0 to size - 1.
        size_B: Clips of the data set.
        key_B: 64 pseudo-random bits of the epoch.
        block: Neighbouring clips that stay together.
        window: Blocks whose clips are shuffled with each other.
    """
    span = block * window
    number_B, offset_B = np.divmod(position_B, span)
    length_B = np.minimum(span, size_B - number_B * span)
    place_B = number_B * span + permute(offset_B, length_B, _stream(key_B, _WINDOW, number_B))
    whole_B = size_B // block
    inside_B = place_B < whole_B * block
    home_B = np.where(inside_B, place_B // block, 0)
    moved_B = permute(home_B, np.maximum(whole_B, 1), _stream(key_B, _BLOCKS, np.zeros_like(number_B)))
    row_B = np.where(inside_B, moved_B * block + place_B % block, place_B)
    shift_B = (_stream(key_B, _SHIFT, np.zeros_like(number_B)) % size_B.astype(np.uint64)).astype(np.int64)
    return (row_B + shift_B) % size_B


def _stream(key_B: Keys, stream: int, number_B: Ints) -> Keys:
    """Returns 64 bits of one of an epoch's streams."""
    words = philox4x32((*split_words(number_B), stream, 0), split_words(key_B))
    return words[0] | (words[1] << np.uint64(32))
