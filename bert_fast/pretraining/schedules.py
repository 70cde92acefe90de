"""Learning rates over a run, as functions of its progress, and the budget that says how far a run is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["Budget", "Kind", "factor"]

Kind = Literal["linear", "cosine", "trapezoidal", "constant"]


def factor(kind: Kind, progress: float, *, warmup: float, decay: float = 0.2, floor: float = 0.0) -> float:
    """What the learning rate is multiplied with: a ramp from 0 to 1 over the warm-up, then by kind.

    - linear: in a straight line down to floor at the end (Devlin et al. 2018, appendix A.2).
    - cosine: half a cosine down to floor (Loshchilov and Hutter 2017, equation 5, without restarts).
    - trapezoidal: 1, and over the last share of the run in a straight line down to floor (Hägele et al. 2024).
    - constant: 1.

    Args:
        kind: one of the above.
        progress: share of the run's steps or time that is over, in [0, 1].
        warmup: share of the run over which the factor rises.
        decay: share over which the trapezoidal schedule falls; the others do not read it.
        floor: factor at the end, in [0, 1].

    Raises:
        ValueError: another kind, a share outside [0, 1], a trapezoid whose warm-up and decay overlap.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
    for name, value in (("progress", progress), ("warmup", warmup), ("decay", decay), ("floor", floor)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
    if kind == "trapezoidal" and warmup + decay > 1 + 1e-9:
        raise ValueError(f"warmup is {warmup} and decay is {decay}; together they must be at most 1")
    if progress < warmup:
        return progress / warmup
    if kind == "constant":
        return 1.0
    start = 1 - decay if kind == "trapezoidal" else warmup
    if progress <= start:
        return 1.0
    fallen = (progress - start) / (1 - start)
    if kind == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return 1 - (1 - floor) * fallen


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a run lasts: a number of optimizer steps, or a time.

    Attributes:
        steps: optimizer steps, at least 1.
        seconds: wall-clock time, above 0. Exactly one of the two is given.

    Raises:
        ValueError: both or none, or a value out of its range.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"steps is {self.steps} and seconds is {self.seconds}; exactly one must be given")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f"steps is {self.steps!r}; it must be an integer of at least 1")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}; it must be a finite number above 0")

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the budget that is spent, in [0, 1].

        Args:
            step: steps that are done.
            elapsed: seconds that the run has taken so far, those before an interruption too.

        Raises:
            ValueError: a negative number.
        """
        for name, value in (("step", step), ("elapsed", elapsed)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a finite number of at least 0")
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None
        return min(1.0, elapsed / self.seconds)

    def is_over(self, step: int, elapsed: float) -> bool:
        """Whether no further step begins. One that begins before a time's end is still made, so a run ends late."""
        return self.progress(step, elapsed) >= 1

    def remaining_seconds(self, step: int, elapsed: float) -> float | None:
        """Seconds to the end, for a number of steps at the run's mean speed so far; None before its first step."""
        progress = self.progress(step, elapsed)
        if self.steps is None:
            assert self.seconds is not None
            return max(0.0, self.seconds - elapsed)
        return None if step == 0 else elapsed * (1 - progress) / progress
