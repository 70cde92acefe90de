"""Candidates reranked: beside CrossEncoder.rank, from files of all kinds, with faults."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import one_thread, randomise, transformers  # noqa: F401
from tiny_models import save_encoder

import bert_fast
from bert_fast.tasks import reranking
from bert_fast.tasks.cross_encoders import load_cross_encoder
from bert_fast.tasks.data.problems import DataError
from bert_fast.tasks.data.runs import Candidates, Passage, read_candidates, read_run
from bert_fast.tasks.reranking import Ranked, rerank, rerank_to
from bert_fast.tasks.task import Model

sentence_transformers: Any = pytest.importorskip("sentence_transformers")

WORDS = ["the", "film", "was", "very", "good", "and", "a", "book", "is", "not", "dull", "with", "grim", "day", "of"]
QUERIES = ["good film", "was the book not very dull?", "day"]


def make_passages() -> list[list[str]]:
    """11, 5 and no passages of 1 to 19 words."""
    generator = np.random.default_rng(3)
    lengths = [[1 + 7 * i % 19 for i in range(11)], [4, 1, 13, 2, 9], []]
    return [[" ".join(generator.choice(WORDS, length)) for length in row] for row in lengths]


PASSAGES = make_passages()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cross")
    return save_encoder(path, architecture="BertForSequenceClassification", num_labels=1, seed=5)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    opened = load_cross_encoder(str(folder))
    randomise(opened.module)
    bert_fast.swap(opened.module)
    return opened


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The same, of sentence-transformers, as it is."""
    cross = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    randomise(cross)
    return cross


@pytest.mark.parametrize("pairs", [1, 7, 8192])
@pytest.mark.parametrize("top", [None, 3])
def test_rerank(model: Model, plain: Any, top: int | None, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reranking, "PAIRS", pairs)
    found = rerank(model, QUERIES, PASSAGES, top=top, tokens_per_batch=100)
    assert len(found) == 3
    assert found[2] == []
    for query, passages, ranked in zip(QUERIES[:2], PASSAGES, found, strict=False):
        expected = plain.rank(query, passages, top_k=top, return_documents=True)
        assert [each.rank - 1 for each in ranked] == [each["corpus_id"] for each in expected]
        assert [each.text for each in ranked] == [each["text"] for each in expected]
        scores = np.array([each["score"] for each in expected])
        assert np.abs(np.array([each.score for each in ranked]) - scores).max() < 1e-5
        assert np.ptp(scores) > 0.01


def test_ties(model: Model) -> None:
    (ranked,) = rerank(model, ["good"], [[Passage("a day", "x"), Passage("the film"), Passage("a day", "y")]])
    assert [each.id for each in ranked if each.text == "a day"] == ["x", "y"]
    assert {each.rank for each in ranked} == {1, 2, 3}


def test_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="queries are 3, and candidates are for 1"):
        rerank(model, QUERIES, PASSAGES[:1])
    with pytest.raises(ValueError, match="top is 0; it must be at least 1"):
        rerank(model, QUERIES, PASSAGES, top=0)
    with pytest.raises(ValueError, match=r"its suffix must be \.jsonl or \.trec"):
        rerank_to(tmp_path / "out.txt", model, [])


def test_scores_are_finite(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(_model: Model, pairs: list[tuple[str, str]], _tokens: int) -> Any:
        return np.where(np.arange(len(pairs)) == 1, np.nan, 0.5).astype(np.float32)

    monkeypatch.setattr(reranking, "cross_scores", scores)
    with pytest.raises(ValueError, match="the score of 'a' with 'c' is not finite"):
        rerank(model, ["a"], [["b", "c"]])


# ---- files -----------------------------------------------------------------------------------------------------------


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    content = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_files(model: Model, plain: Any, tmp_path: Path, name: str) -> None:
    rows: list[Any] = [
        {
            "id": 7,
            "query": QUERIES[0],
            "passages": [{"id": f"p{i}", "text": text} for i, text in enumerate(PASSAGES[0])],
        },
        {"query": QUERIES[1], "passages": PASSAGES[1]},
        {"id": "c", "query": QUERIES[2], "passages": []},
    ]
    out = tmp_path / "out.jsonl"
    assert rerank_to(out, model, read_candidates(write_jsonl(tmp_path / name, rows)), top=4) == 3
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    first = plain.rank(QUERIES[0], PASSAGES[0], top_k=4)
    assert (lines[0]["id"], lines[0]["query"]) == ("7", QUERIES[0])
    assert [each["id"] for each in lines[0]["results"]] == [f"p{each['corpus_id']}" for each in first]
    assert [each["rank"] for each in lines[0]["results"]] == [each["corpus_id"] + 1 for each in first]
    assert "id" not in lines[1]
    assert lines[1]["results"][0].keys() == {"rank", "score", "text"}
    assert lines[2] == {"id": "c", "query": "day", "results": []}
    assert [path.name for path in tmp_path.iterdir() if path.name != name] == ["out.jsonl"]


def test_nothing_is_written_of_a_faulty_file(model: Model, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"query": "good", "passages": ["a"]}, {"query": "good"}])
    with pytest.raises(DataError, match=r"in\.jsonl:3: passages are a NoneType; a list is needed"):
        rerank_to(tmp_path / "out.jsonl", model, read_candidates(file))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no queries"),
        ("{\n", ":1: no JSON"),
        ("[]\n", ":1: a list; an object is needed"),
        ('{"passages": []}\n', ":1: query is None; a text is needed"),
        ('{"query": " ", "passages": []}\n', ":1: query is ' '; a text"),
        ('{"query": "a", "passages": "b"}\n', ":1: passages are a str; a list"),
        ('{"query": "a", "passages": ["b", 3]}\n', ":1: passage 2 is 3; a text"),
        ('{"query": "a", "passages": [{"body": "b"}]}\n', ":1: passage 1 is None"),
        ('{"query": "a", "passages": ["\\ud800"]}\n', ":1: passage 1 holds half of a surrogate pair"),
        ('{"query": "a", "id": true, "passages": []}\n', ":1: id is True; a string or a whole number"),
    ],
)
def test_faults(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"in\.jsonl:? ?{reason}"):
        list(read_candidates(file))


CORPUS = [{"_id": f"d{i}", "title": f"T{i}", "text": f"text {i}"} for i in range(4)]
RUN = "q2 Q0 d3 1 0.5 bm25\nq1 Q0 d0 2 1.5 bm25\n\nq1 Q0 d2 1 2e0 bm25\nq1 Q0 d1 3 1.5 bm25\n"


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(1, 4)])
    return tmp_path


def write_run(folder: Path, content: str, name: str = "run.trec") -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def read(folder: Path, run: Path, columns: dict[str, str] | None = None) -> list[Candidates]:
    return list(read_run(run, folder / "queries.jsonl", folder / "corpus.jsonl", columns))


def test_runs(beir: Path) -> None:
    found = read(beir, write_run(beir, RUN))
    assert found == [
        Candidates("q2", "query 2", (Passage("text 3", "d3"),)),
        Candidates("q1", "query 1", tuple(Passage(f"text {i}", f"d{i}") for i in (2, 0, 1))),
    ]
    rows = [{"id": given.id, "results": [{"id": each.id, "score": 1.0} for each in given.passages]} for given in found]
    assert read(beir, write_jsonl(beir / "run.jsonl", rows)) == found
    titled = read(beir, write_run(beir, RUN), {"title": "title"})
    assert titled[0].passages == (Passage("T3 text 3", "d3"),)


def test_runs_out(model: Model, plain: Any, beir: Path) -> None:
    out = beir / "out.trec"
    assert rerank_to(out, model, read(beir, write_run(beir, RUN)), top=2) == 2
    fields = [line.split() for line in out.read_text(encoding="utf-8").splitlines()]
    best = plain.rank("query 1", ["text 2", "text 0", "text 1"], top_k=2)
    assert [field[:4] for field in fields] == [
        ["q2", "Q0", "d3", "1"],
        *(["q1", "Q0", ["d2", "d0", "d1"][each["corpus_id"]], str(i)] for i, each in enumerate(best, 1)),
    ]
    assert [float(field[4]) for field in fields[1:]] == pytest.approx([each["score"] for each in best], abs=1e-5)
    with pytest.raises(DataError, match="query 'a' or a passage of it has id None"):
        rerank_to(out, model, [Candidates("q", "a", (Passage("b"),))])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run.trec", "q1 Q0 d0 1 0.5\n", ":1: 5 fields; query, Q0, passage, rank, score and name"),
        ("run.trec", "q1 Q0 d0 1 high bm25\n", ":1: score is 'high'; a finite number"),
        ("run.trec", "q1 Q0 d0 1 nan bm25\n", ":1: score is 'nan'"),
        ("run.trec", RUN + "q1 Q0 d2 4 0 bm25\n", ":6: passage 'd2' is there twice for query 'q1'"),
        ("run.trec", RUN + "q9 Q0 d2 4 0 bm25\n", r":6: id 'q9' is not in .*queries\.jsonl"),
        ("run.trec", RUN + "q3 Q0 d9 4 0 bm25\n", r":6: id 'd9' is not in .*corpus\.jsonl"),
        ("run.trec", "\n", ": no passages"),
        ("run.csv", RUN, ": no known suffix; it must be .trec, .run, .txt, .jsonl"),
        ("run.jsonl", '{"id": "q1"}\n', ':1: no "id" with a list of "results"'),
        ("run.jsonl", '{"id": "q1", "results": ["d0"]}\n', ":1: result 'd0' has no id"),
    ],
)
def test_faults_of_runs(beir: Path, name: str, content: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"{name}{reason}"):
        read(beir, write_run(beir, content, name))


def test_faults_of_texts(beir: Path) -> None:
    run = write_run(beir, RUN)
    write_jsonl(beir / "corpus.jsonl", [*CORPUS, CORPUS[0]])
    with pytest.raises(DataError, match=r"corpus\.jsonl:9: id 'd0' is there twice"):
        read(beir, run)
    write_jsonl(beir / "corpus.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: no id"):
        read(beir, run)
    assert Ranked(1, 0.5, "a") == Ranked(1, 0.5, "a", None)
