"""The rows: encoding, a training step, accuracy, and the grid of full batches."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.cli import models

from ..calls import Batch, training_pair, training_step
from ..workloads import ragged_lengths, token_batches
from .contenders import LostError, Worker, arrays, timed
from .convert import BASE, CPU, MINILM
from .measure import MIN_ROUNDS, Bench, measure, pooled, verify
from .peers import MAX_TEXTS, PEERS, SDPA
from .report import OURS, Entry, Record

GRID = "grid"
ACCURACY = "STS-B dev, Spearman"
GRID_BATCHES = (1, 2, 4, 8, 16, 32, 64)
GRID_LENGTHS = (8, 16, 32, 64, 128, 256, 512)
SHORT_ROUNDS = 15  # a spell of a few seconds in which the machine is slow must not hold half of them
BASE_TOKENS = 8192  # larger cells of BERT-base take minutes


class Row(NamedTuple):
    """
    Attributes:
        run: fills the record.
        is_default: whether it is measured where nobody asks for it.
    """

    model: str
    what: str
    run: Callable[[Bench, Record], None]
    is_default: bool = True

    @property
    def name(self) -> str:
        return f"{self.model}: {self.what}"


# ---- encoding --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encoding(bench: Bench, record: Record, lengths: Tensor, dry: Sequence[int], min_rounds: int = MIN_ROUNDS) -> None:
    measure(bench, record, token_batches(torch.tensor(dry) if bench.is_dry else lengths, MAX_TEXTS), min_rounds)


# ---- training --------------------------------------------------------------------------------------------------------


def training(bench: Bench, record: Record) -> None:
    lengths = torch.tensor([9, 3]) if bench.is_dry else ragged_lengths(256)[:MAX_TEXTS]
    (batch,) = token_batches(lengths, MAX_TEXTS)
    original, swapped = training_pair(bench.place.folder)
    record.facts = {"texts": len(lengths), "useful_tokens": int(lengths.sum())}
    measure_steps(bench, record, {OURS: swapped, SDPA: original}, batch, MIN_ROUNDS)


def measure_steps(bench: Bench, record: Record, contenders: Mapping[str, Any], batch: Batch, min_rounds: int) -> None:
    """A classifier's forward and backward; compared first without dropout, whose masks differ.

    Args:
        contenders: name -> model in evaluation mode; ours, then its peer with the same weights.
    """
    swapped, original = contenders.values()
    steps = {name: training_step(model, batch) for name, model in contenders.items()}
    record.entries = [Entry(name) for name in steps]
    ours, theirs = (step().detach() for step in steps.values())
    record.entries[0].difference = float((ours - theirs).abs())
    torch.testing.assert_close(ours, theirs)
    expected = dict(original.named_parameters())
    for name, parameter in swapped.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5)
    for model in contenders.values():
        model.train()
    times, record.rounds = bench.time({name: timed(step) for name, step in steps.items()}, min_rounds)
    record.set_times(times)


# ---- accuracy --------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> tuple[list[tuple[str, str]], list[float]]:
    """Pairs of sentences and their scores, from a CSV file of sentence1,sentence2,score without a header."""
    pairs, scores = [], []
    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.reader(file), 1):
            try:
                first, second, score = row
                scores.append(float(score))
            except ValueError:
                raise ValueError(f"record {line} is {row!r}; sentence1,sentence2,score is allowed") from None
            pairs.append((first, second))
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} records; at least 2 are needed")
    return pairs, scores


@torch.inference_mode()
def accuracy(bench: Bench, record: Record, path: Path | None) -> None:
    """Spearman's correlation of the cosine of mean-pooled vectors with the scores."""
    if path is None:
        record.reason = "needs --stsb FILE, a CSV of sentence1,sentence2,score without a header"
        return
    from scipy.stats import spearmanr

    pairs, scores = read_pairs(path)
    if bench.is_dry:
        pairs, scores = pairs[:16], scores[:16]
    texts = [text for pair in pairs for text in pair]
    _, tokenizer = models.load(bench.place.folder, CPU)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    batches = [
        {name: batch[name] for name in ("input_ids", "attention_mask")}
        for batch in models.batches(tokenizer, [texts[index] for index in order], MAX_TEXTS, 256, CPU)
    ]
    record.facts = {"pairs": len(pairs), "useful_tokens": sum(int(b["attention_mask"].sum()) for b in batches)}
    travelling = arrays(batches)
    for peer in PEERS:
        if peer.precision == "fp32" and peer.name not in (OURS, SDPA):
            continue
        entry = Entry(peer.name, peer.precision)
        record.entries.append(entry)
        try:
            states = bench.field.states(peer.name, travelling)
        except LostError as error:
            entry.reason = str(error)
            continue
        vectors = torch.cat([pooled(hidden, batch) for hidden, batch in zip(states, batches, strict=True)])
        in_order = torch.empty_like(vectors)
        in_order[order] = vectors
        cosines = torch.cosine_similarity(in_order[0::2], in_order[1::2])
        record.scores[peer.name] = float(spearmanr(cosines.numpy(), scores).statistic)


# ---- the grid --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def grid(bench: Bench, record: Record) -> None:
    """Never slower than transformers: full rows, ours against it alone, cell by cell."""
    contenders = {name: bench.field.needed(name) for name in (OURS, SDPA)}
    cells = [(b, n) for b in GRID_BATCHES for n in GRID_LENGTHS]
    if bench.is_dry:
        cells = [(1, 8), (2, 8)]
    record.facts = {"skipped": [cell for cell in cells if bench.place.name == BASE and cell[0] * cell[1] > BASE_TOKENS]}
    for count, length in cells:
        if (count, length) in record.facts["skipped"]:
            continue
        batches: list[Batch] = token_batches(torch.full((count,), length), count)
        travelling = arrays(batches)
        states = {name: bench.field.states(name, travelling) for name in contenders}
        entry = Entry(OURS)
        verify(entry, states[OURS], states[SDPA], batches)
        if entry.reason is not None:
            record.problem = f"{count} x {length}: {entry.reason}"
            return
        for contender in contenders.values():
            contender.do(Worker.prepare, travelling)
        turns = {name: contender.turn for name, contender in contenders.items()}
        times, rounds = bench.time(turns, MIN_ROUNDS if count * length <= 2048 else 3)
        record.cells.append(
            {
                "batch": count,
                "length": length,
                "rounds": rounds,
                "difference": entry.difference,
                "seconds": times[OURS][1],
                "ratio": times[SDPA][1] / times[OURS][1],
            }
        )


# ---- the list --------------------------------------------------------------------------------------------------------


def _workloads(model: str, texts: int, long_rounds: int) -> list[Row]:
    """The rows of a model; one pass over several texts is counted in so many rounds at least."""
    ragged = ragged_lengths(texts)
    kinds: list[tuple[str, Tensor, list[int], int]] = [
        ("ragged, sorted by length", ragged.sort().values, [3, 9], long_rounds),
        ("ragged, as they come", ragged, [9, 3], long_rounds),
        ("full 128", torch.full((32,), 128), [8, 8], long_rounds),
        ("full 512", torch.full((8,), 512), [16, 16], long_rounds),
        *((f"one text of {n}", torch.tensor([n]), [7], SHORT_ROUNDS) for n in (16, 64, 256)),
    ]
    return [
        Row(model, what, partial(encoding, lengths=lengths, dry=dry, min_rounds=rounds))
        for what, lengths, dry, rounds in kinds
    ]


def rows(stsb: Path | None = None) -> list[Row]:
    """All rows, in the order in which they are measured; what is measured last goes first when time is short."""
    return [
        *_workloads(MINILM, 256, MIN_ROUNDS),
        Row(MINILM, "training step", training),
        Row(MINILM, ACCURACY, partial(accuracy, path=stsb)),
        Row(MINILM, GRID, grid, is_default=False),
        *_workloads(BASE, 64, 3),
        Row(BASE, GRID, grid, is_default=False),
    ]


def chosen(only: Sequence[str], has_grid: bool) -> list[Row]:
    """The rows whose names contain one of the words; without words the default ones."""
    if not only:
        return [row for row in rows() if row.is_default or has_grid]
    return [row for row in rows() if any(word.lower() in row.name.lower() for word in only)]
