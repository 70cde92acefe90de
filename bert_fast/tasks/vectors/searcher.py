"""Texts found by texts: a model with the file of vectors that it made."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.problems import bad_line
from ..data.texts import find_texts, read_texts
from ..embeddings import embed_texts, is_cosine
from ..settings import at_least
from ..task import Model
from .embedder import Options, fingerprint, open_model, prompt_of
from .files import Label, open_vectors
from .output import record_file
from .search import Engine, Metric, check_queries, finder

__all__ = ["Found", "Searcher"]


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        row: of the vector, from 0.
        score: cosine or inner product.
        id, text: None where they are not known.
    """

    row: int
    score: float
    id: str | None = None
    text: str | None = None


class Searcher:
    """Searches a file of vectors for the texts nearest to queries.

    Args:
        model: folder or name on the hub of the model that made the vectors, or it itself, opened.
        vectors: from embed, .npy or .parquet.
        texts: of the rows: a list, or what was embedded, which each search reads as far as it needs; None: what a
            .parquet file says.
        options: for queries prompt, prompt_name, tokens_per_batch and, where `model` is opened here, max_length,
            precision, int8 and device; for texts columns and on_problem.
        is_other: whether the model may be another than that of the vectors, such as the query's half of a pair.
        engine, index, index_options: see search.
        metric: see search; None: what the model's similarity is, the cosine unless it says so.

    Raises:
        ValueError: the model is another, or its vectors have another number of dimensions; an argument is not allowed.
        DataError: a file is no file of vectors or texts.
        ImportError: the engine's package is not installed.
    """

    def __init__(
        self,
        model: str | Path | Model,
        vectors: Path,
        texts: Sequence[str] | Path | None = None,
        *,
        options: Options | None = None,
        is_other: bool = False,
        engine: Engine = "exact",
        metric: Metric | None = None,
        index: Path | None = None,
        **index_options: Any,
    ) -> None:
        self.options = options or Options()
        self.vectors = open_vectors(vectors)
        if not isinstance(model, Model) and not is_other:
            _check_model(str(model), vectors)
        self.model = model if isinstance(model, Model) else open_model(str(model), self.options)
        check_queries(self._vectors_of([]), self.vectors)
        if texts is not None and not isinstance(texts, Path) and len(texts) != self.vectors.rows:
            raise ValueError(f"texts are {len(texts):,}; {vectors} has {self.vectors.rows:,} vectors")
        self.texts = texts
        metric = metric or ("cosine" if is_cosine(self.model) else "dot")
        self._find = finder(self.vectors, engine, metric, index, self.options.device, index_options)

    def __call__(self, queries: Sequence[str], top: int = 10) -> list[list[Found]]:
        """The `top` nearest of each query, the nearest first.

        Raises:
            ValueError: `top` is not positive.
            DataError: the texts are fewer than the vectors, or have other ids.
        """
        at_least("top", top, 1)
        hits = self._find(self._vectors_of(queries), top)
        labels = self._labels({int(row) for row in hits.rows.ravel() if row >= 0})
        return [
            [
                Found(row, score, labels[row].id, labels[row].text)
                for row, score in zip(rows, scores, strict=True)
                if row >= 0
            ]
            for rows, scores in zip(hits.rows.tolist(), hits.scores.tolist(), strict=True)
        ]

    def _vectors_of(self, queries: Sequence[str]) -> Any:
        prompt = prompt_of(self.model, self.options.prompt, self.options.prompt_name)
        return embed_texts(self.model, queries, self.options.tokens_per_batch, prompt=prompt)

    def _labels(self, rows: Collection[int]) -> dict[int, Label]:
        labels = self.vectors.labels(rows)
        if self.texts is None:
            return labels
        if isinstance(self.texts, Path):
            return self._read(self.texts, labels)
        return {row: Label(label.id, self.texts[row]) for row, label in labels.items()}

    def _read(self, source: Path, labels: Mapping[int, Label]) -> dict[int, Label]:
        texts = read_texts(find_texts([source]), self.options.columns, self.options.on_problem)
        found = {}
        for row, text in enumerate(islice(texts, max(labels, default=-1) + 1)):
            if row not in labels:
                continue
            expected = labels[row].id
            if None not in (text.id, expected) and text.id != expected:
                reason = f"id {text.id!r}; row {row} of {self.vectors.file} is of {expected!r}: these are other texts"
                raise bad_line(text.file, text.line, reason)
            found[row] = Label(text.id, text.text)
        if len(found) < len(labels):
            raise bad_line(source, None, f"fewer texts than {self.vectors.file} has vectors, {self.vectors.rows:,}")
        return found


def _check_model(model: str, vectors: Path) -> None:
    file = record_file(vectors)
    if not file.is_file():
        return
    record = json.loads(file.read_text(encoding="utf-8"))
    if record.get("model") not in (None, fingerprint(model)):
        raise ValueError(f"{vectors} was made by another model than {model}; is_other=True searches it all the same")
