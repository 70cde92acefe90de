"""Pictures of a run and of what its model predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_confusion", "draw_history", "draw_scores"]

MOST_NAMES = 40  # classes whose names can be read in a picture


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is missing; pip install 'bert-fast[tasks]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_confusion(truth: Sequence[str], found: Sequence[str], labels: Sequence[str], out: Path) -> Path:
    """Writes the confusion matrix as PNG: rows are the right classes, shares of a row are colours."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(truth, found, labels=list(labels))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(16.0, 4 + 0.3 * len(labels))
    figure = _figure(size + 1, size)
    axes = figure.add_subplot(xlabel="predicted", ylabel="right")
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, fraction=0.046, label="share of the row")
    if len(labels) <= MOST_NAMES:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    if len(labels) <= MOST_NAMES // 2:
        for row, column in np.ndindex(*counts.shape):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(out, format="png", dpi=120)
    return out


def draw_scores(truth: Sequence[float], found: Sequence[float], out: Path) -> Path:
    """Writes right numbers against predicted ones as PNG."""
    figure = _figure(6, 6)
    axes = figure.add_subplot(xlabel="right", ylabel="predicted")
    axes.grid(alpha=0.3)
    axes.scatter(truth, found, s=8, alpha=0.4)
    figure.savefig(out, format="png", dpi=120)
    return out


def draw_history(history: Sequence[Mapping[str, Any]], measure: str | None, out: Path) -> Path:
    """Writes a run's training loss, and a measure on the evaluation examples, over steps, as PNG.

    Args:
        history: a Trainer's state.log_history.
        measure: name in the history, such as "eval_accuracy"; None: there is none.
        out: the picture.
    """
    figure = _figure(9, 5)
    axes = figure.add_subplot(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    lines = axes.plot(*zip(*losses, strict=True), color="tab:blue", label="training loss") if losses else []
    found = [] if measure is None else [(row["step"], row[measure]) for row in history if measure in row]
    if found and measure is not None:
        right = axes.twinx()
        right.set_ylabel(measure.removeprefix("eval_"))
        lines += right.plot(*zip(*found, strict=True), "o-", color="tab:orange", label=right.get_ylabel())
    if lines:
        axes.legend(handles=lines, loc="center right")
    figure.savefig(out, format="png", dpi=120)
    return out
