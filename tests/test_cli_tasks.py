"""bert-fast finetune, predict, eval, embed, search and rerank, on tiny models and files made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import save_encoder, save_tsv, sentences

pytest.importorskip("click")
pytest.importorskip("sentence_transformers")

import click
from click.testing import CliRunner

from bert_fast import tasks
from bert_fast.cli import app, finetune_app
from bert_fast.cli import options as command_options
from bert_fast.tasks.settings import Training
from bert_fast.tasks.table import TASKS, task_named

Call = Callable[..., str]

COMMANDS = ("predict", "eval", "embed", "search", "rerank", *(f"finetune {name}" for name in TASKS))


def invoke(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app.app, [str(argument) for argument in arguments])


def passed(*arguments: object) -> str:
    found = invoke(*arguments)
    assert found.exit_code == 0, found.output
    return str(found.output)


def refused(*arguments: object) -> str:
    found = invoke(*arguments)
    assert found.exit_code == 2, found.output
    return " ".join(found.output.split())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def run(encoder: Path) -> Path:
    """A classifier, fine-tuned from the command line."""
    out = encoder.parent / "run"
    train = save_tsv(encoder.parent / "train.tsv", sentences(120))
    output = passed(
        *("finetune", "classify", "--model", encoder, "--train", train, "--out", out),
        *("--epochs", 8, "--learning-rate", 3e-3, "--batch-size", 16, "--held-out", 0.2, "--patience", 20),
    )
    assert "accuracy" in output
    assert f"model in {out}" in output
    return out


# ---- finetune --------------------------------------------------------------------------------------------------------


def test_the_card_names_the_command(run: Path) -> None:
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "bert-fast" in card
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["dev"]["accuracy"] > 0.7


@pytest.mark.parametrize("name", TASKS)
def test_every_setting_is_an_option(name: str) -> None:
    command = finetune_app.finetune.commands[name]
    learnt = {"labels", "has_pairs", "fallback", "has_impossible"}
    options = {parameter.name for parameter in command.params}
    wanted = {field.name for kind in (task_named(name), tasks.Sources, Training) for field in fields(kind)}
    assert wanted - options <= learnt
    assert options - wanted <= {"out", "resume", "before", "device", "help"}


@pytest.mark.parametrize("name", TASKS)
def test_defaults_are_the_tasks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(finetune_app, "_run", lambda *call: calls.append(call))
    passed("finetune", name, "--model", "x", "--train", save_tsv(tmp_path / "a.tsv", []), "--out", tmp_path / "out")
    ((kind, values),) = calls
    assert kind is task_named(name)
    for holder in (Training(**kind.training), kind()):
        for field in fields(holder):
            assert values.get(field.name, getattr(holder, field.name)) == getattr(holder, field.name)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    output = passed(*command.split(), "--help")
    assert f"bert-fast {command}" in output  # an example
    for line in output.splitlines():
        assert len(line) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_a_gpu_is_taken_where_there_is_one(command: str) -> None:
    assert "[default: a GPU if there is one]" in " ".join(passed(*command.split(), "--help").split())
    context = click.Context(app.app)
    for option in (command_options.found_device_option, command_options.device_of_any_option):
        (parameter,) = option(click.command()(lambda: None)).params
        assert parameter.process_value(context, None) is None
        assert str(parameter.process_value(context, "cpu")) == "cpu"
        with pytest.raises(click.BadParameter, match="'gpu' is no device; cpu or cuda is meant"):
            parameter.process_value(context, "gpu")


def test_bad_line(encoder: Path, tmp_path: Path) -> None:
    train = save_tsv(tmp_path / "train.tsv", [("good", "a"), ("bad",)])
    message = refused("finetune", "classify", "--model", encoder, "--train", train, "--out", tmp_path / "out")
    assert f"{train}:3: 1 field; the first line has 2" in message
    assert not (tmp_path / "out").exists()


def test_bad_column(encoder: Path, tmp_path: Path) -> None:
    train = save_tsv(tmp_path / "train.tsv", [("good", "a")])
    arguments = ("finetune", "classify", "--model", encoder, "--train", train, "--out", tmp_path / "out")
    assert "'label' is not ROLE=NAME" in refused(*arguments, "--column", "label")
    assert "no column topic" in refused(*arguments, "--column", "label=topic")


# ---- predict and eval ------------------------------------------------------------------------------------------------


def test_predict(run: Path, tmp_path: Path) -> None:
    texts = [text for text, _ in sentences(9, seed=5)]
    source = save_tsv(tmp_path / "texts.tsv", [(text,) for text in texts], header=("text",))
    output = passed("predict", run, source, "--out", tmp_path / "out.jsonl")
    assert "9 predictions" in output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row.pop("place") for row in rows] == [f"{source}:{line}" for line in range(2, 11)]
    assert rows == tasks.predict(run, texts, device="cpu")
    shown = [json.loads(line) for line in passed("predict", run, source).splitlines()]
    assert [row["label"] for row in shown] == [row["label"] for row in rows]


def test_eval(run: Path, tmp_path: Path) -> None:
    source = save_tsv(tmp_path / "dev.tsv", sentences(30, seed=6))
    output = passed("eval", run, source, "--json", tmp_path / "measures.json")
    measures = json.loads((tmp_path / "measures.json").read_text(encoding="utf-8"))
    assert measures == tasks.evaluate(run, source, device="cpu")
    assert f"{measures['accuracy']:.4f}" in output


def test_settings(run: Path, tmp_path: Path) -> None:
    source = save_tsv(tmp_path / "texts.tsv", [("good", "good")])
    assert "'max_length' is not NAME=VALUE" in refused("predict", run, source, "--set", "max_length")
    assert "max_length is 2" in refused("predict", run, source, "--set", "max-length=2")
    assert "no setting 'colour'" in refused("predict", run, source, "--set", "colour=1")


def test_settings_of_another_kind(run: Path, tmp_path: Path) -> None:
    source = save_tsv(tmp_path / "texts.tsv", [("good", "good")])
    for setting, message in (
        ("threshold=high", "threshold is 'high'; a number is needed"),
        ("max_length=64.5", "max_length is 64.5; a whole number is needed"),
        ("max_length=true", "max_length is True; a whole number is needed"),
    ):
        assert message in refused("predict", run, source, "--set", setting)
    passed("predict", run, source, "--set", "threshold=0.25", "--set", "max_length=null")


def test_outputs_are_checked_first(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "good", "label": "good"}\n', encoding="utf-8")
    before = source.read_bytes()
    monkeypatch.setattr("bert_fast.cli.use.open_model", None)
    assert f"--out is {source}, which is read" in refused("predict", run, source, "--out", source)
    assert f"--json is {source}, which is read" in refused("eval", run, source, "--json", source)
    assert "its suffix must be .jsonl" in refused("predict", run, source, "--out", tmp_path / "a.npy")
    assert "the folder" in refused("predict", run, source, "--out", tmp_path / "gone" / "a.jsonl")
    assert source.read_bytes() == before


def test_another_task(run: Path, tmp_path: Path) -> None:
    source = save_tsv(tmp_path / "texts.tsv", [("good", "good")])
    assert "holds a model for classify; tag was asked for" in refused("predict", run, source, "--task", "tag")


# ---- embed, search, rerank -------------------------------------------------------------------------------------------

TEXTS = ["good film", "a bad day", "the book was very fine", "", "not a great film"]


@pytest.fixture(scope="module")
def vectors(encoder: Path) -> Path:
    source, out = encoder.parent / "texts.txt", encoder.parent / "vectors.npy"
    source.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    output = passed("embed", "--model", encoder, "--in", source, "--out", out, "--device", "cpu", "--block", 2)
    assert f"5 vectors of 32 numbers in {out}, 1 empty" in output
    return out


def test_embed(vectors: Path, encoder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(encoder), device="cpu", local_files_only=True).encode(TEXTS)
    np.testing.assert_allclose(np.load(vectors), expected, atol=1e-5)


def test_search(vectors: Path, encoder: Path, tmp_path: Path) -> None:
    arguments = ("search", vectors, "--model", encoder, "--device", "cpu", "--top", 2)
    texts = ("--texts", vectors.parent / "texts.txt")
    assert "a bad day" in passed(*arguments, *texts, "--query", "a bad day")
    passed(*arguments, *texts, "--query", "a bad day", "--query", "good film", "--out", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["query"], row["results"][0]["text"], row["results"][0]["row"]) for row in rows] == [
        ("a bad day", "a bad day", 1),
        ("good film", "good film", 0),
    ]
    assert all(row["results"][0]["score"] == pytest.approx(1, abs=1e-5) for row in rows)


def test_queries_of_a_file(vectors: Path, encoder: Path, tmp_path: Path) -> None:
    """Their ids stay, so that rerank takes what search wrote."""
    file, out = tmp_path / "queries.jsonl", tmp_path / "out.jsonl"
    arguments = ("search", vectors, "--model", encoder, "--device", "cpu", "--queries", file)
    file.write_text('{"_id": "q7", "text": "good film"}\n', encoding="utf-8")
    passed(*arguments, "--out", out)
    (row,) = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert (row["id"], row["query"]) == ("q7", "good film")
    assert "--out is" in refused(*arguments, "--out", file)
    assert f"{vectors}; its suffix must be .jsonl" in refused(*arguments, "--out", vectors)
    file.write_text('{"text": "good film"}\n{"text": " "}\n', encoding="utf-8")
    assert f"{file}:2: a blank query" in refused(*arguments)
    assert "--query is blank" in refused(*arguments[:-2], "--query", " ")
    file = file.with_suffix(".txt")
    file.touch()
    assert f"{file}: no queries" in refused(*arguments[:-1], file)


def test_devices_that_are_not_there(vectors: Path, encoder: Path) -> None:
    for arguments in (("search", vectors, "--query", "a"), ("embed", "--in", vectors, "--out", "x.npy")):
        assert "'mps' is not served" in refused(*arguments, "--model", encoder, "--device", "mps")


def test_search_needs_queries(vectors: Path, encoder: Path) -> None:
    assert "either --query or --queries is needed" in refused("search", vectors, "--model", encoder)


def test_ray_options_need_ray(vectors: Path, encoder: Path) -> None:
    for option in ("--workers", "--cpus"):
        message = refused("embed", "--model", encoder, "--in", vectors, "--out", "x.npy", option, 2)
        assert "need --engine ray" in message


def test_rerank(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = save_encoder(tmp_path / "cross", architecture="BertForSequenceClassification", num_labels=1)
    passages = [text for text in TEXTS if text]
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"query": "a film", "passages": passages}) + "\n", encoding="utf-8")
    passed("rerank", "--model", folder, "--in", source, "--out", tmp_path / "out.jsonl")
    (row,) = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    expected = CrossEncoder(str(folder), device="cpu", local_files_only=True).rank("a film", passages)
    assert [hit["rank"] - 1 for hit in row["results"]] == [hit["corpus_id"] for hit in expected]


# ---- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_missing_extra(command: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_options, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    assert "sklearn missing; pip install 'bert-fast[tasks]'" in refused(command, run, run / "config.json")


def test_commands_are_listed() -> None:
    output = passed("--help")
    assert isinstance(app.app, click.Group)
    for name in ("finetune", "predict", "eval", "embed", "search", "rerank"):
        assert f"  {name} " in output
