"""bert_fast.verify: honest figures for swapped models, and an error for those that answer something else."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import (
    HEADS,
    MIXED,
    TEXTS,
    WHOLE,
    inputs,
    mask_of,
    minilm,
    one_thread,  # noqa: F401
    theirs,
    transformers,
)
from torch import Tensor, nn

import bert_fast
from bert_fast import BertConfig, engine, functional, masking, reference
from bert_fast.swap import bert_shaped as family
from bert_fast.swap.verify import TensorCheck, Verification, VerificationError

TOKEN_LABELS = torch.randint(2, (8, 13), generator=torch.Generator().manual_seed(1))  # at hidden places, too

LABELS: dict[str, dict[str, Tensor]] = {
    "BertForMaskedLM": {"labels": TOKEN_LABELS},
    "BertForMultipleChoice": {"labels": torch.tensor([1, 0, 0, 1])},
    "BertForNextSentencePrediction": {"labels": torch.arange(8) % 2},
    "BertForPreTraining": {"labels": TOKEN_LABELS, "next_sentence_label": torch.arange(8) % 2},
    "BertForQuestionAnswering": {"start_positions": torch.arange(8), "end_positions": torch.arange(8) + 6},
    "BertForSequenceClassification": {"labels": torch.arange(8) % 2},
    "BertForTokenClassification": {"labels": TOKEN_LABELS},
}


def batch_for(name: str, rows: str = MIXED) -> dict[str, Tensor]:
    batch = inputs(mask_of(rows))
    return {key: x.view(-1, 2, 13) for key, x in batch.items()} if name == "BertForMultipleChoice" else batch


def checks(result: Verification) -> dict[str, TensorCheck]:
    assert len({check.name for check in result.checks}) == len(result.checks)
    return {check.name: check for check in result.checks}


@pytest.fixture
def swapped() -> Any:
    return bert_fast.swap(theirs("BertModel"))


# ---- what passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
@pytest.mark.parametrize("name", ["BertModel", *HEADS])
def test_passes(name: str, rows: str) -> None:
    model = bert_fast.swap(theirs(name))
    result = bert_fast.verify(model, batch_for(name, rows))
    assert result.is_within
    names = list(checks(result))
    assert names[0] == ("encoder" if name == "BertModel" else "bert") + ": last hidden state"
    assert len(names) == {"BertModel": 3, "BertForPreTraining": 3, "BertForQuestionAnswering": 3}.get(name, 2)
    for check in result.checks:
        assert check.is_within
        assert 0 < check.error <= check.bound < 1e-3
        assert check.cosine > 0.99999
        assert check.name in str(result)


@pytest.mark.parametrize("name", HEADS)
def test_passes_with_labels(name: str) -> None:
    model = bert_fast.swap(theirs(name))
    result = checks(bert_fast.verify(model, batch_for(name) | LABELS[name]))
    assert result["loss"].is_within
    assert result["loss"].cosine == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": None},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"position_ids": torch.arange(13)[None] + 3},
        {"input_ids": None, "inputs_embeds": torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(1))},
    ],
    ids=lambda arguments: list(arguments)[-1],
)
def test_arguments(swapped: Any, arguments: dict[str, Any]) -> None:
    result = bert_fast.verify(swapped, inputs(mask_of(MIXED)) | arguments)
    assert len(result.checks) == 3 + 3 * ("output_hidden_states" in arguments)


def test_batch_encoding(swapped: Any) -> None:
    batch = inputs(mask_of(MIXED))
    result = bert_fast.verify(swapped, transformers.BatchEncoding(batch))
    assert result == bert_fast.verify(swapped, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(swapped: Any, dtype: torch.dtype) -> None:
    result = checks(bert_fast.verify(swapped.to(dtype), inputs(mask_of(MIXED))))
    eps = torch.finfo(dtype).eps
    assert eps / 8 < result["last_hidden_state"].error < 100 * eps


def test_original_path(swapped: Any) -> None:
    swapped.encoder.layer[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="original path"):
        result = bert_fast.verify(swapped, inputs(mask_of(MIXED)))
    assert [check.difference for check in result.checks] == [0.0, 0.0, 0.0]


def test_sentence_transformer() -> None:
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = bert_fast.swap(SentenceTransformer(str(minilm()), device="cpu"))
    found = checks(bert_fast.verify(model, TEXTS[:6]))
    assert {"token_embeddings", "sentence_embedding"} <= set(found)
    assert 0 < found["sentence_embedding"].error < 1e-6
    assert found["sentence_embedding"].cosine > 0.999999
    assert bert_fast.verify(model, model.preprocess(TEXTS[:6])) == bert_fast.verify(model, TEXTS[:6])


def test_oracle_of_a_sentence_transformer() -> None:
    # sentence-transformers calls the encoder's forward without its hooks; it is held to the oracle all the same.
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = bert_fast.swap(SentenceTransformer(str(minilm()), device="cpu"))
    names = list(checks(bert_fast.verify(model, TEXTS[:6])))
    assert any(name.endswith(": last hidden state") for name in names)


# ---- the figures -----------------------------------------------------------------------------------------------------


def figures(name: str, found: Tensor, original: Tensor, exact: Tensor) -> TensorCheck:
    """The check as its docstring says it, of rows (tokens, width)."""
    a, b, c = (x.detach().double() for x in (found, original, exact))
    original_error = (b - c).abs().max().item()
    return TensorCheck(
        name=name,
        error=(a - c).abs().max().item(),
        original_error=original_error,
        difference=(a - b).abs().max().item(),
        bound=2 * original_error + 16 * torch.finfo(found.dtype).eps * c.abs().max().item(),
        cosine=min(float(torch.dot(x, y) / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)),
    )


def assert_same_figures(found: TensorCheck, expected: TensorCheck) -> None:
    assert found.name == expected.name
    for field in ("error", "original_error", "difference", "bound"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-4), field
    assert 1 - found.cosine == pytest.approx(1 - expected.cosine, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_figures(dtype: torch.dtype) -> None:
    model = theirs("BertForTokenClassification").to(dtype)
    mask = mask_of(MIXED)
    batch = inputs(mask)
    with torch.no_grad():
        expected = model(**batch)
        hidden = model.bert(**batch)[0]
        exact = copy.deepcopy(model).double()(**batch)
        weights = {name: value.double() for name, value in model.bert.state_dict().items()}
        oracle = reference.bert(weights, BertConfig.from_dict(model.config.to_dict()), **batch).hidden_states[-1]
        bert_fast.swap(model)
        result = checks(bert_fast.verify(model, batch))
        found, found_hidden = model(**batch), model.bert(**batch)[0]
    name = "bert: last hidden state"
    assert_same_figures(result[name], figures(name, found_hidden[mask], hidden[mask], oracle[mask]))
    logits = figures("logits", found.logits[mask], expected.logits[mask], exact.logits[mask])
    assert_same_figures(result["logits"], logits)
    assert len(result) == 2


def test_figures_of_a_scalar() -> None:
    model = theirs("BertForMaskedLM")
    batch = inputs(mask_of(MIXED)) | LABELS["BertForMaskedLM"]
    with torch.no_grad():
        expected, exact = model(**batch).loss, copy.deepcopy(model).double()(**batch).loss
        result = checks(bert_fast.verify(bert_fast.swap(model), batch))
        found = model(**batch).loss
    assert result["loss"].error == pytest.approx(abs(found.double() - exact).item())
    assert result["loss"].original_error == pytest.approx(abs(expected.double() - exact).item())


def test_bound() -> None:
    check = TensorCheck("x", error=1.0, original_error=0.5, difference=0.1, bound=1.0, cosine=1.0)
    assert check.is_within
    assert not replace(check, error=1.0001).is_within
    assert not replace(check, error=float("nan")).is_within
    assert not replace(check, bound=float("nan")).is_within
    assert not Verification((check, replace(check, error=2.0))).is_within
    assert "out of bounds" in str(Verification((replace(check, error=2.0),)))


# ---- sabotage --------------------------------------------------------------------------------------------------------


def tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    real = functional.gelu
    patch.setattr(functional, "gelu", lambda x, bias=None, approximate="none": real(x, bias, "tanh"))  # noqa: ARG005


def no_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(functional, "gelu", lambda x, *_: x * float("nan"))


def other_eps(patch: pytest.MonkeyPatch) -> None:
    real = functional.layer_norm
    patch.setattr(functional, "layer_norm", lambda x, w, b, eps, r=None, **o: real(x, w, b, 1e-3, r, **o))  # noqa: ARG005


def no_residual(patch: pytest.MonkeyPatch) -> None:
    real = functional.layer_norm
    patch.setattr(functional, "layer_norm", lambda x, w, b, eps, r=None, **o: real(x, w, b, eps, **o))  # noqa: ARG005


def mask_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(family, "unpad", lambda mask, **others: masking.unpad(torch.ones_like(mask), **others))


def neighbours_seen(patch: pytest.MonkeyPatch) -> None:
    real = functional.attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **others: Any) -> Tensor:
        others["tiles"] = None
        return real(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q), **others)

    patch.setattr(functional, "attention", attention)


def scale_off(patch: pytest.MonkeyPatch) -> None:
    real = functional.attention
    patch.setattr(functional, "attention", lambda *args, **others: real(*args, **others, scale=0.243))


def positions_from_one(patch: pytest.MonkeyPatch) -> None:
    def unpad(*args: Any, **others: Any) -> Any:
        batch = masking.unpad(*args, **others)
        return replace(batch, positions=batch.positions + 1)

    patch.setattr(family, "unpad", unpad)


def engines_neighbours_seen(patch: pytest.MonkeyPatch) -> None:
    real = engine.encode

    def encode(owner: Any, stack: Any, hidden: Tensor, batch: Any, **others: Any) -> Any:
        tiles = masking.make_tiles(torch.tensor([0, len(hidden)]))
        return real(owner, stack, hidden, replace(batch, tiles=tiles), **others)

    patch.setattr(engine, "encode", encode)


def engines_layer_lost(patch: pytest.MonkeyPatch) -> None:
    real = engine.encode

    def encode(owner: Any, stack: Any, *rest: Any, **others: Any) -> Any:
        return real(owner, engine.stack(stack.layers[1:]), *rest, **others)

    patch.setattr(engine, "encode", encode)


def engines_weights_off(patch: pytest.MonkeyPatch) -> None:
    real = engine._tensors

    def tensors(layer: Any, number: int) -> tuple[list[Tensor | None], list[Tensor]]:
        found, roots = real(layer, number)
        return [None if x is None else x * 1.01 for x in found], roots

    patch.setattr(engine, "_tensors", tensors)
    patch.setattr(engine, "_packed", weakref.WeakKeyDictionary())


def without_engine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "encode", lambda *_, **__: None)


OF_OPERATORS = (tanh_gelu, no_gelu, other_eps, no_residual, neighbours_seen, scale_off)
OF_ALL = (mask_ignored, positions_from_one)
OF_ENGINE = (engines_neighbours_seen, engines_layer_lost, engines_weights_off)


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification", "BertForTokenClassification"])
@pytest.mark.parametrize("sabotage", [*OF_OPERATORS, *OF_ALL, *OF_ENGINE])
def test_sabotage(sabotage: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert_fast.swap(theirs(name))
    batch = inputs(mask_of(MIXED))
    assert bert_fast.verify(model, batch).is_within
    with monkeypatch.context() as patch:
        if sabotage in OF_OPERATORS:
            without_engine(patch)
        sabotage(patch)
        with pytest.raises(VerificationError, match="out of bounds") as caught:
            bert_fast.verify(model, batch)
    result = caught.value.result
    assert not result.is_within
    assert str(result) in str(caught.value)
    assert not result.checks[0].is_within
    assert bert_fast.verify(model, batch).is_within


def test_sabotaged_sentence_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = bert_fast.swap(SentenceTransformer(str(minilm()), device="cpu"))
    without_engine(monkeypatch)
    tanh_gelu(monkeypatch)
    with pytest.raises(VerificationError):
        bert_fast.verify(model, TEXTS[:6])


def test_lost_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the loss tells that labelled tokens under the mask were not computed.
    model = bert_fast.swap(theirs("BertForMaskedLM"))
    batch = inputs(mask_of(MIXED)) | LABELS["BertForMaskedLM"]
    monkeypatch.setattr(family, "read_rows", lambda *_: None)
    with pytest.raises(VerificationError) as caught:
        bert_fast.verify(model, batch)
    assert [check.name for check in caught.value.result.checks if not check.is_within] == ["loss"]


@pytest.mark.parametrize("name", ["pooler_output", "last_hidden_state"])
def test_every_entry_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Here the pooled output has the shape of the mask, and nothing to do with it.
    model = bert_fast.swap(theirs("BertModel", max_position_embeddings=51))
    batch = inputs(mask_of("1" * 30 + "0" * 21 + " " + "1" * 51))
    assert batch["input_ids"].shape == model(**batch).pooler_output.shape
    real = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(self, *args, **kwargs)
        output[name][0, 29 if name == "last_hidden_state" else 40] += 0.1
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(VerificationError) as caught:
        bert_fast.verify(model, batch)
    assert [check.is_within for check in caught.value.result.checks if check.name == name] == [False]


# ---- what is refused, and what is left as it was ---------------------------------------------------------------------


def test_unswapped() -> None:
    model = theirs("BertModel")
    with pytest.raises(ValueError, match="BertModel is not swapped"):
        bert_fast.verify(model, inputs(mask_of(MIXED)))
    bert_fast.restore(bert_fast.swap(model))
    with pytest.raises(ValueError, match="BertModel is not swapped"):
        bert_fast.verify(model, inputs(mask_of(MIXED)))
    with pytest.raises(ValueError, match="Linear is not swapped"):
        bert_fast.verify(nn.Linear(2, 3), {"input": torch.ones(1, 2)})


def state(model: nn.Module) -> Any:
    """What verify may change on its way, but the count of calls."""
    return (
        [
            (name, type(module), module.training, [key for key in vars(module) if key != "bert_fast_calls"])
            for name, module in model.named_modules()
        ],
        [(name, id(p), p.dtype, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()}.keys(),
        torch.is_grad_enabled(),
    )


def failing(patch: pytest.MonkeyPatch) -> None:
    def attention(*_: Any, **__: Any) -> Tensor:
        raise FloatingPointError("sabotage")

    patch.setattr(functional, "attention", attention)


@pytest.mark.parametrize(
    ("sabotage", "error"),
    [(None, None), (tanh_gelu, VerificationError), (failing, FloatingPointError)],
    ids=["good", "out of bounds", "failing"],
)
def test_model_stays(
    sabotage: Callable[[pytest.MonkeyPatch], None] | None,
    error: type[Exception] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = bert_fast.swap(theirs("BertForTokenClassification"))
    model.train()
    model.bert.encoder.layer[1].eval()
    model.bert.register_forward_hook(lambda *_: None)
    batch = inputs(mask_of(MIXED))
    before, weights = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    random_state, given = torch.get_rng_state(), {name: value.clone() for name, value in batch.items()}
    if sabotage is None:
        bert_fast.verify(model, batch)
    else:
        without_engine(monkeypatch)
        sabotage(monkeypatch)
        assert error is not None
        with pytest.raises(error):
            bert_fast.verify(model, batch)
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert batch.keys() == given.keys()
    assert all(torch.equal(value, given[name]) for name, value in batch.items())


def test_evaluation_mode(swapped: Any) -> None:
    # Dropout is off while the figures are taken: in training they would be noise.
    swapped.train()
    assert bert_fast.verify(swapped, inputs(mask_of(MIXED))).is_within
    assert swapped.training
