"""The best spans against a search by hand, and SQuAD's measures against hand-counted cases."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fast.tasks.answers import answer_measures, best_spans, exact_match, f1, normal_words

# ---- search ----------------------------------------------------------------------------------------------------------


def logits(rows: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """No two sums are the same: start logits are whole, end logits parts of one."""
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randperm(3 * length, generator=generator)[:length] for _ in range(rows)]
    ends = [torch.randperm(length, generator=generator) / (length + 1) for _ in range(rows)]
    return torch.stack(starts).float(), torch.stack(ends) * 2 - 1


def search(starts: list[float], ends: list[float], allowed: list[bool], longest: int, number: int) -> list[Any]:
    pairs = itertools.product([index for index, value in enumerate(allowed) if value], repeat=2)
    spans = [(starts[a] + ends[b], a, b) for a, b in pairs if a <= b < a + longest]
    return sorted(spans, reverse=True)[:number]


def found(spans: tuple[Tensor, Tensor, Tensor], row: int) -> list[Any]:
    parts = [part[row].tolist() for part in spans]
    return [span for span in zip(*parts, strict=True) if span[0] > -float("inf")]


@pytest.mark.parametrize("longest", [1, 2, 5, 31, 32, 33, 500])
@pytest.mark.parametrize("number", [1, 7, 5000])
def test_best_spans(longest: int, number: int) -> None:
    starts, ends = logits(5, 32)
    positions = torch.arange(32)
    allowed = torch.stack(
        [positions >= 0, positions > 20, (positions > 3) & (positions < 9), positions == 31, positions < 0]
    )
    spans = best_spans(starts, ends, allowed, longest, number)
    for row in range(5):
        expected = search(starts[row].tolist(), ends[row].tolist(), allowed[row].tolist(), longest, number)
        assert [span[1:] for span in found(spans, row)] == [span[1:] for span in expected]
        assert [span[0] for span in found(spans, row)] == pytest.approx([span[0] for span in expected])
    assert found(spans, 4) == []


def test_no_answer_of_the_best_starts_and_ends_alone() -> None:
    """All good ends lie before all good starts: the best pair is made of others."""
    starts, ends = torch.zeros(1, 60), torch.zeros(1, 60)
    starts[0, 30:] = 5
    ends[0, :30] = 5
    starts[0, 7] = 1
    [(score, first, last)] = found(best_spans(starts, ends, torch.ones(1, 60, dtype=torch.bool), 30, 1), 0)
    assert (score, first) == (6, 7)
    assert 7 <= last < 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lowest_numbers_of_padding(dtype: torch.dtype) -> None:
    """A swapped model says the lowest finite number there; two of them have no finite sum."""
    starts, ends = (torch.full((1, 6), torch.finfo(dtype).min, dtype=dtype) for _ in range(2))
    starts[0, 2], ends[0, 3] = 1.5, 2.0
    allowed = torch.tensor([[False, True, True, True, True, False]])
    scores, first, last = best_spans(starts, ends, allowed, 4, 3)
    assert scores.dtype == torch.float32
    assert found((scores, first, last), 0)[0] == (3.5, 2, 3)
    assert not scores.isnan().any()


# ---- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Cat, a dog\tand an owl.", ["cat", "dog", "and", "owl"]),
        ("anthem theatre Athens", ["anthem", "theatre", "athens"]),
        ("$3,000.50 (U.S.)", ["300050", "us"]),
        ("mother-in-law's", ["motherinlaws"]),
        ("a\u2013b", ["\u2013b"]),  # a dash outside ASCII stays, and a word ends before it
        ("th.e end", ["end"]),  # punctuation goes before articles
        ("\u00c9TAT", ["\u00e9tat"]),
        ("The", []),
        ("", []),
    ],
)
def test_normal_words(text: str, words: list[str]) -> None:
    assert normal_words(text) == words


@pytest.mark.parametrize(
    ("text", "answers", "exact", "overlap"),
    [
        ("The Nile", ["nile!"], 1, 1),
        ("Nile river", ["Nile"], 0, 2 * 0.5 * 1 / 1.5),
        ("Nile", ["the long Nile river"], 0, 2 * 1 * (1 / 3) / (4 / 3)),
        ("to be or not", ["to be to be"], 0, 0.5),
        ("be be be", ["be"], 0, 0.5),
        ("river Nile", ["Nile river"], 0, 1),
        ("Nile", ["Amazon"], 0, 0),
        ("Nile", ["Amazon", "Nile river", "Nile"], 1, 1),
        ("Nile", ["Amazon", "Nile river"], 0, 2 / 3),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("Nile", [], 0, 0),
        ("", ["Nile"], 0, 0),
        ("the", ["the"], 1, 1),
        ("the", ["the", "Nile"], 0, 0),  # an answer of articles alone counts only if there is no other
    ],
)
def test_exact_match_and_f1(text: str, answers: list[str], exact: float, overlap: float) -> None:
    assert exact_match(text, answers) == exact
    assert f1(text, answers) == pytest.approx(overlap)


def prediction(text: str, margin: float = 0.0, best: str | None = None) -> dict[str, Any]:
    """A prediction whose best answer is `best`, for which no answer has a score higher by `margin`."""
    best = text if best is None else best
    return {
        "text": text,
        "null_score": 2.5 + margin,
        "n_best": [{"text": best, "score": 2.5}, {"text": "x", "score": 1.0}],
    }


def test_measures_without_impossible_questions() -> None:
    answers = [["Nile"], ["long river", "river"], ["Amazon"], ["north"]]
    predictions = [prediction(text) for text in ("the Nile", "a long road", "Amazon basin", "")]
    assert answer_measures(answers, predictions, has_impossible=False) == pytest.approx(
        {"exact_match": 25, "f1": 100 * (1 + 1 / 2 + 2 / 3 + 0) / 4}
    )


def test_measures_with_impossible_questions() -> None:
    """With threshold 0 the fourth is not answered and the fifth is, both wrongly; with 2 only the fifth is wrong."""
    answers = [["Nile"], [], ["Amazon"], ["north"], []]
    predictions = [
        prediction("Nile", -3),
        prediction("", 5, best="Lake"),
        prediction("Amazon basin", -2),
        prediction("", 2, best="north"),
        prediction("south", -2.5),
    ]
    assert answer_measures(answers, predictions, has_impossible=True) == pytest.approx(
        {
            "exact_match": 40,
            "f1": 100 * (1 + 1 + 2 / 3 + 0 + 0) / 5,
            "HasAns_exact_match": 100 / 3,
            "HasAns_f1": 100 * (1 + 2 / 3) / 3,
            "NoAns_exact_match": 50,
            "NoAns_f1": 50,
            "best_exact_match": 60,
            "best_exact_match_threshold": -3,
            "best_f1": 100 * (1 + 1 + 2 / 3 + 1 + 0) / 5,
            "best_f1_threshold": 2,
        }
    )


def test_questions_of_one_kind() -> None:
    measures = answer_measures([["Nile"]], [prediction("Nile")], has_impossible=True)
    assert measures["HasAns_f1"] == 100
    assert "NoAns_f1" not in measures
    measures = answer_measures([[]], [prediction("Nile")], has_impossible=True)
    assert measures["NoAns_f1"] == 0
    assert "HasAns_f1" not in measures


def test_best_to_answer_nothing() -> None:
    measures = answer_measures([[], []], [prediction("Nile", 1.5), prediction("Lake", 0.5)], has_impossible=True)
    assert measures["best_f1"] == 100
    assert measures["best_f1_threshold"] < 0.5


def test_no_answer_was_found() -> None:
    nothing = {"text": "", "null_score": 1.0, "n_best": []}
    measures = answer_measures([[], ["Nile"]], [nothing, nothing], has_impossible=True)
    assert measures["best_f1"] == measures["f1"] == 50
    assert measures["best_f1_threshold"] == pytest.approx(0)


@pytest.mark.parametrize("seed", range(5))
def test_best_threshold_is_what_the_best_threshold_gives(seed: int) -> None:
    """Margins are few, so that many questions share one."""
    generator = torch.Generator().manual_seed(seed)
    margins = torch.randint(-3, 4, (23,), generator=generator).tolist()
    answers = [[[], ["Nile"], ["long Nile"]][kind] for kind in torch.randint(3, (23,), generator=generator).tolist()]
    texts = [["Nile", "Lake"][kind] for kind in torch.randint(2, (23,), generator=generator).tolist()]

    def measured(threshold: float) -> dict[str, float]:
        said = ["" if margin > threshold else text for margin, text in zip(margins, texts, strict=True)]
        predictions = [prediction(*parts) for parts in zip(said, margins, texts, strict=True)]
        return answer_measures(answers, predictions, has_impossible=True)

    by_threshold = [measured(threshold) for threshold in range(-4, 4)]
    for name in ("f1", "exact_match"):
        best = by_threshold[0][f"best_{name}"]
        assert best == pytest.approx(max(measures[name] for measures in by_threshold))
        assert measured(by_threshold[0][f"best_{name}_threshold"])[name] == pytest.approx(best)
