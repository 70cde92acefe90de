"""Queries with the passages that answer them, over a corpus that holds each text once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .problems import DataError
from .tables import Role, Row, kind_of, read_table, text_in

__all__ = ["Corpus", "Query", "read_queries"]

NEGATIVES = tuple(f"negative_{number}" for number in range(1, 11))

ROLES = (
    Role("query", ("question", "anchor", "sentence1", "text1", "text_a")),
    Role("id", ("_id", "qid", "query_id", "query-id"), is_required=False),
)
NEGATIVE_ROLES = (
    Role("negative", ("negatives", "hard_negative", "hard_negatives", "neg", "sentence3"), is_required=False),
    *(Role(name, is_required=False) for name in NEGATIVES),
)
POSITIVE = ("positives", "passage", "answer", "document", "response", "pos", "sentence2", "text2", "text_b")


@dataclass(eq=False)
class Corpus:
    """Documents in their order.

    Attributes:
        ids: of each, all different.
        texts: of each.
        rows: the place of an id in `ids` and `texts`.
    """

    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, name: str, text: str) -> None:
        """Appends a document, whose id must be new."""
        self.rows[name] = len(self.ids)
        self.ids.append(name)
        self.texts.append(text)


@dataclass(frozen=True)
class Query:
    """
    Attributes:
        place: where it stands.
        id: no two queries of a file have the same.
        text: what is asked.
        positives: grade, at least 1, of each relevant document, by id.
        negatives: ids of documents that are known not to be relevant.
        corpus: the documents that are searched, the same object for all queries of a file.
    """

    place: str
    id: str
    text: str
    positives: dict[str, int]
    negatives: list[str]
    corpus: Corpus = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        return self.text


def read_queries(file: Path, columns: Mapping[str, str] | None = None, *, is_labelled: bool = True) -> list[Query]:
    """The queries of a table: each row has a query and a passage for it, perhaps also passages that do not answer it.

    Rows with the same query are one example, with the id and the place of the first. The corpus is all passages of the
    file; a passage is named for the row where it comes first: "17:positive", "17:negative_2". In .jsonl positives and
    negatives may also be lists.

    Args:
        file: see read_table.
        columns: see read_table; roles are query, positive, negative, negative_1 to negative_10 and id.
        is_labelled: whether each row must have a positive.

    Raises:
        DataError: see read_table; a passage that is a positive and a negative of a query, an id of two queries.
        OSError: the file cannot be opened.
    """
    corpus, found, ids = Corpus(), dict[str, Query](), dict[str, str]()
    names: dict[str, str] = {}  # of passages, by text
    positive = Role("positive", POSITIVE, is_labelled, is_labelled)
    negatives = [replace(role, is_needed_if_named=is_labelled) for role in NEGATIVE_ROLES]
    for row in read_table(file, (ROLES[0], positive, *negatives, *ROLES[1:]), columns):
        text, name = text_in(row, "query"), _id(row)
        if ids.setdefault(name, text) != text:
            row.refuse(f"id {name!r} is that of another query too")
        query = found.setdefault(text, Query(row.place, name, text, {}, [], corpus))
        passages = list(_passages(row))
        if is_labelled and not any(role.startswith("positive") for role, _ in passages):
            row.refuse("positive is empty")
        for role, passage in passages:
            if passage not in names:
                names[passage] = f"{row.line}:{role}"
                corpus.add(names[passage], passage)
            _judge(row, query, names[passage], is_positive=role.startswith("positive"))
    if not len(corpus):
        raise DataError(f"{file}: no passages that could be searched; there are only queries")
    return list(found.values())


def _id(row: Row) -> str:
    value = row.values.get("id")
    if value in (None, ""):
        return str(row.line)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        row.refuse(f"id is {kind_of(value)}; a string is needed")
    return str(value).strip()


def _passages(row: Row) -> Iterator[tuple[str, str]]:
    """Each passage of a row after its role, which has a number if there are several."""
    for role in ("positive", "negative", *NEGATIVES):
        value: Any = row.values.get(role)
        if value in (None, "", []):
            continue
        parts = value if isinstance(value, list) else [value]
        for number, part in enumerate(parts, 1):
            passage = text_in(replace(row, values={role: part}), role)
            yield (role if len(parts) == 1 else f"{role}_{number}"), passage


def _judge(row: Row, query: Query, name: str, *, is_positive: bool) -> None:
    if name in (query.negatives if is_positive else query.positives):
        row.refuse("a passage is a positive and a negative of the same query")
    if is_positive:
        query.positives[name] = 1
    elif name not in query.negatives:
        query.negatives.append(name)
