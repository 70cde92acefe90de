"""A NumPy twin of kernels/_random.py: its dropout masks, element by element, for bit-by-bit comparison."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bools = NDArray[np.bool_]
Words = NDArray[np.uint64]

STEPS = 2**16


def philox(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> Words:
    """Philox-4x32-7 (Salmon et al. 2011): (4, ...) words below 2^32 of counters that broadcast."""
    word = np.stack(np.broadcast_arrays(*(np.asarray(part, np.uint64) for part in counter)))
    for number in range(7):
        left, right = word[0] * np.uint64(0xD2511F53), word[2] * np.uint64(0xCD9E8D57)
        bump = [(key[0] + number * 0x9E3779B9) % 2**32, (key[1] + number * 0xBB67AE85) % 2**32]
        high, low = np.divmod(np.stack([right, left]), np.uint64(2**32))
        word = np.stack(
            [high[0] ^ word[1] ^ np.uint64(bump[0]), low[0], high[1] ^ word[3] ^ np.uint64(bump[1]), low[1]]
        )
    return word


def steps(rate: float) -> int:
    """How many of the 2^16 numbers are dropped; never all of them."""
    return min(round(STEPS * rate), STEPS - 1)


def scale(rate: float) -> float:
    """The factor of what is kept: the inverse of the share that is."""
    return 1 / (1 - steps(rate) / STEPS)


def key_of(seed: int, stream: int) -> tuple[int, int]:
    """The lower and the upper half of the seed, the latter with the stream's number."""
    seed %= 2**64
    return seed % 2**32, seed // 2**32 ^ stream % 2**32


def _choose(words: Words, which: NDArray[np.int64], is_lower: Bools, rate: float) -> Bools:
    """Whether the chosen half of the chosen word is at least the number of dropped steps."""
    chosen = np.take_along_axis(words, which[None], 0)[0]
    number = np.where(is_lower, chosen % np.uint64(STEPS), chosen // np.uint64(STEPS))
    kept: Bools = number >= steps(rate)
    return kept


def keep_scores(
    seed: int, stream: int, sequence_start: int, head: int, num_queries: int, num_keys: int, rate: float
) -> Bools:
    """(queries, keys): which scores of a head of the sequence that begins at this packed row stay.

    The word is chosen by bits 3 and 4 of the key, its half by bit 3 of the query; the other bits are in the counter.
    """
    query, key = np.meshgrid(np.arange(num_queries), np.arange(num_keys), indexing="ij")
    key_rest = key // 32 * 8 + key % 8
    query_rest = query // 16 * 8 + query % 8
    words = philox((key_rest, query_rest, sequence_start, head), key_of(seed, stream))
    return _choose(words, key // 8 % 4, query // 8 % 2 == 1, rate)


def keep_features(seed: int, stream: int, rows: int, width: int, rate: float) -> Bools:
    """(rows, width): which features stay.

    The word is chosen by bits 1 and 2 of the column, its half by bit 0; the row and the column's rest are the counter.
    """
    row, column = np.meshgrid(np.arange(rows), np.arange(width), indexing="ij")
    words = philox((column // 8, row % 2**32, row // 2**32, 0), key_of(seed, stream))
    return _choose(words, column // 2 % 4, column % 2 == 1, rate)
