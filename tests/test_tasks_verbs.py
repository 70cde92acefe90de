"""The verbs of bert_fast.tasks in Python: settings told apart, files and objects, models opened once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_encoder, save_tsv, sentences, transformers

pytest.importorskip("sentence_transformers")

from bert_fast import tasks
from bert_fast.tasks.classify import Classify
from bert_fast.tasks.verbs import sorted_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tasks.Outcome:
    folder = tmp_path_factory.mktemp("run")
    return tasks.finetune(
        "classify",
        model=save_encoder(folder / "encoder"),
        train=save_tsv(folder / "train.tsv", sentences(60)),
        out=folder / "out",
        held_out=0.3,
        device="cpu",
        epochs=2,
        batch_size=8,
        learning_rate=2e-3,
        max_length=17,
    )


def test_finetune(run: tasks.Outcome) -> None:
    tuned = tasks.open_model(run.folder, device=torch.device("cpu"))
    assert isinstance(tuned.task, Classify)
    assert (tuned.task.max_length, tuned.task.labels) == (17, ("bad", "good"))
    assert sum(run.examples.values()) == 60


def test_transformers_load_the_result(run: tasks.Outcome) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.folder)
    texts = [text for text, _ in sentences(7, seed=3)]
    with torch.no_grad():
        logits = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    found = tasks.predict(run.folder, texts, device="cpu")
    for row, shares in zip(found, logits.softmax(-1).tolist(), strict=True):
        assert list(row["scores"].values()) == pytest.approx(shares, abs=1e-5)


# ---- predict and evaluate --------------------------------------------------------------------------------------------


def test_files_and_objects(run: tasks.Outcome, tmp_path: Path) -> None:
    rows = sentences(11, seed=4)
    texts = [text for text, _ in rows]
    expected = tasks.predict(run.folder, save_tsv(tmp_path / "a.tsv", rows), device="cpu")
    tuned = tasks.open_model(run.folder, device=torch.device("cpu"))
    for source in (texts, tuple(texts), iter(texts), [(text,) for text in texts], [{"text": text} for text in texts]):
        assert tasks.predict(tuned, source) == expected
    assert tasks.predict(tuned, []) == []


def test_evaluate(run: tasks.Outcome, tmp_path: Path) -> None:
    rows = sentences(40, seed=5)
    measures = tasks.evaluate(run.folder, save_tsv(tmp_path / "a.tsv", rows), device="cpu")
    found = [row["label"] for row in tasks.predict(run.folder, [text for text, _ in rows], device="cpu")]
    right = [label == expected for label, (_, expected) in zip(found, rows, strict=True)]
    assert measures["accuracy"] == pytest.approx(sum(right) / len(right))
    dicts = [{"sentence": text, "category": label} for text, label in rows]
    assert tasks.evaluate(run.folder, dicts, device="cpu") == measures


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"text": "good"}, "source is a dict; a file or a list of texts, pairs or dicts is needed"),
        (["good", " "], "source:2: text is empty"),
        (["good", 7], r"source:2: 7; a text, up to 2 of them \(text, pair\) or a dict is needed"),
        (["good", ("a", "b", "c")], "source:2: .*up to 2 of them"),
        ([{"text": "good"}, {"body": "good"}], "source:2: no column text"),
        ([{"text": {"a": {1}}}], "source:1: .*not JSON serializable"),
        ([("good", "film")], "source:1: a second text; the training examples have none"),
    ],
)
def test_bad_objects(run: tasks.Outcome, source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.predict(run.folder, source, device="cpu")


def test_labels_are_needed_to_evaluate(run: tasks.Outcome) -> None:
    with pytest.raises(tasks.DataError, match="source:1: no column label"):
        tasks.evaluate(run.folder, ["good"], device="cpu")


def test_an_opened_model_has_its_device(run: tasks.Outcome) -> None:
    tuned = tasks.open_model(run.folder, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="are given to open_model"):
        tasks.predict(tuned, ["good"], device="cpu")


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_told_apart() -> None:
    task, training = sorted_settings("classify", {"kind": "multi", "epochs": 7, "threshold": 0.25, "seed": 3})
    assert task == Classify(kind="multi", threshold=0.25)
    assert training == tasks.Training(epochs=7, seed=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "setting 'learning_rat' is unknown; did you mean learning_rate"),
        ({"zzz": 1}, "setting 'zzz' is unknown; there are accumulation, batch_size"),
        ({"epochs": -1}, "epochs is -1; it must be positive"),
        ({"kind": "many"}, "kind is 'many'; it must be one of single, multi, number"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sorted_settings("classify", settings)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="task is 'sort'; it must be one of classify, tag, match, retrieve, qa"):
        sorted_settings("sort", {})


# ---- search and rerank -----------------------------------------------------------------------------------------------


def test_search(tmp_path: Path) -> None:
    encoder, texts = save_encoder(tmp_path / "encoder"), [text for text, _ in sentences(12)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    summary = tasks.embed(encoder, tmp_path / "texts.txt", tmp_path / "vectors.npy")
    assert summary.rows == 12
    found = tasks.search(summary.out, texts[3:5], model=encoder, texts=tmp_path / "texts.txt", top=2)
    assert [hits[0].text for hits in found] == texts[3:5]
    assert found == tasks.search(summary.out, texts[3:5], model=str(encoder), texts=texts, top=2)


def test_rerank(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "cross", architecture="BertForSequenceClassification", num_labels=1)
    passages = [text for text, _ in sentences(6)]
    (found,) = tasks.rerank(folder, ["a film"], [passages], device="cpu", top=4)
    assert len(found) == 4
    assert sorted((hit.score for hit in found), reverse=True) == [hit.score for hit in found]
    model = tasks.open_cross_encoder(str(folder), device="cpu")
    assert tasks.rerank(model, ["a film"], [passages], top=4) == [found]
    with pytest.raises(ValueError, match="are given to open_cross_encoder"):
        tasks.rerank(model, ["a film"], [passages], int8=True)


# ---- texts and pairs of the other tasks -----------------------------------------------------------------------------


def test_pairs_to_match(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    same, other = tasks.predict(
        encoder, [("a good film", "a good film"), ("a film", "bad")], task="match", device="cpu"
    )
    assert same["cosine"] == pytest.approx(1)
    assert other["cosine"] < 1


def test_questions_to_answer(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "qa", architecture="BertForQuestionAnswering")
    sizes: dict[str, Any] = {"longest_question": 16, "stride": 8}
    (found,) = tasks.predict(folder, [("was the film good", "the film was very good")], device="cpu", **sizes)
    assert found["text"] in "the film was very good"


def test_texts_to_tag(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "tag", architecture="BertForTokenClassification", num_labels=3)
    (found,) = tasks.predict(folder, ["the film"], device="cpu", words="blanks")
    assert len(found["labels"]) == 2
