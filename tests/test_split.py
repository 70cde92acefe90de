"""The held-out part: by keys alone, whatever stands beside them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import pytest

from bert_fast.tasks.data.split import is_held_out, split


@dataclass(frozen=True)
class Example:
    place: str
    key: str


EXAMPLES = [Example(str(i), f"text {i}") for i in range(2000)]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_share(share: float) -> None:
    train, held_out = split(EXAMPLES, share)
    assert len(held_out) == pytest.approx(2000 * share, abs=4 * (2000 * share * (1 - share)) ** 0.5)
    assert sorted([*train, *held_out], key=EXAMPLES.index) == EXAMPLES
    assert train == [example for example in EXAMPLES if example not in set(held_out)]


def test_order_and_others_do_not_matter() -> None:
    _, held_out = split(EXAMPLES, 0.1)
    shuffled = random.Random(3).sample(EXAMPLES, len(EXAMPLES))
    assert set(split(shuffled, 0.1)[1]) == set(held_out)
    assert set(split(shuffled[:500], 0.1)[1]) == set(held_out) & set(shuffled[:500])


def test_a_larger_part_has_the_smaller_one() -> None:
    assert set(split(EXAMPLES, 0.1)[1]) < set(split(EXAMPLES, 0.2)[1])


def test_same_keys_stay_together() -> None:
    doubled = [Example(f"{place} {example.key}", example.key) for example in EXAMPLES[:100] for place in "ab"]
    train, held_out = split(doubled, 0.3)
    assert not {example.key for example in train} & {example.key for example in held_out}


@pytest.mark.parametrize("key", ["", "text", "\ud800", "ä" * 99])
def test_by_sha256(key: str) -> None:
    value = int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest(), 16) / 2**256
    assert [is_held_out(key, share) for share in (value - 1e-9, value + 1e-9)] == [False, True]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_shares_that_cannot_be(share: float) -> None:
    with pytest.raises(ValueError, match="held_out is"):
        split(EXAMPLES, share)


def test_empty_parts() -> None:
    (first,) = (example for example in EXAMPLES[:50] if example is EXAMPLES[0])
    share = 0.9 if not is_held_out(first.key, 0.9) else 1e-9
    with pytest.raises(ValueError, match="name a file of its own for evaluation"):
        split([first], share)
