"""The rows of the target table, in its order, and the measurements that belong to each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from . import cases_attention as attention
from . import cases_fused as fused
from . import cases_model as model
from .measure import Bench
from .report import Record


class Case(NamedTuple):
    """
    Attributes:
        row: of the target table.
        name: of the measurement.
        run: fills the record.
        seconds: how long it takes at least; with less time left it is not begun.
    """

    row: str
    name: str
    run: Callable[[Bench, Record], None]
    seconds: float = 8.0


FORWARD = "varlen attention forward"
BACKWARD = "attention backward"
DROPOUT = "attention with dropout 0.1"
SHORT = "short rows (mean 64)"
LAYER_NORM = "bias+dropout+residual+LayerNorm"
GELU = "bias+GELU, erf and tanh"
EMBEDDING = "embeddings+LayerNorm+dropout"
HEAD = "masked-LM head and loss at 15 %"
BASE = "BERT-base inference, batch 32"
VARIABLE = "variable-length over fixed-512 throughput"
LATENCY = "batch 1, length 128, CUDA graph"
TRAINING = "BERT-large MLM training, 512"
SQUAD = "BERT-large inference, SQuAD lengths"
BINARIES = "binaries over 1,000 random batches"

TOKENS = 32768
RAGGED = attention.uniform(16, 512, TOKENS)
MEAN_64 = attention.uniform(16, 112, TOKENS)


CASES = (
    *(
        Case(
            FORWARD,
            f"attention forward {heads}x64, {name}",
            partial(attention.forward, heads=heads, lengths=lengths, goals=goals),
        )
        for heads in (12, 16)
        for name, lengths, goals in (
            ("U(16, 512)", RAGGED, {"varlen_attn": 1.15}),
            ("all 512", attention.full(512, TOKENS), {"dense SDPA cuDNN": 0.95}),
        )
    ),
    *(
        Case(
            BACKWARD,
            f"attention backward 12x64, {name}",
            partial(attention.backward, lengths=lengths, goals=goals, runs=runs),
        )
        for name, lengths, goals, runs in (
            *(
                (f"all {length}", attention.full(length, TOKENS), {"FA2 varlen": 1.1}, 100)
                for length in (128, 256, 512)
            ),
            ("U(16, 512)", RAGGED, {}, 100),
        )
    ),
    *(
        Case(
            DROPOUT,
            f"attention {direction} with dropout 12x64, all 512",
            partial(attention.dropout, direction=direction, has_goals=direction == "both"),
        )
        for direction in ("both", "forward", "backward")
    ),
    Case(
        SHORT,
        "attention forward 12x64, U(16, 112)",
        partial(attention.forward, heads=12, lengths=MEAN_64, goals={"FA2 varlen": 1.5}),
    ),
    Case(SHORT, "attention both 12x64, U(16, 112)", partial(attention.both, lengths=MEAN_64)),
    *(
        Case(
            LAYER_NORM,
            f"bias+dropout+residual+LayerNorm {direction}, 16384x{width}",
            partial(fused.layer_norm, width=width, direction=direction),
        )
        for width in (768, 1024)
        for direction in ("forward", "backward")
    ),
    *(
        Case(
            GELU,
            f"bias+GELU {formula} {direction}, 16384x3072",
            partial(fused.gelu, approximate=approximate, direction=direction),
        )
        for formula, approximate in (("erf", "none"), ("tanh", "tanh"))
        for direction in ("forward", "backward")
    ),
    *(
        Case(EMBEDDING, f"embeddings {direction}, 16384x768", partial(fused.embedding, direction=direction))
        for direction in ("forward", "both")
    ),
    Case(HEAD, "masked-LM head and loss, 16384 tokens", fused.masked_lm_head),
    Case(BASE, "BERT-base inference, 32 rows of 102-512", model.base_inference, 20.0),
    Case(VARIABLE, "BERT-base inference, N(256, 64)", model.variable_lengths, 10.0),
    Case(LATENCY, "BERT-base latency, one row of 128", model.latency, 30.0),
    Case(TRAINING, "BERT-large MLM step, 64 rows of 16-512", model.large_training, 30.0),
    Case(SQUAD, "BERT-large inference, 256 rows of 40-384", model.squad_inference, 15.0),
    Case(BINARIES, "training steps on 1,000 random batches", model.random_batches, 15.0),
)

ROWS = tuple(dict.fromkeys(case.row for case in CASES))


def chosen(names: tuple[str, ...]) -> tuple[Case, ...]:
    """The cases whose row or name contains one of the names; all without names."""
    if not names:
        return CASES
    lowered = [name.lower() for name in names]
    return tuple(case for case in CASES if any(name in f"{case.row} {case.name}".lower() for name in lowered))
