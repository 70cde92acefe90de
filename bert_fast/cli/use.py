"""bert-fast predict and eval: fine-tuned models on files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bert_fast.tasks import Tuned, open_model

from .finetune import show_measures
from .lines import say, write_lines


def open_tuned(
    folder: Path,
    task: str | None,
    device: torch.device | None,
    int8: bool,
    columns: dict[str, str],
    settings: dict[str, Any],
) -> Tuned:
    """The model of a folder with its task; see bert_fast.tasks.open_model."""
    chosen = {**settings, "columns": columns} if columns else settings
    return open_model(folder, task, device=device, int8=int8, **chosen)


def predict(console: Console, tuned: Tuned, source: Path, out: Path | None, tokens_per_batch: int) -> None:
    """Writes what the model says of each example, a JSON object a line, with the place where it stands.

    Args:
        console: where to, without `out`.
        tuned: the model.
        source: see Task.read.
        out: a file, which appears whole or not at all.
        tokens_per_batch: see Tuned.predict.

    Raises:
        DataError: the source's first fault.
    """
    examples = tuned.task.read(source, is_labelled=False)
    predictions = tuned.predict(examples, tokens_per_batch)
    lines = [
        json.dumps({"place": example.place, **prediction}, ensure_ascii=False)
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    if out is None:
        for line in lines:
            say(console, line)
        return
    write_lines(out, lines)
    say(console, f"{len(lines):,} predictions in {out}")


def evaluate(console: Console, tuned: Tuned, source: Path, json_file: Path | None, tokens_per_batch: int) -> None:
    """Prints the measures, and writes them where they are wanted.

    Args:
        console: where to.
        tuned: the model.
        source: see Task.read.
        json_file: for the measures.
        tokens_per_batch: see Tuned.predict.

    Raises:
        DataError: the source's first fault, or it does not go with the model.
    """
    examples = tuned.task.read(source)
    measures = tuned.measure(examples, tuned.predict(examples, tokens_per_batch))
    show_measures(console, measures)
    say(console, f"{len(examples):,} examples")
    if json_file is not None:
        json_file.write_text(json.dumps(measures, indent=1) + "\n", encoding="utf-8")
