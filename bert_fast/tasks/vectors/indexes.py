"""Indexes of faiss and usearch: built from a file of vectors by parts, kept, and checked against it."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..data.problems import bad_line
from ..packages import package
from ..settings import at_least, one_of
from .files import Array, Vectors
from .output import record_file
from .search import Engine, Hits, Metric, ready
from .work import check_state, file_hash, write_text

__all__ = ["Index", "IndexOptions", "Kind", "open_index"]

Kind: TypeAlias = Literal["flat", "hnsw", "ivf"]

CHUNK = 16_384
POINTS = 256  # for each list, which faiss trains on


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """
    Attributes:
        kind: "hnsw" (Malkov & Yashunin 2016); of faiss also "flat", which is exact, and "ivf", inverted lists.
        links: of a vector in "hnsw".
        build_width: vectors looked at for each one that comes into "hnsw".
        search_width: the same for each query.
        lists: of "ivf"; None: 4 times the root of the number of vectors, each of 39 vectors at least.
        probes: lists that are looked through for each query.

    Raises:
        ValueError: a value is not allowed.
    """

    kind: Kind = "hnsw"
    links: int = 32
    build_width: int = 128
    search_width: int = 128
    lists: int | None = None
    probes: int = 16

    def __post_init__(self) -> None:
        one_of("kind", self.kind, Kind)
        for name in ("links", "build_width", "search_width", "probes"):
            at_least(name, getattr(self, name), 1)
        if self.lists is not None:
            at_least("lists", self.lists, 1)


class Index(ABC):
    """
    Args:
        index: of the library.
        metric: "cosine": queries are scaled to length 1, as the vectors are.
        options: as it was built.
    """

    def __init__(self, index: Any, metric: Metric, options: IndexOptions) -> None:
        self.index = index
        self.metric = metric
        self.options = options

    @classmethod
    @abstractmethod
    def built(cls, vectors: Vectors, metric: Metric, options: IndexOptions) -> Index:
        """An index of all vectors."""

    @classmethod
    @abstractmethod
    def read(cls, file: Path, metric: Metric, options: IndexOptions) -> Index:
        """One that was written."""

    @abstractmethod
    def write(self, file: Path) -> None:
        """Writes the library's file."""

    @abstractmethod
    def nearest(self, queries: Array, top: int) -> tuple[Array, Any]:
        """Scores and rows (queries, top); -inf and -1 where fewer are found."""

    def search(self, queries: Array, top: int) -> Hits:
        """See search."""
        if not len(queries):
            return Hits(np.empty((0, top), np.float32), np.empty((0, top), np.int64))
        scores, rows = self.nearest(ready(queries, self.metric).numpy(), top)
        order = np.lexsort((rows, -scores))
        return Hits(np.take_along_axis(scores, order, 1), np.take_along_axis(rows.astype(np.int64), order, 1))


class _Faiss(Index):
    @classmethod
    def built(cls, vectors: Vectors, metric: Metric, options: IndexOptions) -> Index:
        faiss = package("faiss", "engine 'faiss'")
        inner = faiss.METRIC_INNER_PRODUCT
        if options.kind == "flat":
            index = faiss.IndexFlatIP(vectors.dimensions)
        elif options.kind == "hnsw":
            index = faiss.IndexHNSWFlat(vectors.dimensions, options.links, inner)
            index.hnsw.efConstruction = options.build_width
        else:
            lists = options.lists or max(1, min(round(4 * vectors.rows**0.5), vectors.rows // 39))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(vectors.dimensions), vectors.dimensions, lists, inner)
            index.train(_sample(vectors, metric, POINTS * lists))
        for _, chunk in vectors.chunks(CHUNK):
            index.add(ready(chunk, metric).numpy())
        return cls(index, metric, options)

    @classmethod
    def read(cls, file: Path, metric: Metric, options: IndexOptions) -> Index:
        return cls(package("faiss", "engine 'faiss'").read_index(str(file)), metric, options)

    def write(self, file: Path) -> None:
        package("faiss", "engine 'faiss'").write_index(self.index, str(file))

    def nearest(self, queries: Array, top: int) -> tuple[Array, Any]:
        if self.options.kind == "hnsw":
            self.index.hnsw.efSearch = max(self.options.search_width, top)
        elif self.options.kind == "ivf":
            self.index.nprobe = self.options.probes
        scores, rows = self.index.search(queries, min(top, self.index.ntotal))
        return np.where(rows < 0, -np.inf, scores).astype(np.float32), rows


class _Usearch(Index):
    @classmethod
    def built(cls, vectors: Vectors, metric: Metric, options: IndexOptions) -> Index:
        if options.kind != "hnsw":
            raise ValueError(f"kind is {options.kind!r}; engine 'usearch' has 'hnsw' alone")
        index = package("usearch.index", "engine 'usearch'").Index(
            ndim=vectors.dimensions,
            metric="ip",
            dtype="f32",
            connectivity=options.links,
            expansion_add=options.build_width,
            expansion_search=options.search_width,
        )
        for start, chunk in vectors.chunks(CHUNK):
            index.add(np.arange(start, start + len(chunk)), ready(chunk, metric).numpy())
        return cls(index, metric, options)

    @classmethod
    def read(cls, file: Path, metric: Metric, options: IndexOptions) -> Index:
        index = package("usearch.index", "engine 'usearch'").Index.restore(str(file))
        if index is None:
            raise RuntimeError("it has no head of usearch")
        return cls(index, metric, options)

    def write(self, file: Path) -> None:
        self.index.save(str(file))

    def nearest(self, queries: Array, top: int) -> tuple[Array, Any]:
        top = min(top, len(self.index))
        self.index.expansion_search = max(self.options.search_width, top)
        found = self.index.search(queries, top)
        keys, distances = np.atleast_2d(found.keys), np.atleast_2d(found.distances)  # one query has no batch
        is_missing = np.isnan(distances) if len(queries) > 1 else np.zeros(keys.shape, bool)
        width = (0, 0), (0, top - keys.shape[1])
        scores = np.pad(np.where(is_missing, -np.inf, 1 - distances), width, constant_values=-np.inf)
        rows = np.pad(np.where(is_missing, -1, keys.astype(np.int64)), width, constant_values=-1)
        return scores.astype(np.float32), rows


LIBRARIES: dict[str, type[Index]] = {"faiss": _Faiss, "usearch": _Usearch}


def open_index(vectors: Vectors, engine: Engine, metric: Metric, options: IndexOptions, file: Path | None) -> Index:
    """An index, read where it was written before.

    Args:
        vectors: that it is of.
        engine: "faiss" or "usearch".
        metric, options: that it is built with.
        file: where it is kept, with FILE.json beside it, which says what it is of.

    Raises:
        DataError: there are no vectors.
        ValueError: the file's index is of other vectors or options, or `file` is no index of open_index.
        ImportError: the engine's package is not installed.
    """
    if not vectors.rows:
        raise bad_line(vectors.file, None, "no vectors")
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"index is {file}; the folder {file.parent} does not exist")
    library = LIBRARIES[engine]
    state = {"engine": engine, "metric": metric, **asdict(options)}
    if file is not None and file.exists():
        _check(file, state, vectors)
        try:
            return library.read(file, metric, options)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{file} cannot be read ({error}); delete it") from None
    index = library.built(vectors, metric, options)
    if file is not None:
        beside = file.with_name(f".{file.name}.part")
        index.write(beside)
        write_text(record_file(file), json.dumps({**state, "vectors": _identity(vectors)}, indent=1) + "\n")
        os.replace(beside, file)
    return index


def _identity(vectors: Vectors) -> dict[str, Any]:
    status = vectors.file.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": file_hash(vectors.file)}


def _check(file: Path, state: dict[str, Any], vectors: Vectors) -> None:
    try:
        before = json.loads(record_file(file).read_text(encoding="utf-8"))
        known = before["vectors"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no index that search wrote ({record_file(file).name}: {error})") from None
    searching = ("search_width", "probes")  # may change
    check_state(file, before, {name: value for name, value in state.items() if name not in searching})
    status = vectors.file.stat()
    if (known["bytes"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
        return
    if known["sha256"] != file_hash(vectors.file):
        raise ValueError(
            f"{file} is an index of other vectors than {vectors.file} holds; delete it or name another file"
        )


def _sample(vectors: Vectors, metric: Metric, count: int) -> Array:
    """(about count, dimensions) evenly from all vectors."""
    step = max(1, vectors.rows // count)
    parts = [chunk[(-start) % step :: step] for start, chunk in vectors.chunks(CHUNK)]
    return ready(np.concatenate(parts), metric).numpy()
