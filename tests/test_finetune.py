"""Fine-tuning: the best checkpoint is written, a killed run goes on to the same weights, and faults are told."""

from __future__ import annotations

import gc
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import save_encoder, save_tsv, sentences
from torch import Tensor

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import transformers
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import bert_fast
from bert_fast.tasks import DataError, DivergedError, Model, Outcome, Sources, Training, loop, open_model, results
from bert_fast.tasks.card import _measures
from bert_fast.tasks.classify import Classify, Text
from bert_fast.tasks.data.split import split
from bert_fast.tasks.finetune import finetune

CPU = torch.device("cpu")
SECONDS = 60

ROWS = sentences(72, seed=1)
MORE = sentences(160, seed=3)
DEV = [(text, label) for text, label in sentences(130, seed=2) if text not in dict(ROWS)][:30]

Change = Callable[[], None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of the time of runs as short as these; those of `done` are drawn, and looked at."""
    if "done" not in request.fixturenames:
        monkeypatch.setattr(results, "draw_history", lambda *arguments: touch(arguments[-1]))
        monkeypatch.setattr(Classify, "plot", lambda *_: [])


def touch(file: Path) -> Path:
    file.touch()
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with and without dropout, and tables."""
    folder = tmp_path_factory.mktemp("sources")
    save_encoder(folder / "model")
    save_encoder(folder / "still", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_tsv(folder / "train.tsv", ROWS)
    save_tsv(folder / "more.tsv", MORE)
    save_tsv(folder / "dev.tsv", DEV)
    return folder


def sources(folder: Path, model: str = "model", **others: Any) -> Sources:
    named = {"model": str(folder / model), "train": folder / "train.tsv", "dev": folder / "dev.tsv"}
    return Sources(**{**named, **others})


def training(**settings: Any) -> Training:
    return Training(**{"epochs": 2, "batch_size": 12, "learning_rate": 1e-3, **settings})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def is_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoints(out: Path) -> list[int]:
    return sorted(int(folder.name.partition("-")[2]) for folder in (out / "checkpoints").iterdir())


# ---- what is written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    outcome: Outcome
    logs: list[dict[str, Any]]
    stderr: str


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run, with everything that it can write; what it prints goes to a pipe of its own."""
    pytest.importorskip("tensorboard")
    logs: list[dict[str, Any]] = []
    out = tmp_path_factory.mktemp("runs") / "done"
    file = out.with_name("stderr")
    torch.set_num_threads(1)
    with file.open("w") as stream, pytest.MonkeyPatch.context() as capture:
        capture.setattr(sys, "stderr", stream)
        outcome = finetune(
            Classify(),
            sources(folder, train=folder / "more.tsv", dev=None, held_out=0.3),
            out,
            training(epochs=6, learning_rate=1e-2, warmup=0.2, tensorboard=True),
            before=True,
            device=CPU,
            command="bert-fast finetune classify",
            on_log=logs.append,
        )
    return Run(outcome, logs, file.read_text())


def test_it_learns(done: Run) -> None:
    assert done.outcome.measures["accuracy"] > 0.9
    assert done.outcome.before["accuracy"] < 0.8
    assert sum(done.outcome.examples.values()) == len(MORE)
    assert done.outcome.seconds > 0


def test_it_is_quiet(done: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert done.stderr == ""
    assert capfd.readouterr() == ("", "")


def test_log(done: Run) -> None:
    """Losses and evaluations are heard, and of each evaluation its step's loss before it."""
    evaluated = [entry["step"] for entry in done.logs if "eval_accuracy" in entry]
    lost = [entry["step"] for entry in done.logs if "loss" in entry]
    steps = done.logs[0]["steps"]
    assert len(evaluated) == 6
    assert evaluated[-1] == lost[-1] == steps
    assert set(evaluated) <= set(lost)
    assert all(math.isfinite(entry["loss"]) for entry in done.logs if "loss" in entry)


def test_plain_transformers_loads_it(done: Run) -> None:
    out = done.outcome.folder
    classifier = transformers.pipeline("text-classification", model=str(out), device="cpu")
    found = classifier([text for text, _ in MORE])
    predictions = open_model(out, device=CPU).predict([Text("", text, None, None) for text, _ in MORE])
    assert [row["label"] for row in found] == [row["label"] for row in predictions]
    scores = [row["scores"][row["label"]] for row in predictions]
    assert [row["score"] for row in found] == pytest.approx(scores, abs=1e-5)


def test_files(done: Run) -> None:
    out = done.outcome.folder
    names = {
        *("README.md", "bert_fast_task.json", "checkpoints", "config.json", "confusion.png", "dev_predictions.jsonl"),
        *("loss.png", "metrics.json", "model.safetensors", "run.json", "tensorboard", "tokenizer.json"),
        "tokenizer_config.json",
    }
    assert {file.name for file in out.iterdir()} == names
    assert {file.name for file in done.outcome.files} == {
        *("README.md", "confusion.png", "dev_predictions.jsonl", "loss.png", "metrics.json")
    }
    assert all(file.is_file() for file in done.outcome.files)
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["dev"], metrics["before"]) == (done.outcome.measures, done.outcome.before)
    assert list((out / "tensorboard").glob("events.out.*"))


def test_predictions_are_those_of_the_measures(done: Run) -> None:
    rows = [json.loads(line) for line in (done.outcome.folder / "dev_predictions.jsonl").read_text().splitlines()]
    lines = [int(row["place"].rpartition(":")[2]) for row in rows]
    assert lines == sorted(lines)
    right = [row["label"] == MORE[line - 2][1] for row, line in zip(rows, lines, strict=True)]
    assert sum(right) / len(right) == pytest.approx(done.outcome.measures["accuracy"])


@pytest.mark.parametrize("name", ["loss.png", "confusion.png"])
def test_pictures(name: str, done: Run) -> None:
    data = (done.outcome.folder / name).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert min(width, height) >= 400
    assert len(data) > 5000


def test_card(done: Run) -> None:
    file = done.outcome.folder / "README.md"
    text = file.read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-classification")
    assert "base_model" not in front  # a folder, which the hub does not know
    found = {result.metric_type: result.metric_value for result in ModelCard.load(file).data.eval_results}
    assert found == done.outcome.measures
    accuracy = f"| accuracy | {done.outcome.before['accuracy']:.4f} | {done.outcome.measures['accuracy']:.4f} |"
    held_out = f"| evaluation: 30% of it, by a hash of the text | {done.outcome.examples['dev']} |"
    for part in ("bert-fast finetune classify", "| epochs | 6 |", "| labels | ('bad', 'good') |", accuracy, held_out):
        assert part in text


# ---- how it is trained -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scripted(Classify):
    """Its measure says what the script says, whatever the model predicts; the weights of each time are kept."""

    script: ClassVar[list[float]] = []
    kept: ClassVar[list[dict[str, Tensor]]] = []

    def predict(self, model: Model, examples: Any, tokens_per_batch: int) -> Any:
        self.kept.append({name: value.clone() for name, value in model.module.state_dict().items()})
        return super().predict(model, examples, tokens_per_batch)

    def measure(self, examples: Any, predictions: Any) -> dict[str, float]:
        return {**super().measure(examples, predictions), "accuracy": self.script[len(self.kept) - 1]}


@pytest.mark.parametrize(
    ("script", "settings", "best", "times"),
    [
        ([0.1, 0.9, 0.5, 0.2], {"epochs": 4, "keep": 1}, 1, 4),
        ([0.1, 0.9, 0.5, 0.9, 0.95, 1.0], {"epochs": 6, "patience": 2}, 1, 4),
        ([0.1, 0.2, 0.3], {"epochs": 0.8, "eval_steps": 2}, 2, 3),  # after steps 2, 4 and 5, the last one
        ([0.5, 0.4], {"epochs": 1, "eval_steps": 5}, 0, 2),
    ],
)
def test_the_best_checkpoint_is_written(
    script: list[float], settings: dict[str, Any], best: int, times: int, folder: Path, tmp_path: Path
) -> None:
    Scripted.script[:] = [*script[:times], 0.0, 0.0]
    Scripted.kept.clear()
    finetune(Scripted(), sources(folder), tmp_path / "run", training(**settings), device=CPU)
    kept = Scripted.kept.copy()
    assert len(kept) == times + 1  # and the one that is written
    assert [is_same(weights(tmp_path / "run"), state) for state in kept[:times]] == [i == best for i in range(times)]
    assert is_same(kept[-1], kept[best])
    if (
        settings.get("keep") == 1
    ):  # the last checkpoint is gone, and what came after the best one would be trained again
        assert checkpoints(tmp_path / "run") == [12]
        return
    # Going on with what has come to its end, even early, trains no more.
    finetune(Scripted(), sources(folder), tmp_path / "run", training(**settings), device=CPU, resume=True)
    assert len(Scripted.kept) == times + 2
    assert is_same(Scripted.kept[-1], kept[best])
    assert is_same(weights(tmp_path / "run"), kept[best])


def test_without_evaluation(folder: Path, tmp_path: Path) -> None:
    logs: list[dict[str, Any]] = []
    found = finetune(
        Classify(), sources(folder, dev=None, held_out=0), tmp_path / "run", training(), device=CPU, on_log=logs.append
    )
    assert (found.measures, found.examples) == ({}, {"train": 72, "dev": 0})
    assert [file.name for file in found.files] == ["metrics.json", "loss.png", "README.md"]
    assert is_same(weights(tmp_path / "run"), weights(tmp_path / "run" / "checkpoints" / "checkpoint-12"))
    assert "Evaluation" not in (tmp_path / "run" / "README.md").read_text()
    assert [entry["loss"] for entry in logs if "loss" in entry]


def losses(folder: Path, out: Path, task: Classify | None = None, **settings: Any) -> list[float]:
    """Of a run without dropout, and the gradients' norms."""
    logs: list[dict[str, Any]] = []
    finetune(
        task or Classify(),
        sources(folder, "still", dev=None, held_out=0),
        out,
        training(epochs=1, **settings),
        device=CPU,
        on_log=logs.append,
    )
    return [entry[name] for entry in logs if "loss" in entry for name in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    torch.set_num_threads(1)
    return losses(folder, tmp_path_factory.mktemp("plain") / "run")


def test_the_first_losses_are_those_of_plain_transformers(folder: Path, plain: list[float]) -> None:
    """A step of torch's AdamW on an untouched model, with the order of the batches that the Trainer takes."""
    torch.manual_seed(1)
    model = Classify(labels=("bad", "good")).build(str(folder / "still"))
    torch.manual_seed(1)
    arguments = {"output_dir": ".", "use_cpu": True, "report_to": [], "seed": 1, "per_device_train_batch_size": 12}
    task = Classify().fitted(Classify().read(folder / "train.tsv"))
    trainer = task.trainer(model, task.read(folder / "train.tsv"), {**arguments, "data_seed": 1})
    for batch, expected in zip(trainer.get_train_dataloader(), zip(plain[::2], plain[1::2], strict=True), strict=True):
        loss = model.module(**batch).loss
        model.module.zero_grad()
        loss.backward()
        norm = torch.stack([value.grad.norm() for value in model.module.parameters() if value.grad is not None]).norm()
        assert (loss.item(), norm.item()) == pytest.approx(expected, rel=1e-4)
        return


@pytest.mark.parametrize("weight", ["none", "balanced"])
def test_accumulation_is_the_larger_batch(weight: Any, folder: Path, plain: list[float], tmp_path: Path) -> None:
    task = Classify(class_weights=weight)
    whole = plain if weight == "none" else losses(folder, tmp_path / "whole", task)
    parts = losses(folder, tmp_path / "parts", task, batch_size=4, accumulation=3)
    assert len(whole) == 12
    assert parts == pytest.approx(whole, rel=1e-3)


def test_gradient_checkpointing_changes_nothing(folder: Path, plain: list[float], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="takes its original path: gradient checkpointing is on"):
        found = losses(folder, tmp_path / "run", gradient_checkpointing=True)
    assert found == pytest.approx(plain, rel=1e-3)


def test_bf16(folder: Path, plain: list[float], tmp_path: Path) -> None:
    found = losses(folder, tmp_path / "run", precision="bf16")
    assert found != plain
    assert found == pytest.approx(plain, rel=0.1)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())


def test_it_takes_the_fast_path(folder: Path, tmp_path: Path) -> None:
    reports = []

    class Looking(Classify):
        def trainer(self, model: Model, examples: Any, arguments: dict[str, Any]) -> Any:
            reports.append(bert_fast.report(model.module))
            return super().trainer(model, examples, arguments)

    finetune(Looking(), sources(folder), tmp_path / "run", training(epochs=0.2), device=CPU)
    (report,) = reports
    assert "original" not in str(report).lower()
    assert "cpp" in str(report)


def test_seeds(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(Classify(), sources(folder), tmp_path / name, training(epochs=0.4, seed=seed), device=CPU)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert is_same(a, b)
    assert not is_same(a, c)
    assert not torch.equal(a["classifier.weight"], c["classifier.weight"])


# ---- runs that are killed, and runs of two processes -----------------------------------------------------------------

LONG = {"epochs": 2, "eval_steps": 4, "patience": 9}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step_seven(entry: dict[str, Any]) -> None:
    if entry["step"] == 7:
        kill()


def in_a_checkpoint() -> None:
    """The second one, whose last file is written in part."""

    def save_to_json(state: Any, path: str) -> None:
        original(state, path)
        if state.global_step == 8:
            os.truncate(path, 99)
            kill()

    original = transformers.TrainerState.save_to_json
    transformers.TrainerState.save_to_json = save_to_json  # type: ignore[assignment, method-assign]


def between_the_results() -> None:
    """When the weights have been moved up."""

    def replace(file: Path, target: Path) -> Path:
        moved = original(file, target)
        if file.name == "model.safetensors":
            kill()
        return moved

    original = Path.replace
    Path.replace = replace  # type: ignore[assignment, method-assign]


# What kills, what of the log does, and the step of the last whole checkpoint.
KILLS: dict[str, tuple[Change | None, Any, int]] = {
    "at step seven": (None, at_step_seven, 4),
    "in a checkpoint": (in_a_checkpoint, None, 4),
    "between the results": (between_the_results, None, 12),
}


def trained(sources: Sources, out: Path, change: Change | None = None, on_log: Any = None) -> None:
    if change is not None:
        change()
    finetune(Classify(), sources, out, training(**LONG), device=CPU, resume=True, on_log=on_log)


def one_of_two(rank: int, sources: Sources, out: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in names.items()}, GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", f"file://{out.with_name('store')}", rank=rank, world_size=2)
    logs: list[dict[str, Any]] = []
    found = finetune(Classify(), sources, out, training(batch_size=6, epochs=1), device=CPU, on_log=logs.append)
    files = [file.name for file in found.files]
    out.with_name(f"{rank}.json").write_text(json.dumps([found.measures, files, logs]))


def start(function: Callable[..., None], *arguments: Any) -> Any:
    """A process that is a copy of this one."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def end(process: Any) -> int:
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
    return int(process.exitcode if process.exitcode is not None else 999)


def all_runs(folder: Path, root: Path) -> None:
    """Each run in a copy of this process, which has imported everything and has no threads."""
    torch.set_num_threads(1)
    for name in ("matplotlib.figure", "scipy.stats", "sklearn.metrics", "transformers.models.bert.modeling_bert"):
        importlib.import_module(name)
    transformers.Trainer.__name__  # noqa: B018 (it is imported here)
    gc.freeze()
    vars(results)["draw_history"] = lambda *arguments: touch(arguments[-1])
    Classify.plot = lambda *_: []  # type: ignore[method-assign]
    codes = {"undisturbed": end(start(trained, sources(folder), root / "undisturbed"))}
    for name, (change, on_log, _) in KILLS.items():
        codes[f"{name}, killed"] = end(start(trained, sources(folder), root / name, change, on_log))
        shutil.copytree(root / name, root / f"{name}, killed")
        (root / name).rename(root / f"{name}, moved")
        codes[f"{name}, moved"] = end(start(trained, sources(folder), root / f"{name}, moved"))
    both = [start(one_of_two, rank, sources(folder, "still"), root / "two") for rank in (0, 1)]
    codes["two"] = max(end(process) for process in both)
    (root / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    process = multiprocessing.get_context("spawn").Process(target=all_runs, args=(folder, root))
    process.start()
    process.join(SECONDS * 5)
    assert process.exitcode == 0
    return root


has_fork = pytest.mark.skipif(sys.platform != "linux", reason="runs are started by fork")


@has_fork
@pytest.mark.parametrize("name", KILLS)
def test_killed_runs_hold_no_model(name: str, runs: Path) -> None:
    assert json.loads((runs / "codes.json").read_text())[f"{name}, killed"] == -signal.SIGKILL
    killed = runs / f"{name}, killed"
    assert loop.last_checkpoint(killed) == killed / "checkpoints" / f"checkpoint-{KILLS[name][2]}"
    with pytest.raises(ValueError, match="killed holds a run that has not come to its end; resume goes on with it"):
        open_model(killed, device=CPU)
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForSequenceClassification.from_pretrained(killed)


@has_fork
@pytest.mark.parametrize("name", KILLS)
def test_killed_runs_go_on(name: str, runs: Path) -> None:
    """Bit by bit to the weights and measures of a run that nobody disturbed, also in a folder that was moved."""
    codes = json.loads((runs / "codes.json").read_text())
    assert codes["undisturbed"] == codes[f"{name}, moved"] == 0
    moved, undisturbed = runs / f"{name}, moved", runs / "undisturbed"
    assert is_same(weights(moved), weights(undisturbed))
    assert {file.name for file in moved.iterdir()} == {file.name for file in undisturbed.iterdir()}
    assert (moved / "dev_predictions.jsonl").read_bytes() == (undisturbed / "dev_predictions.jsonl").read_bytes()
    found, expected = (json.loads((out / "metrics.json").read_text()) for out in (moved, undisturbed))
    assert found["dev"] == expected["dev"]


@has_fork
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(folder: Path, runs: Path, tmp_path: Path) -> None:
    """As torchrun starts them. Together they train as one with twice the batch does, and the first one writes."""
    assert json.loads((runs / "codes.json").read_text())["two"] == 0
    logs: list[dict[str, Any]] = []
    alone = finetune(
        Classify(), sources(folder, "still"), tmp_path / "alone", training(epochs=1), device=CPU, on_log=logs.append
    )
    first, second = (json.loads((runs / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] == second[0] == pytest.approx(alone.measures, abs=1e-6)
    assert first[1] == [file.name for file in alone.files]
    assert second[1:] == [[], []]
    for name in ("loss", "grad_norm"):
        found, expected = ([entry[name] for entry in entries if name in entry] for entries in (first[2], logs))
        assert len(found) == 6
        assert found == pytest.approx(expected, rel=1e-3)
    assert len(open_model(runs / "two", device=CPU).predict([Text("", "good", None, None)])) == 1


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be positive"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"eval_steps": 0}, "eval_steps is 0; it must be at least 1"),
        ({"warmup": 1.5}, "warmup is 1.5; it must be within 0 and 1"),
        ({"precision": "fp8"}, "precision is 'fp8'; it must be one of fp32, bf16, fp16"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**settings)


def test_fp16_needs_a_gpu(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision is 'fp16', which needs a GPU"):
        finetune(Classify(), sources(folder), tmp_path / "run", training(precision="fp16"), device=CPU)


def test_gpus_have_no_numbers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device is cuda:1; it must be cpu or cuda, and CUDA_VISIBLE_DEVICES chooses"):
        finetune(Classify(), sources(folder), tmp_path / "run", device=torch.device("cuda:1"))


@pytest.mark.parametrize("settings", [{"learning_rate": 1e30}, {"learning_rate": 1e30, "eval_steps": 1}])
def test_divergence(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        DivergedError,
        match=r"(loss|norm) is (nan|inf) at step \d+, with learning_rate 1e\+30; a lower|outputs are NaN or infinite",
    ):
        finetune(Classify(), sources(folder), out, training(warmup=0, **settings), device=CPU)
    assert not (out / "config.json").exists()


def test_out_is_not_empty(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    for resume in (False, True):
        with pytest.raises(ValueError, match="is not empty; a new folder is needed"):
            finetune(Classify(), sources(folder), tmp_path, device=CPU, resume=resume)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@has_fork
def test_another_run(runs: Path, folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(runs / "undisturbed", tmp_path / "run")
    with pytest.raises(ValueError, match="is not empty; resume goes on with a run that was stopped; a new folder"):
        finetune(Classify(), sources(folder), out, training(**LONG), device=CPU)
    for task, changed, settings, message in (
        (Classify(), {}, {"seed": 2}, "was begun with seed = 1, now it is 2; a run goes on with the same settings"),
        (Classify(max_length=9), {}, {}, "was begun with settings = "),
        (Classify(), {"model": str(folder / "still")}, {}, "was begun with model = "),
        (Classify(), {"dev": None, "held_out": 0.2}, {}, "was begun with dev = "),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(task, sources(folder, **changed), out, training(**LONG, **settings), device=CPU, resume=True)
    assert is_same(weights(out), weights(runs / "undisturbed"))
    assert (out / "config.json").is_file()


@has_fork
def test_the_data_have_changed(runs: Path, folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(runs / "undisturbed", tmp_path / "run")
    file = save_tsv(tmp_path / "train.tsv", [*ROWS[:-1], ("new", "good")])
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**run, "train": str(file)}))
    with pytest.raises(ValueError, match=r"was begun with data = '72\+30 examples, .*', now it is '72\+30 examples, "):
        finetune(Classify(), sources(folder, train=file), out, training(**LONG), device=CPU, resume=True)


@pytest.mark.parametrize(
    ("dev", "message"),
    [
        ([("a film", "good"), ("a book", "great")], r"dev\.tsv:3: class 'great' is not among the model's: bad, good"),
        ([("a film", "")], r"dev\.tsv:2: label is empty"),
    ],
)
def test_faulty_dev(dev: list[tuple[str, str]], message: str, folder: Path, tmp_path: Path) -> None:
    file = save_tsv(tmp_path / "dev.tsv", dev)
    with pytest.raises(DataError, match=message):
        finetune(Classify(), sources(folder, dev=file), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_no_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no model; its config\.json is missing"):
        finetune(Classify(), sources(folder, model=str(tmp_path / "empty")), tmp_path / "run", device=CPU)


def test_no_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none is no folder, nor can it be a name on the hub"):
        finetune(Classify(), sources(folder, model=str(tmp_path / "none")), tmp_path / "run", device=CPU)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_held_out(share: float, folder: Path) -> None:
    with pytest.raises(ValueError, match="held_out is"):
        sources(folder, held_out=share)


def test_a_label_that_is_held_out_alone(folder: Path, tmp_path: Path) -> None:
    """It stands in the training file, so it is one of the model's."""
    rows = [(text, "good" if label == "good" else "bad") for text, label in ROWS]
    for rare, _ in MORE:
        train = save_tsv(tmp_path / "train.tsv", [*((t, label) for t, label in rows if t != rare), (rare, "rare")])
        if split(Classify().read(train), 0.2)[1][-1].label == "rare":
            break
    outcome = finetune(
        Classify(),
        Sources(model=str(folder / "model"), train=train, held_out=0.2),
        tmp_path / "out",
        training(epochs=1),
        device=CPU,
    )
    assert "accuracy" in outcome.measures
    task = open_model(outcome.folder, device=CPU).task
    assert isinstance(task, Classify)
    assert task.labels == ("bad", "good", "rare")


def test_the_training_file_is_no_evaluation(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dev is .*train\.tsv, as train is; without dev a part of train is held out"):
        Sources(model="m", train=folder / "train.tsv", dev=folder / ".." / folder.name / "train.tsv")


def test_a_corrected_label_is_another_run(folder: Path, tmp_path: Path) -> None:
    train = save_tsv(tmp_path / "train.tsv", ROWS)
    these = Sources(model=str(folder / "model"), train=train, held_out=0.0)
    finetune(Classify(), these, tmp_path / "out", training(epochs=1), device=CPU)
    text, label = ROWS[0]
    save_tsv(train, [(text, "bad" if label == "good" else "good"), *ROWS[1:]])
    with pytest.raises(ValueError, match="was begun with data = "):
        finetune(Classify(), these, tmp_path / "out", training(epochs=1), resume=True, device=CPU)


def test_a_measure_that_was_not_there_before(tmp_path: Path) -> None:
    """As of a kind of entity that is neither in the text nor predicted at first."""
    outcome = Outcome(tmp_path, {"f1": 0.5, "f1_MISC": 0.25}, {"f1": 0.1}, {"train": 3, "dev": 2}, 1.0, 1.0)
    text = _measures(outcome)
    assert "| f1 | 0.1000 | 0.5000 |" in text
    assert "| f1_MISC |  | 0.2500 |" in text


def test_patience_needs_an_evaluation(folder: Path, tmp_path: Path) -> None:
    these = Sources(model=str(folder / "model"), train=folder / "train.tsv", held_out=0.0)
    with pytest.raises(ValueError, match="patience is 3, which needs an evaluation"):
        finetune(Classify(), these, tmp_path / "out", training(patience=3), device=CPU)
