"""bert_fast.reference, the oracle of other tests: its derivatives, and its values against torch and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast import BertConfig, reference


def assert_exact(found: Tensor | None, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).requires_grad_()


def gradcheck(function: Callable[..., Tensor], *inputs: Any) -> None:
    assert torch.autograd.gradcheck(function, inputs, atol=1e-7, rtol=1e-5)


def test_layer_norm_has_the_right_derivatives() -> None:
    x, residual, weight, bias = leaf(3, 7), leaf(3, 7, seed=1), leaf(7, seed=2), leaf(7, seed=3)
    gradcheck(reference.layer_norm, x, weight, bias, 1e-5, residual)
    gradcheck(reference.layer_norm, x, weight, bias, 1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_has_the_right_derivatives(approximate: str) -> None:
    gradcheck(reference.gelu, leaf(3, 7), leaf(7, seed=1), approximate)
    gradcheck(reference.gelu, leaf(3, 7), None, approximate)


def test_attention_has_the_right_derivatives() -> None:
    q, k, v = (leaf(8, 2, 3, seed=seed) for seed in range(3))
    cu_seqlens = torch.tensor([0, 3, 3, 4, 6, 8], dtype=torch.int32)
    gradcheck(reference.attention, q, k, v, cu_seqlens, 0.7)
    gradcheck(reference.attention, q, k, v, cu_seqlens, 0.7, torch.tensor([2, 0, 1, 0, 2]))


def test_layer_norm_is_torchs() -> None:
    x, residual = -2.3 + 0.5 * draw(5, 132), draw(5, 132, seed=1)
    weight, bias = 1 + 0.3 * draw(132, seed=2), draw(132, seed=3)
    expected = F.layer_norm(x + residual, (132,), weight, bias, 1e-5)
    assert_exact(reference.layer_norm(x, weight, bias, 1e-5, residual), expected)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_torchs(approximate: str) -> None:
    x, bias = 3 * draw(5, 132), draw(132, seed=1)
    assert_exact(reference.gelu(x, bias, approximate), F.gelu(x + bias, approximate=approximate))


def test_attention_is_torchs_within_each_sequence() -> None:
    q, k, v = (draw(7, 2, 5, seed=seed) for seed in range(3))
    out = reference.attention(q, k, v, torch.tensor([0, 4, 4, 7]), 0.3, torch.tensor([4, 0, 2]))
    for rows, keys in ((slice(0, 4), slice(0, 4)), (slice(4, 7), slice(4, 6))):
        heads_first = [x.transpose(0, 1) for x in (q[rows], k[keys], v[keys])]
        expected = F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2], scale=0.3)
        assert_exact(out[rows], expected.transpose(0, 1))


def test_attention_without_keys_is_zero() -> None:
    q, k, v = (draw(5, 2, 3, seed=seed) for seed in range(3))
    out = reference.attention(q, k, v, torch.tensor([0, 2, 5]), 0.3, torch.tensor([0, 3]))
    assert not out[:2].any()
    assert out[2:].all()
    assert reference.attention(q[:0], k[:0], v[:0], torch.tensor([0]), 0.3).shape == (0, 2, 3)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("has_embeddings", [False, True], ids=["ids", "embeddings"])
def test_bert_is_transformers(hidden_act: str, has_embeddings: bool) -> None:
    """A mask with holes, token types, positions out of order; compared where the mask is set."""
    transformers = pytest.importorskip("transformers")
    config = BertConfig(
        vocab_size=97,
        hidden_size=132,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=211,
        max_position_embeddings=23,
        hidden_act=hidden_act,
    )
    generator = torch.Generator().manual_seed(0)
    theirs = transformers.BertModel(
        transformers.BertConfig(**{**config.to_dict(), "attn_implementation": "eager"})
    ).double()
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # not the initial weights: those of LayerNorm are 1 and 0
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    ids = torch.randint(97, (3, 19), generator=generator)
    mask = (torch.rand(3, 19, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    types = torch.randint(2, (3, 19), generator=generator)
    positions = torch.randperm(23, generator=generator)[None, :19]
    embeds = draw(3, 19, 132) if has_embeddings else None
    inputs = {"input_ids": None if has_embeddings else ids, "inputs_embeds": embeds, "attention_mask": mask,
              "token_type_ids": types, "position_ids": positions}  # fmt: skip
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True)
    found = reference.bert(theirs.state_dict(), config, **inputs)
    assert 0 < int(mask.sum()) < mask.numel()
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for mine, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_exact(mine[mask == 1], other[mask == 1])
    assert_exact(found.pooled, expected.pooler_output)


def test_bert_defaults() -> None:
    """Without mask, types and positions: everywhere, zeros, columns; without a pooler's weights no pooled output."""
    config = BertConfig(
        vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5,
        max_position_embeddings=4,
    )  # fmt: skip
    shapes = {
        "embeddings.word_embeddings": (11, 6),
        "embeddings.position_embeddings": (4, 6),
        "embeddings.token_type_embeddings": (2, 6),
        "encoder.layer.0.intermediate.dense": (5, 6),
        "encoder.layer.0.output.dense": (6, 5),
        **{f"encoder.layer.0.attention.self.{name}": (6, 6) for name in ("query", "key", "value")},
        "encoder.layer.0.attention.output.dense": (6, 6),
    }
    weights = {f"{name}.weight": draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    weights |= {f"{name}.bias": draw(shape[0], seed=9) for name, shape in shapes.items()}
    for name in ("embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"):
        weights |= {f"{name}.LayerNorm.weight": draw(6, seed=10), f"{name}.LayerNorm.bias": draw(6, seed=11)}
    ids = torch.tensor([[1, 5, 7], [3, 0, 2]])
    found = reference.bert(weights, config, ids)
    full = reference.bert(
        weights, config, ids, torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.long), torch.arange(3)[None]
    )
    assert found.pooled is None
    assert len(found.hidden_states) == 2
    for mine, other in zip(found.hidden_states, full.hidden_states, strict=True):
        assert torch.equal(mine, other)
