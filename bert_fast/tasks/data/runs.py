"""Candidates for queries: .jsonl with their texts, or a run, which has ids, with the files that the ids are of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...lines import bare_suffix
from .problems import bad_line, lines_of
from .texts import find_texts, read_texts

__all__ = ["Candidates", "Passage", "read_candidates", "read_run"]


@dataclass(frozen=True)
class Passage:
    """
    Attributes:
        text: of the passage.
        id: None: it has none.
    """

    text: str
    id: str | None = None


@dataclass(frozen=True)
class Candidates:
    """
    Attributes:
        id: of the query; None: it has none.
        query: its text.
        passages: in the order that they have so far.
    """

    id: str | None
    query: str
    passages: tuple[Passage, ...]


def read_candidates(file: Path) -> Iterator[Candidates]:
    """Queries with their passages, one after another.

    Args:
        file: .jsonl, also with .gz or .xz: {"query": ..., "passages": [...]} a line, with "id" if the query has one; a
            passage is a string or {"text": ...}, with "id" if it has one. Blank lines are passed over.

    Raises:
        DataError: a line is something else, or there is none.
        OSError: the file cannot be opened.
    """
    is_empty = True
    for line, row in _objects(file):
        is_empty = False
        passages = row.get("passages")
        if not isinstance(passages, list):
            raise bad_line(file, line, f"passages are a {type(passages).__name__}; a list is needed")
        query = _string(file, line, "query", row.get("query"))
        yield Candidates(
            _id(file, line, row),
            query,
            tuple(_passage(file, line, number, each) for number, each in enumerate(passages, 1)),
        )
    if is_empty:
        raise bad_line(file, None, "no queries")


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in lines_of(file):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise bad_line(file, line, f"no JSON ({error})") from None
        if not isinstance(row, dict):
            raise bad_line(file, line, f"a {type(row).__name__}; an object is needed")
        yield line, row


def _passage(file: Path, line: int, number: int, value: Any) -> Passage:
    row = value if isinstance(value, dict) else {"text": value}
    return Passage(_string(file, line, f"passage {number}", row.get("text")), _id(file, line, row))


def _string(file: Path, line: int, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise bad_line(file, line, f"{name} is {value!r:.80}; a text is needed")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_line(file, line, f"{name} holds half of a surrogate pair") from None
    return value


def _id(file: Path, line: int, row: Mapping[str, Any]) -> str | None:
    value = row.get("id", row.get("_id"))
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int)) or value == ""):
        raise bad_line(file, line, f"id is {value!r:.80}; a string or a whole number is needed")
    return None if value is None else str(value)


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hit:
    """A line's passage for a query."""

    line: int
    query: str
    passage: str
    score: float | None


def read_run(run: Path, queries: Path, corpus: Path, columns: Mapping[str, str] | None = None) -> Iterator[Candidates]:
    """What a retriever found, with its texts; the ids of the run and the texts that it names are in memory.

    Args:
        run: .jsonl: {"id": ..., "results": [{"id": ...}, ...]} a line, the best first, as `retrieve` predicts; or
            .trec, .run or .txt: query, Q0, passage, rank, score, name, divided by blanks, which is ordered by the
            scores. Also with .gz or .xz.
        queries, corpus: files of texts with ids, see read_texts; of BEIR queries.jsonl and corpus.jsonl.
        columns: of the corpus, such as {"title": "title"}, with which titles stand before the texts.

    Raises:
        DataError: a line is something else, a passage is there twice for a query, an id is unknown, or there is none.
        OSError: a file cannot be opened.
    """
    lists = _lists(run)
    asked = _texts_of(queries, None, {query: hits[0].line for query, hits in lists.items() if hits}, run)
    lines = {hit.passage: hit.line for hits in lists.values() for hit in hits}
    found = _texts_of(corpus, columns, lines, run)
    for query, hits in lists.items():
        if hits:
            yield Candidates(query, asked[query], tuple(Passage(found[hit.passage], hit.passage) for hit in hits))


def _lists(run: Path) -> dict[str, list[_Hit]]:
    """The passages of each query, in their order."""
    readers: dict[str, Callable[[Path], Iterator[_Hit]]] = dict.fromkeys((".trec", ".run", ".txt"), _read_trec)
    readers[".jsonl"] = _read_results
    if bare_suffix(run) not in readers:
        raise bad_line(run, None, f"no known suffix; it must be {', '.join(readers)}, also with .gz or .xz")
    lists: dict[str, list[_Hit]] = {}
    known: set[tuple[str, str]] = set()
    for hit in readers[bare_suffix(run)](run):
        if (hit.query, hit.passage) in known:
            raise bad_line(run, hit.line, f"passage {hit.passage!r} is there twice for query {hit.query!r}")
        known.add((hit.query, hit.passage))
        lists.setdefault(hit.query, []).append(hit)
    if not lists:
        raise bad_line(run, None, "no passages")
    for hits in lists.values():
        hits.sort(key=lambda hit: -(hit.score or 0.0))
    return lists


def _read_trec(run: Path) -> Iterator[_Hit]:
    for line, content in lines_of(run):
        fields = content.split()
        if not fields:
            continue
        if len(fields) != 6:
            raise bad_line(run, line, f"{len(fields)} fields; query, Q0, passage, rank, score and name are needed")
        try:
            score = float(fields[4])
        except ValueError:
            score = float("nan")
        if not abs(score) < float("inf"):
            raise bad_line(run, line, f"score is {fields[4]!r}; a finite number is needed")
        yield _Hit(line, fields[0], fields[2], score)


def _read_results(run: Path) -> Iterator[_Hit]:
    for line, row in _objects(run):
        query, results = _id(run, line, row), row.get("results")
        if query is None or not isinstance(results, list):
            raise bad_line(run, line, 'no "id" with a list of "results"')
        for each in results:
            passage = _id(run, line, each) if isinstance(each, dict) else None
            if passage is None:
                raise bad_line(run, line, f"result {each!r:.80} has no id")
            yield _Hit(line, query, passage, None)


def _texts_of(source: Path, columns: Mapping[str, str] | None, lines: Mapping[str, int], run: Path) -> dict[str, str]:
    """The texts of these ids.

    Args:
        lines: of the run, where each id is.
    """
    found: dict[str, str] = {}
    for text in read_texts(find_texts([source]), columns):
        if text.id is None:
            raise bad_line(text.file, text.line, "no id")
        if text.id in found:
            raise bad_line(text.file, text.line, f"id {text.id!r} is there twice")
        if text.id in lines:
            found[text.id] = text.text
    for name, line in lines.items():
        if name not in found:
            raise bad_line(run, line, f"id {name!r} is not in {source}")
    return found
