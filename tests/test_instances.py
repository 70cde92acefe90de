"""Instances of pretraining: which tokens become pairs, and how often."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from corpora import random_shard, shard

from bert_fast.functional import IGNORED
from bert_fast.pretraining import instances
from bert_fast.pretraining.instances import IS_NEXT, IS_OTHER, Instances, Kind

KINDS = get_args(Kind)

SHARDS = [random_shard(seed) for seed in range(3)]

LENGTH = 31


def build(kind: Kind, shards: Any = SHARDS, **options: Any) -> Instances:
    return instances.build(shards, kind, **{"max_length": LENGTH, "seed": 7, **options})


def place(stretch: Any, shards: Any = SHARDS) -> tuple[int, int, int]:
    """The shard of a stretch, its document, and its first token."""
    number, start, _ = map(int, stretch)
    documents = shards[number].sentences[shards[number].documents]
    return number, int(np.searchsorted(documents, start, side="right")) - 1, start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [5, 6, 17, 31, 997])
@pytest.mark.parametrize("short_seq_prob", [0.0, 0.5, 1.0])
def test_lengths(kind: Kind, max_length: int, short_seq_prob: float) -> None:
    found = build(kind, max_length=max_length, short_seq_prob=short_seq_prob)
    specials = np.where(found.second[:, 2] > 0, 3, 2)
    assert (found.lengths == found.first[:, 2] + found.second[:, 2] + specials).all()
    assert found.lengths.max() <= max_length
    assert (found.first[:, 2] > 0).all()
    for stretches in (found.first, found.second):
        for number, start, length in stretches.tolist():
            assert 0 <= start <= start + length <= len(SHARDS[number].tokens)
    if kind == "full":
        assert (found.second[:, 2] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stretches_stay_within_their_documents(kind: Kind) -> None:
    found = build(kind)
    for stretches in (found.first, found.second[found.second[:, 2] > 0]):
        for stretch in stretches:
            number, document, start = place(stretch)
            bounds = SHARDS[number].sentences[SHARDS[number].documents]
            assert start + stretch[2] <= bounds[document + 1]


def test_labels_say_what_follows() -> None:
    found = build("nsp", max_length=64)
    assert set(found.labels.tolist()) == {IS_NEXT, IS_OTHER}
    for first, second, label in zip(found.first, found.second, found.labels.tolist(), strict=True):
        is_same = place(first)[:2] == place(second)[:2]
        assert is_same == (label == IS_NEXT)
        if is_same:  # what was cut off between them aside, the second comes behind the first
            assert first[1] + first[2] <= second[1]


def test_next_sentences_touch_where_nothing_is_cut() -> None:
    """Sentences of one token, so that no pair is ever too long."""
    documents = [[[5 + i] for i in range(90)] for _ in range(29)]
    found = build("nsp", [shard(documents)], max_length=64, short_seq_prob=0.0)
    is_next = found.labels == IS_NEXT
    assert is_next.sum() > 20
    assert (found.first[is_next, 1] + found.first[is_next, 2] == found.second[is_next, 1]).all()


def test_half_of_the_pairs_are_random() -> None:
    """Pairs that could have been cut in two: within four standard deviations."""
    documents = [[[7, 8]] * 60 for _ in range(400)]
    labels = build("nsp", [shard(documents)], short_seq_prob=0.0).labels
    share, bound = (labels == IS_OTHER).mean(), 4 * 0.5 / len(labels) ** 0.5
    # The last sentence of a document, where it is alone, has no successor.
    assert 0.5 - bound <= share <= 0.5 + bound + 400 / len(labels)


def test_unused_sentences_are_used_next() -> None:
    """Whatever is not cut off for its length is in some first or next segment."""
    documents = [[[5 + (i + j) % 90] * 2 for j in range(50)] for i in range(11)]
    found = build("nsp", [shard(documents)], max_length=999, short_seq_prob=0.0)
    covered = np.zeros(sum(map(len, documents)) * 2, bool)
    for first, second, label in zip(found.first, found.second, found.labels, strict=True):
        covered[first[1] : first[1] + first[2]] = True
        if label == IS_NEXT:
            covered[second[1] : second[1] + second[2]] = True
    assert covered.all()


def test_sentence_order() -> None:
    found = build("sop", max_length=997)
    assert set(found.labels.tolist()) == {IS_NEXT, IS_OTHER, IGNORED}
    for first, second, label in zip(found.first, found.second, found.labels.tolist(), strict=True):
        if label == IGNORED:
            assert second[2] == 0
            continue
        before, behind = (first, second) if label == IS_NEXT else (second, first)
        assert place(before)[:2] == place(behind)[:2]
        assert before[1] + before[2] == behind[1]
    swapped = (found.labels == IS_OTHER).sum() / (found.labels != IGNORED).sum()
    assert 0.25 < swapped < 0.75


@pytest.mark.parametrize("max_length", [5, 13, 31, 997])
def test_whole_sentences_lose_nothing(max_length: int) -> None:
    found = build("full", max_length=max_length)
    for number, one in enumerate(SHARDS):
        stretches = found.first[found.first[:, 0] == number]
        assert (stretches[1:, 1] == (stretches[:, 1] + stretches[:, 2])[:-1]).all()
        assert stretches[:, 2].sum() == len(one.tokens)


def test_whole_sentences_are_whole() -> None:
    """A stretch ends with a sentence, unless the sentence is longer than all that fits."""
    found = build("full", short_seq_prob=0.0)
    for number, start, length in found.first.tolist():
        ends = set(SHARDS[number].sentences.tolist())
        assert start + length in ends or length == LENGTH - 2
        begins = start in ends
        assert begins or length <= LENGTH - 2


def test_the_longer_one_is_cut_at_both_ends() -> None:
    documents = [[[9], list(range(5, 90))] for _ in range(200)]
    found = build("nsp", [shard(documents)], max_length=43, short_seq_prob=0.0)
    pairs = found.labels == IS_NEXT
    assert pairs.sum() > 50
    assert (found.first[pairs, 2] == 1).all()
    assert (found.second[pairs, 2] == 39).all()
    in_front = found.second[pairs, 1] - found.first[pairs, 1] - 1
    assert 23 - 3 < in_front.mean() < 23 + 3  # 46 tokens go, each from the front as often as from the end
    assert len(set(in_front.tolist())) > 5


@pytest.mark.parametrize("lengths", [(80, 70), (70, 80), (75, 75), (80, 79)])
def test_both_are_cut_to_the_same_length(lengths: tuple[int, int]) -> None:
    documents = [[[9] * lengths[0], [8] * lengths[1]] for _ in range(20)]
    found = build("sop", [shard(documents)], max_length=44, short_seq_prob=0.0)
    order = np.where(found.labels == IS_NEXT, found.first[:, 2], found.second[:, 2])
    assert (found.lengths == 44).all()
    assert set(order.tolist()) == {21}  # of two equally long ones the second is cut first
    assert set((found.first[:, 2] + found.second[:, 2]).tolist()) == {41}


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(kind: Kind) -> None:
    one, again, other = build(kind), build(kind), build(kind, seed=8)
    for name in ("first", "second", "labels"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert not np.array_equal(one.first, other.first)


@pytest.mark.parametrize("kind", KINDS)
def test_no_documents(kind: Kind) -> None:
    found = build(kind, [shard([])])
    assert len(found) == 0
    assert found.first.shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 4}, "max_length is 4; it must be at least 5"),
        ({"short_seq_prob": 1.5}, "short_seq_prob is 1.5"),
        ({"shards": [shard([[[5, 6]]])]}, "there is one document; next-sentence prediction needs another"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("nsp", **options)
