"""What a run says while it trains: log.jsonl, TensorBoard and a line on the terminal."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flops import model_flops_utilisation
from .log import Evaluation, Step, line_of, open_log

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Evaluation", "Monitor", "Step"]

AVERAGED = ("loss", "mlm_loss", "nsp_loss", "grad_norm")
LATEST = ("steps_total", "progress", "remaining_seconds", "learning_rate")
SUMMED = ("tokens", "sequences", "seconds", "flops")
DECAY = 0.98  # of the live line's averages: about the last fifty steps


class _Average:
    """Sums of steps, of which the older ones fade with `decay` below 1."""

    def __init__(self, decay: float = 1.0) -> None:
        self.decay = decay
        self.steps = 0
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, step: Step) -> None:
        self.steps += 1
        for name in (*AVERAGED, *SUMMED):
            value = getattr(step, name)
            if value is None:
                continue
            past, weight = self._sums.get(name, 0.0), self._weights.get(name, 0.0)
            if self.decay < 1 and not math.isfinite(past):
                past = weight = 0.0  # a NaN fades at once, or it would stay for ever
            self._sums[name] = value + self.decay * past
            self._weights[name] = 1.0 + self.decay * weight

    def sum(self, name: str) -> float:
        return self._sums[name]

    def mean(self, name: str) -> float | None:
        return self._sums[name] / self._weights[name] if name in self._sums else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.sum("tokens") / self.sum("seconds") if self.sum("seconds") > 0 else None

    def mfu(self, peak: float | None) -> float | None:
        if peak is None or not self.sum("seconds") > 0:
            return None
        return model_flops_utilisation(self.sum("flops"), self.sum("seconds"), peak)


class Monitor:
    """Writes log.jsonl, TensorBoard's events and the console's lines of one run; a context manager.

    Each line of log.jsonl is a JSON object of kind "start", "step", "evaluation" or "note". Those of kind "step" come
    at every multiple of `every`, and when the monitor is closed: means of the losses and of the gradient's norm, sums
    of steps, tokens, sequences, seconds and operations, all since the line before; see log.py. In a distributed run one
    process has a monitor.

    Args:
        folder: of the run; made where it is missing.
        console: where the lines go; one line that stays on a terminal, one for each line of the log elsewhere. None:
            nowhere.
        tensorboard: whether to write scalars to folder/tensorboard.
        peak: operations a second of all devices together, for the MFU; None: unknown.
        every: steps from line to line.
        is_resumed_at: the last step of the checkpoint that the run goes on from: what the log holds of later steps is
            dropped. 0 starts over; None is a new run.

    Raises:
        FileExistsError: a new run in a folder that has a log.
        ImportError: tensorboard is asked for and not installed.
        ValueError: an argument out of range, or a log with a line that is no entry.
    """

    def __init__(
        self,
        folder: Path,
        *,
        console: Console | None,
        tensorboard: bool,
        peak: float | None,
        every: int,
        is_resumed_at: int | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        if is_resumed_at is not None and is_resumed_at < 0:
            raise ValueError(f"is_resumed_at is {is_resumed_at}; it must be at least 0, or None")
        if peak is not None and not peak > 0:
            raise ValueError(f"peak is {peak}; it must be above 0, or None")
        self._console, self._peak, self._every = console, peak, every
        self._last = is_resumed_at or 0
        self._step: Step | None = None
        self._window, self._recent = _Average(), _Average(DECAY)
        self._live: Live | None = None
        make_writer = _summary_writer() if tensorboard else None
        self._open = ExitStack()
        self._log = self._open.enter_context(open_log(folder, is_resumed_at))
        self._writer: SummaryWriter | None = None
        if make_writer is not None:
            purge_step = None if is_resumed_at is None else is_resumed_at + 1
            self._writer = make_writer(str(folder / "tensorboard"), purge_step=purge_step)
            self._open.callback(self._writer.close)
        self._write("start", self._last, {"every": every, "peak": peak})

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, step: Step) -> None:
        """Counts a step in, renews the live line, and writes where `every` steps are full.

        Raises:
            ValueError: a step that does not come after the last one, or the monitor is closed.
        """
        if self._log.closed:
            raise ValueError("the monitor is closed")
        if step.step <= self._last:
            raise ValueError(f"step is {step.step}; it must be above {self._last}, the step before")
        is_full = step.step // self._every > self._last // self._every
        self._last, self._step = step.step, step
        self._window.add(step)
        self._recent.add(step)
        self._show(step)
        if is_full:
            self._write_steps(step)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Writes an evaluation to the log, TensorBoard and the console."""
        values = asdict(evaluation)
        self._write("evaluation", values.pop("step"), values)
        self._scalars("evaluation", evaluation.step, values, ("mlm_loss", "mlm_accuracy", "nsp_accuracy"))
        parts = [f"step {evaluation.step}", f"held-out loss {evaluation.mlm_loss:.4f}"]
        parts.append(f"accuracy {evaluation.mlm_accuracy:.1%}")
        if evaluation.nsp_accuracy is not None:
            parts.append(f"next sentence {evaluation.nsp_accuracy:.1%}")
        self._print("  ".join(parts))

    def note(self, text: str) -> None:
        """Writes a sentence to the log and the console."""
        self._write("note", self._last, {"text": text})
        self._print(text)

    def close(self) -> None:
        """Writes the steps since the last line and closes everything; a second call does nothing."""
        try:
            if self._step is not None and self._window.steps:
                self._write_steps(self._step)
        finally:
            self._open.close()

    def _write_steps(self, step: Step) -> None:
        average, self._window = self._window, _Average()
        values: dict[str, Any] = {name: getattr(step, name) for name in LATEST}
        values |= {name: average.mean(name) for name in AVERAGED}
        values |= {"steps": average.steps, "tokens": int(average.sum("tokens"))}
        values |= {"sequences": int(average.sum("sequences")), "seconds": average.sum("seconds")}
        values |= {"flops": average.sum("flops")}
        values |= {"tokens_per_second": average.tokens_per_second, "mfu": average.mfu(self._peak)}
        self._write("step", step.step, values)
        self._scalars("train", step.step, values, (*AVERAGED, "learning_rate"))
        self._scalars("speed", step.step, values, ("tokens_per_second", "mfu"))
        if self._live is None:
            self._print(_figures(step, average, self._peak))

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._log.write(line_of(kind, step, values))
        self._log.flush()

    def _scalars(self, group: str, step: int, values: dict[str, Any], names: tuple[str, ...]) -> None:
        if self._writer is not None:
            for name in names:
                if values[name] is not None:
                    self._writer.add_scalar(f"{group}/{name}", values[name], step)

    def _print(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, step: Step) -> None:
        """The live line, which begins with the first step."""
        if self._console is None or not self._console.is_terminal:
            return
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            self._live = self._open.enter_context(Live(console=self._console))
        self._live.update(Text(_figures(step, self._recent, self._peak)))


def _figures(step: Step, average: _Average, peak: float | None) -> str:
    """A step in one line."""
    place = f"{step.step}/{step.steps_total}" if step.steps_total is not None else f"{step.step} ({step.progress:.1%})"
    parts = [f"step {place}", f"loss {average.mean('loss'):.4f}", f"lr {step.learning_rate:.2e}"]
    rate, mfu = average.tokens_per_second, average.mfu(peak)
    if rate is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    if mfu is not None:
        parts.append(f"MFU {mfu:.1%}")
    if step.remaining_seconds is not None and math.isfinite(step.remaining_seconds):
        minutes, seconds = divmod(max(0, round(step.remaining_seconds)), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return "  ".join(parts)


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard is missing; pip install 'bert-fast[pretrain]'") from error
    return SummaryWriter
