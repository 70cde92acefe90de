"""The model card: what a fine-tuned model is of, how good it is, and how to have it again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .settings import Training
from .task import Task

if TYPE_CHECKING:
    from .finetune import Outcome, Sources

__all__ = ["write_card"]


def write_card(
    folder: Path, outcome: Outcome, task: Task[Any], sources: Sources, training: Training, command: str | None
) -> Path:
    """Writes README.md with the metadata that the Hugging Face hub reads.

    Args:
        folder: where to.
        outcome: of the run.
        task: fitted.
        sources: of the model.
        training: settings of the loop.
        command: how the run was called; None: from Python.
    """
    import transformers
    from huggingface_hub import ModelCard

    from .. import __version__

    versions = f"bert-fast {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    parts = [
        f"# {Path(sources.model).name}, fine-tuned: {task.name}",
        _table(("data", "examples"), _data_rows(outcome, sources)),
        _measures(outcome),
        "## Training\n\n" + _table(("setting", "value"), [*asdict(training).items(), *_settings(task)]),
        f"{outcome.seconds:,.0f} seconds; {versions}.",
    ]
    if command is not None:
        parts.append(f"```\n{command}\n```")
    metadata = _metadata(outcome, task, sources)
    card = ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")
    file = folder / "README.md"
    card.save(file)
    return file


def _metadata(outcome: Outcome, task: Task[Any], sources: Sources) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    name = outcome.folder.resolve().name
    data = (sources.dev or sources.train).name
    results = [EvalResult(task.pipeline, data, data, measure, value) for measure, value in outcome.measures.items()]
    card = ModelCardData(
        base_model=None if Path(sources.model).is_dir() else sources.model,  # the hub knows no folders
        library_name=task.library,
        pipeline_tag=task.pipeline,
        tags=["bert-fast", task.name],
        model_name=name if results else None,
        eval_results=results or None,
    )
    text: str = card.to_yaml()
    return text


def _data_rows(outcome: Outcome, sources: Sources) -> list[tuple[str, Any]]:
    dev = sources.dev.name if sources.dev else f"{sources.held_out:.0%} of it, by a hash of the text"
    rows = [(f"training: {sources.train.name}", outcome.examples["train"])]
    return [*rows, (f"evaluation: {dev}", outcome.examples["dev"])] if outcome.examples["dev"] else rows


def _measures(outcome: Outcome) -> str:
    if not outcome.measures:
        return ""
    has_before = bool(outcome.before)
    head = ("measure", "before", "after") if has_before else ("measure", "value")
    rows = [
        (name, *([_shown(outcome.before.get(name))] if has_before else []), _shown(value))
        for name, value in outcome.measures.items()
    ]
    return "## Evaluation\n\n" + _table(head, rows)


def _shown(value: float | None) -> str:
    """A measure; there may be none, as of a kind of entity that only one of two predictions has."""
    return "" if value is None else f"{value:.4f}"


def _settings(task: Task[Any]) -> list[tuple[str, Any]]:
    shown = []
    for name, value in task.settings().items():
        is_long = isinstance(value, (list, tuple)) and len(value) > 20
        shown.append((name, f"{len(value)} of them" if is_long else value))
    return shown


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
