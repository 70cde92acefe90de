"""A NumPy twin of csrc/masking.h: the same contracts in plain loops, for bit-by-bit comparison."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

SELECT, REPLACE, SPAN = 0, 1, 2
"""The last counter word: what a draw is for."""


# ---- philox ----------------------------------------------------------------------------------------------------------


def philox(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """Philox-4x32-10 (Salmon et al. 2011) of counters that broadcast; each word is below 2^32."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    for i in range(10):
        k0, k1 = (np.uint64((k + i * weyl) % 2**32) for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (product1 >> half) ^ c1 ^ k0, product1 & low, (product0 >> half) ^ c3 ^ k1, product0 & low
    return c0, c1, c2, c3


def draw(seed: int, numbers: ArrayLike, row: int, purpose: int) -> tuple[Words, Words, Words, Words]:
    """Four words for each of `numbers`, in the counter (number, row low, row high, purpose)."""
    row %= 2**64
    return philox((numbers, row % 2**32, row // 2**32, purpose), (seed % 2**32, seed // 2**32))


def is_below(words: Words, probability: float) -> Bools:
    """Whether a word / 2^32 lies below the probability, which is rounded, halves up, to a multiple of 2^-32."""
    scaled = probability * 2**32
    below: Bools = words < np.uint64(int(scaled) + (scaled % 1.0 >= 0.5))
    return below


# ---- unpad, pad, pack ------------------------------------------------------------------------------------------------


class Packing(NamedTuple):
    """What `unpad` finds; the names and shapes of PackedBatch."""

    indices: Ints
    positions: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    num_keys: NDArray[np.int32]
    tiles: NDArray[np.int32]
    max_seqlen: int


def unpad(mask: Bools, keep: Bools | None, keep_first: bool, tile_size: int) -> Packing:
    """The packing of a mask (rows, columns) and of what is to be kept besides, (rows, columns) or None."""
    kept = np.zeros_like(mask) if keep is None else keep.copy()
    kept[:, :1] |= keep_first
    indices: list[int] = []
    positions: list[int] = []
    cu_seqlens, num_keys = [0], []
    for row, (is_key, is_kept) in enumerate(zip(mask, kept, strict=True)):
        keys = np.flatnonzero(is_key).tolist()
        extra = np.flatnonzero(is_kept & ~is_key).tolist()
        positions += keys + extra
        indices += [row * mask.shape[1] + column for column in keys + extra]
        cu_seqlens.append(len(indices))
        num_keys.append(len(keys))
    return Packing(
        np.array(indices, np.int64),
        np.array(positions, np.int32),
        np.array(cu_seqlens, np.int32),
        np.array(num_keys, np.int32),
        make_tiles(cu_seqlens, num_keys, tile_size),
        max((stop - start for start, stop in pairwise(cu_seqlens)), default=0),
    )


def make_tiles(cu_seqlens: list[int], num_keys: list[int], tile_size: int) -> NDArray[np.int32]:
    """(tiles, 4): sequence start, rows, keys, first row of the tile."""
    tiles = [
        (start, stop - start, keys, first)
        for (start, stop), keys in zip(pairwise(cu_seqlens), num_keys, strict=True)
        for first in range(0, stop - start, tile_size)
    ]
    return np.array(tiles, np.int32).reshape(-1, 4)


def pad(x: NDArray[Any], indices: Ints, rows: int) -> NDArray[Any]:
    """(rows, ...) with x's rows at `indices`, zeros elsewhere."""
    out = np.zeros((rows, *x.shape[1:]), x.dtype)
    for row, index in zip(x, indices, strict=True):
        out[index] = row
    return out


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the sequence numbers of each bin, ascending."""
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[number]]
        if fitting:
            best = min(fitting, key=lambda b: room[b])  # the oldest of equally full ones: min keeps the first
        else:
            best = len(bins)
            bins.append([])
            room.append(capacity)
        bins[best].append(number)
        room[best] -= lengths[number]
    return [sorted(numbers) for numbers in bins]


# ---- mask_tokens -----------------------------------------------------------------------------------------------------


class Masked(NamedTuple):
    """What `mask_tokens` makes: ids and labels (rows, columns), positions (predicted,)."""

    ids: Ints
    labels: Ints
    positions: Ints


def mask_tokens(
    ids: Ints,
    word_ids: NDArray[np.int32] | None,
    *,
    special_ids: list[int],
    mask_id: int,
    vocab_size: int,
    probability: float,
    unit: str,
    max_span: int,
    mask_probability: float,
    random_probability: float,
    seed: int,
    first_row: int,
) -> Masked:
    """The masked-language-model targets of ids (rows, columns), row after row."""
    ordinary = np.array([i for i in range(vocab_size) if i not in special_ids], np.int64)
    masked, labels = ids.copy(), np.full_like(ids, -100)
    for row in range(ids.shape[0]):
        number = first_row + row
        words = split_words(ids[row], None if word_ids is None else word_ids[row], special_ids)
        if unit == "span":
            chosen = choose_spans(words, probability, max_span, seed, number)
        else:
            # In the unit "token" each column of a word is one of its own; word_ids only say what is left alone.
            units = words if unit == "word" else [[column] for word in words for column in word]
            chosen = choose_units(units, ids.shape[1], probability, seed, number)
        columns = np.array(chosen, np.int64)
        choice, token, _, _ = draw(seed, columns, number, REPLACE)
        is_mask = is_below(choice, mask_probability)
        is_random = ~is_mask & is_below(choice, mask_probability + random_probability)
        labels[row, columns] = ids[row, columns]
        masked[row, columns[is_mask]] = mask_id
        masked[row, columns[is_random]] = ordinary[(token[is_random] * np.uint64(len(ordinary))) >> np.uint64(32)]
    return Masked(masked, labels, np.flatnonzero(labels != -100))


def split_words(ids: Ints, word_ids: NDArray[np.int32] | None, special_ids: list[int]) -> list[list[int]]:
    """The columns of each maskable word of a row, in order."""
    words: list[list[int]] = []
    for column, token in enumerate(ids):
        if token in special_ids or (word_ids is not None and word_ids[column] < 0):
            continue
        follows = bool(words) and words[-1][-1] == column - 1
        if follows and word_ids is not None and word_ids[column] == word_ids[column - 1]:
            words[-1].append(column)
        else:
            words.append([column])
    return words


def choose_units(units: list[list[int]], columns: int, probability: float, seed: int, row: int) -> list[int]:
    """The columns of the units whose first column is drawn."""
    column = np.arange(columns)
    words = np.stack(draw(seed, column // 64 * 16 + column % 16, row, SELECT))
    is_chosen = is_below(words[column // 16 % 4, column], probability)
    return [c for unit in units if is_chosen[unit[0]] for c in unit]


def choose_spans(words: list[list[int]], probability: float, max_span: int, seed: int, row: int) -> list[int]:
    """The columns of spans of words: as many as the budget allows, or 16 + 8 * words draws give."""
    draws = draw(seed, np.arange(17 + 8 * len(words)), row, SPAN)
    wanted = probability * sum(len(word) for word in words)
    budget = int(wanted) + int(is_below(draws[0][0], wanted % 1.0))
    weights = 1.0 / np.arange(1, max_span + 1)
    limits = np.cumsum(weights / np.cumsum(weights)[-1])
    is_taken = [False] * len(words)
    for length_word, start_word in zip(draws[0][1:], draws[1][1:], strict=True):
        length = 1 + sum(not is_below(length_word, limit) for limit in limits[:-1])
        start = int(start_word) * len(words) >> 32
        for i in range(start, min(start + length, len(words))):
            if is_taken[i] or len(words[i]) > budget:
                break
            is_taken[i] = True
            budget -= len(words[i])
    return [column for word, taken in zip(words, is_taken, strict=True) if taken for column in word]
