"""What there is to say of a run, and log.jsonl, which keeps it: a JSON object a line, with its kind, step and time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

__all__ = ["LOG_NAME", "Evaluation", "Step", "line_of", "open_log", "read_log"]

LOG_NAME = "log.jsonl"


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all devices.

    Attributes:
        step: its number, from 1 on.
        steps_total: steps of the whole run; None where time ends it.
        loss, mlm_loss, nsp_loss: means of the step; nsp_loss is None without next-sentence prediction.
        learning_rate: of the step.
        grad_norm: before clipping; None where it was not computed.
        tokens: without padding.
        sequences: in it.
        seconds: wall time since the step before.
        progress: share of the run that is done, in [0, 1].
        remaining_seconds: expected until the end; None while unknown.
        flops: operations as training_flops counts them.
    """

    step: int
    steps_total: int | None
    loss: float
    mlm_loss: float
    nsp_loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens: int
    sequences: int
    seconds: float
    progress: float
    remaining_seconds: float | None
    flops: float


@dataclass(frozen=True)
class Evaluation:
    """The model on held-out text.

    Attributes:
        step: the last step before it.
        mlm_loss: mean over the predicted tokens.
        mlm_accuracy, nsp_accuracy: shares in [0, 1]; nsp_accuracy is None without next-sentence prediction.
        tokens: without padding.
        seconds: wall time.
    """

    step: int
    mlm_loss: float
    mlm_accuracy: float
    nsp_accuracy: float | None
    tokens: int
    seconds: float


def line_of(kind: str, step: int, values: Mapping[str, Any]) -> str:
    """The line of an entry. Numbers that JSON lacks become "nan", "inf" and "-inf", which float() reads."""
    entry: dict[str, Any] = {
        "kind": kind,
        "step": step,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **values,
    }
    for name, value in entry.items():
        if isinstance(value, float) and not math.isfinite(value):
            entry[name] = str(value)
    return json.dumps(entry, allow_nan=False) + "\n"


def read_log(log: Path) -> list[dict[str, Any]]:
    """The entries of a log, in order; a last line that a killed run left torn is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is no entry.
    """
    return [entry for _, entry in _entries(log)]


def open_log(folder: Path, is_resumed_at: int | None) -> TextIO:
    """The folder's log, to be written on; both are made where they are missing.

    Args:
        folder: of the run.
        is_resumed_at: entries of later steps are dropped; None: there must be no log.

    Raises:
        FileExistsError: there is one, and it is not empty.
        ValueError: a line that is no entry, other than a torn last one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG_NAME
    if log.exists() and log.stat().st_size > 0:
        if is_resumed_at is None:
            raise FileExistsError(f"{log} exists; resume that run, or take another folder")
        _drop_after(log, is_resumed_at)
    return log.open("a", encoding="utf-8", newline="\n")


def _entries(log: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = log.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            is_entry = isinstance(entry["step"], int) and isinstance(entry["kind"], str)
        except (ValueError, TypeError, KeyError):
            is_entry = False
        if is_entry:
            yield line, entry
        elif number < len(lines):
            raise ValueError(f"{log}, line {number} is {line[:60]!r}; a JSON object with kind and step is needed")


def _drop_after(log: Path, step: int) -> None:
    """Rewrites the log without what a killed run wrote after `step`; the file is whole at every moment."""
    kept = [line + b"\n" for line, entry in _entries(log) if entry["step"] <= step]
    beside = log.with_name(f"{log.name}.new")
    with beside.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(log)
