"""Verification and timing that the rows share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calls import Batch
from .contenders import Field, LostError, Worker, arrays
from .peers import PEERS, SDPA, Place
from .report import OURS, OURS_BF16, OURS_INT8, Entry, Precision, Record, is_floor

# The largest absolute difference that float32 may show, and the smallest cosines of what is rounded.
MAX_DIFFERENCE = 1e-4
MIN_COSINES: dict[Precision, float] = {"bf16": 0.999, "int8": 0.98}

MIN_ROUNDS = 7
MAX_ROUNDS = 30
SECONDS = 2.0  # fast rows have more rounds than they must, for so long
TURN = 0.05  # seconds; a call that takes less is repeated within its turn
PAUSE = 0.25  # seconds after which the threads of the one before have stopped to spin; Intel's OpenMP does so for 0.2


@dataclass
class Bench:
    """
    Attributes:
        field: the model's contenders.
        deadline: of time.time.
    """

    field: Field
    deadline: float

    @property
    def place(self) -> Place:
        return self.field.place

    @property
    def is_dry(self) -> bool:
        return self.place.is_dry

    def time(self, turns: Mapping[str, Callable[[int], float]], min_rounds: int) -> tuple[dict[str, list[float]], int]:
        """Quartiles of the seconds of a call of each, taking turns, and the number of rounds; a round before warms up.

        Args:
            turns: name -> function that calls so often and gives the mean seconds.
            min_rounds: unless the deadline comes first.
        """
        repeats = {name: self._repeats(turn) for name, turn in turns.items()}
        times: dict[str, list[float]] = {name: [] for name in turns}
        start, rounds = time.time(), 0
        while rounds < (1 if self.is_dry else MAX_ROUNDS):
            now = time.time()
            if rounds and (now > self.deadline or (rounds >= min_rounds and now - start > SECONDS)):
                break
            for name, turn in turns.items():
                if self.place.threads > 1:
                    time.sleep(PAUSE)
                times[name].append(turn(repeats[name]))
            rounds += 1
        return {name: quartiles(found) for name, found in times.items()}, rounds

    def _repeats(self, turn: Callable[[int], float]) -> int:
        seconds = turn(1)
        if self.is_dry or seconds > 10 * TURN:
            return 1
        return max(1, min(50, round(TURN / min(turn(1), turn(1)))))  # the first may have met cold caches


def quartiles(values: Sequence[float]) -> list[float]:
    """The first, the median and the third."""
    return [values[0]] * 3 if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")


def verify(entry: Entry, found: Sequence[Tensor], expected: Sequence[Tensor], batches: Sequence[Batch]) -> None:
    """Puts the largest difference and the smallest cosine into the entry; a NaN is infinite, or -1.

    Args:
        entry: receives them, with a reason where float32 is out of bounds and a note where less is.
        found, expected: hidden states of each batch; places that are padding do not count.
        batches: have the masks.
    """
    differences, cosines = [0.0], [1.0]
    for ours, theirs, batch in zip(found, expected, batches, strict=True):
        mask = batch["attention_mask"].bool()
        differences.append(float((ours - theirs)[mask].abs().max().nan_to_num(torch.inf)))
        means = (pooled(ours, batch).double(), pooled(theirs, batch).double())
        cosines.append(float(torch.cosine_similarity(means[0], means[1]).nan_to_num(-1.0).min()))
    entry.difference, entry.cosine = max(differences), min(cosines)
    bound = MIN_COSINES.get(entry.precision)
    if bound is not None and entry.cosine < bound:
        entry.note = f"smallest cosine {entry.cosine:.4f}, below {bound}"
    if bound is None and not entry.difference <= MAX_DIFFERENCE:
        entry.reason = f"wrong: differs by {entry.difference:.1e}, above {MAX_DIFFERENCE:.0e}"


def pooled(hidden: Tensor, batch: Batch) -> Tensor:
    """(texts, hidden_size): the mean over the tokens; what stands at padding does not count, not even NaN."""
    mask = batch["attention_mask"][..., None].bool()
    return torch.where(mask, hidden, 0).sum(1) / mask.sum(1)


def workload_facts(batches: Sequence[Batch]) -> dict[str, Any]:
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    places = sum(batch["attention_mask"].numel() for batch in batches)
    texts = sum(len(batch["input_ids"]) for batch in batches)
    return {"texts": texts, "useful_tokens": tokens, "padding": places / tokens}


def measure(bench: Bench, record: Record, batches: Sequence[Batch], min_rounds: int) -> None:
    """Every contender on the same batches: verified, then timed in turns; medians into the record."""
    record.facts = workload_facts(batches)
    travelling = arrays(batches)
    expected = bench.field.states(SDPA, travelling)
    turns: dict[str, Callable[[int], float]] = {}
    for peer in PEERS:
        entry = Entry(peer.name, peer.precision)
        record.entries.append(entry)
        contender = bench.field.contender(peer.name)
        if contender is None:
            entry.reason = bench.field.missing[peer.name]
            continue
        try:
            if not is_floor(peer.name):
                start = time.perf_counter()
                verify(entry, bench.field.states(peer.name, travelling), expected, batches)
                entry.first_seconds = time.perf_counter() - start
            if entry.reason is None:
                contender.do(Worker.prepare, travelling)
                turns[peer.name] = contender.turn
        except LostError as error:  # ours shows as a problem of the row
            entry.reason = str(error)
    times, record.rounds = bench.time(turns, min_rounds)
    record.set_times(times)
    judge(record)


def judge(record: Record) -> None:
    """Says in the record what is wrong with ours. bf16 and int8 may be missing, but not wrong."""
    ours = record.entry(OURS)
    if ours is not None and ours.reason is not None:
        record.problem = f"{OURS}: {ours.reason}"
        return
    for name in (OURS_BF16, OURS_INT8):
        entry = record.entry(name)
        if entry is not None and entry.note is not None:
            record.problem = f"{name}: {entry.note}"
