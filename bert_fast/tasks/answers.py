"""Answers within texts: the search for the best ones, and how right they are (Rajpurkar et al. 2016 and 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["answer_measures", "best_spans", "exact_match", "f1", "normal_words"]

Array = np.ndarray[Any, np.dtype[np.float64]]

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


# ---- search ----------------------------------------------------------------------------------------------------------


def best_spans(
    start_logits: Tensor, end_logits: Tensor, is_allowed: Tensor, longest: int, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The spans with the highest sums of their first token's start logit and their last token's end logit.

    Every span is looked at, not those of the best starts and the best ends alone.

    Args:
        start_logits: (batch, length), of any floating dtype.
        end_logits: as start_logits.
        is_allowed: (batch, length) bool, whether a span may begin or end there.
        longest: tokens of a span.
        number: of spans in each row.

    Returns:
        scores (batch, found) float32, the highest first, -inf where a row has no more spans, and the first and the last
        token of each, int64; `found` is `number` or less.
    """
    starts = start_logits.float().masked_fill(~is_allowed, -torch.inf)
    ends = end_logits.float().masked_fill(~is_allowed, -torch.inf)
    longest = min(longest, starts.shape[1])
    ends_by_start = F.pad(ends, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    sums = (starts[:, :, None] + ends_by_start).flatten(1)
    scores, places = sums.topk(min(number, sums.shape[1]), dim=1)
    first = places.div(longest, rounding_mode="floor")
    return scores, first, first + places % longest


# ---- measures --------------------------------------------------------------------------------------------------------


def normal_words(text: str) -> list[str]:
    """The words in lower case, without ASCII punctuation and English articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 where the text has the words of one of the answers; no answers: where it has none. Otherwise 0."""
    return float(normal_words(text) in _golds(answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """The highest F1 of the text's words, each as often as it stands there, with those of an answer."""
    words = normal_words(text)
    return max(_overlap(words, gold) for gold in _golds(answers))


def _golds(answers: Sequence[str]) -> list[list[str]]:
    return [words for words in map(normal_words, answers) if words] or [[]]


def _overlap(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = (Counter(words) & Counter(gold)).total()
    return 2 * common / (len(words) + len(gold))


def answer_measures(
    answers: Sequence[Sequence[str]], predictions: Sequence[dict[str, Any]], *, has_impossible: bool
) -> dict[str, float]:
    """Exact match and F1 in percent, and those of questions with and without an answer, as SQuAD 2.0 names them.

    Args:
        answers: right ones of each question; none where there is none in its context.
        predictions: with text, null_score and n_best.
        has_impossible: whether to say, too, what would come of the best threshold for answering, best_...
    """
    texts = [row["text"] for row in predictions]
    result = _means("", texts, answers)
    if not has_impossible:
        return result
    for prefix, kind in (("HasAns_", True), ("NoAns_", False)):
        part = [index for index, golds in enumerate(answers) if bool(golds) == kind]
        if part:
            result |= _means(prefix, [texts[index] for index in part], [answers[index] for index in part])
    return result | _best(answers, predictions)


def _means(prefix: str, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    return {
        f"{prefix}{name}": 100
        * float(np.mean([measure(text, golds) for text, golds in zip(texts, answers, strict=True)]))
        for name, measure in (("exact_match", exact_match), ("f1", f1))
    }


def _best(answers: Sequence[Sequence[str]], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the measures would be with the threshold that is best for each."""
    texts = [row["n_best"][0]["text"] if row["n_best"] else "" for row in predictions]
    margins = np.array(
        [row["null_score"] - row["n_best"][0]["score"] if row["n_best"] else np.inf for row in predictions]
    )
    result = {}
    for name, measure in (("exact_match", exact_match), ("f1", f1)):
        answered = np.array([measure(text, golds) for text, golds in zip(texts, answers, strict=True)])
        silent = np.array([measure("", golds) for golds in answers])
        value, result[f"best_{name}_threshold"] = _best_threshold(margins, answered, silent)
        result[f"best_{name}"] = 100 * value
    return result


def _best_threshold(margins: Array, answered: Array, silent: Array) -> tuple[float, float]:
    """The highest mean where a question is answered if its margin is not above a threshold, and the lowest such one."""
    order = np.argsort(margins, kind="stable")
    ordered = margins[order]
    totals = silent.sum() + np.cumsum((answered - silent)[order])
    is_last = np.append(ordered[1:] != ordered[:-1], True)
    totals, thresholds = totals[is_last], ordered[is_last]
    if totals.max() <= silent.sum():
        return float(silent.mean()), float(np.nextafter(ordered.min(initial=0.0), -np.inf))
    best = int(totals.argmax())
    return float(totals[best] / len(margins)), float(thresholds[best])
