"""The tasks by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .task import Task

__all__ = ["TASKS", "task_named"]

TASKS = {"classify": "Classify", "tag": "Tag", "match": "Match", "retrieve": "Retrieve", "qa": "Answer"}
"""Names of commands, which are names of modules too, and the class in each."""


def task_named(name: str) -> type[Task[Any]]:
    """The class of a task.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; it must be one of {', '.join(TASKS)}")
    found: type[Task[Any]] = getattr(import_module(f".{name}", __package__), TASKS[name])
    return found
