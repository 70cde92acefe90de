"""Retrieval data: folders in the layout of BEIR, tables of queries and passages, and every fault of theirs."""

from __future__ import annotations

import gc
import gzip
import lzma
from pathlib import Path
from typing import Any

import pytest

from bert_fast.tasks import DataError
from bert_fast.tasks.data.beir import is_beir, read_beir
from bert_fast.tasks.data.queries import read_queries

CORPUS = """{"_id": "d1", "title": "Cats", "text": "They sleep."}
{"_id": "d2", "title": "", "text": "Dogs run."}

{"_id": "d3", "text": "Birds sing."}
{"_id": 4, "title": null, "text": ""}
"""
QUERIES = """{"_id": "q1", "text": "who sleeps?", "metadata": {}}
{"_id": "q2", "text": " who runs? "}
{"_id": "q3", "text": "who swims?"}
"""
HEADER = "query-id\tcorpus-id\tscore\n"
QRELS = HEADER + "q2\td2\t2\nq1\td1\t1\nq2\td3\t0\nq2\t4\t1\n"


def write(folder: Path, **files: str) -> Path:
    """A folder with these files, of which those left out are right."""
    contents = {"corpus": CORPUS, "queries": QUERIES, "test": QRELS, **files}
    (folder / "qrels").mkdir()
    for name, text in contents.items():
        path = folder / (f"{name}.jsonl" if name in ("corpus", "queries") else f"qrels/{name}.tsv")
        path.write_text(text, encoding="utf-8")
    return folder


# ---- the layout of BEIR ----------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    found = read_beir(write(tmp_path))
    assert [(query.id, query.text, query.positives, query.negatives) for query in found] == [
        ("q2", "who runs?", {"d2": 2, "4": 1}, ["d3"]),
        ("q1", "who sleeps?", {"d1": 1}, []),
    ]
    assert found[0].place == f"{tmp_path / 'queries.jsonl'}:2"
    assert found[0].key == "who runs?"
    assert found[0].corpus is found[1].corpus
    assert found[0].corpus.ids == ["d1", "d2", "d3", "4"]
    assert found[0].corpus.texts == ["Cats They sleep.", "Dogs run.", "Birds sing.", ""]
    assert found[0].corpus.rows["4"] == 3


def test_without_labels_every_query_is_there(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "qrels" / "test.tsv").unlink()
    for path in (folder, folder / "queries.jsonl"):
        found = read_beir(path, is_labelled=False)
        assert [query.id for query in found] == ["q1", "q2", "q3"]
        assert not any(query.positives for query in found)


def test_splits(tmp_path: Path) -> None:
    folder = write(tmp_path, dev=HEADER + "q3\td3\t1\n")
    assert [query.id for query in read_beir(folder, "dev")] == ["q3"]
    assert [query.id for query in read_beir(folder / "qrels" / "dev.tsv", "test")] == ["q3"]
    with pytest.raises(DataError, match=r"several splits \(there are dev, test\); the setting split"):
        read_beir(folder)
    with pytest.raises(DataError, match=r"no split 'train' \(there are dev, test\)"):
        read_beir(folder, "train")


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_flat_and_compressed(tmp_path: Path, suffix: str) -> None:
    pack: Any = {".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    for name, text in (("corpus.jsonl", CORPUS), ("queries.jsonl", QUERIES), ("qrels-train.tsv", QRELS)):
        (tmp_path / (name + suffix)).write_bytes(pack(text.encode()))
    file = tmp_path / f"qrels-train.tsv{suffix}"
    assert is_beir(file)
    assert is_beir(tmp_path)
    assert [query.id for query in read_beir(file)] == ["q2", "q1"]
    assert read_beir(tmp_path) == read_beir(tmp_path, "train") == read_beir(file)


def test_tables_are_no_beir(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "pairs.jsonl").write_text("", encoding="utf-8")
    assert not is_beir(folder / "pairs.jsonl")
    assert is_beir(folder / "queries.jsonl")
    (folder / "corpus.jsonl").unlink()
    assert not is_beir(folder / "queries.jsonl")


def test_corpus_is_held_once(tmp_path: Path) -> None:
    folder = write(tmp_path, dev=HEADER + "q3\td3\t1\n")
    train, dev = read_beir(folder, "test"), read_beir(folder, "dev")
    assert train[0].corpus is dev[0].corpus
    (folder / "corpus.jsonl").write_text(CORPUS.replace("Cats", "Lions"), encoding="utf-8")
    changed = read_beir(folder, "dev")[0].corpus
    assert changed.texts[0] == "Lions They sleep."
    assert train[0].corpus.texts[0] == "Cats They sleep."
    from bert_fast.tasks.data import beir

    held = len(beir._read)
    del train, dev, changed
    gc.collect()
    assert len(beir._read) == held - 2


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("corpus", "", "no documents"),
        ("corpus", CORPUS + '{"_id": "d1", "text": "x"}\n', ":6: _id 'd1' is there twice"),
        ("corpus", CORPUS + '{"_id": "", "text": "x"}\n', ":6: no _id, which must be a string"),
        ("corpus", CORPUS + '{"_id": [1], "text": "x"}\n', ":6: _id is [1]; a string is needed"),
        ("corpus", CORPUS + '{"_id": true, "text": "x"}\n', ":6: _id is True; a string is needed"),
        ("corpus", CORPUS + '{"id": "d5", "text": "x"}\n', ":6: no _id, which must be a string"),
        ("corpus", CORPUS + '{"_id": "d5", "title": "x"}\n', ":6: no text"),
        ("corpus", CORPUS + '{"_id": "d5", "text": 7}\n', ":6: text is a int; a string is needed"),
        ("corpus", CORPUS + '{"_id": "d5", "title": 7, "text": ""}\n', ":6: title is a int; a string is needed"),
        ("corpus", CORPUS + '["d5"]\n', ":6: a list; an object is needed"),
        ("corpus", CORPUS + '{"_id": "d5"\n', ":6: no JSON"),
        ("queries", "\n", "no queries"),
        ("queries", QUERIES + '{"_id": "q1", "text": "x"}\n', ":4: _id 'q1' is there twice"),
        ("queries", QUERIES + '{"_id": "q4", "text": "  "}\n', ":4: text is empty"),
        ("queries", QUERIES + '{"_id": "q4"}\n', ":4: no text"),
        ("test", HEADER, "no rows"),
        ("test", "q1\td1\t1\n", ":1: no header; the first line must be query-id, corpus-id, score"),
        ("test", HEADER + "q1\td1\n", ":2: 2 fields between tabs; there must be three"),
        ("test", "query-id corpus-id score\n", ":1: 1 fields between tabs; there must be three"),
        ("test", HEADER + "q1\t0\td1\t1\n", ":2: 4 fields between tabs; there must be three"),
        ("test", QRELS + "q1\td2\t0.5\n", ":6: score is '0.5'; a whole number is needed"),
        ("test", QRELS + "q1\td2\t\n", ":6: score is ''; a whole number is needed"),
        ("test", QRELS + "q7\td1\t1\n", ":6: query-id 'q7' is not among the queries"),
        ("test", QRELS + "q1\td7\t1\n", ":6: corpus-id 'd7' is not in the corpus"),
        ("test", QRELS + "q1\td1\t0\n", ":6: query-id 'q1' and corpus-id 'd1' are there twice"),
    ],
)
def test_faults(tmp_path: Path, name: str, text: str, reason: str) -> None:
    folder = write(tmp_path, **{name: text})
    file = folder / ("qrels/test.tsv" if name == "test" else f"{name}.jsonl")
    with pytest.raises(DataError) as caught:
        read_beir(folder)
    assert str(caught.value).startswith(f"{file}{reason if reason.startswith(':') else ': ' + reason}")


def test_missing_files(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(DataError, match=r"queries.jsonl: it does not say which documents are relevant"):
        read_beir(folder / "queries.jsonl")
    (folder / "queries.jsonl").rename(folder / "queries.jsonl.old")
    with pytest.raises(DataError, match=r"queries.jsonl: no such file; a folder in the layout of BEIR has one"):
        read_beir(folder)
    (folder / "corpus.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 files: corpus.jsonl, corpus.jsonl.gz"):
        read_beir(folder)
    with pytest.raises(DataError, match=r"corpus.jsonl: no such file"):
        read_beir(folder / "qrels")


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_table(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    rows = ["question\tanswer\tnegative", "who?\tme\tyou", "why?\tso\t", "who?\tus\tso"]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    who, why = read_queries(file)
    assert (who.id, who.place, who.text) == ("2", f"{file}:2", "who?")
    assert who.positives == {"2:positive": 1, "4:positive": 1}
    assert who.negatives == ["2:negative", "3:positive"]
    assert (why.id, why.positives, why.negatives) == ("3", {"3:positive": 1}, [])
    assert who.corpus is why.corpus
    assert who.corpus.texts == ["me", "you", "so", "us"]


def test_lists_and_ids(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"_id": "a", "anchor": "who?", "positives": ["me", "us"], "negatives": ["you", "me too"]}\n'
        '{"_id": 7, "anchor": "why?", "positives": "so", "negatives": []}\n',
        encoding="utf-8",
    )
    who, why = read_queries(file)
    assert (who.id, why.id) == ("a", "7")
    assert who.positives == {"1:positive_1": 1, "1:positive_2": 1}
    assert who.negatives == ["1:negative_1", "1:negative_2"]


def test_numbered_negatives(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("query,positive,negative_1,negative_2\nwho?,me,you,they\n", encoding="utf-8")
    (who,) = read_queries(file)
    assert [who.corpus.texts[who.corpus.rows[name]] for name in who.negatives] == ["you", "they"]


def test_table_without_labels(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("query\tnegative\nwho?\tyou\n", encoding="utf-8")
    (who,) = read_queries(file, is_labelled=False)
    assert not who.positives
    with pytest.raises(DataError, match="no column positive or positives"):
        read_queries(file)
    file.write_text("query\nwho?\n", encoding="utf-8")
    with pytest.raises(DataError, match="no passages that could be searched"):
        read_queries(file, is_labelled=False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"query": "who?", "positive": ""}', "positive is empty"),
        ('{"query": "who?", "positive": []}', "positive is empty"),
        ('{"query": "who?", "positive": ["us", " "]}', "positive is empty"),
        ('{"query": "who?", "positive": [7]}', "positive is a number; a string is needed"),
        ('{"query": "who?", "positive": {"text": "us"}}', "positive is an object; a string is needed"),
        ('{"query": "", "positive": "us"}', "query is empty"),
        ('{"query": "who?", "positive": "us", "negative": "me"}', "a passage is a positive and a negative"),
        ('{"query": "who?", "positive": "you"}', "a passage is a positive and a negative"),
        ('{"query": "why?", "positive": "so", "id": "a"}', "id 'a' is that of another query too"),
        ('{"query": "why?", "positive": "so", "id": ["a"]}', "id is a list; a string is needed"),
    ],
)
def test_bad_rows(tmp_path: Path, row: str, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    first = '{"id": "a", "query": "who?", "positive": "me", "negative": "you"}'
    file.write_text(f"{first}\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_queries(file)
    assert str(caught.value).startswith(f"{file}:2: {reason}")
