"""torch.compile of swapped models and of our own: one graph, whatever the batch, and the results of the eager call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import bert_fast
from bert_fast.config import BertConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 41,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def swapped(name: str, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **settings)
    return bert_fast.swap(getattr(transformers, name)(config))


def own(**settings: Any) -> Any:
    torch.manual_seed(0)
    return bert_fast.BertForPreTraining(BertConfig(**SIZES, **settings))


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def random_batches(count: int) -> Iterator[dict[str, Tensor]]:
    """Other numbers of texts, columns and tokens every time; some texts are empty. Labels are under the mask, too."""
    generator = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(count):
        shape = (number(2, 9), number(2, 65))
        lengths = torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
        ids = torch.randint(0, 97, shape, generator=generator)
        is_labelled = torch.rand(shape, generator=generator) < 0.2
        yield {
            "input_ids": ids,
            "attention_mask": (torch.arange(shape[1]) < lengths).long(),
            "token_type_ids": ids % 2,
            "labels": ids.where(is_labelled, torch.tensor(-100)),
            "next_sentence_label": torch.randint(0, 2, shape[:1], generator=generator),
        }


def loss_and_gradients(call: Any, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss = call(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_one_graph() -> None:
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")  # torch's own import
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_swapped_encoder(backend: str) -> None:
    model = swapped("BertModel").eval()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in random_batches(100):
            inputs = {name: x for name, x in batch.items() if "label" not in name}
            for found, expected in zip(compiled(**inputs).values(), model(**inputs).values(), strict=True):
                torch.testing.assert_close(found, expected)
    assert_one_graph()


@pytest.mark.parametrize("make", [lambda: swapped("BertForPreTraining", **NO_DROPOUT), lambda: own(**NO_DROPOUT)])
def test_pretraining(make: Callable[[], Any]) -> None:
    model = make().train()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in random_batches(100):
        found = loss_and_gradients(compiled, model, batch)
        expected = loss_and_gradients(model, model, batch)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert_one_graph()


def test_pretraining_on_labelled_rows_with_dropout() -> None:
    model = own().train()
    model.needs_labelled_only = True
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    losses = [float(loss_and_gradients(compiled, model, batch)[0]) for batch in random_batches(20)]
    assert all(0.0 < loss < 10.0 for loss in losses)
    assert_one_graph()


def test_without_dynamic_shapes_it_compiles_anew_until_all_have_changed() -> None:
    """torch's default takes the first sizes for constants, then those that change for variables."""
    model = swapped("BertModel").eval()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for batch in random_batches(20):
            compiled(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert 1 < counters["stats"]["unique_graphs"] <= 3


def test_compiled_calls_go_uncounted() -> None:
    model = swapped("BertModel").eval()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.arange(12).view(2, 6)
    compiled(ids)
    assert "bert_fast_calls" not in model.__dict__


def test_a_refused_call_is_compiled_as_the_original() -> None:
    model = swapped("BertModel", attn_implementation="eager").eval()
    compiled: Any = torch.compile(model, backend="aot_eager")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad(), pytest.warns(UserWarning, match="attention probabilities are asked for"):
        output = compiled(ids, output_attentions=True)
    assert len(output.attentions) == 2
