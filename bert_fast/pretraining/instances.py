"""Which stretches of a corpus become training instances: sentence pairs, or sentences up to a length.

An instance is one or two stretches of tokens that lie side by side in a shard, so a table of numbers says it all, and
no token is copied until a batch is made.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from ..functional import IGNORED

Kind = Literal["nsp", "sop", "full"]
Array = np.ndarray[Any, Any]

# Classes of next-sentence prediction, as BERT's checkpoints have them; of sentence order likewise 0 is the true one.
IS_NEXT, IS_OTHER = 0, 1

# [CLS] a [SEP], and [CLS] a [SEP] b [SEP].
SPECIALS_OF_ONE, SPECIALS_OF_TWO = 2, 3


class ShardLike(Protocol):
    """
    Attributes:
        tokens: (tokens,) ids.
        sentences: (sentences + 1,) where each sentence's tokens begin.
        documents: (documents + 1,) where each document's sentences begin.
    """

    @property
    def tokens(self) -> Array: ...
    @property
    def sentences(self) -> Array: ...
    @property
    def documents(self) -> Array: ...


@dataclass(frozen=True, eq=False)
class Instances:
    """
    Attributes:
        first, second: (instances, 3) int64: number of the shard, first token, tokens; a second one may have none.
        labels: (instances,) int64: IS_NEXT or IS_OTHER, IGNORED where there is nothing to say.
    """

    first: Array
    second: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Array:
        """(instances,) int64, tokens with [CLS] and [SEP]."""
        has_second = self.second[:, 2] > 0
        length: Array = self.first[:, 2] + self.second[:, 2]
        return length + np.where(has_second, SPECIALS_OF_TWO, SPECIALS_OF_ONE)


class _Stretch(NamedTuple):
    shard: int
    start: int
    length: int


_NOTHING = _Stretch(0, 0, 0)


class _Pair(NamedTuple):
    first: _Stretch
    second: _Stretch
    label: int


class _Documents:
    """The documents of several shards under one numbering."""

    def __init__(self, shards: Sequence[ShardLike]) -> None:
        self.sentences = [shard.sentences.tolist() for shard in shards]
        self.documents = [shard.documents.tolist() for shard in shards]
        self.firsts = [0]
        for documents in self.documents:
            self.firsts.append(self.firsts[-1] + len(documents) - 1)

    def __len__(self) -> int:
        return self.firsts[-1]

    def locate(self, number: int) -> tuple[int, int, int]:
        """The shard of a document, its first sentence and the one behind its last."""
        shard = bisect_right(self.firsts, number) - 1
        local = number - self.firsts[shard]
        return shard, self.documents[shard][local], self.documents[shard][local + 1]

    def stretch(self, shard: int, first: int, last: int) -> _Stretch:
        """The tokens of the sentences from `first` up to `last`."""
        bounds = self.sentences[shard]
        return _Stretch(shard, bounds[first], bounds[last] - bounds[first])


def build(
    shards: Sequence[ShardLike], kind: Kind, *, max_length: int, short_seq_prob: float = 0.1, seed: int = 0
) -> Instances:
    """Makes the instances of one pass over the shards, in their order.

    "nsp": pairs of segments (Devlin et al. 2018, section 3.1 and appendix A.2, by the procedure of their released
    code): sentences are gathered up to a length, cut into two at random, and half the time the second part gives way to
    sentences of another document and is used afterwards. Pairs that are too long lose tokens at both ends.
    "sop": the same without other documents; half the pairs are in the wrong order (Lan et al. 2020, section 3.1).
    "full": one segment of whole sentences of one document (Liu et al. 2019, DOC-SENTENCES); what is longer is cut.

    Args:
        shards: see ShardLike.
        kind: of instances.
        max_length: tokens of the longest, [CLS] and [SEP] among them.
        short_seq_prob: share of the documents whose instances get a length drawn from 2 up to the longest.
        seed: of all draws.

    Raises:
        ValueError: a max_length that leaves no room, a share outside [0, 1], or "nsp" where there is one document.
    """
    if max_length < SPECIALS_OF_TWO + 2:
        raise ValueError(f"max_length is {max_length}; it must be at least {SPECIALS_OF_TWO + 2}")
    if not 0 <= short_seq_prob <= 1:
        raise ValueError(f"short_seq_prob is {short_seq_prob}; it must lie in [0, 1]")
    documents = _Documents(shards)
    if kind == "nsp" and len(documents) == 1:
        raise ValueError("there is one document; next-sentence prediction needs another one to draw from: sop or full")
    maker = _MAKERS[kind](documents, max_length, short_seq_prob, random.Random(seed))
    found = [pair for number in range(len(documents)) for pair in maker.pairs(number)]
    return Instances(
        first=np.array([pair.first for pair in found], np.int64).reshape(-1, 3),
        second=np.array([pair.second for pair in found], np.int64).reshape(-1, 3),
        labels=np.array([pair.label for pair in found], np.int64),
    )


class _Maker:
    """Makes the instances of one document after another."""

    specials = SPECIALS_OF_TWO

    def __init__(self, documents: _Documents, max_length: int, short_seq_prob: float, draws: random.Random) -> None:
        self.documents, self.draws = documents, draws
        self.room = max_length - self.specials
        self.short_seq_prob = short_seq_prob

    def below(self, bound: int) -> int:
        return int(self.draws.random() * bound)

    def target(self) -> int:
        """Tokens that a document's instances are to have."""
        if self.draws.random() < self.short_seq_prob:
            return 2 + self.below(self.room - 1)
        return self.room

    def pairs(self, number: int) -> Iterator[_Pair]:
        raise NotImplementedError

    def reach(self, shard: int, sentence: int, end: int, target: int) -> int:
        """The sentence, or `end`, up to which those from `sentence` on together reach the target."""
        bounds = self.documents.sentences[shard]
        return min(bisect_left(bounds, bounds[sentence] + target, sentence + 1, end), end)

    def cut(self, first: _Stretch, second: _Stretch) -> tuple[_Stretch, _Stretch]:
        """Both, without what is too long: token by token the longer one loses its first or its last, at random."""
        excess = first.length + second.length - self.room
        if excess <= 0:
            return first, second
        difference = first.length - second.length
        alone = min(excess, abs(difference))
        shared = excess - alone
        # Of two that are equally long the second is cut first.
        from_first = (alone if difference > 0 else 0) + shared // 2
        return self._shortened(first, from_first), self._shortened(second, excess - from_first)

    def _shortened(self, stretch: _Stretch, removed: int) -> _Stretch:
        in_front = sum(self.draws.random() < 0.5 for _ in range(removed))
        return _Stretch(stretch.shard, stretch.start + in_front, stretch.length - removed)


class _NextSentence(_Maker):
    def pairs(self, number: int) -> Iterator[_Pair]:
        target = self.target()
        shard, sentence, end = self.documents.locate(number)
        while sentence < end:
            last = self.reach(shard, sentence, end, target)
            middle = sentence + 1 + self.below(last - sentence - 1)
            first = self.documents.stretch(shard, sentence, middle)
            if middle == last or self.draws.random() < 0.5:
                yield _Pair(*self.cut(first, self.other(number, target - first.length)), IS_OTHER)
                sentence = middle  # what is left of the sentences is used next
            else:
                yield _Pair(*self.cut(first, self.documents.stretch(shard, middle, last)), IS_NEXT)
                sentence = last

    def other(self, number: int, target: int) -> _Stretch:
        """Sentences of another document, from one of them on up to the target."""
        drawn = self.below(len(self.documents) - 1)
        shard, start, end = self.documents.locate(drawn + (drawn >= number))
        first = start + self.below(end - start)
        return self.documents.stretch(shard, first, self.reach(shard, first, end, target))


class _SentenceOrder(_Maker):
    def pairs(self, number: int) -> Iterator[_Pair]:
        target = self.target()
        shard, sentence, end = self.documents.locate(number)
        while sentence < end:
            last = max(self.reach(shard, sentence, end, target), min(sentence + 2, end))
            yield self.pair(shard, sentence, last)
            sentence = last

    def pair(self, shard: int, sentence: int, last: int) -> _Pair:
        if last - sentence == 1:  # nothing to put in order
            return _Pair(self.cut(self.documents.stretch(shard, sentence, last), _NOTHING)[0], _NOTHING, IGNORED)
        middle = sentence + 1 + self.below(last - sentence - 1)
        stretches = (self.documents.stretch(shard, sentence, middle), self.documents.stretch(shard, middle, last))
        first, second = self.cut(*stretches)
        return _Pair(second, first, IS_OTHER) if self.draws.random() < 0.5 else _Pair(first, second, IS_NEXT)


class _WholeSentences(_Maker):
    specials = SPECIALS_OF_ONE

    def pairs(self, number: int) -> Iterator[_Pair]:
        target = self.target()
        shard, sentence, end = self.documents.locate(number)
        bounds = self.documents.sentences[shard]
        start = bounds[sentence]
        while start < bounds[end]:
            # The last sentence that ends within the target, or, of one that is longer, a part.
            last = bisect_right(bounds, start + target, sentence, end + 1) - 1
            stop = bounds[last] if bounds[last] > start else start + target
            yield _Pair(_Stretch(shard, start, stop - start), _NOTHING, IGNORED)
            sentence, start = max(last, sentence), stop


_MAKERS: dict[Kind, type[_Maker]] = {"nsp": _NextSentence, "sop": _SentenceOrder, "full": _WholeSentences}
