"""Small corpora of random ids for the tests of pretraining."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TinyVocabulary:
    """Ids 0 to 4 are special; every fourth of the others continues a word."""

    size: int = 97
    pad_id: int = 0
    cls_id: int = 2
    sep_id: int = 3
    mask_id: int = 4
    special_ids: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])

    @property
    def is_continuation(self) -> Array:
        ids = np.arange(self.size)
        is_continuation: Array = (ids > 4) & (ids % 4 == 0)
        return is_continuation


@dataclass(frozen=True)
class TinyShard:
    tokens: Array
    sentences: Array
    documents: Array


def shard(documents: list[list[list[int]]]) -> TinyShard:
    """Of documents, which are lists of sentences, which are lists of ids."""
    sentences = [sentence for document in documents for sentence in document]
    return TinyShard(
        np.array([token for sentence in sentences for token in sentence], np.uint16),
        np.concatenate([[0], np.cumsum([len(sentence) for sentence in sentences])]).astype(np.int64),
        np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64),
    )


def random_shard(seed: int, documents: int = 23, longest_sentence: int = 19, most_sentences: int = 13) -> TinyShard:
    """Documents of different lengths, of ids 5 to 96."""
    draws = np.random.default_rng(seed)
    return shard(
        [
            [
                draws.integers(5, 97, draws.integers(1, longest_sentence + 1)).tolist()
                for _ in range(draws.integers(1, most_sentences + 1))
            ]
            for _ in range(documents)
        ]
    )
