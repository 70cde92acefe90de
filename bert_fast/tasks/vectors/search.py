"""The nearest vectors: exactly, by parts of a file, or by an index of faiss or usearch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..settings import at_least, one_of
from .embedder import unit
from .files import Array, Vectors, open_vectors

__all__ = ["Engine", "Hits", "Metric", "check_queries", "exact", "finder", "ready", "search"]

Metric: TypeAlias = Literal["cosine", "dot"]
Engine: TypeAlias = Literal["exact", "faiss", "usearch"]

CHUNK = 16_384  # vectors in memory
QUERIES = 256  # that are compared with them at once


@dataclass(frozen=True)
class Hits:
    """
    Attributes:
        scores: (queries, top) float32, the highest first; of equal scores the lower row is first.
        rows: (queries, top) int64, from 0; -1, with a score of -inf, where an approximate index found fewer.
    """

    scores: Array
    rows: np.ndarray[Any, np.dtype[np.int64]]


def search(
    vectors: Path,
    queries: Array | Path,
    top: int = 10,
    *,
    engine: Engine = "exact",
    metric: Metric = "cosine",
    index: Path | None = None,
    device: str | None = None,
    **options: Any,
) -> Hits:
    """The `top` vectors nearest to each query, or all where there are fewer.

    Args:
        vectors: .npy or .parquet; a part of it is in memory at a time, but for an index, which is in memory as a whole.
        queries: (queries, dimensions), or a file of them.
        top: vectors for each query.
        engine: "exact"; "faiss" and "usearch" need these packages.
        metric: "cosine", of the angle, or "dot", the inner product.
        index: file of the engine's index, which is built and written if it is not there; None: it is not kept.
        device: where "exact" multiplies; None: a GPU if there is one.
        options: of indexes.IndexOptions.

    Raises:
        DataError: a file is no file of vectors.
        ValueError: an argument is not allowed, the dimensions differ, a number is not finite, or the index is of other
            vectors.
        ImportError: the engine's package is not installed.
    """
    at_least("top", top, 1)
    opened = open_vectors(vectors)
    wanted = open_vectors(queries).whole() if isinstance(queries, Path) else np.asarray(queries, np.float32)
    check_queries(wanted, opened)
    return finder(opened, engine, metric, index, device, options)(wanted, top)


def finder(
    vectors: Vectors, engine: Engine, metric: Metric, index: Path | None, device: str | None, options: dict[str, Any]
) -> Callable[[Array, int], Hits]:
    """(queries, top) -> Hits, for any number of calls; arguments as those of search."""
    one_of("engine", engine, Engine)
    one_of("metric", metric, Metric)
    if engine == "exact":
        if index is not None or options:
            raise ValueError(f"engine is 'exact', which takes no {'index' if index else next(iter(options))}")
        return lambda queries, top: exact(vectors, queries, top, metric, device)
    from .indexes import IndexOptions, open_index

    return open_index(vectors, engine, metric, IndexOptions(**options), index).search


def check_queries(queries: Array, vectors: Vectors) -> None:
    """
    Raises:
        ValueError: queries and vectors cannot be compared.
    """
    if queries.ndim != 2:
        raise ValueError(f"queries are of shape {queries.shape}; (queries, dimensions) is needed")
    if queries.shape[1] != vectors.dimensions:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions, the vectors in {vectors.file} have {vectors.dimensions}; "
            "both must be of the same model"
        )
    if not np.isfinite(queries).all():
        raise ValueError(f"query {int(np.isfinite(queries).all(1).argmin())} holds a number that is not finite")


def exact(vectors: Vectors, queries: Array, top: int, metric: Metric, device: str | None = None) -> Hits:
    """Compares all; arguments as those of search."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    top = min(top, vectors.rows)
    asked = [ready(part, metric, place) for part in np.split(queries, range(QUERIES, len(queries), QUERIES))]
    best = [_Best(len(part), place) for part in asked]
    for start, chunk in vectors.chunks(CHUNK):
        there = ready(chunk, metric, place).T
        for part, found in zip(asked, best, strict=True):
            found.add(part @ there, start, top)
    scores = torch.cat([found.scores for found in best]).cpu().numpy()
    return Hits(scores, torch.cat([found.rows for found in best]).cpu().numpy())


def ready(array: Array, metric: Metric, device: torch.device | None = None) -> Tensor:
    """(rows, dimensions) float32 on the device, as inner products are to be taken of it."""
    values = torch.from_numpy(np.require(array, np.float32, ["C", "W"])).to(device or "cpu")
    return unit(values) if metric == "cosine" else values


class _Best:
    """The best rows so far of some queries: scores (queries, found) float32 and rows (queries, found) int64."""

    def __init__(self, queries: int, device: torch.device) -> None:
        self.scores = torch.empty(queries, 0, device=device)
        self.rows = torch.empty(queries, 0, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, start: int, top: int) -> None:
        """Takes up the scores (queries, rows) of the rows from `start`, which come after those before."""
        rows = torch.arange(start, start + scores.shape[1], device=scores.device).expand(len(scores), -1)
        scores, rows = torch.cat([self.scores, scores], 1), torch.cat([self.rows, rows], 1)
        places = _first(scores, top)
        self.scores, self.rows = scores.gather(1, places), rows.gather(1, places)


def _first(scores: Tensor, top: int) -> Tensor:
    """(queries, at most top) places of the highest scores, of equal ones the leftmost.

    torch.topk promises no order of equal scores, so that it is given numbers that all differ: the bits of a float32,
    read as an integer whose order is that of the scores, above the place, counted from the right.
    """
    bits = (scores + 0.0).view(torch.int32)  # no -0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    places = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    return (ordered * 2**32 + places).topk(min(top, scores.shape[1]), 1).indices
