"""The file beside a fine-tuned model that says for which task it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .table import TASKS, task_named
from .task import Task

__all__ = ["NAME", "load", "save"]

NAME = "bert_fast_task.json"
STARTED = "run.json"
FORMAT = 1

# Heads of models that were fine-tuned elsewhere.
HEADS = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "qa",
}


def save(task: Task[Any], folder: Path) -> None:
    """Writes which task a folder's model is for."""
    record = {"format": FORMAT, "task": task.name, "settings": task.settings()}
    (folder / NAME).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: Path, name: str | None = None, **settings: Any) -> Task[Any]:
    """The task that a folder's model is for.

    Args:
        folder: of a model.
        name: of the task; None: what the folder says, or its head.
        settings: stronger than those of the folder.

    Raises:
        ValueError: the folder does not say, its run has not come to its end, the record cannot be read, it is another
            task than `name`, or a setting is not allowed.
    """
    file = folder / NAME
    if (folder / STARTED).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds a run that has not come to its end; resume goes on with it")
    if not file.is_file():
        return task_named(name or _by_head(folder)).of_settings(settings)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
        found, kept = record["task"], record["settings"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error!s}") from None
    if name is not None and name != found:
        raise ValueError(f"{folder} holds a model for {found}; {name} was asked for")
    return task_named(found).of_settings({**kept, **settings})


def _by_head(folder: Path) -> str:
    if (folder / "modules.json").is_file():
        return "match"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = list(config.get("architectures") or ())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no model: {error}") from None
    for architecture in names:
        for head, task in HEADS.items():
            if architecture.endswith(head):
                return task
    raise ValueError(
        f"{folder} holds {', '.join(names) or 'a model without a name'}, which is for none of {', '.join(TASKS)}; "
        "name the task"
    )
