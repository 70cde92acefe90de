"""Retrieval: prompts, negatives, training by in-batch negatives, search in the whole corpus, measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401
from sentence_models import ANIMALS, COLOURS, VERBS, embedder, save_encoder, sentence_transformers

from bert_fast.tasks import DataError, Outcome, Sources, Training, open_model
from bert_fast.tasks.data.queries import Corpus, Query
from bert_fast.tasks.finetune import finetune
from bert_fast.tasks.ranking import ranking_measures
from bert_fast.tasks.retrieve import Retrieve
from bert_fast.tasks.task import Model

CPU = torch.device("cpu")
TRAINING = Training(epochs=6, batch_size=8, learning_rate=1e-2)

PASSAGES = [f"the {colour} {animal} {verb}" for colour in COLOURS for animal in ANIMALS for verb in VERBS]

OTHER = dict(zip((*COLOURS, *VERBS), ("in", "on", "under", "query", "a", ":", "the"), strict=True))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder", initializer_range=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BEIR's layout: a query has other words for a colour and a verb; all passages with both answer it."""
    folder = tmp_path_factory.mktemp("beir")
    corpus = [{"_id": f"d{row}", "title": "", "text": text} for row, text in enumerate(PASSAGES)]
    queries, lines = [], {"train": ["query-id\tcorpus-id\tscore"], "dev": ["query-id\tcorpus-id\tscore"]}
    for number, (colour, verb) in enumerate((colour, verb) for colour in COLOURS for verb in VERBS):
        words = f"why {OTHER[colour]} {OTHER[verb]}"
        queries.append({"_id": f"q{number}", "text": words})
        for row, text in enumerate(PASSAGES):
            if colour in text and verb in text:
                lines["dev" if number % 4 == 0 else "train"].append(f"q{number}\td{row}\t1")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for split, rows_of_split in lines.items():
        (folder / f"qrels-{split}.tsv").write_text("\n".join(rows_of_split) + "\n", encoding="utf-8")
    return folder


def run(encoder: str, folder: Path, out: Path, **settings: Any) -> Outcome:
    sources = Sources(model=encoder, train=folder / "qrels-train.tsv", dev=folder / "qrels-dev.tsv")
    return finetune(Retrieve(**settings), sources, out, TRAINING, before=True, device=CPU)


def query(positives: dict[str, int], corpus: Corpus, negatives: tuple[str, ...] = ()) -> Query:
    return Query("a.jsonl:1", "q", "why runs red", positives, list(negatives), corpus)


def corpus_of(*texts: str) -> Corpus:
    corpus = Corpus()
    for row, text in enumerate(texts):
        corpus.add(f"d{row}", text)
    return corpus


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"mini_batch": 3}, {"mine_negatives": 2, "negatives": 3}, {"query_prompt": "query : ", "max_length": 7}],
    ids=str,
)
def test_finetune(encoder: str, folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    outcome = run(encoder, folder, tmp_path / "out", **settings)
    assert outcome.measures["ndcg@10"] > outcome.before["ndcg@10"] + 0.1
    assert outcome.examples == {"train": 9, "dev": 3}

    plain = sentence_transformers.SentenceTransformer(str(outcome.folder), device="cpu", local_files_only=True)
    dev = Retrieve().read(folder / "qrels-dev.tsv")
    scores = plain.encode_query([row.text for row in dev]) @ plain.encode_document(PASSAGES).T
    scores /= np.linalg.norm(plain.encode_query([row.text for row in dev]), axis=1)[:, None]
    scores /= np.linalg.norm(plain.encode_document(PASSAGES), axis=1)
    lines = (outcome.folder / "dev_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for row, line in zip(scores, lines, strict=True):
        hits = json.loads(line)["results"]
        assert len(hits) == len(PASSAGES)
        np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(row)[::-1], atol=1e-5)
        np.testing.assert_allclose([row[int(hit["id"][1:])] for hit in hits], np.sort(row)[::-1], atol=1e-5)

    tuned = open_model(outcome.folder, device=CPU)
    assert tuned.measure(dev, tuned.predict(dev)) == pytest.approx(outcome.measures, abs=1e-6)


def test_tables(encoder: str, tmp_path: Path) -> None:
    """Of queries and passages; the passages of all rows are the corpus."""
    file = tmp_path / "train.tsv"
    rows = [(f"why {colour}", f"the {colour} {animal}") for animal in ANIMALS for colour in COLOURS]
    file.write_text("query\tpositive\n" + "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    sources = Sources(model=encoder, train=file, held_out=0.4)
    outcome = finetune(Retrieve(top=10), sources, tmp_path / "out", TRAINING, device=CPU)
    assert outcome.examples["train"] + outcome.examples["dev"] == len(COLOURS)
    assert 0 < outcome.measures["ndcg@10"] <= 1


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_hard_negatives_are_filled_up() -> None:
    corpus = corpus_of("a", "b", "c", "d", "e")
    examples = [query({"d0": 1}, corpus, ("d1", "d2")), query({"d3": 1, "d4": 1}, corpus)]
    rows = Retrieve(negatives=2)._rows(examples, [(), ()], 1)
    assert list(rows) == ["query", "positive", "negative_1", "negative_2"]
    assert rows["positive"] == ["a", "d", "e"]
    assert {rows["negative_1"][0], rows["negative_2"][0]} == {"b", "c"}
    for row in (1, 2):
        assert {rows["negative_1"][row], rows["negative_2"][row]} <= {"a", "b", "c"}
    assert rows == Retrieve(negatives=2)._rows(examples, [(), ()], 1)


def test_mined_negatives_are_not_relevant(encoder: str) -> None:
    module = embedder(encoder)
    corpus = corpus_of(*PASSAGES)
    relevant = {f"d{row}": 1 for row, text in enumerate(PASSAGES) if "red" in text}
    task = Retrieve(mine_negatives=5)
    (mined,) = task._mined(Model(module, module.tokenizer), [query(relevant, corpus)])
    scores = module.encode(PASSAGES) @ module.encode("why runs red")
    scores /= np.linalg.norm(module.encode(PASSAGES), axis=1)
    best = [f"d{row}" for row in np.argsort(-scores, kind="stable") if f"d{row}" not in relevant]
    assert mined == best[:5]


def test_no_negative_is_left() -> None:
    corpus = corpus_of("a", "b")
    with pytest.raises(DataError, match="every document is relevant, so there is no negative"):
        Retrieve(negatives=1)._rows([query({"d0": 1}, corpus, ("d1",)), query({"d0": 1, "d1": 1}, corpus)], [(), ()], 1)


# ---- search ----------------------------------------------------------------------------------------------------------


def test_the_query_itself_is_left_out(encoder: str) -> None:
    """As in those of BEIR's sets whose queries are documents of the corpus."""
    module = embedder(encoder)
    corpus = corpus_of("the red cat", "the blue dog")
    itself = Query("x:1", "d0", "the red cat", {"d1": 1}, [], corpus)
    (found,) = Retrieve().predict(Model(module, module.tokenizer), [itself], 100)
    assert [hit["id"] for hit in found["results"]] == ["d1"]


def test_no_queries(encoder: str) -> None:
    module = embedder(encoder)
    assert Retrieve().predict(Model(module, module.tokenizer), [], 100) == []


# ---- measures --------------------------------------------------------------------------------------------------------


def test_measures_by_hand() -> None:
    """Relevant documents at ranks 2 and 4 of one query, none found of another, at 11 of a third."""
    others = [f"x{row}" for row in range(20)]
    rankings = [["x", "a", "y", "b"], others, [*others[:10], "c"]]
    found = ranking_measures([{"a": 2, "b": 1, "z": 0}, {"a": 1}, {"c": 1}], rankings)
    gain = (2 / np.log2(3) + 1 / np.log2(5)) / (2 / np.log2(2) + 1 / np.log2(3))
    assert found == pytest.approx(
        {
            "ndcg@10": gain / 3,
            "recall@10": 1 / 3,
            "recall@100": 2 / 3,
            "mrr@10": 0.5 / 3,
            "map": ((1 / 2 + 2 / 4) / 2 + 1 / 11) / 3,
        }
    )


def test_lists_of_other_queries() -> None:
    with pytest.raises(ValueError, match="there are 1 queries and 2 lists"):
        ranking_measures([{"a": 1}], [["a"], ["b"]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 9}, "top is 9; it must be at least 10"),
        ({"mini_batch": 0}, "mini_batch is 0; it must be at least 1"),
        ({"mine_negatives": 6}, "mine_negatives is 6; it must be at most negatives, which is 5"),
        ({"negatives": -1}, "negatives is -1; it must be at least 0"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retrieve(**settings)


def test_the_split_stays_with_the_training(folder: Path) -> None:
    """Of a folder with several nobody means that of the training queries later."""
    task = Retrieve(split="train")
    examples = task.read(folder)
    fitted = task.fitted(examples)
    assert fitted == Retrieve()
    with pytest.raises(DataError, match=r"several splits .*dev, train"):
        fitted.read(folder)


def test_a_table_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"query": "why", "positive": "so"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"split is 'test'; .*a\.jsonl is a table, which has none"):
        Retrieve(split="test").read(tmp_path / "a.jsonl")
