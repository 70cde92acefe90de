"""A model fine-tuned for a task, judged, and written with all that came of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..swap import swap
from . import hugging_face, loop, results
from .data.split import split
from .record import STARTED
from .results import METRICS, PREDICTIONS
from .settings import Training
from .task import Model, Prediction, Task

__all__ = ["METRICS", "PREDICTIONS", "Outcome", "Sources", "finetune"]

# What a run that goes on may have otherwise, for the weights are the same.
FREE = ("keep", "tensorboard", "tokens_per_batch", "workers")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a model is made from.

    Attributes:
        model: folder, or name on the hub.
        train: training examples.
        dev: examples for evaluation; None: a part of the training examples.
        held_out: that part; 0: there is no evaluation.
    """

    model: str
    train: Path
    dev: Path | None = None
    held_out: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be at least 0 and less than 1")
        if self.dev is not None and self.dev.resolve() == self.train.resolve():
            raise ValueError(f"dev is {self.dev}, as train is; without dev a part of train is held out")


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        folder: of the model.
        measures: on the examples for evaluation, of the best checkpoint; empty without any.
        before: the same before training, where it was asked for.
        examples: numbers of examples for "train" and "dev".
        seconds: of training, with its evaluations; of a run that went on, since then.
        steps_seconds: of it without the evaluations.
        files: written beside the model: measures, predictions, pictures, the card.
    """

    folder: Path
    measures: dict[str, float]
    before: dict[str, float]
    examples: dict[str, int]
    seconds: float
    steps_seconds: float
    files: list[Path] = field(default_factory=list)


def finetune(
    task: Task[Any],
    sources: Sources,
    out: Path,
    training: Training | None = None,
    *,
    resume: bool = False,
    before: bool = False,
    device: torch.device | None = None,
    command: str | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    is_quiet: bool = True,
) -> Outcome:
    """Fine-tunes a model and writes it, with its task, a card, measures, predictions and pictures.

    Until all of it is there the folder has no config.json, without which no library loads it. Under torchrun every
    process calls it, with the same arguments; the first one writes.

    Args:
        task: with its settings.
        sources: the model and the files.
        out: folder of the run; new or empty, unless a run is to go on.
        training: settings of the loop; None: the defaults, with those of the task.
        resume: whether to go on from the run's last checkpoint, if there is one.
        before: whether the model is judged before training, too; only tasks without a new head say anything then.
        device: where to train, a CPU or a GPU; None: a GPU if there is one.
        command: how the run was called, for the card.
        on_log: gets what the Trainer logs.
        is_quiet: whether the Trainer's progress bar stays off.

    Raises:
        DataError: a file's first fault.
        DivergedError: the loss became NaN or infinite.
        ValueError: a setting is not allowed, `out` holds something else, or the run to go on with was another.
        OSError: a file or a model cannot be read.
    """
    training = training or Training(**task.training)
    if training.patience is not None and sources.dev is None and sources.held_out == 0:
        raise ValueError(f"patience is {training.patience}, which needs an evaluation; dev is None and held_out 0")
    where = loop.place(device)
    if training.precision == "fp16" and where.device.type != "cuda":
        raise ValueError("precision is 'fp16', which needs a GPU; fp32 and bf16 work everywhere")
    train, dev = _examples(task, sources)
    # A part that is held out of the training examples may have a label that no other has.
    task = task.fitted(train if sources.dev else [*train, *dev])
    task.check(dev)
    with where.main_process_first(local=False):
        if where.process_index == 0:
            _begin(out, _run(task, sources, training, where.world_size, [train, dev]), resume=resume)

    torch.manual_seed(training.seed)
    model = task.build(sources.model)
    swap(model.module.to(where.device))
    judge = Judge(task, model, dev, training.tokens_per_batch)
    measures_before = judge() if before and dev else {}
    best = task.best if dev else None
    arguments = loop.arguments(training, out, examples=len(train), best=best, device=where.device, is_quiet=is_quiet)
    trainer = task.trainer(model, train, arguments)
    trainer.judge = judge
    loop.add_callbacks(trainer, training.patience if dev else None, on_log)
    if training.tensorboard:
        loop.add_curves(trainer, out)
    start, judge.seconds = time.perf_counter(), 0.0
    with hugging_face.quiet(has_warnings=True):
        loop.train(trainer, loop.last_checkpoint(out) if resume else None)
        seconds = time.perf_counter() - start
        steps_seconds = seconds - judge.seconds
        measures = judge() if dev else {}
        counts = {"train": len(train), "dev": len(dev)}
        outcome = Outcome(out, measures, measures_before, counts, seconds, steps_seconds)
        with where.main_process_first(local=False):
            if where.process_index == 0:
                outcome = results.write(outcome, task, sources, training, trainer, dev, judge.predictions, command)
    return outcome


class Judge:
    """Predicts the examples for evaluation and measures how right that is.

    Args:
        task: fitted.
        model: that is trained.
        examples: for evaluation.
        tokens_per_batch: see Task.predict.

    Attributes:
        predictions: of the last call.
        seconds: of all calls.
    """

    def __init__(self, task: Task[Any], model: Model, examples: Sequence[Any], tokens_per_batch: int) -> None:
        self.task, self.model, self.examples, self.tokens_per_batch = task, model, examples, tokens_per_batch
        self.predictions: list[Prediction] = []
        self.seconds = 0.0

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        self.predictions = self.task.predict(self.model, self.examples, self.tokens_per_batch)
        measures = self.task.measure(self.examples, self.predictions)
        self.seconds += time.perf_counter() - start
        return measures


def _examples(task: Task[Any], sources: Sources) -> tuple[list[Any], list[Any]]:
    train = task.read(sources.train)
    if sources.dev is not None:
        return train, task.read(sources.dev)
    return split(train, sources.held_out) if sources.held_out > 0 else (train, [])


def _run(
    task: Task[Any], sources: Sources, training: Training, processes: int, examples: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    """What the folder's run is of, as JSON gives it back."""
    digest = hashlib.sha256()
    for example in (example for part in examples for example in part):
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
    run = {
        "task": task.name,
        "settings": task.settings(),
        **asdict(sources),
        "data": f"{'+'.join(str(len(part)) for part in examples)} examples, {digest.hexdigest()[:16]}",
        "processes": processes,
        **asdict(training),
    }
    as_json: dict[str, Any] = json.loads(json.dumps(run, default=str))
    return as_json


def _begin(out: Path, run: dict[str, Any], *, resume: bool) -> None:
    """Notes what the folder's run is of; a run that goes on must be of the same."""
    file = out / STARTED
    if file.is_file() and resume:
        _compare(out, json.loads(file.read_text(encoding="utf-8")), run)
        return
    if out.is_dir() and any(out.iterdir()):
        way = "resume goes on with a run that was stopped; " if file.is_file() else ""
        raise ValueError(f"{out} is not empty; {way}a new folder is needed")
    out.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)


def _compare(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in now:
        if name not in FREE and now[name] != before.get(name):
            raise ValueError(
                f"{out} was begun with {name} = {before.get(name)!r}, now it is {now[name]!r}; "
                "a run goes on with the same settings"
            )
