"""Packs of instances as batches: tokens side by side, masks drawn, labels beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import masking
from ..functional import IGNORED
from ..masking import PackedBatch
from .instances import Array
from .stream import Pack, PackId, draws

# A pool has fewer packs than this, so that no two packs of an epoch share their masks.
PACKS_OF_POOL = 2**32


class VocabularyLike(Protocol):
    """See vocabulary.Vocabulary."""

    @property
    def size(self) -> int: ...
    @property
    def cls_id(self) -> int: ...
    @property
    def sep_id(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def special_ids(self) -> list[int]: ...
    @property
    def is_continuation(self) -> Array: ...


@dataclass(frozen=True)
class Masking:
    """How tokens are chosen, and what becomes of them; see masking.mask_tokens."""

    unit: Literal["token", "word", "span"] = "token"
    mask_probability: float = 0.8
    random_probability: float = 0.1
    max_span: int = 3


@dataclass(eq=False)
class PretrainingBatch:
    """
    Attributes:
        packed: the sequences, with masks in; its `kept` are the rows that are predicted.
        labels: (1, tokens) int64, the original id where one is predicted, else IGNORED.
        next_sentence: (sequences,) int64, classes of the pairs, or IGNORED; None: there are no pairs.
    """

    packed: PackedBatch
    labels: Tensor
    next_sentence: Tensor | None

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted."""
        return 0 if self.packed.kept is None else len(self.packed.kept)

    @property
    def pairs(self) -> int:
        """Number of pairs that have a class."""
        return 0 if self.next_sentence is None else int((self.next_sentence != IGNORED).sum())

    def to(self, device: torch.device | str) -> PretrainingBatch:
        """The same batch with its tensors on `device`."""
        pairs = None if self.next_sentence is None else self.next_sentence.to(device, non_blocking=True)
        return PretrainingBatch(self.packed.to(device), self.labels.to(device, non_blocking=True), pairs)


def assemble(pack: Pack, vocabulary: VocabularyLike) -> tuple[PackedBatch, Tensor]:
    """A pack's tokens, as [CLS] a [SEP] or [CLS] a [SEP] b [SEP], without masks.

    Returns:
        The batch, its token types 0 up to the first [SEP] and 1 behind it; (sequences,) int64, the pairs' classes.
    """
    found = pack.instances
    first, second = found.first[pack.rows], found.second[pack.rows]
    lengths = found.lengths[pack.rows]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.full(bounds[-1], vocabulary.sep_id, np.int64)
    ids[bounds[:-1]] = vocabulary.cls_id
    types = np.zeros(bounds[-1], np.int64)
    for begin, end, (shard, start, length), (shard_b, start_b, length_b) in zip(
        bounds[:-1].tolist(), bounds[1:].tolist(), first.tolist(), second.tolist(), strict=True
    ):
        ids[begin + 1 : begin + 1 + length] = pack.shards[shard].tokens[start : start + length]
        if length_b:
            ids[end - 1 - length_b : end - 1] = pack.shards[shard_b].tokens[start_b : start_b + length_b]
            types[end - 1 - length_b : end] = 1
    batch = masking.from_flattened(
        torch.from_numpy(bounds), ids=torch.from_numpy(ids), token_types=torch.from_numpy(types)
    )
    return batch, torch.from_numpy(found.labels[pack.rows])


def word_ids(ids: Array, vocabulary: VocabularyLike) -> Array:
    """(tokens,) int32: equal neighbours are pieces of one word, -1 is a special token."""
    words = np.cumsum(~vocabulary.is_continuation[ids], dtype=np.int32)
    return np.where(np.isin(ids, vocabulary.special_ids), np.int32(-1), words)


def mask(
    batch: PackedBatch,
    classes: Tensor,
    identity: PackId,
    vocabulary: VocabularyLike,
    *,
    rate: float,
    seed: int,
    rule: Masking | None = None,
) -> PretrainingBatch:
    """Draws masks, which depend on the seed and on which pack it is, not on who draws them.

    Args:
        batch, classes: see assemble.
        identity: of the pack.
        vocabulary: of its tokens.
        rate: share of the tokens that are predicted.
        seed: of the masks.
        rule: see Masking; None: tokens, as Devlin et al. 2018 masked them.
    """
    rule = Masking() if rule is None else rule
    assert batch.ids is not None
    masked = masking.mask_tokens(
        batch.ids[None],
        special_ids=vocabulary.special_ids,
        mask_id=vocabulary.mask_id,
        vocab_size=vocabulary.size,
        probability=rate,
        unit=rule.unit,
        word_ids=None if rule.unit == "token" else torch.from_numpy(word_ids(batch.ids.numpy(), vocabulary))[None],
        max_span=rule.max_span,
        mask_probability=rule.mask_probability,
        random_probability=rule.random_probability,
        seed=int(draws(seed, identity.epoch, identity.lane, 3).integers(2**63)),
        first_row=identity.pool * PACKS_OF_POOL + identity.number,
    )
    has_pairs = bool((classes != IGNORED).any())
    return PretrainingBatch(
        packed=replace(batch, ids=masked.ids[0], kept=masked.positions),
        labels=masked.labels,
        next_sentence=classes if has_pairs else None,
    )
