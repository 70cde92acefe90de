"""bert-fast finetune: a run, and what came of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bert_fast.tasks import Outcome, Sources, Training
from bert_fast.tasks.finetune import finetune
from bert_fast.tasks.task import Task

from .lines import say


def run(console: Console, kind: type[Task[Any]], values: Mapping[str, Any]) -> None:
    """Fine-tunes as the options say, and says how it goes.

    Args:
        console: where to.
        kind: the task's class.
        values: the options by name: fields of the task, of Sources and of Training, and out, resume and device.

    Raises:
        DataError, ValueError, OSError: see bert_fast.tasks.finetune.
    """
    task = kind.of_settings(_of(kind, values))
    sources, training = Sources(**_of(Sources, values)), Training(**_of(Training, values))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        teller = Teller(console, progress)
        outcome = finetune(
            task,
            sources,
            values["out"],
            training,
            resume=values["resume"],
            before=values["before"],
            device=values["device"],
            command=shlex.join(["bert-fast", *sys.argv[1:]]),
            on_log=teller,
        )
    conclude(console, outcome)


def _of(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


class Teller:
    """Shows what the Trainer logs: a bar of steps, and a line for each evaluation.

    Args:
        console: of the lines.
        progress: of the bar.
    """

    def __init__(self, console: Console, progress: Progress) -> None:
        self.console, self.progress = console, progress
        self.bar = progress.add_task("reading", total=None)

    def __call__(self, log: dict[str, Any]) -> None:
        description = f"loss {log['loss']:.4f}" if "loss" in log else None
        self.progress.update(self.bar, completed=log["step"], total=log["steps"], description=description)
        measures = {name.removeprefix("eval_"): value for name, value in log.items() if name.startswith("eval_")}
        if measures:
            text = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
            say(self.console, f"step {log['step']:,}: {text}")


def conclude(console: Console, outcome: Outcome) -> None:
    """The measures of the model that was written, and where it is."""
    if outcome.measures:
        show_measures(console, outcome.measures)
    say(console, f"{outcome.examples['train']:,} training examples, {outcome.seconds:,.0f} s")
    say(console, f"model in {outcome.folder}")
    for file in outcome.files:
        say(console, f"  {file}")


def show_measures(console: Console, measures: Mapping[str, float]) -> None:
    """A line for each measure."""
    table = Table("measure", "value", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[1].justify = "right"
    for name, value in measures.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
