"""Interleaved measurement: ours and its peers take turns, so that a change of the machine's speed meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

ROUNDS = 15


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compare(
    benchmark: Any,
    ours: Callable[[], Any],
    peers: Mapping[str, Callable[[], Any]],
    *,
    device: str = "cpu",
    rounds: int = ROUNDS,
    warmup: int = 2,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Times `ours` with pytest-benchmark and each peer right before it, round after round.

    The peers' medians in seconds go into the benchmark's extra_info under "peers"; `facts` go beside them.

    Args:
        benchmark: pytest-benchmark's fixture.
        ours: the call to measure.
        peers: name -> call that does the same work.
        device: "cpu" or "cuda".
        rounds: counted rounds.
        warmup: rounds before those.
        facts: what else the result should say.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def finished(call: Callable[[], Any]) -> Callable[[], Any]:
        """The call with the wait for its device; on a CPU the bare call, since a wrapper counts in microseconds."""

        def run() -> None:
            call()
            synchronise(device)

        return call if device == "cpu" else run

    measured = finished(ours)
    others = {name: finished(peer) for name, peer in peers.items()}

    def take_turns() -> None:
        for name, other in others.items():
            start = time.perf_counter()
            other()
            seconds[name].append(time.perf_counter() - start)

    for _ in range(warmup):
        take_turns()
        measured()
    for times in seconds.values():
        times.clear()
    benchmark.pedantic(measured, setup=take_turns, rounds=rounds)
    benchmark.extra_info["peers"] = {name: statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info.update(facts or {})
