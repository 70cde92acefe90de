"""The curves of a run as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

__all__ = ["plot"]

Entries = list[dict[str, Any]]

DECAY = 0.9  # of the smoothed curve, from one line of the log to the next


def plot(log: Path, out: Path) -> None:
    """Draws a run's masked-LM loss, raw and smoothed, that on held-out text, and the learning rate, over steps.

    Args:
        log: the run's log.jsonl; the run may still be writing it.
        out: the PNG to write.

    Raises:
        FileNotFoundError: there is no log.
        ImportError: matplotlib is not installed.
        ValueError: a log without steps or with a line that is no entry, or an `out` that does not end with .png.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"out is {out}; a name that ends with .png is needed")
    entries = read_log(log)
    steps = [entry for entry in entries if entry["kind"] == "step"]
    held_out = [entry for entry in entries if entry["kind"] == "evaluation"]
    if not steps:
        raise ValueError(f"{log} has no steps; a run writes the first ones after as many steps as its `every`")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is missing; pip install 'bert-fast[pretrain]'") from error

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="masked-LM loss")
    axes.grid(alpha=0.3)
    lines = _draw_losses(axes, steps, held_out) + _draw_rates(axes.twinx(), steps)
    axes.legend(handles=lines, loc="upper right")
    figure.savefig(out, format="png", dpi=150)


def _draw_losses(axes: Axes, steps: Entries, held_out: Entries) -> list[Line2D]:
    numbers, losses = _curve(steps, "mlm_loss")
    marker = "o" if len(steps) == 1 else None
    lines = axes.plot(numbers, losses, color="tab:blue", alpha=0.3, linewidth=1, marker=marker, label="training")
    lines += axes.plot(numbers, smoothed(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if held_out:
        lines += axes.plot(*_curve(held_out, "mlm_loss"), "o-", color="tab:orange", markersize=4, label="held out")
    return lines


def _draw_rates(axes: Axes, steps: Entries) -> list[Line2D]:
    lines = axes.plot(*_curve(steps, "learning_rate"), "--", color="tab:gray", linewidth=1, label="learning rate")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return lines


def _curve(entries: Entries, name: str) -> tuple[list[int], list[float]]:
    return [entry["step"] for entry in entries], [float(entry[name]) for entry in entries]


def smoothed(values: Sequence[float], decay: float = DECAY) -> list[float]:
    """Averages with weights decay^distance to both sides, so that the curve does not lag; what is NaN stays NaN."""
    counts = [float(math.isfinite(value)) for value in values]
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    sums, weights = _both_sides(finite, decay), _both_sides(counts, decay)
    return [a / b if count else math.nan for a, b, count in zip(sums, weights, counts, strict=True)]


def _both_sides(values: Sequence[float], decay: float) -> list[float]:
    def faded(total: float, value: float) -> float:
        return decay * total + value

    before = accumulate(values, faded)
    after = reversed(list(accumulate(reversed(values), faded)))
    return [a + b - value for a, b, value in zip(before, after, values, strict=True)]
