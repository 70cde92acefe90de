"""Packs: how full they are, and that each is a function of the seed and its number."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from corpora import TinyVocabulary, random_shard
from hypothesis import given, settings
from hypothesis import strategies as some

from bert_fast.pretraining import stream
from bert_fast.pretraining.batches import assemble
from bert_fast.pretraining.feed import Feed
from bert_fast.pretraining.stream import Pack, PackStream, fill

SHARDS = [random_shard(seed, documents=31) for seed in range(5)]

VOCABULARY = TinyVocabulary()


def streamed(**options: Any) -> PackStream:
    return PackStream(**{"shards": SHARDS, "kind": "nsp", "max_length": 37, "capacity": 211, "seed": 3, **options})


def packs(count: int, start: int = 0, step: int = 1, **options: Any) -> list[Pack]:
    return list(itertools.islice(streamed(**options).packs(start, step), count))


def content(pack: Pack) -> list[int]:
    batch, classes = assemble(pack, VOCABULARY)
    assert batch.ids is not None
    return [*batch.ids.tolist(), *batch.cu_seqlens.tolist(), *classes.tolist()]


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are three of them."""
    monkeypatch.setattr(stream, "POOL_TOKENS", sum(len(shard.tokens) for shard in SHARDS) // 3 + 1)


# ---- filling ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(some.lists(some.integers(1, 50), max_size=400), some.integers(50, 300))
def test_fill_loses_nothing(lengths: list[int], capacity: int) -> None:
    array = np.array(lengths, np.int64)
    order, offsets = fill(array, capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert offsets[0] == 0
    assert offsets[-1] == len(lengths)
    for start, stop in itertools.pairwise(offsets.tolist()):
        assert 0 < array[order[start:stop]].sum() <= capacity


@pytest.mark.parametrize(("longest", "capacity"), [(128, 2048), (128, 16384), (512, 4096), (512, 16384)])
def test_packs_are_full(longest: int, capacity: int) -> None:
    """98 % and more, whatever the lengths are, as long as there are short ones among them."""
    draws = np.random.default_rng(0)
    for lengths in (draws.integers(8, longest + 1, 30_000), np.minimum(draws.geometric(0.02, 30_000) + 4, longest)):
        order, offsets = fill(lengths, capacity)
        full = np.add.reduceat(lengths[order], offsets[:-1]) / capacity
        assert full.mean() >= 0.98
        assert full[:-1].min() >= 0.98


def test_lengths_that_never_fill_a_pack() -> None:
    lengths = np.full(5_000, 51, np.int64)
    order, offsets = fill(lengths, 100)
    assert (np.diff(offsets) == 1).all()
    assert sorted(order.tolist()) == list(range(5_000))


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nsp", "sop", "full"])
@pytest.mark.parametrize(("duplicates", "lanes"), [(0, 1), (2, 1), (0, 2), (2, 4), (0, 5)])
@pytest.mark.usefixtures("small_pools")
def test_numbers_say_everything(kind: Any, duplicates: int, lanes: int) -> None:
    """Whoever begins anywhere, or shares the stream with others, meets the same packs."""
    options = {"kind": kind, "duplicates": duplicates, "lanes": lanes}
    count = 3 * streamed(**options).packs_of_pass()
    whole = [content(pack) for pack in packs(count, **options)]
    start = count // 2
    assert [content(pack) for pack in packs(count - start, start, **options)] == whole[start:]
    for processes in (2, 3, 4):
        for rank in range(processes):
            mine = packs(len(range(rank, count, processes)), rank, processes, **options)
            assert [content(pack) for pack in mine] == whole[rank::processes]
    assert [content(pack) for pack in packs(count, seed=4, **options)] != whole


@pytest.mark.usefixtures("small_pools")
def test_counts_spare_plans() -> None:
    first = streamed()
    expected = [content(pack) for pack in itertools.islice(first.packs(), 500)]
    assert len(first.counts[0]) > 3
    second = streamed(counts=[list(counts) for counts in first.counts])
    planned: list[Any] = []
    (lane,) = second._lanes
    original = lane.plan
    lane.plan = lambda *where: planned.append(where) or original(*where)  # type: ignore[method-assign, func-returns-value]
    assert content(next(second.packs(499))) == expected[499]
    assert len(planned) == 1


@pytest.mark.usefixtures("small_pools")
def test_a_pass_holds_every_instance_once() -> None:
    subject = streamed(kind="full", short_seq_prob=0.0)
    count = subject.packs_of_pass()
    tokens = np.sort(np.concatenate([assembled(pack) for pack in itertools.islice(subject.packs(), count)]))
    assert np.array_equal(tokens, np.sort(np.concatenate([shard.tokens for shard in SHARDS])))
    assert len(subject.counts[0]) == 3


def assembled(pack: Pack) -> Any:
    """The pack's tokens without the special ones."""
    ids = assemble(pack, VOCABULARY)[0].ids
    assert ids is not None
    return ids.numpy()[ids.numpy() > 4]


@pytest.mark.parametrize("duplicates", [0, 1, 2])
def test_epochs(duplicates: int) -> None:
    """Static duplicates come again, in another order; otherwise every pass has instances of its own."""
    subject = streamed(duplicates=duplicates)
    found = list(itertools.islice(subject.packs(), 400))
    sizes, passes, start = subject.counts[0], [], 0
    for size in sizes[:3]:
        passes.append([tuple(content(pack)) for pack in found[start : start + size]])
        start += size
    assert len(passes) == 3
    for number in (1, 2):
        repeats = duplicates > 0 and number % duplicates == 0
        assert (sorted(passes[number]) == sorted(passes[0])) == repeats
        assert passes[number] != passes[0]


def test_sequences_and_capacity() -> None:
    for pack in packs(50):
        batch, _ = assemble(pack, VOCABULARY)
        assert batch.total_tokens <= 211
        assert batch.max_seqlen <= 37
        assert batch.is_plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 36}, "capacity is 36; it must be at least max_length, 37"),
        ({"shards": []}, "hold no tokens"),
        ({"lanes": 0}, r"lanes is 0; it must lie in \[1, 5\], the number of shards"),
        ({"lanes": 6}, r"lanes is 6; it must lie in \[1, 5\]"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streamed(**options)


@pytest.mark.usefixtures("small_pools")
def test_a_process_plans_its_own_lanes_alone() -> None:
    subject = streamed(lanes=4)
    list(itertools.islice(subject.packs(1, 2), 100))
    assert [bool(counts) for counts in subject.counts] == [False, True, False, True]
    used = {pack.id.lane for pack in itertools.islice(subject.packs(3, 4), 20)}
    assert used == {3}


@pytest.mark.usefixtures("small_pools")
@pytest.mark.parametrize("lanes", [2, 3, 5])
def test_lanes_hold_every_instance_once(lanes: int) -> None:
    subject = streamed(kind="full", short_seq_prob=0.0, lanes=lanes)
    found: dict[Any, Any] = {}
    for pack in itertools.islice(subject.packs(), 2 * subject.packs_of_pass()):
        found.setdefault(pack.id, assembled(pack))
    tokens = np.sort(np.concatenate([one for identity, one in found.items() if identity.epoch == 0]))
    assert np.array_equal(tokens, np.sort(np.concatenate([shard.tokens for shard in SHARDS])))


# ---- feeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_feed(workers: int) -> None:
    """Processes that read ahead change nothing."""
    expected = packs(41)[2::3]
    subject = Feed(streamed(), VOCABULARY, start=2, step=3, workers=workers).packs()
    for number, (found, pack) in enumerate(zip(subject, expected, strict=False)):
        batch, classes = assemble(pack, VOCABULARY)
        assert found.number == 2 + 3 * number
        assert found.id == pack.id
        assert batch.ids is not None
        assert found.batch.ids is not None
        assert torch.equal(found.batch.ids, batch.ids)
        assert torch.equal(found.classes, classes)
        assert found.counts


def test_a_stream_can_be_sent() -> None:
    subject = streamed()
    expected = content(next(subject.packs(5)))
    assert content(next(pickle.loads(pickle.dumps(subject)).packs(5))) == expected
    assert len(pickle.dumps(subject)) < 200_000
