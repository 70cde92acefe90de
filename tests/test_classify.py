"""Classification: what is read as a label, what is learnt of them, and predictions against plain transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, save_encoder, save_tsv, sentences

pytest.importorskip("accelerate")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

import transformers
from sklearn.utils.class_weight import compute_sample_weight

from bert_fast.tasks import DataError, Model, Prediction, open_model
from bert_fast.tasks.batching import budget_batches
from bert_fast.tasks.classify import Classify, Text

TEXTS = [text for text, _ in sentences(60)]
LENGTHS = [len(text.split()) + 2 for text in TEXTS]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


def save_head(folder: Path, **config: Any) -> Path:
    return save_encoder(folder, architecture="BertForSequenceClassification", **config)


def texts(labels: Sequence[Any], pair: str | None = None) -> list[Text]:
    return [Text(f"a:{i}", f"text {i}", pair, label) for i, label in enumerate(labels)]


def read(folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> list[Text]:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Classify(**settings).read(file)


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "label"),
    [
        ("single", " good ", "good"),
        ("single", 3, "3"),
        ("single", True, "true"),
        ("multi", "b, a,,b", ("b", "a")),
        ("multi", ["x, y", 2, False], ("x, y", "2", "false")),
        ("multi", [], ()),
        ("multi", "", ()),
        ("number", "2.5", 2.5),
    ],
)
def test_labels(kind: Any, value: object, label: Any, tmp_path: Path) -> None:
    (example,) = read(tmp_path, [{"sentence": " a b ", "category": value}], kind=kind)
    assert example == Text(f"{tmp_path}/a.jsonl:1", "a b", None, label)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("single", "  ", "label is empty"),
        ("single", None, "label is null; one class is needed"),
        ("single", ["a"], "label is a list; one class is needed .kind 'multi' takes lists."),
        ("multi", None, "label is null; a list of classes is needed"),
        ("multi", {"a": 1}, "label is an object; a list of classes is needed"),
        ("multi", ["a", None], "label is null; one class is needed"),
        ("number", "much", "label is 'much'; a finite number is needed"),
    ],
)
def test_what_is_no_label(kind: Any, value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        read(tmp_path, [{"text": "a", "label": "1"}, {"text": "a", "label": value}], kind=kind)


def test_pairs(tmp_path: Path) -> None:
    file = save_tsv(tmp_path / "a.tsv", [("a", "b", "x")], ("premise", "hypothesis", "gold_label"))
    assert Classify().read(file) == [Text(f"{file}:2", "a", "b", "x")]
    file = save_tsv(tmp_path / "a.tsv", [("a", "b", "x"), ("a", "", "x")], ("premise", "hypothesis", "gold_label"))
    with pytest.raises(DataError, match=r"a\.tsv:3: pair is empty"):
        Classify().read(file)
    rows: list[dict[str, Any]] = [{"text": "a", "pair": "b", "label": "x"}, {"text": "a", "pair": None, "label": "x"}]
    with pytest.raises(DataError, match=r"a\.jsonl:2: no second text; the rows before have one"):
        read(tmp_path, rows)
    with pytest.raises(DataError, match=r"a\.jsonl:2: a second text; the rows before have none"):
        read(tmp_path, rows[::-1])


def test_without_labels(tmp_path: Path) -> None:
    """What stands where labels would be is not looked at, nor is its column needed where one is named."""
    task = Classify(columns={"text": "words", "label": "kind"})
    file = save_tsv(tmp_path / "a.tsv", [("a", "")], ("words", "label"))
    assert task.read(file, is_labelled=False) == [Text(f"{file}:2", "a", None, None)]
    with pytest.raises(DataError, match="no column kind"):
        task.read(file)


# ---- what is learnt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        (["10", "9", "-1", "9.5"] * 2, ("-1", "9", "9.5", "10")),
        (["nan", "2", "b", "inf", "1e3"] * 2, ("2", "1e3", "b", "inf", "nan")),
    ],
)
def test_order_of_labels(names: list[str], labels: tuple[str, ...]) -> None:
    task = Classify().fitted(texts(names))
    assert (task.labels, task.has_pairs) == (labels, False)


def test_given_labels() -> None:
    task = Classify(labels=("pos", "neg", "none"))
    assert task.fitted(texts(["neg", "pos"], "b")).labels == ("pos", "neg", "none")
    with pytest.raises(DataError, match="a:1: class 'other' is not among the model's: pos, neg, none"):
        task.fitted(texts(["neg", "other"]))


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("single", ["x", "x"], "only the class 'x'; two are needed"),
        ("multi", [("x",), ()], "only the class 'x'; two are needed"),
        ("multi", [(), ()], "only the class None; two are needed"),
        ("single", [str(i) for i in range(9)], "9 classes in 9 texts, such as 0, 1, 2; numbers are learnt with kind"),
    ],
)
def test_nothing_to_learn(kind: Any, labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Classify(kind=kind).fitted(texts(labels))


def test_few_texts_of_many_classes() -> None:
    """Names are classes, however few texts each has."""
    names = [f"intent {number % 20:02}" for number in range(30)]
    assert Classify().fitted(texts(names)).labels == tuple(sorted(set(names)))


def test_check() -> None:
    task = Classify().fitted(texts(["x", "y"]))
    task.check(texts(["y", None]), is_labelled=False)
    with pytest.raises(DataError, match="a:1: no label"):
        task.check(texts(["y", None]))
    with pytest.raises(DataError, match="a:1: class 'z' is not among the model's: x, y"):
        task.check(texts(["x", "z"]))
    with pytest.raises(DataError, match="a:0: a second text; the training examples have none"):
        task.check(texts(["x"], "b"))
    with pytest.raises(DataError, match="a:0: no second text; the training examples have one"):
        Classify().fitted(texts(["x", "y"], "b")).check(texts(["x"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "double"}, "kind is 'double'; it must be one of single, multi, number"),
        ({"class_weights": "balanced", "kind": "multi"}, "which needs kind 'single', not 'multi'"),
        ({"class_weights": "some"}, "class_weights is 'some'; it must be one of none, balanced"),
        ({"max_length": 2}, "max_length is 2; it must be at least 3"),
        ({"threshold": 1.0}, "threshold is 1.0; it must be between 0 and 1"),
        ({"labels": ("a", "b", "a")}, "labels are .*; there must be two strings or more, none of them twice"),
        ({"labels": ("a",)}, "labels are .*; there must be two strings or more"),
        ({"labels": (0, 1)}, "labels are .*; there must be two strings or more"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classify(**settings)


def test_settings_come_back() -> None:
    task = Classify(kind="multi", columns={"text": "x"}, labels=("b", "a"), has_pairs=True, threshold=0.25)
    assert Classify.of_settings(json.loads(json.dumps(task.settings()))) == task
    with pytest.raises(
        ValueError, match="classify has no setting 'label'; it has class_weights, columns, has_pairs, kind"
    ):
        Classify.of_settings({"label": "x"})


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "labels", "problem"),
    [
        ("single", ("no", "yes", "10"), "single_label_classification"),
        ("multi", ("no", "yes"), "multi_label_classification"),
        ("number", (), "regression"),
    ],
)
def test_build(kind: Any, labels: tuple[str, ...], problem: str, encoder: Path) -> None:
    config: Any = Classify(kind=kind, labels=labels).build(str(encoder)).module.config
    assert (config.problem_type, config.num_labels) == (problem, len(labels) or 1)
    if labels:
        assert config.id2label == dict(enumerate(labels))
        assert config.label2id == {name: index for index, name in enumerate(labels)}


def test_load_refuses_a_new_head(encoder: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder has no weights classifier\.bias, classifier\.weight"):
        open_model(encoder, "classify", labels=("a", "b"))
    with pytest.raises(ValueError, match="BertModel, which is for none of classify"):
        open_model(encoder)


@pytest.mark.parametrize(
    ("config", "kind", "labels"),
    [
        ({"id2label": {0: "x", 1: "y", 2: "z"}}, "single", ("x", "y", "z")),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi", ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"num_labels": 1}, "number", ()),
    ],
)
def test_models_from_elsewhere(config: dict[str, Any], kind: str, labels: tuple[str, ...], tmp_path: Path) -> None:
    tuned = open_model(save_head(tmp_path, **config), device=torch.device("cpu"))
    task = tuned.task
    assert isinstance(task, Classify)
    assert (task.kind, task.labels, task.has_pairs) == (kind, labels, None)
    for pair in (None, "a b"):  # one text or two: nobody has said
        assert len(tuned.predict(texts([None] * 3, pair))) == 3
    with pytest.raises(DataError, match="a second text; the examples before have none"):
        tuned.predict([*texts([None]), *texts([None], "b")])
    with pytest.raises(ValueError, match=r"the model has \d outputs; the task is of 4"):
        open_model(tmp_path, labels=("a", "b", "c", "d"), kind="single")


# ---- predictions -----------------------------------------------------------------------------------------------------


def expected_logits(folder: Path, examples: Sequence[Text]) -> torch.Tensor:
    """Of plain transformers, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat(
            [model(**tokenizer(example.text, example.pair, return_tensors="pt")).logits for example in examples]
        )


@pytest.mark.parametrize("tokens", [1, 40, 100_000])
@pytest.mark.parametrize("pair", [None, "the film was not good"])
@pytest.mark.parametrize("kind", ["single", "multi", "number"])
def test_predictions(kind: str, pair: str | None, tokens: int, tmp_path: Path) -> None:
    problems = {"single": "single_label_classification", "multi": "multi_label_classification", "number": "regression"}
    folder = save_head(tmp_path, num_labels=1 if kind == "number" else 3, problem_type=problems[kind])
    examples = [Text(str(i), text, pair, None) for i, text in enumerate(TEXTS[:24])]
    found = open_model(folder, device=torch.device("cpu")).predict(examples, tokens)
    logits = expected_logits(folder, examples)
    if kind == "number":
        assert [row["score"] for row in found] == pytest.approx(logits[:, 0].tolist(), abs=1e-5)
        return
    shares = logits.softmax(1) if kind == "single" else 1 / (1 + (-logits).exp())
    assert_scores(found, shares, kind)


def assert_scores(found: list[Prediction], shares: torch.Tensor, kind: str) -> None:
    assert len(found) == len(shares)
    for row, share in zip(found, shares.tolist(), strict=True):
        scores = {f"LABEL_{i}": value for i, value in enumerate(share)}
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
        best = max(scores, key=lambda name: scores[name])
        assert row["label"] == (best if kind == "single" else [name for name in scores if scores[name] >= 0.5])


def test_the_longest_texts(tmp_path: Path) -> None:
    """They are cut at max_length, and where none is given at what the model takes."""
    folder = save_head(tmp_path, num_labels=2)
    long = " ".join(["good"] * 99)
    for max_length in (7, SIZES["max_position_embeddings"]):
        cut = " ".join(["good"] * (max_length - 2))
        settings: dict[str, Any] = {"max_length": max_length} if max_length == 7 else {}
        found = open_model(folder, device=torch.device("cpu"), **settings).predict([Text("", long, None, None)])
        expected = expected_logits(folder, [Text("", cut, None, None)]).softmax(1)
        assert list(found[0]["scores"].values()) == pytest.approx(expected[0].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="max_length is 49; it must be within 3 and the model's 48"):
        open_model(folder, max_length=49).predict([Text("", long, None, None)])


def test_batches_are_of_tokens(tmp_path: Path) -> None:
    seen: list[torch.Size] = []
    tuned = open_model(save_head(tmp_path, num_labels=2), device=torch.device("cpu"))
    tuned.model.module.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["input_ids"].shape), with_kwargs=True
    )
    tuned.predict([Text("", text, None, None) for text in TEXTS], 50)
    assert sum(rows for rows, _ in seen) == len(TEXTS)
    assert all(rows * columns <= 50 for rows, columns in seen)
    assert [columns for _, columns in seen] == sorted((columns for _, columns in seen), reverse=True)
    assert len(seen) < sum(LENGTHS) / 50 * 1.5


@pytest.mark.parametrize("tokens", [1, 13, 10_000])
def test_budget_batches(tokens: int) -> None:
    batches = list(budget_batches(LENGTHS, tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    assert all(len(batch) == 1 or len(batch) * max(LENGTHS[i] for i in batch) <= tokens for batch in batches)
    assert list(budget_batches([], tokens)) == []
    with pytest.raises(ValueError, match="tokens is 0"):
        list(budget_batches(LENGTHS, 0))


# ---- losses ----------------------------------------------------------------------------------------------------------


def batch_loss(task: Classify, encoder: Path, examples: list[Text], out: Path) -> tuple[float, Model]:
    """The loss that the Trainer takes of all examples as one batch, in evaluation mode."""
    torch.manual_seed(7)
    model = task.build(str(encoder))
    model.module.eval()
    trainer = task.trainer(model, examples, {"output_dir": str(out), "use_cpu": True, "report_to": []})
    batch = trainer.data_collator(trainer.train_dataset)
    return trainer.compute_loss(model.module, batch).item(), model


def logits_of(model: Model, examples: list[Text]) -> torch.Tensor:
    """One text at a time, by the model as it was before swap."""
    with torch.no_grad():
        texts = [model.tokenizer(example.text, return_tensors="pt") for example in examples]
        return torch.cat([model.module(**text).logits for text in texts])


@pytest.mark.parametrize("kind", ["single", "balanced", "multi", "number"])
def test_losses(kind: str, encoder: Path, tmp_path: Path) -> None:
    labels: dict[str, list[Any]] = {
        "single": ["a", "b", "c", "a"] * 3,
        "balanced": ["a"] * 6 + ["b"] * 5 + ["c"],
        "multi": [("a",), ("b", "c"), (), ("c",)] * 3,
        "number": [0.5, -3.0, 2.0, 7.0] * 3,
    }
    names = labels[kind]
    examples = [Text("", text, None, label) for text, label in zip(TEXTS, names, strict=False)]
    task = Classify(
        kind="single" if kind == "balanced" else kind,  # type: ignore[arg-type]
        class_weights="balanced" if kind == "balanced" else "none",
    ).fitted(examples)
    loss, model = batch_loss(task, encoder, examples, tmp_path)
    logits = logits_of(model, examples)
    if kind == "number":
        expected = ((logits[:, 0] - torch.tensor(names)) ** 2).mean()
    elif kind == "multi":
        truth = torch.tensor([[name in label for name in "abc"] for label in names])
        expected = -torch.where(truth, logits.sigmoid(), 1 - logits.sigmoid()).log().mean()
    else:
        weight = torch.ones(12)
        if kind == "balanced":  # scikit-learn's formula: texts / (classes * texts of the class)
            weight = torch.from_numpy(compute_sample_weight("balanced", names)).float()
        rows = torch.arange(12)
        expected = -(weight * logits.log_softmax(1)[rows, [*map("abc".index, names)]]).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert math.isfinite(loss)
