"""A held-out part that is always the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..task import E

__all__ = ["is_held_out", "split"]


def is_held_out(key: str, share: float) -> bool:
    """Whether the hash of a key falls into the held-out share, whatever else there is."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def split(examples: Sequence[E], share: float) -> tuple[list[E], list[E]]:
    """Training examples and held-out ones, in their order, divided by the hash of their keys.

    Args:
        examples: of one task.
        share: that is held out, in (0, 1).

    Raises:
        ValueError: `share` is not within 0 and 1, or one of the parts would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out is {share}; it must be between 0 and 1")
    parts: tuple[list[E], list[E]] = ([], [])
    for example in examples:
        parts[is_held_out(example.key, share)].append(example)
    if not all(parts):
        raise ValueError(
            f"held_out is {share}, which leaves {len(parts[0])} of {len(examples)} examples for training and "
            f"{len(parts[1])} for evaluation; name a file of its own for evaluation"
        )
    return parts
