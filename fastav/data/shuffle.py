"""The order in which the clips of a data set are visited: pure functions of the position, for any number of clips.

The order `global` is a keyed bijection over all clips (`fastav.data.rng.permute`). The order `blocked` keeps
neighbouring clips close together, for shards on remote storage: it shuffles blocks of neighbouring clips, then shuffles
the clips within windows of a few blocks. A reader then uses the shards of one window at a time, and reads all clips of
a fetched range before it drops the range. The block boundaries change each epoch, so that clips get new neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastav.data.rng import permute, philox4x32, split_words

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

_SHIFT, _BLOCKS, _WINDOW = range(3)  # independent random streams of an epoch


def blocked(position_B: Ints, size_B: Ints, key_B: Keys, *, block: int, window: int) -> Ints:
    """Returns the row at each position of a blocked epoch.

    All whole blocks are shuffled; the remaining rows, which do not fill a block, come last. Position p is in window
    p // (block * window), which holds the shuffled clips of `window` blocks. Finally all rows are rotated by a random
    shift, so that the block boundaries change each epoch.

    Args:
        position_B: Positions in the epoch, 0 to size - 1.
        size_B: Number of clips in the data set.
        key_B: 64 pseudo-random bits per epoch.
        block: Number of neighbouring clips that stay together.
        window: Number of blocks whose clips are shuffled together.

    Returns:
        Row numbers, int64 [B].
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
    """Returns 64 pseudo-random bits of one of an epoch's streams."""
    words = philox4x32((*split_words(number_B), stream, 0), split_words(key_B))
    return words[0] | (words[1] << np.uint64(32))
