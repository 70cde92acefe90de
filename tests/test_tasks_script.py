"""benchmarks.tasks: the parts of the data that it takes, and what it writes of a case."""

from __future__ import annotations

import csv
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentence_models import TEXTS, embedder, save_encoder

from benchmarks.tasks import CASES, articles, find, part_of_beir, some_classes, some_lines, some_sentences

ROOT = Path(__file__).resolve().parents[1]


def lines_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


# ---- parts of the data -----------------------------------------------------------------------------------------------


def test_files_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.xz").write_bytes(lzma.compress(b"x\n"))
    assert find(tmp_path, "a.tsv") == tmp_path / "a.tsv.xz"
    with pytest.raises(SystemExit, match=r"b\.tsv is missing"):
        find(tmp_path, "b.tsv")


@pytest.mark.parametrize("has_header", [False, True])
def test_some_lines(tmp_path: Path, has_header: bool) -> None:
    source = tmp_path / "a.tsv"
    rows = [f"text {number}\t{number % 2}" for number in range(1000)]
    source.write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    found = lines_of(some_lines(source, tmp_path / "b.tsv", 0.2, has_header=has_header))
    if has_header:
        assert found.pop(0) == "sentence\tlabel"
    assert 120 < len(found) < 280
    assert [row for row in rows if row in set(found)] == [row for row in found if row in rows]
    assert found == lines_of(some_lines(source, tmp_path / "c.tsv", 0.2, has_header=has_header))[has_header:]


def test_some_classes_are_whole(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    rows = [[f'text {number}, "quoted"\nand long', f"class {number % 40}"] for number in range(200)]
    with source.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["text", "category"], *rows])
    with some_classes(source, tmp_path / "b.csv", 0.3).open(encoding="utf-8", newline="") as stream:
        head, *found = csv.reader(stream)
    assert head == ["text", "category"]
    classes = {row[1] for row in found}
    assert 4 < len(classes) < 24
    assert found == [row for row in rows if row[1] in classes]


def test_some_sentences_are_whole(tmp_path: Path) -> None:
    """Also where the line between them is not quite empty."""
    source = tmp_path / "a.conll"
    sentences = [f"word{number}\tO\nis\tB-x" for number in range(300)]
    source.write_text("".join(f"{text}\n{' ' * (i % 2)}\n" for i, text in enumerate(sentences)), encoding="utf-8")
    found = some_sentences(source, tmp_path / "b.conll", 0.3).read_text(encoding="utf-8").strip().split("\n\n")
    assert 55 < len(found) < 125
    assert set(found) <= set(sentences)


def test_articles_are_not_divided(tmp_path: Path) -> None:
    data = [
        {"title": str(article), "paragraphs": [{"context": f"{article} {row}", "qas": []} for row in range(40)]}
        for article in range(9)
    ]
    source = tmp_path / "a.json"
    source.write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
    train, dev = (json.loads(file.read_text(encoding="utf-8"))["data"] for file in articles(source, tmp_path, 0.5))
    assert [article["title"] for article in (*train, *dev)] == [str(number) for number in range(9)]
    assert len(dev) == 5
    kept = sum(len(article["paragraphs"]) for article in (*train, *dev))
    assert 120 < kept < 240


def test_judged_documents_stay(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    for name, letter in (("queries", "q"), ("corpus", "d")):
        rows = [json.dumps({"_id": f"{letter}{number}", "text": f"{letter} {number}"}) for number in range(200)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    judged = "".join(f"q{number}\td{199 - number}\t1\n" for number in range(200))
    (folder / "qrels-train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}", encoding="utf-8")
    found = part_of_beir(folder, tmp_path / "part", 0.2)
    queries, documents = (
        {json.loads(line)["_id"] for line in lines_of(found / f"{name}.jsonl")} for name in ("queries", "corpus")
    )
    head, *grades = (line.split("\t") for line in lines_of(found / "qrels-train.tsv"))
    assert head == ["query-id", "corpus-id", "score"]
    assert {row[0] for row in grades} == queries
    assert {row[1] for row in grades} < documents
    assert 15 < len(queries) < 70
    assert len(documents) < 120


# ---- a case ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STS-B's files, of few texts."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "stsb").mkdir()
    for name in ("train", "dev"):
        rows = [(TEXTS[i % 23], TEXTS[(7 * i + j) % 23], i % 6) for i in range(60) for j in range(4)]
        (folder / "stsb" / f"{name}.csv").write_text(
            "".join(f"{first},{second},{score}\n" for first, second, score in rows), encoding="utf-8"
        )
    embedder(save_encoder(folder / "encoder")).save_pretrained(str(folder / "model"), create_model_card=False)
    return folder


def test_a_case_takes_its_own_place(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    out.write_text(json.dumps({"SST-2": {"runs": []}, "STS-B": {"runs": "of before"}}), encoding="utf-8")
    options: list[Any] = ["--data", data, "--model", data / "model", "--out", out, "--work", tmp_path / "work"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tasks", *map(str, options), "--only", "STS-B", "--threads", "1"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "BERT_FAST"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    found = json.loads(text)
    assert found["SST-2"] == {"runs": []}
    (run,) = found["STS-B"]["runs"]
    assert {"device", "versions", "commit", "date", "minutes"} <= found["STS-B"].keys()
    ours, plain = run["sides"]["bert-fast"], run["sides"]["plain"]
    assert ours["examples"] == plain["examples"]
    for side in (ours, plain):
        assert 0 < side["steps_seconds"] < side["seconds"]
        assert side["inference_seconds"] > 0
    assert ours["before"]["spearman"] == pytest.approx(plain["before"]["spearman"], abs=1e-6)
    assert "STS-B, spearman" in done.stdout


def test_every_task_is_measured() -> None:
    assert {case.task for case in CASES.values()} == {"classify", "tag", "match", "retrieve", "qa"}
