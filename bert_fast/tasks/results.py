"""What a run leaves in its folder: the model, measures, predictions, pictures and the card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import record
from .card import write_card
from .plots import draw_history
from .settings import Training
from .task import Prediction, Task

if TYPE_CHECKING:
    from .finetune import Outcome, Sources

__all__ = ["METRICS", "PREDICTIONS", "write"]

METRICS, PREDICTIONS = "metrics.json", "dev_predictions.jsonl"
UNFINISHED = "unfinished"

LAST = ("modules.json", "config.json")  # without these sentence-transformers and transformers load nothing


def write(
    outcome: Outcome,
    task: Task[Any],
    sources: Sources,
    training: Training,
    trainer: Any,
    dev: Sequence[Any],
    predictions: Sequence[Prediction],
    command: str | None,
) -> Outcome:
    """Writes everything into a folder within the run's, and then moves it up.

    Args:
        outcome: of the run.
        task: fitted.
        sources: of the model.
        training: settings of the loop.
        trainer: that has trained.
        dev: examples for evaluation.
        predictions: of them.
        command: how the run was called, for the card; None: from Python.

    Returns:
        the outcome with its files.
    """
    part = outcome.folder / UNFINISHED
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    task.save(trainer, part)
    (part / "training_args.bin").unlink(missing_ok=True)  # a pickle with paths of this machine
    record.save(task, part)
    files = [_write_metrics(part / METRICS, task, outcome)]
    if dev:
        files += [_write_predictions(part / PREDICTIONS, dev, predictions), *task.plot(dev, predictions, part)]
    measure = f"eval_{task.best}" if dev else None
    files.append(draw_history(trainer.state.log_history, measure, part / "loss.png"))
    files.append(write_card(part, outcome, task, sources, training, command))
    _move_up(part)
    return replace(outcome, files=[outcome.folder / file.name for file in files])


def _write_metrics(file: Path, task: Task[Any], outcome: Outcome) -> Path:
    content = {
        "task": task.name,
        "best": task.best,
        "dev": outcome.measures,
        "before": outcome.before,
        "examples": outcome.examples,
        "seconds": outcome.seconds,
        "steps_seconds": outcome.steps_seconds,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def _write_predictions(file: Path, dev: Sequence[Any], predictions: Sequence[Prediction]) -> Path:
    with file.open("w", encoding="utf-8") as stream:
        for example, prediction in zip(dev, predictions, strict=True):
            stream.write(json.dumps({"place": example.place, **prediction}, ensure_ascii=False) + "\n")
    return file


def _move_up(part: Path) -> None:
    out = part.parent
    for name in LAST:
        (out / name).unlink(missing_ok=True)
    for entry in sorted(part.iterdir(), key=lambda entry: LAST.index(entry.name) if entry.name in LAST else -1):
        target = out / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    part.rmdir()
