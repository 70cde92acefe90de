"""All columns of a batch in one forward pass: the loss and the gradients of a pass for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_models import TEXTS, embedder, save_encoder
from torch import Tensor, nn

import bert_fast
from bert_fast.tasks.columns import in_one_forward

losses: Any = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

LABELS = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.3])
CASES = {
    "cosine": (losses.CosineSimilarityLoss, 2),
    "cosent": (losses.CoSENTLoss, 2),
    "ranking": (losses.MultipleNegativesRankingLoss, 2),
    "ranking, with negatives": (losses.MultipleNegativesRankingLoss, 4),
}


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    """Swapped, without dropout, which would draw other masks for one pass."""
    encoder = save_encoder(tmp_path / "encoder", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    swapped: nn.Module = bert_fast.swap(embedder(encoder)).train()
    return swapped


def features(model: Any, columns: int) -> list[dict[str, Any]]:
    """The columns' texts have other lengths in each."""
    return [model.preprocess(TEXTS[5 * column : 5 * column + 5]) for column in range(columns)]


def differentiate(loss: Any, columns: list[dict[str, Any]]) -> tuple[dict[str, Tensor], int]:
    """The loss and the gradients, and the number of forward passes."""
    calls: list[None] = []
    hook = loss.model.register_forward_hook(lambda *_: calls.append(None))
    value = loss([dict(column) for column in columns], LABELS)
    hook.remove()
    parameters = {name: weight for name, weight in loss.model.named_parameters() if "pooler" not in name}
    grads = torch.autograd.grad(value, list(parameters.values()))
    return {"loss": value.detach(), **dict(zip(parameters, grads, strict=True))}, len(calls)


@pytest.mark.parametrize(("kind", "columns"), CASES.values(), ids=CASES)
def test_loss_and_gradients_are_the_same(model: nn.Module, kind: Any, columns: int) -> None:
    batch = features(model, columns)
    expected, passes = differentiate(kind(model), batch)
    assert passes == min(columns, 2)  # theirs merges all but the first
    found, passes = differentiate(in_one_forward(kind(model)), batch)
    assert passes == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_columns_of_other_kinds_go_one_by_one(model: nn.Module) -> None:
    batch = features(model, 2)
    batch[1]["prompt_length"] = 3
    expected, _ = differentiate(losses.CosineSimilarityLoss(model), batch)
    found, passes = differentiate(in_one_forward(losses.CosineSimilarityLoss(model)), batch)
    assert passes == 2
    assert torch.equal(found["loss"], expected["loss"])


def test_an_unswapped_model_stays_as_it_is(model: nn.Module) -> None:
    loss = losses.CosineSimilarityLoss(bert_fast.restore(model))
    assert type(in_one_forward(loss)) is losses.CosineSimilarityLoss


def test_a_loss_that_caches_gradients_stays_as_it_is(model: nn.Module) -> None:
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    assert type(in_one_forward(loss)) is losses.CachedMultipleNegativesRankingLoss
