"""bert_fast.BertModel against the float64 oracle and transformers' BertModel, and what it promises of packed rows."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from models import (
    MIXED,
    SIZES,
    WHOLE,
    assert_near,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
    ours,
    theirs,
)
from tolerance import assert_twice_torch, magnitude
from torch import Tensor

import bert_fast
from bert_fast import BertConfig, PackedBatch, masking, ops, reference

SHAPES: dict[str, dict[str, Any]] = {
    "132 in 3 heads": {"hidden_size": 132, "num_hidden_layers": 1, "intermediate_size": 101},
    "96 in 4 heads, tanh": {
        "hidden_size": 96,
        "num_attention_heads": 4,
        "intermediate_size": 131,
        "hidden_act": "gelu_new",
    },
    "51 in 3 heads": {},
}

DROPOUTS = ("attention", "attention_output", "output")

MASK_DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


def weigh(hidden_states: list[Tensor], pooled: Tensor | None, mask: Tensor) -> Tensor:
    """A scalar in which every hidden state at a token, and every pooled one, has another weight."""
    total = torch.zeros((), dtype=hidden_states[0].dtype)
    for index, x in enumerate([h[mask] for h in hidden_states] + ([] if pooled is None else [pooled])):
        generator = torch.Generator().manual_seed(index)
        total = total + (x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum()
    return total


class Run:
    """Hidden states, pooled output and the gradients by transformers' names of one model."""

    def __init__(self, hidden_states: Any, pooled: Any, weights: dict[str, Tensor], mask: Tensor) -> None:
        self.values = {f"hidden state {i}": x[mask] for i, x in enumerate(hidden_states)} | {"pooled": pooled}
        grads = torch.autograd.grad(weigh(list(hidden_states), pooled, mask), list(weights.values()))
        self.values |= dict(zip(weights, grads, strict=True))


def run_ours(model: Any, batch: dict[str, Tensor], mask: Tensor) -> Run:
    output = model(**batch, output_hidden_states=True)
    weights = {str(bert_fast.checkpoint.to_hugging_face(name)): p for name, p in model.named_parameters()}
    return Run(output.hidden_states, output.pooled, weights, mask)


def run_theirs(model: Any, batch: dict[str, Tensor], mask: Tensor) -> Run:
    output = model(**batch, output_hidden_states=True)
    return Run(output.hidden_states, output.pooler_output, dict(model.named_parameters()), mask)


def run_oracle(model: Any, batch: dict[str, Tensor], mask: Tensor) -> Run:
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    output = reference.bert(weights, BertConfig.from_dict(model.config.to_dict()), **batch)
    return Run(output.hidden_states, output.pooled, weights, mask)


def assert_as_exact_as_torch(found: Run, torchs: Run, oracle: Run) -> None:
    assert found.values.keys() == torchs.values.keys() == oracle.values.keys()
    for name, exact in oracle.values.items():
        # The gradient of the keys' bias is zero but for rounding: the softmax does not see it.
        scale = magnitude(oracle.values[name.replace("key", "query")]) if name.endswith("key.bias") else None
        if name == "embeddings.word_embeddings.weight":  # the oracle knows no padding id, which gets no gradient
            exact = exact.index_fill(0, torch.tensor([0]), 0.0)
        assert_twice_torch(name, found.values[name], torchs.values[name], exact, scale)


@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_oracle(shape: dict[str, Any], rows: str) -> None:
    model = theirs("BertModel", **shape)
    mask = mask_of(rows)
    batch = inputs(mask)
    batch["input_ids"][0, 3] = 0  # [PAD] among the tokens
    oracle = run_oracle(model, batch, mask)
    assert_as_exact_as_torch(run_ours(ours(model), batch, mask), run_theirs(model, batch, mask), oracle)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the kernels run compiled")
def test_triton() -> None:
    model = theirs("BertModel", hidden_size=34, num_attention_heads=2, intermediate_size=41)
    mask = mask_of("11111111111 11111000000 00111101100 00000000000")
    batch = inputs(mask)
    with ops.forced_path("triton"):
        found = run_ours(ours(model), batch, mask)
    assert_as_exact_as_torch(found, run_theirs(model, batch, mask), run_oracle(model, batch, mask))
    on_cpp = run_ours(ours(model), batch, mask)
    assert any(not torch.equal(found.values[name], x) for name, x in on_cpp.values.items()), "both runs took one path"


@pytest.fixture
def model() -> Any:
    return ours(theirs("BertModel"))


# ---- padding ---------------------------------------------------------------------------------------------------------


def test_shapes(model: Any) -> None:
    mask = mask_of(MIXED)
    output = model(**inputs(mask))
    tokens = int((mask | (torch.arange(13) == 0)).sum())  # the first place is always computed
    assert output.packed.shape == (tokens, 51)
    assert output.batch.total_tokens == tokens
    assert output.last_hidden_state.shape == (8, 13, 51)
    assert output.pooled.shape == (8, 51)
    assert output.packed_hidden_states == output.hidden_states == ()
    padding = ~mask
    padding[:, 0] = False
    assert magnitude(output.last_hidden_state[padding]) == 0.0
    assert torch.equal(output.pooled, torch.tanh(model.pooler(output.last_hidden_state[:, 0])))
    output = model(**inputs(mask), output_hidden_states=True)
    assert [x.shape for x in output.packed_hidden_states] == [(tokens, 51)] * 3
    assert torch.equal(output.packed_hidden_states[-1], output.packed)
    assert [x.shape for x in output.hidden_states] == [(8, 13, 51)] * 3


def test_no_pooler() -> None:
    model = bert_fast.BertModel(BertConfig(**SIZES), has_pooler=False)
    assert model.pooler is None
    assert model(**inputs(mask_of(MIXED))).pooled is None


def test_padding_is_nothing(model: Any) -> None:
    # Each row alone, without its padding, gives what it gives in the batch.
    mask = mask_of(MIXED)
    batch = inputs(mask)
    model.pooler = None
    output = model(**batch)
    for row in range(len(mask)):
        columns = torch.nonzero(mask[row]).flatten()
        if len(columns) == 0:
            continue
        alone = model(
            batch["input_ids"][row, columns][None],
            token_type_ids=batch["token_type_ids"][row, columns][None],
            position_ids=columns[None],
        )
        assert_near(alone.packed, output.last_hidden_state[row, columns])


def test_hidden_tokens_are_nothing(model: Any) -> None:
    mask = mask_of(MIXED)
    batch, other = inputs(mask, seed=1, padding=None), inputs(mask, seed=2, padding=None)
    for name in ("input_ids", "token_type_ids"):
        other[name] = batch[name].where(mask | (torch.arange(13) == 0), other[name])
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    assert torch.equal(model(**batch).packed, model(**other).packed)


def test_neighbours_do_not_leak(model: Any) -> None:
    mask = mask_of(MIXED)
    batch = inputs(mask)
    loud = torch.tensor([1, 4])
    batch["input_ids"] = batch["input_ids"] % 48 + 1
    batch["input_ids"][loud] += 48
    quiet = torch.ones(len(mask), dtype=torch.bool).index_fill(0, loud, False)
    with torch.no_grad():
        before = model(**batch)
        model.embeddings.word.weight[49:] *= 100
        after = model(**batch)
    assert torch.equal(after.last_hidden_state[quiet], before.last_hidden_state[quiet])
    assert torch.equal(after.pooled[quiet], before.pooled[quiet])
    assert not torch.equal(after.last_hidden_state[loud], before.last_hidden_state[loud])


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_mask_dtypes(model: Any, dtype: torch.dtype) -> None:
    mask = mask_of(MIXED)
    batch = inputs(mask)
    expected = model(**{**batch, "attention_mask": mask})
    found = model(**{**batch, "attention_mask": mask.to(dtype)})
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.pooled, expected.pooled)


def test_no_mask(model: Any) -> None:
    batch = inputs(mask_of(WHOLE))
    expected = model(**batch)
    del batch["attention_mask"]
    found = model(**batch)
    assert found.batch.indices is None
    assert torch.equal(found.packed, expected.packed)


def test_no_token_types(model: Any) -> None:
    batch = inputs(mask_of(MIXED))
    batch["token_type_ids"].zero_()
    expected = model(**batch)
    del batch["token_type_ids"]
    assert_near(model(**batch).packed, expected.packed)


@pytest.mark.parametrize("rows", ["000 000", "0 0"])
def test_nothing_but_padding(rows: str) -> None:
    mask = mask_of(rows)
    reference_model = theirs("BertModel")
    model = ours(reference_model)
    output = model(**inputs(mask))
    assert output.packed.shape == (2, 51)  # the first places
    assert output.last_hidden_state.shape == (*mask.shape, 51)
    assert_near(output.pooled, reference_model(**inputs(mask)).pooler_output)
    output.pooled.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_no_tokens() -> None:
    model = bert_fast.BertModel(BertConfig(**SIZES), has_pooler=False)
    mask = mask_of("000 000")
    output = model(masking.unpad(mask, ids=mask.long()))
    assert output.packed.shape == (0, 51)
    assert magnitude(output.last_hidden_state) == 0.0
    output.last_hidden_state.sum().backward()
    assert all(p.grad is None or magnitude(p.grad) == 0.0 for p in model.parameters())


@pytest.mark.parametrize("batch_size", [0, 3])
def test_empty_batch(batch_size: int) -> None:
    model = bert_fast.BertModel(BertConfig(**SIZES), has_pooler=False)
    ids = torch.zeros(batch_size, 0, dtype=torch.int64)
    assert model(ids).last_hidden_state.shape == (batch_size, 0, 51)


def test_deterministic(model: Any) -> None:
    batch = inputs(mask_of(MIXED))
    assert torch.equal(model(**batch).packed, model(**batch).packed)


def test_threads(model: Any) -> None:
    # More threads than rows in a sequence, and than sequences.
    mask = mask_of(MIXED)
    batch = inputs(mask)
    expected = run_ours(model, batch, mask)
    for threads in (2, 11):
        torch.set_num_threads(threads)
        found = run_ours(model, batch, mask)
        for name, x in expected.values.items():
            assert_near(found.values[name], x, 1e-4 if name.endswith("key.bias") else 1e-5)


# ---- packed batches and positions ------------------------------------------------------------------------------------


def test_packed_batch(model: Any) -> None:
    mask = mask_of(MIXED)
    batch = inputs(mask)
    packed = masking.unpad(
        mask, ids=batch["input_ids"], token_types=batch["token_type_ids"], keep_first=True, device="cpu"
    )
    found, expected = model(packed, output_hidden_states=True), model(**batch, output_hidden_states=True)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.pooled, expected.pooled)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", ["0111 1111", "1111 0111"], ids=["first", "last"])
def test_packed_batch_without_first_token(model: Any, rows: str) -> None:
    # Column 0 is not among the packed rows: the pooled output is refused, or that of the row's own first token.
    mask = mask_of(rows)
    batch = inputs(mask)
    packed = masking.unpad(mask, ids=batch["input_ids"], token_types=batch["token_type_ids"])
    pooled = None
    with suppress(ValueError):
        pooled = model(packed).pooled
    hidden_states = model(**batch).last_hidden_state
    firsts = torch.stack([hidden_states[row, column] for row, column in enumerate(mask.int().argmax(1))])
    assert pooled is None or torch.allclose(pooled, torch.tanh(model.pooler(firsts)), atol=1e-5)


def test_packed_batch_with_empty_sequence(model: Any) -> None:
    mask = mask_of("1111 0000 0110")
    packed = masking.unpad(mask, ids=inputs(mask)["input_ids"])
    with pytest.raises(ValueError, match="sequence 1 has no rows"):
        model(packed)
    model.pooler = None
    assert model(packed).packed.shape == (6, 51)


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids", "position_ids", "keep"])
def test_packed_batch_stands_alone(model: Any, name: str) -> None:
    mask = mask_of(MIXED)
    packed = masking.unpad(mask, ids=inputs(mask)["input_ids"], keep_first=True)
    with pytest.raises(ValueError, match=name):
        model(packed, **{name: mask})


def test_packed_batch_without_ids(model: Any) -> None:
    packed = masking.unpad(mask_of(MIXED), keep_first=True)
    assert isinstance(packed, PackedBatch)
    with pytest.raises(ValueError, match="no ids"):
        model(packed)


@pytest.mark.parametrize("has_pooler", [False, True])
@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
def test_position_ids(rows: str, has_pooler: bool) -> None:
    reference_model = theirs("BertModel")
    model = ours(reference_model)
    mask = mask_of(rows)
    batch = inputs(mask)
    batch["position_ids"] = torch.arange(13).flip(0).repeat(len(mask), 1) // 2 + 5
    expected = reference_model(**batch)
    if not has_pooler:
        model.pooler = None
    output = model(**batch)
    assert_near(output.last_hidden_state[mask], expected.last_hidden_state[mask])
    if has_pooler:
        assert_near(output.pooled, expected.pooler_output)


def test_position_ids_of_one_row(model: Any) -> None:
    model.pooler = None
    batch = inputs(mask_of(MIXED))
    position_ids = torch.arange(13) + 7
    expected = model(**batch, position_ids=position_ids.expand(8, 13))
    assert torch.equal(model(**batch, position_ids=position_ids[None]).packed, expected.packed)


def test_length_limit(model: Any) -> None:
    assert model(torch.ones(2, 37, dtype=torch.int64)).packed.shape == (74, 51)
    with pytest.raises(ValueError, match=r"38.*37"):
        model(torch.ones(2, 38, dtype=torch.int64))
    position_ids = torch.arange(38).expand(2, 38) % 37
    model.pooler = None
    assert model(torch.ones(2, 38, dtype=torch.int64), position_ids=position_ids).packed.shape == (76, 51)


@pytest.mark.parametrize(
    ("shape", "others", "message"),
    [
        ((13,), {}, r"\(13,\)"),
        ((2, 13, 3), {}, r"\(2, 13, 3\)"),
        ((2, 13), {"attention_mask": (2, 11)}, r"\(2, 13\).*\(2, 11\)"),
        ((2, 13), {"attention_mask": (2, 1, 1, 13)}, r"\(2, 1, 1, 13\)"),
        ((2, 13), {"token_type_ids": (3, 13)}, r"\(3, 13\).*\(2, 13\)"),
    ],
    ids=str,
)
def test_shapes_that_do_not_belong_together(
    model: Any, shape: tuple[int, ...], others: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(
            torch.ones(shape, dtype=torch.int64),
            **{name: torch.ones(size, dtype=torch.int64) for name, size in others.items()},
        )


@pytest.mark.parametrize("bad", [-1, 97])
def test_ids_out_of_range(model: Any, bad: int) -> None:
    with pytest.raises(IndexError):
        model(torch.tensor([[1, bad]]))


def test_kept_tokens(model: Any) -> None:
    # A kept token sees what the others see, and is seen by nobody.
    mask = mask_of(MIXED)
    batch = inputs(mask)
    keep = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    output, without = model(**batch, keep=keep), model(**batch)
    assert_near(output.last_hidden_state[mask], without.last_hidden_state[mask])
    weights = {bert_fast.checkpoint.to_hugging_face(name): p for name, p in model.named_parameters()}
    oracle = reference.bert({str(name): p.double() for name, p in weights.items()}, model.config, **batch)
    computed = mask | keep
    assert bool((keep & ~mask).any())
    assert_near(output.last_hidden_state[computed], oracle.hidden_states[-1][computed].float())


# ---- dropout and initial weights -------------------------------------------------------------------------------------


def train_step(model: Any, seed: int) -> list[Tensor]:
    batch = inputs(mask_of(MIXED))
    torch.manual_seed(seed)
    output = model(**batch)
    weights = [p for name, p in model.named_parameters() if not name.startswith("pooler")]
    return [output.packed, *torch.autograd.grad(output.packed.square().sum(), weights)]


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3), (0.1, 0.1)], ids=["hidden", "attention", "both"])
def test_dropout(rates: tuple[float, float]) -> None:
    reference_model = theirs("BertModel", hidden_dropout_prob=rates[0], attention_probs_dropout_prob=rates[1])
    model = ours(reference_model)
    evaluated = model(**inputs(mask_of(MIXED))).packed
    model.train()
    first, again, other = train_step(model, 1), train_step(model, 1), train_step(model, 2)
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], evaluated)
    assert all(bool(x.isfinite().all()) for x in first)
    model.eval()
    assert torch.equal(model(**inputs(mask_of(MIXED))).packed, evaluated)


@pytest.mark.parametrize("name", ["embeddings.dropout", *(f"layers.1.{part}_dropout" for part in DROPOUTS)])
def test_every_dropout_counts(name: str) -> None:
    model = ours(theirs("BertModel", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2))
    evaluated = model(**inputs(mask_of(MIXED))).packed
    dropouts = {key: module for key, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert len(dropouts) == 1 + 2 * len(DROPOUTS)
    assert dropouts[name].p == (0.2 if "attention_dropout" in name else 0.3)
    for key, module in dropouts.items():
        if key != name:
            module.p = 0.0
    model.train()
    assert magnitude(model(**inputs(mask_of(MIXED))).packed - evaluated) > 0.1


def test_dropout_rate_of_attention() -> None:
    # Values that are one everywhere: what comes out is the sum of the kept probabilities, whose mean is one and whose
    # variance at one key of length 1 is p / (1 - p).
    torch.manual_seed(3)
    rate, tokens = 0.3, 40_009
    value = torch.ones(tokens, 1, 1)
    cu_seqlens = torch.arange(tokens + 1, dtype=torch.int32)
    out = bert_fast.functional.attention(value, value, value, cu_seqlens, 1, dropout_p=rate).flatten()
    assert torch.allclose(out.unique(), torch.tensor([0.0, 1 / (1 - rate)]))
    assert abs(float((out == 0).float().mean()) - rate) < 5 * (rate * (1 - rate) / tokens) ** 0.5


def test_no_dropout_in_training() -> None:
    model = ours(theirs("BertModel", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    evaluated = train_step(model, 1)
    model.train()
    for x, y in zip(train_step(model, 2), evaluated, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_initial_weights(std: float) -> None:
    torch.manual_seed(7)
    model = bert_fast.BertForPreTraining(BertConfig(**{**SIZES, "hidden_size": 96}, initializer_range=std))
    seen = {"weight": 0, "norm": 0, "bias": 0}
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            seen["bias"] += 1
            assert magnitude(parameter) == 0.0, name
        elif "norm" in name:
            seen["norm"] += 1
            assert bool((parameter == 1).all()), name
        else:
            seen["weight"] += 1
            values = parameter.detach()[1 if name == "bert.embeddings.word.weight" else 0 :]
            five_sigmas = 5 * std / values.numel() ** 0.5
            assert abs(float(values.mean())) < five_sigmas, name
            assert abs(float(values.std()) - std) < five_sigmas / 2**0.5, name
    assert seen == {"weight": 3 + 2 * 6 + 1 + 2, "norm": 1 + 2 * 2 + 1, "bias": 1 + 2 * 8 + 1 + 4}
    assert magnitude(model.bert.embeddings.word.weight[0]) == 0.0
