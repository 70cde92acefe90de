"""Candidates for queries, put into a new order by a cross-encoder's scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cross_encoders import cross_scores
from .data.problems import DataError
from .data.runs import Candidates, Passage
from .settings import at_least
from .task import Model
from .use import TOKENS_PER_BATCH

__all__ = ["Ranked", "rerank", "rerank_to"]

PAIRS = 8192  # that are scored together, in batches of about equal lengths


@dataclass(frozen=True)
class Ranked:
    """
    Attributes:
        rank: that the passage had before, from 1.
        score: of the cross-encoder.
        text: of the passage.
        id: None: it has none.
    """

    rank: int
    score: float
    text: str
    id: str | None = None


def rerank(
    model: Model,
    queries: Sequence[str],
    candidates: Sequence[Sequence[str | Passage]],
    *,
    top: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[list[Ranked]]:
    """The candidates of each query, that with the highest score first; of equal scores the one that was before.

    The same as CrossEncoder.rank, in batches of the pairs of all queries.

    Args:
        model: from load_cross_encoder.
        queries: any number of them.
        candidates: passages for each query, in the order that they have so far.
        top: how many are kept; None: all.
        tokens_per_batch: see budget_batches.

    Raises:
        ValueError: there are not as many lists of candidates as queries, `top` is not positive, or a score is not
            finite.
    """
    if len(queries) != len(candidates):
        raise ValueError(f"queries are {len(queries)}, and candidates are for {len(candidates)}")
    given = (
        Candidates(None, query, tuple(each if isinstance(each, Passage) else Passage(each) for each in passages))
        for query, passages in zip(queries, candidates, strict=True)
    )
    return [ranked for _, ranked in _ranked(model, given, top, tokens_per_batch)]


def rerank_to(
    out: Path,
    model: Model,
    candidates: Iterable[Candidates],
    *,
    top: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> int:
    """Writes reranked candidates, in constant memory; the file appears whole or not at all.

    Args:
        out: .jsonl: {"id", "query", "results": [{"id", "rank", "score", "text"}, ...]} a line, without ids that there
            are not; or .trec: a run as trec_eval reads it.
        model, top, tokens_per_batch: see rerank.
        candidates: from runs.read_candidates or runs.read_run.

    Returns:
        How many queries there were.

    Raises:
        DataError: what `candidates` meets; or an id is missing, which .trec needs.
        ValueError: see rerank; `out` has another suffix.
    """
    lines = {".jsonl": _json_line, ".trec": _trec_lines}.get(out.suffix.lower())
    if lines is None:
        raise ValueError(f"out is {out}; its suffix must be .jsonl or .trec")
    count = 0
    beside = out.with_name(f".{out.name}.part")
    with beside.open("w", encoding="utf-8", newline="\n") as stream:
        for given, ranked in _ranked(model, candidates, top, tokens_per_batch):
            stream.write(lines(given, ranked))
            count += 1
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, out)
    return count


def _ranked(
    model: Model, candidates: Iterable[Candidates], top: int | None, tokens: int
) -> Iterator[tuple[Candidates, list[Ranked]]]:
    if top is not None:
        at_least("top", top, 1)
    for group in _groups(candidates):
        pairs = [(given.query, passage.text) for given in group for passage in given.passages]
        scores = cross_scores(model, pairs, tokens)
        if not np.isfinite(scores).all():
            query, passage = pairs[int(np.isfinite(scores).argmin())]
            raise ValueError(f"the score of {query[:80]!r} with {passage[:80]!r} is not finite")
        start = 0
        for given in group:
            part = scores[start : start + len(given.passages)]
            yield given, _sorted(given.passages, part)[:top]
            start += len(given.passages)


def _groups(candidates: Iterable[Candidates]) -> Iterator[list[Candidates]]:
    """Queries of PAIRS pairs together, or a little more."""
    group: list[Candidates] = []
    pairs = 0
    for given in candidates:
        group.append(given)
        pairs += len(given.passages)
        if pairs >= PAIRS:
            yield group
            group, pairs = [], 0
    if group:
        yield group


def _sorted(passages: Sequence[Passage], scores: np.ndarray[tuple[int], np.dtype[np.float32]]) -> list[Ranked]:
    order = np.argsort(-scores, kind="stable")
    return [Ranked(int(i) + 1, float(scores[i]), passages[i].text, passages[i].id) for i in order]


def _json_line(given: Candidates, ranked: Sequence[Ranked]) -> str:
    results = [{**_id(each.id), "rank": each.rank, "score": each.score, "text": each.text} for each in ranked]
    return json.dumps({**_id(given.id), "query": given.query, "results": results}, ensure_ascii=False) + "\n"


def _id(name: str | None) -> dict[str, str]:
    return {} if name is None else {"id": name}


def _trec_lines(given: Candidates, ranked: Sequence[Ranked]) -> str:
    for name in (given.id, *(each.id for each in ranked)):
        if name is None or len(name.split()) != 1:
            raise DataError(f"query {given.query[:80]!r} or a passage of it has id {name!r}; .trec needs a word")
    return "".join(f"{given.id} Q0 {each.id} {rank} {each.score!r} bert-fast\n" for rank, each in enumerate(ranked, 1))
