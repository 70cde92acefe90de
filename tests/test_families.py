"""Families built much as BERT is: the same answers, losses and gradients, bit by bit the same state."""

from __future__ import annotations

import copy
from contextlib import nullcontext
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
    "DistilBert": {"dim": 51, "n_layers": 2, "n_heads": 3, "hidden_dim": 71},
    "Electra": {"embedding_size": 29, "pad_token_id": 0},
    "MPNet": {"pad_token_id": 1},
    # Windows that end within a text, in layers between those that see all; heads of an even size.
    "ModernBert": {
        "hidden_size": 54,
        "num_hidden_layers": 4,
        "local_attention": 6,
        "pad_token_id": 0,
        **dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 2),
    },
}

WITHOUT_TYPES = ("DistilBert", "MPNet", "ModernBert")

# Where a text's tokens must be side by side.
WITH_DISTANCES = ("MPNet", "ModernBert")

# Relative positions are those of packed rows where a text has no holes and, for the pooler's sake, begins in front.
RIGHT = """
    1111111111111
    1111111000000
    1111111111111
    1111111110000
    1111100000000
    0000000000000
    1111110000000
    1000000000000
"""

# Where the first layer's attention is, if not where BERT's is.
ATTENTION = {
    "DistilBert": "transformer.layer.0.attention",
    "MPNet": "encoder.layer.0.attention.attn",
    "ModernBert": "layers.0.attn",
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


def width_of(model: Any) -> int:
    width: int = model.config.hidden_size
    return width


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """A model and its swapped copy."""
    model = build(name, **config)
    return model, bert_fast.swap(copy.deepcopy(model))


def padding_of(prefix: str) -> int:
    config = getattr(transformers, f"{prefix}Model").config_class(**{**SIZES, **FAMILIES[prefix]})
    padding: int = config.pad_token_id
    return padding


def rows_for(prefix: str) -> str:
    return RIGHT if prefix in WITH_DISTANCES else MIXED


def batch_for(name: str, rows: str | None = None) -> dict[str, Tensor]:
    """Ids at random, so that padding's own number stands at tokens too."""
    prefix = prefix_of(name)
    batch = inputs(mask_of(rows_for(prefix) if rows is None else rows), padding=padding_of(prefix))
    if prefix in WITHOUT_TYPES:
        del batch["token_type_ids"]
    return {key: x.view(-1, 2, 13) for key, x in batch.items()} if head_of(name) == "ForMultipleChoice" else batch


def labels_for(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if name.startswith(WITH_DISTANCES) and head_of(name) in ("ForMaskedLM", "ForTokenClassification"):
        labels = LABELS[f"Bert{head_of(name)}"]["labels"]
        return {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}
    if name == "ElectraForPreTraining":
        return {"labels": token_labels(2).clamp(min=0)}
    return LABELS["BertLMHeadModel" if head_of(name) == "ForCausalLM" else f"Bert{head_of(name)}"]


# ---- the same answers ------------------------------------------------------------------------------------------------


def test_every_family_is_here() -> None:
    """BERT and torch's own encoders have tests of their own."""
    theirs = {family.encoder for family in core.FAMILIES if family.module.startswith("transformers.")}
    assert theirs == {"BertModel", *(f"{prefix}Model" for prefix in FAMILIES)}


@pytest.mark.parametrize("rows", [None, WHOLE], ids=["mixed", "whole"])
@pytest.mark.parametrize("name", MODELS)
def test_output(name: str, rows: str | None) -> None:
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
    batch = batch_for(name)
    batch |= labels_for(name, batch)
    expected, found = model(**batch).loss, swapped(**batch).loss
    assert_near(found, expected)
    assert_same_gradients(gradients(swapped, found), gradients(model, expected))
    with torch.no_grad():
        assert_near(swapped(**batch).loss, expected.detach())
    assert calls(swapped) == {"fast": 2}


@each_family
def test_gradients(prefix: str) -> None:
    model, swapped = pair(f"{prefix}Model")
    batch = batch_for(f"{prefix}Model")
    mask = batch["attention_mask"] != 0
    weights = torch.randn(8, 13, width_of(model), generator=torch.Generator().manual_seed(3))[mask]
    found = gradients(swapped, (swapped(**batch)[0][mask] * weights).sum())
    assert_same_gradients(found, gradients(model, (model(**batch)[0][mask] * weights).sum()))


@each_family
def test_gradients_after_inference(prefix: str) -> None:
    """Nothing that is kept between calls was made for inference alone."""
    _, swapped = pair(f"{prefix}Model", max_position_embeddings=41)
    batch = batch_for(f"{prefix}Model")
    with torch.inference_mode():
        swapped(**batch)
    swapped(**batch)[0].sum().backward()


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
    batch = batch_for(f"{prefix}Model") | {"output_hidden_states": True, "return_dict": return_dict}
    mask = batch["attention_mask"] != 0
    found, expected = swapped(**batch), model(**batch)
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    ours, theirs = (x["hidden_states"] if return_dict else x[-1] for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one[mask], other[mask])
    assert calls(swapped) == {"fast": 1}


@each_family
def test_hidden_states_by_number(prefix: str) -> None:
    """MPNet takes any number for a yes."""
    model, swapped = pair(f"{prefix}Model")
    batch: dict[str, Any] = {**batch_for(f"{prefix}Model"), "output_hidden_states": [0, -1]}
    is_fast = prefix != "MPNet"
    with nullcontext() if is_fast else pytest.warns(UserWarning, match="by number"):
        found = swapped(**batch)
    assert_same_output(found, model(**batch), batch["attention_mask"] != 0)
    assert (calls(swapped) == {"fast": 1}) is is_fast


@each_family
@pytest.mark.parametrize("is_last", [True, False])
def test_sparse_calls(prefix: str, is_last: bool) -> None:
    """Without a mask, token types or a pooler's output; with positions or embeddings given."""
    model, swapped = pair(f"{prefix}Model")
    ids = inputs(mask_of(WHOLE))["input_ids"]
    everywhere = torch.ones(ids.shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(4)
    width = model.config.embedding_size if prefix == "Electra" else width_of(model)
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
    checks = bert_fast.verify(swapped, batch_for(f"{prefix}Model")).checks
    assert [check.name for check in checks][:2] == ["encoder: last hidden state", "last_hidden_state"]


# ---- positions of RoBERTa --------------------------------------------------------------------------------------------

COUNTED = ("Roberta", "XLMRoberta", "Camembert", "MPNet")


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


@pytest.mark.parametrize("prefix", COUNTED[:3])  # MPNet's are below
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


# ---- relative positions of MPNet -------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize(
    ("rows", "is_fast", "has_pooler"),
    [
        ("1111111111111", True, True),
        ("1111111100000", True, True),
        ("0000011111111", False, True),  # the pooler reads a hidden token far from the others
        ("0000011111111", True, False),
        ("0000011110000", True, False),
        ("1111011111111", False, False),
        ("1000000000001", False, False),
    ],
)
def test_only_neighbours_are_packed(rows: str, is_fast: bool, has_pooler: bool, has_grad: bool) -> None:
    model = build("MPNetModel") if has_pooler else build("MPNetForTokenClassification").mpnet
    swapped = bert_fast.swap(copy.deepcopy(model))
    batch = batch_for("MPNetModel", f"1111111111100\n{rows}")
    with (
        torch.set_grad_enabled(has_grad),
        nullcontext() if is_fast else pytest.warns(UserWarning, match="side by side"),
    ):
        assert_same_output(swapped(**batch), model(**batch), batch["attention_mask"] != 0)
    assert (calls(swapped) == {"fast": 1}) is is_fast


@pytest.mark.parametrize("is_fast", [True, False])
def test_labels_of_hidden_tokens(is_fast: bool) -> None:
    """They are computed behind the text: right where they stand there."""
    model, swapped = pair("MPNetForMaskedLM")
    batch = batch_for("MPNetModel", "1111111111111\n1111110000000")
    labels = torch.full((2, 13), -100)
    labels[0, 3] = 5
    labels[1, 6 if is_fast else 8] = 7
    with nullcontext() if is_fast else pytest.warns(UserWarning, match="side by side"):
        found = swapped(**batch, labels=labels).loss
    assert_same_gradients(gradients(swapped, found), gradients(model, model(**batch, labels=labels).loss))
    assert (calls(swapped) == {"fast": 1}) is is_fast


def test_texts_longer_than_the_table() -> None:
    """Where positions are given, rows may be farther apart than the table has positions."""
    model, swapped = pair("MPNetModel", max_position_embeddings=9)
    batch = {"input_ids": batch_for("MPNetModel", WHOLE)["input_ids"], "position_ids": torch.arange(13)[None] % 9}
    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            assert_same_output(swapped(**batch), model(**batch), torch.ones(4, 13, dtype=torch.bool))


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
    batch = batch_for(f"{prefix}Model")
    mask = batch["attention_mask"] != 0
    model = build(f"{prefix}Model")
    with torch.no_grad():
        expected = model(**batch)[0][mask]
        assert_near(bert_fast.swap(model, int8=True)(**batch)[0][mask], expected, 0.3)
        assert_near(bert_fast.swap(model, bf16=True)(**batch)[0][mask], expected, 0.1)
    assert bert_fast.verify(model, batch).rounding_checks


@each_family
def test_hooks_take_the_original_path(prefix: str) -> None:
    model, swapped = pair(f"{prefix}Model")
    batch = batch_for(f"{prefix}Model")
    name = ATTENTION.get(prefix, "encoder.layer.0.attention.self")
    swapped.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="has hooks"):
        assert_identical(swapped(**batch), model(**batch))
