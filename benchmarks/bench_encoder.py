"""The whole encoder, real weights, against transformers; and the distance to the matrix products alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bert_fast
from bert_fast.cli import models

from .calls import encode, floor, training_pair, training_step
from .compare import compare
from .workloads import ragged_lengths, token_batches

RAGGED = ragged_lengths(256)
WORKLOADS = {
    "ragged, as they come": (RAGGED, 32),
    "ragged, sorted": (RAGGED.sort().values, 32),
    "full 128": (torch.full((32,), 128), 32),
    "one text of 16": (torch.tensor([16]), 1),
    "one text of 64": (torch.tensor([64]), 1),
    "one text of 256": (torch.tensor([256]), 1),
}


@pytest.mark.parametrize(("lengths", "size"), list(WORKLOADS.values()), ids=list(WORKLOADS))
def test_encoder(benchmark: Any, device: str, lengths: Tensor, size: int) -> None:
    pytest.importorskip("transformers")
    place = torch.device(device)
    original, _ = models.load(models.demo_folder(), place)
    swapped = bert_fast.swap(models.load(models.demo_folder(), place)[0])
    batches = [{k: v.to(place) for k, v in batch.items()} for batch in token_batches(lengths, size)]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]

    with torch.inference_mode():
        for batch in batches:
            rows = batch["attention_mask"].bool()
            difference = (original(**batch)[0] - swapped(**batch)[0])[rows].abs().max().item()
            assert difference <= (1e-5 if device == "cpu" else 2e-5)
        peers = {"transformers SDPA": encode(original, batches), "floor: matrix products": floor(original, tokens)}
        rounds = 7 if len(batches) > 1 else 30
        places = sum(batch["attention_mask"].numel() for batch in batches)
        facts = {"padding": places / sum(tokens), "useful_tokens": sum(tokens)}
        compare(benchmark, encode(swapped, batches), peers, device=device, rounds=rounds, facts=facts)


@pytest.mark.parametrize("is_training", [False, True], ids=["no dropout", "dropout"])
def test_training_step(benchmark: Any, device: str, is_training: bool) -> None:
    """Forward and backward of a classifier on one ragged batch; compared first without dropout, which differs."""
    pytest.importorskip("transformers")
    original, swapped = training_pair(models.demo_folder(), device)
    (batch,) = ({k: v.to(device) for k, v in b.items()} for b in token_batches(RAGGED[:32], 32))
    torch.testing.assert_close(training_step(original, batch)(), training_step(swapped, batch)())
    for model in (original, swapped):
        model.train(is_training)
    peers = {"transformers SDPA": training_step(original, batch)}
    compare(benchmark, training_step(swapped, batch), peers, device=device, rounds=7)
