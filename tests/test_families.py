"""Families built as BERT is: the same answers, losses and gradients, bit by bit the same state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import (
    MIXED,
    SIZES,
    WHOLE,
    assert_near,
    assert_same_gradients,
    gradients,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
    randomise,
    transformers,
)
from test_swap import LABELS, assert_identical, assert_same_output, calls, token_labels
from torch import Tensor

import bert_fast
from bert_fast.swap import core

# Class prefix -> what its configuration needs beyond the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "Roberta": {},
    "XLMRoberta": {"pad_token_id": 3},
    "Camembert": {},
    "Electra": {"embedding_size": 29, "pad_token_id": 0},
}

HEADS = (
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForCausalLM",
)

MODELS = [
    prefix + head for prefix in FAMILIES for head in ("Model", *HEADS) if hasattr(transformers, f"{prefix}{head}")
]

each_family = pytest.mark.parametrize("prefix", FAMILIES)


def prefix_of(name: str) -> str:
    return max((prefix for prefix in FAMILIES if name.startswith(prefix)), key=len)


def head_of(name: str) -> str:
    return name.removeprefix(prefix_of(name))


def build(name: str, **config: Any) -> Any:
    cls = getattr(transformers, name)
    labels = {"num_labels": 3} if head_of(name) in ("ForSequenceClassification", "ForTokenClassification") else {}
    model = cls(cls.config_class(**{**SIZES, **FAMILIES[prefix_of(name)], **labels, **config}))
    randomise(model)
    for key, parameter in model.named_parameters():
        if key.endswith("embeddings_project.weight"):  # drawn as a table of embeddings, but multiplied like any weight
            parameter.data.div_(parameter.shape[1] ** 0.5)
    return model.eval()


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """A model and its swapped copy."""
    model = build(name, **config)
    return model, bert_fast.swap(copy.deepcopy(model))


def batch_for(name: str, rows: str = MIXED) -> dict[str, Tensor]:
    """Ids at random, so that padding's own number stands at tokens too."""
    batch = inputs(mask_of(rows))
    return {key: x.view(-1, 2, 13) for key, x in batch.items()} if head_of(name) == "ForMultipleChoice" else batch


def labels_for(name: str) -> dict[str, Tensor]:
    if name == "ElectraForPreTraining":
        return {"labels": token_labels(2).clamp(min=0)}
    return LABELS["BertLMHeadModel" if head_of(name) == "ForCausalLM" else f"Bert{head_of(name)}"]


# ---- the same answers ------------------------------------------------------------------------------------------------


def test_every_family_is_here() -> None:
    """BERT has tests of its own."""
    assert {family.encoder.removesuffix("Model") for family in core.FAMILIES} == {"Bert", *FAMILIES}


@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
@pytest.mark.parametrize("name", MODELS)
def test_output(name: str, rows: str) -> None:
    model, swapped = pair(name)
    batch = batch_for(name, rows)
    assert_same_output(swapped(**batch), model(**batch), batch["attention_mask"] != 0)
    with torch.no_grad():  # through the engine
        assert_same_output(swapped(**batch), model(**batch), batch["attention_mask"] != 0)
    assert calls(swapped) == {"fast": 2}


@pytest.mark.parametrize("name", [name for name in MODELS if head_of(name) != "Model"])
def test_loss(name: str) -> None:
    """Labels at hidden places count: heads read what the encoder makes of hidden tokens there."""
    model, swapped = pair(name)
    batch = batch_for(name) | labels_for(name)
    expected, found = model(**batch).loss, swapped(**batch).loss
    assert_near(found, expected)
    assert_same_gradients(gradients(swapped, found), gradients(model, expected))
    with torch.no_grad():
        assert_near(swapped(**batch).loss, expected.detach())
    assert calls(swapped) == {"fast": 2}


@each_family
def test_gradients(prefix: str) -> None:
    model, swapped = pair(f"{prefix}Model")
    mask = mask_of(MIXED)
    batch = inputs(mask)
    weights = torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(3))[mask]
    found = gradients(swapped, (swapped(**batch)[0][mask] * weights).sum())
    assert_same_gradients(found, gradients(model, (model(**batch)[0][mask] * weights).sum()))


@pytest.mark.parametrize("table", ["word_embeddings", "position_embeddings", "token_type_embeddings"])
def test_entries_without_a_gradient(table: str) -> None:
    model, swapped = pair("RobertaModel")
    for each in (model, swapped):
        getattr(each.embeddings, table).padding_idx = 2
    mask = mask_of(MIXED)
    batch = inputs(mask)
    found = gradients(swapped, swapped(**batch)[0][mask].square().sum())
    assert_same_gradients(found, gradients(model, model(**batch)[0][mask].square().sum()))
    assert not found[f"embeddings.{table}.weight"][2].any()


@each_family
@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states(prefix: str, return_dict: bool) -> None:
    model, swapped = pair(f"{prefix}Model")
    batch = inputs(mask_of(MIXED)) | {"output_hidden_states": True, "return_dict": return_dict}
    mask = batch["attention_mask"] != 0
    found, expected = swapped(**batch), model(**batch)
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    ours, theirs = (x["hidden_states"] if return_dict else x[-1] for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one[mask], other[mask])
    assert calls(swapped) == {"fast": 1}


@each_family
@pytest.mark.parametrize("is_last", [True, False])
def test_sparse_calls(prefix: str, is_last: bool) -> None:
    """Without a mask, token types or a pooler's output; with positions or embeddings given."""
    model, swapped = pair(f"{prefix}Model")
    ids = inputs(mask_of(WHOLE))["input_ids"]
    everywhere = torch.ones(ids.shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(4)
    width = model.config.embedding_size if prefix == "Electra" else 51
    for batch in (
        {"input_ids": ids},
        {"input_ids": ids, "position_ids": torch.randint(37, ids.shape, generator=generator)},
        {"input_ids": ids, "position_ids": torch.arange(13)[None] + 5},
        {"inputs_embeds": torch.randn(4, 13, width, generator=generator)},
    ):
        with torch.set_grad_enabled(is_last):
            assert_same_output(swapped(**batch), model(**batch), everywhere)
    assert calls(swapped) == {"fast": 4}


@each_family
def test_verify(prefix: str) -> None:
    _, swapped = pair(f"{prefix}Model")
    checks = bert_fast.verify(swapped, inputs(mask_of(MIXED))).checks
    assert [check.name for check in checks][:2] == ["encoder: last hidden state", "last_hidden_state"]


# ---- positions of RoBERTa --------------------------------------------------------------------------------------------

COUNTED = ("Roberta", "XLMRoberta", "Camembert")


@pytest.mark.parametrize("prefix", COUNTED)
@pytest.mark.parametrize("length", [33, 34, 35, 36, 37, 40])
def test_longest(prefix: str, length: int) -> None:
    """Columns do not count, tokens that are not padding's do: a long row fits if it holds few of them."""
    model, swapped = pair(f"{prefix}Model")
    padding = model.config.pad_token_id
    for number in (1, 30, length):
        ids = torch.full((2, length), padding)
        ids[:, :number] = 7
        batch = {"input_ids": ids, "attention_mask": ids != padding}
        try:
            expected = model(**batch)
        except (IndexError, RuntimeError):
            assert padding + number >= 37 or length > 37
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                swapped(**batch)
        else:
            assert_same_output(swapped(**batch), expected, batch["attention_mask"])


@pytest.mark.parametrize("prefix", COUNTED)
def test_left_padding(prefix: str) -> None:
    """A row's answer is the same wherever it is padded."""
    model, swapped = pair(f"{prefix}Model")
    padding = model.config.pad_token_id
    right = torch.full((1, 13), padding)
    right[0, :5] = torch.tensor([7, 8, 9, 10, 11])
    left = right.roll(8, 1)
    found = [swapped(ids, attention_mask=ids != padding)[0][ids != padding] for ids in (right, left)]
    assert torch.equal(*found)
    assert_near(found[0], model(right, attention_mask=right != padding)[0][right != padding])


# ---- what stays as it was --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_and_restore(name: str) -> None:
    model, swapped = pair(name)
    batch = batch_for(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert type(swapped).__name__ == name
    for _ in range(2):
        swapped(**batch)
        state = swapped.state_dict()
        assert list(state) == list(before)
        assert all(torch.equal(state[key], value) for key, value in before.items())
        bert_fast.restore(swapped)
    assert type(swapped) is type(model)
    assert_identical(swapped(**batch), model(**batch))


@each_family
def test_int8_and_bf16(prefix: str) -> None:
    mask = mask_of(MIXED)
    batch = inputs(mask)
    model = build(f"{prefix}Model")
    with torch.no_grad():
        expected = model(**batch)[0][mask]
        assert_near(bert_fast.swap(model, int8=True)(**batch)[0][mask], expected, 0.3)
        assert_near(bert_fast.swap(model, bf16=True)(**batch)[0][mask], expected, 0.1)
    assert bert_fast.verify(model, batch).rounding_checks


@each_family
def test_hooks_take_the_original_path(prefix: str) -> None:
    model, swapped = pair(f"{prefix}Model")
    batch = inputs(mask_of(MIXED))
    swapped.encoder.layer[0].attention.self.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="has hooks"):
        assert_identical(swapped(**batch), model(**batch))
