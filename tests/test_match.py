"""Pairs of texts: files, scales, training of both kinds, and their models in plain sentence-transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401
from sentence_models import ANIMALS, COLOURS, embedder, save_encoder, sentence_transformers

import bert_fast
from bert_fast.tasks import DataError, Outcome, Sources, Training, open_model
from bert_fast.tasks.finetune import finetune
from bert_fast.tasks.match import Match, Pair
from bert_fast.tasks.task import Model

pytestmark = [
    pytest.mark.filterwarnings("ignore:bert_fast.*original path. gradient checkpointing is on:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*`gradient_checkpointing_enable`:FutureWarning"
    ),  # transformers of sentence-transformers
]

TRAINING = Training(epochs=1, batch_size=8, learning_rate=1e-2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder", initializer_range=0.1)


Files = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Training and evaluation pairs for each kind of model, of a score that some steps can teach it.

    For "bi": whether both texts are of a mammal or none is; for "cross": whether the second is.
    """
    folder = tmp_path_factory.mktemp("data")
    texts = [f"the {colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    result = {}
    for kind in ("bi", "cross"):
        lines = []
        for first, second in ((first, second) for first in texts for second in texts[::3]):
            is_mammal = [text.split()[2] in ("cat", "dog") for text in (first, second)]
            score = 4 * (is_mammal[1] if kind == "cross" else is_mammal[0] == is_mammal[1])
            lines.append(f"{first}\t{second}\t{score}")
        parts = {"train": [line for number, line in enumerate(lines) if number % 5], "dev": lines[::5]}
        for name, part in parts.items():
            text = "\n".join(["sentence1\tsentence2\tscore", *part]) + "\n"
            (folder / f"{kind}-{name}.tsv").write_text(text, encoding="utf-8")
        result[kind] = (folder / f"{kind}-train.tsv", folder / f"{kind}-dev.tsv")
    return result


def pair(score: float | None, place: str = "a.tsv:2") -> Pair:
    return Pair(place, "the cat", "a dog", score)


# ---- files and scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "sentence1\tsentence2\tscore\nthe cat\ta dog\t2.5\n"),
        ("a.csv", 'text1,text2,similarity\n"the cat", a dog,2.5\n'),
        ("a.jsonl", '{"question1": "the cat", "question2": "a dog", "label": 2.5}\n'),
        ("a.jsonl", '{"score": 2.5, "text_b": "a dog", "text_a": "the cat", "other": []}\n'),
    ],
)
def test_reading(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    line = 1 if name.endswith("l") else 2
    assert Match().read(file) == [Pair(f"{file}:{line}", "the cat", "a dog", 2.5)]


def test_columns_by_number(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("x,1,the cat,a dog\n", encoding="utf-8")
    task = Match(columns={"sentence1": "3", "sentence2": "4", "score": "2"})
    assert task.read(file) == [Pair(f"{file}:1", "the cat", "a dog", 1.0)]


def test_scores_may_be_missing_in_use(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("sentence1\tsentence2\nthe cat\ta dog\n", encoding="utf-8")
    assert Match().read(file, is_labelled=False) == [Pair(f"{file}:2", "the cat", "a dog", None)]
    with pytest.raises(DataError, match=r"a.tsv:1: no column score or similarity"):
        Match().read(file)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("the cat\ta dog\tmuch", "score is 'much'; a finite number is needed"),
        ("the cat\ta dog\tnan", "score is 'nan'; a finite number is needed"),
        ("the cat\ta dog\t", "score is ''; a finite number is needed"),
        ("the cat\t \t1", "sentence2 is empty"),
        ("\ta dog\t1", "sentence1 is empty"),
        ("the cat\ta dog", "2 fields; the first line has 3"),
    ],
)
def test_bad_rows(tmp_path: Path, row: str, reason: str) -> None:
    file = tmp_path / "a.tsv"
    file.write_text(f"sentence1\tsentence2\tscore\nthe cat\ta dog\t1\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        Match().read(file)
    assert str(caught.value) == f"{file}:3: {reason}"


@pytest.mark.parametrize(
    ("scores", "low", "high"), [((0.2, 4.8), 0, 5), ((1, 5), 1, 5), ((0.1, 0.9), 0, 1), ((-0.5, 0.5), -1, 1)]
)
def test_scale_is_learnt(scores: tuple[float, ...], low: float, high: float) -> None:
    task = Match().fitted([pair(score) for score in scores])
    assert (task.low, task.high) == (low, high)
    assert Match.of_settings(json.loads(json.dumps(task.settings()))) == task


def test_given_scale_stays() -> None:
    task = Match(low=0, high=10).fitted([pair(2), pair(3)])
    assert (task.low, task.high) == (0, 10)
    with pytest.raises(DataError, match=r"a.tsv:2: score 11 is not within 0 and 10"):
        Match(low=0, high=10).fitted([pair(2), pair(11)])


def test_equal_scores_are_refused() -> None:
    with pytest.raises(DataError, match=r"scores are within 2.5 and 2.5; two are needed"):
        Match().fitted([pair(2.5), pair(2.5)])


def test_scores_outside_are_refused() -> None:
    task = Match().fitted([pair(0), pair(5)])
    task.check([pair(5.0), pair(None)], is_labelled=False)
    with pytest.raises(DataError, match="no score"):
        task.check([pair(5.0), pair(None)])
    with pytest.raises(DataError, match=r"dev.tsv:7: score 5.5 is not within 0 and 5"):
        task.check([pair(5.5, "dev.tsv:7")])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "tri"}, "kind is 'tri'; it must be one of bi, cross"),
        ({"kind": "cross", "loss": "cosent"}, "loss is 'cosent', which needs kind 'bi', not 'cross'"),
        ({"loss": "mse"}, "loss is 'mse'; it must be one of cosine, cosent"),
        ({"low": 2, "high": 2}, "low is 2, high is 2; low must be less than high"),
        ({"max_length": 2}, "max_length is 2; it must be at least 3"),
    ],
)
def test_bad_settings(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Match(**settings)


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_cosines(encoder: str, files: Files) -> None:
    task, module = Match(), embedder(encoder)
    examples = task.read(files["bi"][1])
    first, second = (module.encode([getattr(e, name) for e in examples]) for name in ("sentence1", "sentence2"))
    expected = sentence_transformers.util.pairwise_cos_sim(first, second)
    found = task.predict(Model(module, module.tokenizer), examples, 64)
    np.testing.assert_allclose([row["cosine"] for row in found], expected, atol=1e-5)


def test_no_examples(encoder: str) -> None:
    assert Match().predict(Match().build(encoder), [], 64) == []


def test_measures() -> None:
    examples = [pair(score) for score in (0, 1, 2, 4)]
    measures = Match().measure(examples, [{"cosine": cosine} for cosine in (-0.1, 0.2, 0.1, 0.9)])
    assert measures["spearman"] == pytest.approx(0.8)  # 1 - 6·2 / (4·15)
    assert measures.keys() == {"spearman", "pearson"}
    measures = Match(kind="cross").measure(examples, [{"score": score} for score in (1, 1, 2, 4)])
    assert measures["mse"] == 0.25


# ---- training --------------------------------------------------------------------------------------------------------


def run(encoder: str, files: Files, out: Path, task: Match, **settings: Any) -> Outcome:
    sources = Sources(model=encoder, train=files[task.kind][0], dev=files[task.kind][1])
    training = replace(
        TRAINING, **{name: value for name, value in settings.items() if name not in ("resume", "before")}
    )
    rest = {name: value for name, value in settings.items() if name in ("resume", "before")}
    return finetune(task, sources, out, training, device=torch.device("cpu"), **rest)


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dev_predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("settings", "training"),
    [
        ({"loss": "cosine"}, {}),
        ({"loss": "cosent"}, {"gradient_checkpointing": True}),
        ({"kind": "cross"}, {"gradient_checkpointing": True}),
        ({"kind": "cross"}, {"precision": "bf16"}),
        ({"loss": "cosine", "max_length": 7}, {"precision": "bf16"}),
    ],
    ids=str,
)
def test_finetune(
    encoder: str, files: Files, tmp_path: Path, settings: dict[str, Any], training: dict[str, Any]
) -> None:
    outcome = run(encoder, files, tmp_path / "out", Match(**settings), before=True, **training)
    assert outcome.measures["spearman"] > max(0.6, outcome.before["spearman"])
    assert "fine-tuned: match" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    examples = Match().read(files[settings.get("kind", "bi")][1])
    name = "score" if settings.get("kind") == "cross" else "cosine"
    found = [row[name] for row in predictions(outcome.folder)]
    np.testing.assert_allclose(found, _plainly(outcome.folder, examples, name), atol=2e-5)

    tuned = open_model(outcome.folder, device=torch.device("cpu"))
    assert isinstance(tuned.task, Match)
    assert (tuned.task.low, tuned.task.high) == (0, 4)
    assert tuned.measure(examples, tuned.predict(examples)) == pytest.approx(outcome.measures, abs=1e-5)


def _plainly(folder: Path, examples: list[Pair], name: str) -> Any:
    """What sentence-transformers makes of the folder."""
    if name == "score":
        module = sentence_transformers.CrossEncoder(str(folder), device="cpu")
        return 4 * module.predict([(e.sentence1, e.sentence2) for e in examples], show_progress_bar=False)
    module = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    first, second = (module.encode([getattr(e, part) for e in examples]) for part in ("sentence1", "sentence2"))
    return sentence_transformers.util.pairwise_cos_sim(first, second).numpy()


def test_best_checkpoint_is_kept(encoder: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measures = iter([0.9, 0.1, 0.9])  # after steps 5 and 10, and of what is kept
    monkeypatch.setattr(Match, "measure", lambda *_: {"spearman": next(measures)})
    outcome = run(encoder, files, tmp_path / "out", Match(), eval_steps=5)
    found = [row["cosine"] for row in predictions(outcome.folder)]
    examples = Match().read(files["bi"][1])
    first, last = (
        _plainly(outcome.folder / "checkpoints" / f"checkpoint-{step}", examples, "cosine") for step in (5, 10)
    )
    np.testing.assert_allclose(found, first, atol=2e-5)
    assert np.abs(np.array(found) - last).max() > 0.01


def test_lost_checkpoint_is_an_error(
    encoder: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: Any, path: str) -> None:
        raise OSError(f"{path} is lost")

    monkeypatch.setattr(sentence_transformers.SentenceTransformerTrainer, "_load_from_checkpoint", lost)
    with pytest.raises(OSError, match="checkpoint-10 is lost"):
        run(encoder, files, tmp_path / "out", Match())


def test_resume(encoder: str, files: Files, tmp_path: Path) -> None:
    """A run that stops after a checkpoint and goes on ends where one without a stop does."""
    task = Match()
    whole = run(encoder, files, tmp_path / "whole", task, eval_steps=5)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 8:
            raise InterruptedError

    sources = Sources(model=encoder, train=files[task.kind][0], dev=files[task.kind][1])
    training = replace(TRAINING, eval_steps=5)
    with pytest.raises(InterruptedError):
        finetune(task, sources, tmp_path / "parts", training, device=torch.device("cpu"), on_log=stop)
    parts = run(encoder, files, tmp_path / "parts", task, eval_steps=5, resume=True)
    assert parts.measures == pytest.approx(whole.measures, abs=1e-5)


# ---- models from elsewhere -------------------------------------------------------------------------------------------


def test_bi_encoder_from_elsewhere(encoder: str, tmp_path: Path) -> None:
    embedder(encoder).save_pretrained(str(tmp_path / "bi"), create_model_card=False)
    tuned = open_model(tmp_path / "bi", device=torch.device("cpu"))
    assert tuned.task == Match()
    assert tuned.predict([Pair("", "the cat", "the cat", None)])[0]["cosine"] == pytest.approx(1)


@pytest.mark.parametrize("is_plain", [False, True])
def test_cross_encoder_from_elsewhere(tmp_path: Path, is_plain: bool) -> None:
    """Saved by transformers or, with modules.json, by sentence-transformers."""
    folder = save_encoder(tmp_path / "plain", "BertForSequenceClassification", num_labels=1)
    module = sentence_transformers.CrossEncoder(folder, device="cpu")
    if not is_plain:
        folder = str(tmp_path / "cross")
        module.save_pretrained(folder, create_model_card=False)
    tuned = open_model(Path(folder), "match" if is_plain else None, device=torch.device("cpu"))
    assert tuned.task == Match(kind="cross")
    assert bert_fast.report(tuned.model.module).encoders
    found = tuned.predict([Pair("", "the cat", "a dog", None)])
    assert found[0]["score"] == pytest.approx(module.predict([("the cat", "a dog")])[0], abs=1e-5)
