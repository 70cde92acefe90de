"""Search in files of vectors: beside numpy, with ties, by indexes, and by texts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import one_thread, transformers  # noqa: F401
from tiny_models import save_encoder

from bert_fast.tasks.data.problems import DataError
from bert_fast.tasks.embeddings import load_sentence_transformer
from bert_fast.tasks.vectors import Options, Searcher, embed, search
from bert_fast.tasks.vectors.files import Label, open_vectors
from bert_fast.tasks.vectors.search import Metric

arrow: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")
sentence_transformers: Any = pytest.importorskip("sentence_transformers")

searching = import_module("bert_fast.tasks.vectors.search")
indexes = import_module("bert_fast.tasks.vectors.indexes")

GENERATOR = np.random.default_rng(5)
VECTORS = (0.3 + GENERATOR.standard_normal((211, 13))).astype(np.float32)
QUERIES = (0.3 + GENERATOR.standard_normal((7, 13))).astype(np.float32)

needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="faiss-cpu is not installed")
needs_usearch = pytest.mark.skipif(find_spec("usearch") is None, reason="usearch is not installed")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of files and of queries, of which the tests have several."""
    monkeypatch.setattr(searching, "CHUNK", 17)
    monkeypatch.setattr(searching, "QUERIES", 3)
    monkeypatch.setattr(indexes, "CHUNK", 17)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return npy(tmp_path / "vectors.npy", VECTORS)


def npy(file: Path, array: np.ndarray[Any, Any]) -> Path:
    np.save(file, array)
    return file


def column(array: np.ndarray[Any, Any], *, is_fixed: bool = True) -> Any:
    values = arrow.array(array.ravel())
    if is_fixed:
        return arrow.FixedSizeListArray.from_arrays(values, array.shape[1])
    return arrow.ListArray.from_arrays(np.arange(len(array) + 1) * array.shape[1], values)


def expected(metric: str, top: int, vectors: np.ndarray[Any, Any] = VECTORS) -> tuple[Any, Any]:
    """Scores and rows in float64, of equal ones the lower row first."""
    asked, there = QUERIES.astype(float), vectors.astype(float)
    if metric == "cosine":
        asked, there = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (asked, there))
    scores = asked @ there.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(scores, rows, 1), rows


# ---- exactly ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("top", [1, 10, 50, 1000])
def test_exact(file: Path, metric: Any, top: int) -> None:
    hits = search(file, QUERIES, top, metric=metric)
    scores, rows = expected(metric, top)
    assert hits.rows.dtype == np.int64
    assert np.array_equal(hits.rows, rows)
    assert np.abs(hits.scores - scores).max() < 1e-5


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("is_fixed", [True, False])
def test_parquet(tmp_path: Path, dtype: type, is_fixed: bool) -> None:
    file = tmp_path / "vectors.parquet"
    vectors: Any = VECTORS.astype(dtype)
    parquet.write_table(arrow.table({"embedding": column(vectors, is_fixed=is_fixed)}), file, row_group_size=50)
    opened = open_vectors(file)
    assert (opened.rows, opened.dimensions) == (211, 13)
    assert np.array_equal(opened.whole(), vectors.astype(np.float32))
    hits = search(file, npy(tmp_path / "queries.npy", QUERIES), 5)
    assert np.array_equal(hits.rows, expected("cosine", 5, vectors)[1])


def test_ties(tmp_path: Path) -> None:
    """Small whole numbers, whose products have no rounding, so that many scores are equal."""
    vectors = np.random.default_rng(1).integers(-1, 2, (211, 3)).astype(np.float32)
    queries = np.array([[1, 0, 0], [0, -1, 1], [0, 0, 0]], np.float32)
    hits = search(npy(tmp_path / "vectors.npy", vectors), queries, 60, metric="dot")
    scores = queries @ vectors.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :60]
    assert np.array_equal(hits.rows, rows)
    assert np.array_equal(hits.scores, np.take_along_axis(scores, rows, 1))
    assert hits.rows[2].tolist() == list(range(60))


def test_zeros_and_nothing(tmp_path: Path) -> None:
    vectors = np.zeros((3, 13), np.float32)
    assert search(npy(tmp_path / "a.npy", vectors), QUERIES, 2).scores.tolist() == [[0.0, 0.0]] * 7
    hits = search(npy(tmp_path / "b.npy", vectors[:0]), QUERIES)
    assert hits.scores.shape == hits.rows.shape == (7, 0)
    hits = search(npy(tmp_path / "c.npy", vectors), QUERIES[:0])
    assert hits.scores.shape == hits.rows.shape == (0, 3)


def test_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    chunks = searching.Vectors.chunks

    def spying(self: Any, size: int) -> Any:
        for start, part in chunks(self, size):
            assert part.base is None or not isinstance(part.base, np.memmap)
            sizes.append(len(part))
            yield start, part

    monkeypatch.setattr(searching.Vectors, "chunks", spying)
    search(file, QUERIES)
    assert sizes == [17] * 12 + [7]


# ---- indexes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("faiss", {"kind": "flat"}, marks=needs_faiss),
        pytest.param("faiss", {"kind": "hnsw", "links": 16}, marks=needs_faiss),
        pytest.param("faiss", {"kind": "ivf", "lists": 3, "probes": 3}, marks=needs_faiss),
        pytest.param("usearch", {"links": 16, "build_width": 300, "search_width": 300}, marks=needs_usearch),
    ],
)
def test_indexes(file: Path, tmp_path: Path, engine: Any, options: dict[str, Any], metric: Any) -> None:
    """With few vectors every index is exact."""
    kept = tmp_path / "vectors.index"
    scores, rows = expected(metric, 9)
    for number in range(3):
        found = search(file, QUERIES, 9, engine=engine, metric=metric, index=kept if number else None, **options)
        assert np.array_equal(found.rows, rows)
        assert found.scores.dtype == np.float32
        assert np.abs(found.scores - scores).max() < 1e-5
    one = search(file, QUERIES[:1], 1000, engine=engine, metric=metric, index=kept, **options)
    assert one.rows.shape == (1, 211)
    assert one.rows[0, :9].tolist() == rows[0].tolist()
    assert search(file, QUERIES[:0], 4, engine=engine, metric=metric, index=kept, **options).rows.shape == (0, 4)
    with pytest.raises(DataError, match=r"empty\.npy: no vectors"):
        search(npy(tmp_path / "empty.npy", VECTORS[:0]), QUERIES, engine=engine, **options)


@pytest.mark.parametrize(
    "engine", [pytest.param("faiss", marks=needs_faiss), pytest.param("usearch", marks=needs_usearch)]
)
def test_kept_index(file: Path, tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "vectors.index"
    first = search(file, QUERIES, engine=engine, index=kept)
    monkeypatch.setattr(indexes.LIBRARIES[engine], "built", None)
    again = search(file, QUERIES, engine=engine, index=kept, search_width=100)
    assert np.array_equal(first.rows, again.rows)
    os.utime(file)  # the same vectors at another time
    search(file, QUERIES, engine=engine, index=kept)
    with pytest.raises(ValueError, match=r"vectors\.index is of metric = 'cosine', now it is 'dot'"):
        search(file, QUERIES, engine=engine, index=kept, metric="dot")
    with pytest.raises(ValueError, match=r"vectors\.index is of links = 32, now it is 8"):
        search(file, QUERIES, engine=engine, index=kept, links=8)
    npy(file, VECTORS[::-1])
    with pytest.raises(ValueError, match=r"vectors\.index is an index of other vectors than"):
        search(file, QUERIES, engine=engine, index=kept)
    (tmp_path / "vectors.index.json").unlink()
    with pytest.raises(ValueError, match=r"vectors\.index is no index that search wrote"):
        search(file, QUERIES, engine=engine, index=kept)


@needs_faiss
def test_fewer_found(file: Path) -> None:
    hits = search(file, QUERIES, 200, engine="faiss", kind="ivf", lists=5, probes=1)
    missing = hits.rows == -1
    assert missing.any()
    assert np.array_equal(missing, np.isneginf(hits.scores))
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()  # at the end


@pytest.mark.parametrize(("engine", "pip"), [("faiss", "faiss-cpu"), ("usearch", "usearch")])
def test_missing_packages(file: Path, engine: Any, pip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    monkeypatch.setitem(sys.modules, f"{engine}.index", None)
    with pytest.raises(ImportError, match=rf"engine '{engine}' needs {pip} \(pip install '{pip}'\)"):
        search(file, QUERIES, engine=engine)


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"queries": QUERIES[:, :5]}, r"queries have 5 dimensions, the vectors in .*vectors\.npy have 13"),
        ({"queries": QUERIES[0]}, r"queries are of shape \(13,\)"),
        (
            {"queries": np.where(np.arange(7)[:, None] == 3, np.nan, QUERIES)},
            "query 3 holds a number that is not finite",
        ),
        ({"top": 0}, "top is 0; it must be at least 1"),
        ({"engine": "annoy"}, "engine is 'annoy'; it must be one of exact, faiss, usearch"),
        ({"metric": "l2"}, "metric is 'l2'; it must be one of cosine, dot"),
        ({"index": Path("a.index")}, "engine is 'exact', which takes no index"),
        ({"links": 3}, "engine is 'exact', which takes no links"),
        ({"engine": "faiss", "kind": "pq"}, "kind is 'pq'"),
        ({"engine": "faiss", "probes": 0}, "probes is 0"),
        pytest.param({"engine": "usearch", "kind": "ivf"}, "kind is 'ivf'; engine 'usearch' has", marks=needs_usearch),
    ],
)
def test_refused(file: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        search(file, **{"queries": QUERIES, **options})


def write_parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda file: parquet.write_table(arrow.table(columns), file)


def write_npz(file: Path) -> None:
    with file.open("wb") as stream:
        np.savez(stream, VECTORS)


ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0]]


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.npy", lambda file: np.save(file, VECTORS[0]), r"holds float32 of shape \(13,\); rows of float16"),
        ("a.npy", lambda file: np.save(file, VECTORS.astype(int)), "holds int64 of shape"),
        ("a.npy", Path.touch, r"a\.npy: damaged, cut or no \.npy"),
        ("a.npy", write_npz, r"a\.npy: damaged, cut or no \.npy"),
        ("a.npy", lambda file: file.write_bytes(b"NUMPY"), r"a\.npy: damaged, cut or no \.npy"),
        (
            "a.npy",
            lambda file: np.save(file, np.where(VECTORS[20] == VECTORS, np.inf, VECTORS)),
            r"a\.npy:21: .*finite",
        ),
        ("a.parquet", lambda file: file.write_bytes(b"PAR1"), r"a\.parquet: damaged, cut or no Parquet"),
        ("a.parquet", write_parquet(vector=[[1.0]]), r"no column 'embedding'; there are 'vector'"),
        ("a.parquet", write_parquet(embedding=["x"]), "column 'embedding' is of type string"),
        ("a.parquet", write_parquet(embedding=ROWS), r"a\.parquet:3: 1 dimensions; the first row has 2"),
        ("a.parquet", write_parquet(embedding=[*ROWS[:2], None]), r"a\.parquet:3: no vector"),
        ("a.parquet", write_parquet(embedding=[None, *ROWS[:2]]), r"a\.parquet:1: no vector"),
        ("a.bin", Path.touch, r"a\.bin: no known suffix; it must be \.npy or \.parquet"),
    ],
)
def test_no_vectors(tmp_path: Path, name: str, write: Callable[[Path], Any], reason: str) -> None:
    write(tmp_path / name)
    with pytest.raises(DataError, match=reason):
        open_vectors(tmp_path / name).whole()


# ---- texts -----------------------------------------------------------------------------------------------------------

TEXTS = ["a good film", "a bad book", "the day was very bright", "", "not grim and not dull", "a very good film", "of"]
ASKED = ["good film", "very grim"]
METRICS: tuple[Metric, ...] = ("cosine", "dot")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": f"d{i}", "body": text}) + "\n" for i, text in enumerate(TEXTS)), "utf-8")
    return file


OPTIONS: dict[str, Any] = {"block": 3, "device": "cpu", "columns": {"text": "body"}}


@pytest.mark.parametrize(
    ("suffix", "options", "has_text"),
    [(".npy", {}, False), (".parquet", {}, False), (".parquet", {"keep_text": True}, True)],
)
def test_searcher(
    folder: Path, rows: Path, tmp_path: Path, suffix: str, options: dict[str, Any], has_text: bool
) -> None:
    out = tmp_path / f"out{suffix}"
    settings = Options(**OPTIONS, **options)
    embed(folder, rows, out, options=settings)
    plain: Any = load_sentence_transformer(str(folder)).module
    similarity = plain.similarity(plain.encode(ASKED), plain.encode(TEXTS)).numpy()
    for texts in (None, rows, TEXTS):
        found = Searcher(folder, out, texts, options=settings)(ASKED, 4)
        for query, hits in enumerate(found):
            order = np.argsort(-similarity[query], kind="stable")[:4].tolist()
            assert [hit.row for hit in hits] == order
            assert [hit.id for hit in hits] == [f"d{row}" for row in order]
            shown = TEXTS if texts is not None or has_text else [None] * len(TEXTS)
            assert [hit.text for hit in hits] == [shown[row] for row in order]
            assert np.abs(np.array([hit.score for hit in hits]) - similarity[query, order]).max() < 1e-5
    assert Searcher(folder, out)([]) == []


def test_searchers_model(folder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    embed(folder, rows, out, options=Options(**OPTIONS))
    other = save_encoder(tmp_path / "other", seed=2)
    with pytest.raises(ValueError, match=r"out\.npy was made by another model than"):
        Searcher(other, out)
    assert len(Searcher(other, out, is_other=True)(ASKED)) == 2
    wide = save_encoder(tmp_path / "wide", hidden_size=34)
    with pytest.raises(ValueError, match=r"queries have 34 dimensions, the vectors in .*out\.npy have 32"):
        Searcher(wide, out, is_other=True)
    opened = load_sentence_transformer(str(folder))
    searcher = Searcher(opened, out, options=Options(prompt="the day: "))
    prompted = opened.module.encode([f"the day: {text}" for text in ASKED])  # type: ignore[operator]
    hits = search(out, prompted, 3)
    assert [[hit.row for hit in found] for found in searcher(ASKED, 3)] == hits.rows.tolist()


def test_the_models_metric(folder: Path, rows: Path, tmp_path: Path) -> None:
    """A model that says so is searched by inner products, as eval of retrieve does."""
    opened = load_sentence_transformer(str(folder))
    module: Any = opened.module
    embed(folder, rows, tmp_path / "out.npy", options=Options(**OPTIONS))
    expected = {metric: search(tmp_path / "out.npy", module.encode(ASKED), 3, metric=metric) for metric in METRICS}
    for metric in (*METRICS, METRICS[0]):
        module.similarity_fn_name = metric
        found = Searcher(opened, tmp_path / "out.npy")(ASKED, 3)
        np.testing.assert_allclose([[h.score for h in hits] for hits in found], expected[metric].scores, rtol=1e-5)
    assert not np.allclose(expected["cosine"].scores, expected["dot"].scores)


@pytest.mark.parametrize(
    "engine", [pytest.param("faiss", marks=needs_faiss), pytest.param("usearch", marks=needs_usearch)]
)
def test_index_files(file: Path, tmp_path: Path, engine: Any) -> None:
    queries = VECTORS[:2]
    with pytest.raises(ValueError, match=r"index is .*gone.*; the folder .*gone does not exist"):
        search(file, queries, engine=engine, index=tmp_path / "gone" / "a.index")
    search(file, queries, engine=engine, index=tmp_path / "a.index")
    (tmp_path / "a.index").write_bytes(b"no index")
    with pytest.raises(ValueError, match=r"a\.index cannot be read .*; delete it"):
        search(file, queries, engine=engine, index=tmp_path / "a.index")


@needs_faiss
def test_searchers_index(folder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    embed(folder, rows, out, options=Options(**OPTIONS))
    exact = Searcher(folder, out)(ASKED, 3)
    found = Searcher(folder, out, engine="faiss", index=tmp_path / "out.index", kind="flat")(ASKED, 3)
    assert [[hit.id for hit in hits] for hits in found] == [[hit.id for hit in hits] for hits in exact]


def test_searchers_faults(folder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    embed(folder, rows, out, options=Options(**OPTIONS))
    with pytest.raises(ValueError, match=r"texts are 2; .* has 7 vectors"):
        Searcher(folder, out, ["a", "b"])
    moved = [{"id": f"d{row - 1}", "body": text} for row, text in enumerate(["new", *TEXTS])]
    rows.write_text("".join(json.dumps(row) + "\n" for row in moved), "utf-8")
    with pytest.raises(
        DataError, match=r"rows\.jsonl:\d+: id 'd-?\d'; row \d of .*out\.npy is of 'd\d': these are other"
    ):
        Searcher(folder, out, rows, options=Options(**OPTIONS))(ASKED)
    rows.write_text('{"id": "d0", "body": "b"}\n', "utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl: fewer texts than .*out\.npy has vectors, 7"):
        Searcher(folder, out, rows, options=Options(**OPTIONS))(ASKED)
    with pytest.raises(ValueError, match="top is 0"):
        Searcher(folder, out)(ASKED, 0)
    (tmp_path / "out.ids.txt").write_text("a\n", "utf-8")
    with pytest.raises(DataError, match=r"out\.ids\.txt: 1 ids; .*out\.npy has 7 rows"):
        open_vectors(out).labels([3])
    (tmp_path / "out.ids.txt").unlink()
    assert open_vectors(out).labels([3]) == {3: Label()}
