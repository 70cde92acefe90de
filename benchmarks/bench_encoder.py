"""The whole encoder, real weights, against transformers; and the distance to the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import bert_fast
from bert_fast.cli import models

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


def floor(model: Any, tokens: list[int]) -> Callable[[], None]:
    """The layers' matrix products on the real tokens of each batch, and nothing else."""
    linears = [
        (module.weight, module.bias)
        for layer in model.encoder.layer
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    weight = linears[0][0]
    inputs = {
        (count, width): torch.randn(count, width, device=weight.device, dtype=weight.dtype)
        for count in set(tokens)
        for width in {w.shape[1] for w, _ in linears}
    }

    def run() -> None:
        for count in tokens:
            for weight, bias in linears:
                F.linear(inputs[count, weight.shape[1]], weight, bias)

    return run


@pytest.mark.parametrize(("lengths", "size"), list(WORKLOADS.values()), ids=list(WORKLOADS))
def test_encoder(benchmark: Any, device: str, lengths: Tensor, size: int) -> None:
    pytest.importorskip("transformers")
    place = torch.device(device)
    original, _ = models.load(models.demo_folder(), place)
    swapped = bert_fast.swap(models.load(models.demo_folder(), place)[0])
    batches = [{k: v.to(place) for k, v in batch.items()} for batch in token_batches(lengths, size)]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]

    def encode(model: Any) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                model(**batch)

        return run

    with torch.inference_mode():
        for batch in batches:
            rows = batch["attention_mask"].bool()
            difference = (original(**batch)[0] - swapped(**batch)[0])[rows].abs().max().item()
            assert difference <= (1e-5 if device == "cpu" else 2e-5)
        peers = {"transformers SDPA": encode(original), "floor: matrix products": floor(original, tokens)}
        rounds = 7 if len(batches) > 1 else 30
        places = sum(batch["attention_mask"].numel() for batch in batches)
        facts = {"padding": places / sum(tokens), "useful_tokens": sum(tokens)}
        compare(benchmark, encode(swapped), peers, device=device, rounds=rounds, facts=facts)


@pytest.mark.parametrize("is_training", [False, True], ids=["no dropout", "dropout"])
def test_training_step(benchmark: Any, device: str, is_training: bool) -> None:
    """Forward and backward of a classifier on one ragged batch; compared first without dropout, which differs."""
    transformers = pytest.importorskip("transformers")
    with models.quiet():
        pair = [
            transformers.AutoModelForSequenceClassification.from_pretrained(models.demo_folder(), local_files_only=True)
            .eval()
            .to(device)
            for _ in range(2)
        ]
    original, swapped = pair[0], bert_fast.swap(pair[1])
    swapped.load_state_dict(original.state_dict())
    (batch,) = ({k: v.to(device) for k, v in b.items()} for b in token_batches(RAGGED[:32], 32))
    labels = torch.arange(32, device=device) % 2

    def step(model: Any) -> Callable[[], Any]:
        def run() -> Any:
            model.zero_grad(set_to_none=True)
            loss = model(**batch, labels=labels).loss
            loss.backward()
            return loss

        return run

    torch.testing.assert_close(step(original)(), step(swapped)())
    for model in (original, swapped):
        model.train(is_training)
    compare(benchmark, step(swapped), {"transformers SDPA": step(original)}, device=device, rounds=7)
