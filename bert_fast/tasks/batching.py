"""Batches of about equal work, of texts of about equal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["budget_batches"]


def budget_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of texts in batches, the longest texts first, each text once.

    Args:
        lengths: tokens of each text.
        tokens: of a batch at most, padded to its longest text. A text with more is a batch of its own.

    Raises:
        ValueError: `tokens` is not positive.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; it must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        count = max(1, tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count
