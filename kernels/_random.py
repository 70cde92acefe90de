"""Dropout masks: a pure function of (seed, stream, place). The backward pass draws them again instead of reading them.

The generator is Philox-4x32 with seven rounds, the fewest with which it passes every test of its authors (Salmon et al.
2011, table 2). A counter gives eight numbers of 16 bits; an element is dropped when its number is below
round(2^16 * rate), so a rate holds to 2^-17, and what is kept is scaled by the inverse of the rate that really holds.

Which elements share a counter is chosen so that one lane of a matrix-product tile, or of a row, holds all eight: the
compiler then draws once for them. tests/dropout_twin.py says the same in NumPy.
"""

import triton
import triton.language as tl

ROUNDS: tl.constexpr = tl.constexpr(7)

STEPS = 1 << 16


def threshold(rate: float) -> int:
    """The 16-bit number below which an element is dropped; at most 2^16 - 1, so that the scale stays finite."""
    return min(round(rate * STEPS), STEPS - 1)


def scale(rate: float) -> float:
    """The factor of what is kept."""
    return STEPS / (STEPS - threshold(rate))


@triton.jit
def _number(word0, word1, word2, word3, which, is_lower):
    """The chosen word, with its chosen half in the upper 16 bits."""
    is_odd = (which & 1) != 0
    word = tl.where((which & 2) != 0, tl.where(is_odd, word3, word2), tl.where(is_odd, word1, word0))
    return tl.where(is_lower, word << 16, word)


@triton.jit
def load_seed(seed_ptr, stream):
    """The key of a place in the model: the call's seed, with the stream's number in its upper half."""
    return tl.load(seed_ptr).to(tl.uint64) ^ (tl.cast(stream, tl.uint64) << 32)


@triton.jit
def keep_scores(seed, sequence_start, head, query_idx, key_idx, threshold):
    """Which scores stay; query_idx and key_idx, one of them a column, broadcast to the tile.

    Counter: (key without bits 3 and 4, query without bit 3, packed row of the sequence's start, head). Key bits 3 and 4
    choose the word, query bit 3 its lower half.
    """
    key_group = (key_idx & 7) | ((key_idx >> 5) << 3)
    query_group = (query_idx & 7) | ((query_idx >> 4) << 3)
    word0, word1, word2, word3 = tl.philox(seed, key_group, query_group, sequence_start, head, ROUNDS)
    number = _number(word0, word1, word2, word3, key_idx >> 3, (query_idx & 8) != 0)
    return number >= (tl.cast(threshold, tl.uint32) << 16)


@triton.jit
def keep_features(seed, row, column_idx, threshold):
    """Which features of a row (int64) stay.

    Counter: (column / 8, row low, row high, 0). Column bits 1 and 2 choose the word, bit 0 its lower half.
    """
    row_low = (row & 0xFFFFFFFF).to(tl.uint32)
    row_high = (row >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(seed, column_idx >> 3, row_low, row_high, 0, ROUNDS)
    number = _number(word0, word1, word2, word3, (column_idx >> 1) & 3, (column_idx & 1) != 0)
    return number >= (tl.cast(threshold, tl.uint32) << 16)
