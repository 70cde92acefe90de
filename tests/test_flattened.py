"""Texts side by side in one row, without padding: the collator, and what swapped models make of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from models import (
    assert_near,
    assert_same_gradients,
    gradients,
    one_thread,  # noqa: F401
    transformers,
)
from test_families import FAMILIES, WITHOUT_TYPES, build, head_of, pair, prefix_of
from torch import Tensor

import bert_fast
from bert_fast import FlatteningCollator, masking

LENGTHS = (5, 1, 13, 7)

MODELS = [f"{prefix}Model" for prefix in FAMILIES]
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


def examples(name: str) -> list[dict[str, Any]]:
    """As a tokenizer gives them; no id is that of padding."""
    generator = torch.Generator().manual_seed(7)
    result = []
    for number, length in enumerate(LENGTHS):
        example: dict[str, Any] = {
            "input_ids": torch.randint(5, 97, (length,), generator=generator).tolist(),
            "attention_mask": [1] * length,
        }
        if prefix_of(name) not in WITHOUT_TYPES:
            example["token_type_ids"] = [int(i > 2) for i in range(length)]
        if head_of(name) == "ForSequenceClassification":
            example["labels"] = number % 3
        elif head_of(name) == "ForMaskedLM":
            example["labels"] = [7 if i % 3 == 0 else -100 for i in range(length)]
        elif head_of(name) == "ForTokenClassification":
            example["labels"] = [i % 3 for i in range(length)]
        result.append(example)
    return result


def padded(name: str) -> dict[str, Tensor]:
    """The same batch with padding."""
    texts = examples(name)
    fills = {"input_ids": build(name).config.pad_token_id, "labels": -100}
    batch = {}
    for key in texts[0]:
        if isinstance(texts[0][key], int):
            batch[key] = torch.tensor([text[key] for text in texts])
            continue
        batch[key] = torch.full((len(texts), max(LENGTHS)), fills.get(key, 0))
        for row, text in zip(batch[key], texts, strict=True):
            row[: len(text[key])] = torch.tensor(text[key])
    return batch


@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_encoders(name: str, has_grad: bool) -> None:
    model, swapped = pair(name)
    batch = padded(name)
    with torch.set_grad_enabled(has_grad):
        expected, found = model(**batch), swapped(**FlatteningCollator()(examples(name)))
    assert type(found) is type(expected)
    assert found.last_hidden_state.shape[:2] == (1, sum(LENGTHS))
    assert_near(found.last_hidden_state[0], expected.last_hidden_state[batch["attention_mask"] != 0])
    if "pooler_output" in expected:
        assert_near(found.pooler_output, expected.pooler_output)
    assert swapped.bert_fast_calls == {"fast": 1}


@pytest.mark.parametrize("name", [f"{prefix}{head}" for prefix in FAMILIES for head in HEADS])
def test_heads(name: str) -> None:
    model, swapped = pair(name)
    batch = padded(name)
    flat = FlatteningCollator()(examples(name))
    expected, found = model(**batch), swapped(**flat)
    assert_near(found.loss, expected.loss)
    assert_same_gradients(gradients(swapped, found.loss), gradients(model, expected.loss))
    is_of_texts = head_of(name) == "ForSequenceClassification"
    logits = expected.logits if is_of_texts else expected.logits[batch["attention_mask"] != 0][None]
    assert_near(found.logits, logits)
    with torch.no_grad():
        assert_near(swapped(**flat).loss, expected.loss.detach())


def test_transformers_collator() -> None:
    """It drops token types and shifts labels, but its bounds and positions are served."""
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    model, swapped = pair("DistilBertModel")
    flat = collator(examples("DistilBertModel"))
    del flat["labels"]
    batch = padded("DistilBertModel")
    assert_near(swapped(**flat)[0][0], model(**batch)[0][batch["attention_mask"] != 0])


def test_positions_of_the_call() -> None:
    """They go before those that the model knows."""
    model, swapped = pair("RobertaModel")
    texts = examples("RobertaModel")
    flat = FlatteningCollator(first_position=5)(texts)
    batch = padded("RobertaModel") | {"position_ids": 5 + torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1)}
    assert_near(swapped(**flat)[0][0], model(**batch)[0][batch["attention_mask"] != 0])


def test_embeddings_in_a_row() -> None:
    model, swapped = pair("ElectraModel")
    batch, flat = padded("ElectraModel"), FlatteningCollator()(examples("ElectraModel"))
    words = model.embeddings.word_embeddings.weight
    found = swapped(inputs_embeds=words[flat.pop("input_ids")], **flat)[0][0]
    assert_near(found, model(**batch)[0][batch["attention_mask"] != 0])


def test_hidden_states() -> None:
    model, swapped = pair("RobertaModel")
    batch, flat = padded("RobertaModel"), FlatteningCollator()(examples("RobertaModel"))
    mask = batch["attention_mask"] != 0
    found, expected = (
        each(**some, output_hidden_states=True).hidden_states for each, some in ((swapped, flat), (model, batch))
    )
    for one, other in zip(found, expected, strict=True):
        assert_near(one[0], other[mask])


def test_no_text_sees_another() -> None:
    _, swapped = pair("ModernBertModel")
    flat = FlatteningCollator()(examples("ModernBertModel"))
    before = swapped(**flat)[0][0]
    bounds = flat["cu_seq_lens_q"].tolist()
    flat["input_ids"][0, bounds[2] : bounds[3]] = 3
    changed = (swapped(**flat)[0][0] != before).any(1)
    assert changed.tolist() == [bounds[2] <= row < bounds[3] for row in range(bounds[-1])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5, 25])}, "cu_seq_lens_q has shape .* ends with .25.; the batch is 1 rows"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 6, 26])}, "ascend"),
        ({"cu_seq_lens_q": torch.tensor([1, 9, 26])}, "0"),
        ({"cu_seq_lens_q": torch.tensor([[0, 26]])}, "cu_seq_lens_q has shape"),
        ({"cu_seq_lens_q": torch.tensor([], dtype=torch.int32)}, "cu_seq_lens_q has shape"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 26.0])}, "dtype torch.float32"),
        ({"input_ids": torch.ones(2, 13, dtype=torch.long)}, "2 rows of 13"),
    ],
    ids=str,
)
def test_wrong_bounds(change: dict[str, Tensor], message: str) -> None:
    _, swapped = pair("DistilBertModel")
    flat = {**FlatteningCollator()(examples("DistilBertModel")), **change}
    with pytest.raises(ValueError, match=message):
        swapped(**flat)


def test_too_long_a_text() -> None:
    _, swapped = pair("RobertaModel", max_position_embeddings=14)
    flat = FlatteningCollator()(examples("RobertaModel"))
    with pytest.raises(ValueError, match="a text has length 13; the position table lasts for 12"):
        swapped(**flat)


def test_answers_are_refused() -> None:
    _, swapped = pair("RobertaForQuestionAnswering")
    flat = FlatteningCollator()(examples("RobertaModel"))
    answers = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="start_positions and cu_seq_lens_q are both given"):
        swapped(**flat, start_positions=answers, end_positions=answers)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"cu_seq_lens_q": None}, "cu_seq_lens_k is given without cu_seq_lens_q"),
        ({"attention_mask": torch.ones(1, 26, dtype=torch.long)}, "attention_mask is given beside cu_seq_lens_q"),
    ],
    ids=["no bounds", "a mask"],
)
def test_original_path(arguments: dict[str, Any], reason: str) -> None:
    _, swapped = pair("RobertaModel")
    flat = {**FlatteningCollator()(examples("RobertaModel")), **arguments}
    with pytest.warns(UserWarning, match=reason):
        swapped(**flat)


# ---- the collator ----------------------------------------------------------------------------------------------------


def test_collator() -> None:
    texts = [
        {"input_ids": [3, 4], "token_type_ids": [0, 1], "attention_mask": [1, 1], "label": 2},
        {"input_ids": torch.tensor([5]), "token_type_ids": [1], "attention_mask": [1], "label": 0},
    ]
    batch = FlatteningCollator(first_position=2)(texts)
    tensors = {key: value.tolist() for key, value in batch.items() if isinstance(value, Tensor)}
    assert tensors == {
        "input_ids": [[3, 4, 5]],
        "token_type_ids": [[0, 1, 1]],
        "label": [2, 0],
        "position_ids": [[2, 3, 2]],
        "cu_seq_lens_q": [0, 2, 3],
        "cu_seq_lens_k": [0, 2, 3],
    }
    assert batch["max_length_q"] == batch["max_length_k"] == 2
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert set(FlatteningCollator(keys=["input_ids"])(texts)) == {*batch} - {"token_type_ids", "label", "position_ids"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "examples is empty"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"labels of example 0 has shape \(1,\) and its input_ids 2 tokens"),
        ([{"input_ids": [1], "x": [1]}, {"input_ids": [1]}], "example 1 has no 'x'; it has 'input_ids'"),
    ],
)
def test_wrong_examples(texts: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatteningCollator()(texts)


def test_from_flattened() -> None:
    ids = torch.arange(8)
    batch = masking.from_flattened(torch.tensor([0, 3, 3, 8]), ids=ids)
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert (batch.max_seqlen, batch.shape, batch.indices, batch.total_tokens) == (5, (1, 8), None, 8)
    assert batch.num_keys.tolist() == [3, 0, 5]
    assert [tuple(tile) for tile in batch.tiles.tolist()] == [(0, 3, 3, 0), (3, 5, 5, 0)]
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        assert torch.equal(batch.pad(ids)[0, start:stop], ids[start:stop])
    with pytest.raises(ValueError, match=r"ids has shape \(8,\); cu_seqlens ends with 7"):
        masking.from_flattened(torch.tensor([0, 7]), ids=ids)


# ---- a PackedBatch in place of ids -----------------------------------------------------------------------------------


def packed(batch: dict[str, Tensor]) -> masking.PackedBatch:
    types = batch.get("token_type_ids")
    return masking.unpad(batch["attention_mask"], ids=batch["input_ids"], token_types=types)


def shift(batch: dict[str, Tensor], padding: int) -> dict[str, Tensor]:
    """The same texts with their padding on the left."""
    fills = {"input_ids": padding, "labels": -100}
    result = {}
    for key, value in batch.items():
        result[key] = torch.full_like(value, fills.get(key, 0))
        for row, found, length in zip(result[key], value, LENGTHS, strict=True):
            row[len(row) - length :] = found[:length]
    return result


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_batch(name: str, side: str) -> None:
    """The rows that the padded call gives, positions included."""
    model, swapped = pair(name)
    batch = padded(name)
    if side == "left":
        batch = shift(batch, model.config.pad_token_id)
    found = swapped(packed(batch))
    assert_near(found.last_hidden_state[0], model(**batch).last_hidden_state[batch["attention_mask"] != 0])
    assert swapped.bert_fast_calls == {"fast": 1}


@pytest.mark.parametrize("name", [f"{prefix}{head}" for prefix in FAMILIES for head in HEADS])
def test_packed_batch_in_heads(name: str) -> None:
    model, swapped = pair(name)
    batch = padded(name)
    rows = packed(batch)
    is_of_texts = head_of(name) == "ForSequenceClassification"
    labels = batch["labels"] if is_of_texts else rows.select(batch["labels"])
    expected, found = model(**batch), swapped(input_ids=rows, labels=labels)
    assert_near(found.loss, expected.loss)
    assert_same_gradients(gradients(swapped, found.loss), gradients(model, expected.loss))
    assert_near(found.logits, expected.logits if is_of_texts else expected.logits[batch["attention_mask"] != 0][None])


def test_positions_beside_a_packed_batch() -> None:
    model, swapped = pair("RobertaModel")
    batch = padded("RobertaModel")
    positions = 5 + torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1)
    rows = packed(batch)
    found = swapped(rows, position_ids=rows.select(positions)[None])[0][0]
    assert_near(found, model(**batch, position_ids=positions)[0][batch["attention_mask"] != 0])


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"attention_mask": torch.ones(1, 5)}, "attention_mask is given beside a PackedBatch"),
        ({}, {"token_type_ids": torch.ones(1, 5)}, "token_type_ids is given beside a PackedBatch"),
        ({"ids": None}, {}, "the PackedBatch has no ids"),
        ({"keep_first": True}, {}, "rows that nobody attends to"),
        ({}, {"output_attentions": True}, r"attention probabilities are asked for; attn_|output_attentions is set"),
    ],
    ids=["mask", "types", "no ids", "hidden rows", "original path"],
)
@pytest.mark.parametrize("name", ["ElectraModel", "ElectraForMaskedLM", "ElectraForSequenceClassification"])
def test_wrong_packed_batch(name: str, options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    _, swapped = pair(name)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    batch = masking.unpad(mask, **{"ids": torch.full((2, 3), 7), **options})
    with pytest.raises(ValueError, match=message):
        swapped(batch, **arguments)


def test_original_path_keeps_texts_apart() -> None:
    """With our attention the original path heeds the bounds; without, it is refused."""
    bert_fast.register_attention()
    _, swapped = pair("RobertaModel")
    flat = FlatteningCollator()(examples("RobertaModel"))
    with pytest.raises(ValueError, match="would let the texts see one another"):
        swapped(**flat, output_attentions=True)
    expected = swapped(**flat)[0]
    swapped.set_attn_implementation("bert_fast")
    swapped.register_forward_pre_hook(lambda *_: None)
    swapped.encoder.layer[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="has hooks"):
        found = swapped(**flat, position_ids=2 + masking.from_flattened(flat["cu_seq_lens_q"]).positions[None])[0]
    assert_near(found, expected)


def test_flattened_batch() -> None:
    """There and back."""
    batch = padded("ElectraModel")
    rows = packed(batch)
    arguments = rows.flattened()
    twin = masking.from_flattened(
        arguments["cu_seq_lens_q"], ids=arguments["input_ids"][0], token_types=arguments["token_type_ids"][0]
    )
    for name in ("ids", "token_types", "cu_seqlens", "num_keys", "tiles"):
        assert torch.equal(getattr(rows, name), getattr(twin, name))
    assert torch.equal(rows.positions.long(), twin.positions)
    assert rows.is_plain
    assert twin.is_plain
    assert arguments["max_length_q"] == max(LENGTHS)


@pytest.mark.parametrize(
    ("mask", "options", "is_plain"),
    [
        ([[1, 1, 0], [1, 1, 1]], {}, True),
        ([[0, 1, 1], [1, 0, 1]], {}, True),
        ([[1, 1, 0], [0, 0, 0]], {}, False),
        ([[0, 1, 1], [1, 0, 1]], {"keep_first": True}, False),
        ([[1, 1, 0], [1, 0, 1]], {"keep_first": True}, True),
        ([[1, 1, 0], [1, 1, 1]], {"keep": torch.tensor([[True] * 3] * 2)}, False),
        ([[1, 1, 1], [1, 1, 1]], {"keep": torch.tensor([[True] * 3] * 2)}, True),
    ],
)
def test_is_plain(mask: list[list[int]], options: dict[str, Any], is_plain: bool) -> None:
    assert masking.unpad(torch.tensor(mask), **options).is_plain == is_plain
    bounds = torch.tensor([0, 2, 2])
    assert not masking.from_flattened(bounds).is_plain


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
def test_refused_texts_in_a_row(head: str) -> None:
    """What the original path would mix up is an error."""
    _, swapped = pair(f"Roberta{head}")
    swapped.train()
    swapped.gradient_checkpointing_enable()
    flat = FlatteningCollator()(examples("RobertaModel"))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q is given, but .*, since gradient checkpointing is on"):
        swapped(**flat)
