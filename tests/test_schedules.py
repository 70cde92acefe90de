"""Schedules: transformers' at every step, their corners, and how far a budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bert_fast.pretraining.schedules import Budget, Kind, factor

STEPS = 211


def theirs(schedule: Callable[..., Any], **options: Any) -> list[float]:
    """transformers' factor at each step, the one after the last included."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, **options)
    factors = []
    for _ in range(STEPS + 1):
        factors.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return factors


def ours(kind: Kind, warmup: int, **options: float) -> list[float]:
    return [factor(kind, step / STEPS, warmup=warmup / STEPS, **options) for step in range(STEPS + 1)]


def assert_same(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 23, 210])
def test_linear_and_cosine_are_those_of_transformers(warmup: int) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    sizes = {"num_warmup_steps": warmup, "num_training_steps": STEPS}
    assert_same(ours("linear", warmup), theirs(optimization.get_linear_schedule_with_warmup, **sizes))
    assert_same(ours("cosine", warmup), theirs(optimization.get_cosine_schedule_with_warmup, **sizes))
    floor = theirs(optimization.get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.13, **sizes)
    assert_same(ours("cosine", warmup, floor=0.13), floor)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 43), (23, 43), (23, 1), (100, 111)])
def test_trapezoid_is_that_of_transformers(warmup: int, decay: int) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    sizes = {"num_warmup_steps": warmup, "num_decay_steps": decay, "num_training_steps": STEPS}
    expected = theirs(optimization.get_wsd_schedule, decay_type="linear", **sizes)
    assert_same(ours("trapezoidal", warmup, decay=decay / STEPS), expected)
    # theirs begins the warm-up at the floor, ours at 0
    floored = theirs(optimization.get_wsd_schedule, decay_type="linear", min_lr_ratio=0.2, **sizes)
    assert_same(ours("trapezoidal", warmup, decay=decay / STEPS, floor=0.2)[warmup:], floored[warmup:])


def test_constant_is_that_of_transformers() -> None:
    optimization = pytest.importorskip("transformers.optimization")
    expected = theirs(optimization.get_constant_schedule_with_warmup, num_warmup_steps=23)
    assert_same(ours("constant", 23), expected)


@pytest.mark.parametrize(
    ("kind", "progress", "warmup", "decay", "expected"),
    [
        ("linear", 0.0, 0.0, 0.2, 1.0),
        ("linear", 0.55, 0.1, 1.0, 0.55),  # decay is read by the trapezoid alone
        ("linear", 1.0, 0.1, 0.2, 0.1),
        ("linear", 1.0, 1.0, 0.2, 1.0),
        ("cosine", 0.5, 0.0, 0.2, 0.55),
        ("cosine", 1.0, 0.3, 0.2, 0.1),
        ("trapezoidal", 0.0, 0.1, 0.2, 0.0),
        ("trapezoidal", 0.05, 0.1, 0.2, 0.5),
        ("trapezoidal", 0.8, 0.1, 0.2, 1.0),
        ("trapezoidal", 0.9, 0.1, 0.2, 0.55),
        ("trapezoidal", 1.0, 0.1, 0.0, 1.0),
        ("trapezoidal", 0.75, 0.5, 0.5, 0.55),
        ("trapezoidal", 0.3, 0.7, 0.3, 0.3 / 0.7),
        ("constant", 1.0, 0.1, 0.2, 1.0),
    ],
)
def test_corners(kind: Kind, progress: float, warmup: float, decay: float, expected: float) -> None:
    assert factor(kind, progress, warmup=warmup, decay=decay, floor=0.1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "square"}, r"kind is 'square'; it must be one of linear, cosine, trapezoidal, constant"),
        ({"progress": 1.01}, r"progress is 1.01; it must lie in \[0, 1\]"),
        ({"progress": math.nan}, r"progress is nan"),
        ({"warmup": -0.1}, r"warmup is -0.1"),
        ({"decay": 2.0}, r"decay is 2.0"),
        ({"floor": 1.5}, r"floor is 1.5"),
        ({"warmup": 0.6, "decay": 0.5}, r"warmup is 0.6 and decay is 0.5; together they must be at most 1"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    values = {"kind": "trapezoidal", "progress": 0.5, "warmup": 0.1, **values}
    with pytest.raises(ValueError, match=message):
        factor(values.pop("kind"), values.pop("progress"), **values)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_budget_of_steps() -> None:
    budget = Budget(steps=7)
    assert [budget.is_over(step, 1e9) for step in (0, 6, 7, 8)] == [False, False, True, True]
    assert [budget.progress(step, 1e9) for step in (0, 3, 7, 9)] == [0.0, 3 / 7, 1.0, 1.0]
    assert budget.remaining_seconds(0, 5.0) is None
    assert budget.remaining_seconds(2, 5.0) == pytest.approx(12.5)
    assert budget.remaining_seconds(7, 5.0) == 0


def test_budget_of_seconds() -> None:
    budget = Budget(seconds=8.0)
    assert [budget.progress(99, elapsed) for elapsed in (0.0, 2.0, 8.0, 9.5)] == [0.0, 0.25, 1.0, 1.0]
    assert [budget.remaining_seconds(0, elapsed) for elapsed in (0.0, 2.0, 9.5)] == [8.0, 6.0, 0.0]


def test_step_that_begins_in_time_is_made() -> None:
    budget, step, elapsed = Budget(seconds=8.0), 0, 0.0
    while not budget.is_over(step, elapsed):
        step, elapsed = step + 1, elapsed + 3.0
    assert (step, elapsed) == (3, 9.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "steps is None and seconds is None; exactly one must be given"),
        ({"steps": 3, "seconds": 2.0}, "steps is 3 and seconds is 2.0"),
        ({"steps": 0}, "steps is 0; it must be an integer of at least 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"seconds": 0.0}, "seconds is 0.0; it must be a finite number above 0"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"seconds": math.nan}, "seconds is nan"),
    ],
)
def test_budgets_that_are_none(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**values)


@pytest.mark.parametrize(
    ("step", "elapsed", "name"), [(-1, 0.0, "step"), (0, -0.5, "elapsed"), (0, math.nan, "elapsed")]
)
def test_no_time_before_the_run(step: int, elapsed: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; it must be a finite number of at least 0"):
        Budget(steps=7).progress(step, elapsed)
