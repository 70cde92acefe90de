"""Each head of ours against transformers' class of the same name with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    HEADS,
    MIXED,
    SIZES,
    WHOLE,
    assert_near,
    assert_same_gradients,
    gradients,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
    ours,
    theirs,
)
from tolerance import magnitude
from torch import Tensor

import bert_fast
from bert_fast import checkpoint
from bert_fast.config import BertConfig

# BERT's own -100 on the empty row: what that row is classified as means nothing.
CLASSES = torch.tensor([0, 2, 1, 0, -100, -100, 2, 1])
BINARY = CLASSES.clamp(max=1)


def token_labels(shape: tuple[int, int], classes: int) -> Tensor:
    """Labels at tokens and at hidden places, a third of them -100."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(classes, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < 0.33, -100)


def our_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradients under transformers' names."""
    return {str(checkpoint.to_hugging_face(name)): grad for name, grad in gradients(model, loss).items()}


def assert_same_loss(model: Any, twin: Any, batch: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
    """Loss and the gradient of every parameter."""
    expected, found = model(**batch, **labels), twin(**batch, **labels)
    assert found.loss.shape == ()
    assert_near(found.loss, expected.loss)
    assert_same_gradients(our_gradients(twin, found.loss), gradients(model, expected.loss))


# ---- masked language model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_masked_lm(name: str, rows: str, hidden_act: str) -> None:
    model = theirs(name, hidden_act=hidden_act)
    twin = ours(model)
    mask = mask_of(rows)
    batch = inputs(mask)
    expected, found = model(**batch), twin(**batch)
    assert found.loss is None
    logits = expected.logits if name == "BertForMaskedLM" else expected.prediction_logits
    assert found.logits.shape == (*mask.shape, 97)
    assert_near(found.logits[mask], logits[mask])

    labels = token_labels((len(mask), 13), 97)
    chosen = labels != -100
    assert bool((chosen & ~mask).any()) == (rows == MIXED)
    found = twin(**batch, labels=labels)
    assert found.logits.shape == (int(chosen.sum()), 97)
    targets = found.encoder.batch.select(labels)
    assert_near(found.logits, found.encoder.batch.select(logits)[targets != -100])
    if name == "BertForMaskedLM":
        assert_same_loss(model, twin, batch, {"labels": labels})


def test_pre_training() -> None:
    model = theirs("BertForPreTraining")
    twin = ours(model)
    mask = mask_of(MIXED)
    batch = inputs(mask)
    assert_near(twin(**batch).next_sentence_logits, model(**batch).seq_relationship_logits)
    labels, next_sentence_label = token_labels((8, 13), 97), BINARY
    assert_same_loss(model, twin, batch, {"labels": labels, "next_sentence_label": next_sentence_label})

    # Each loss is also there alone.
    both = twin(**batch, labels=labels, next_sentence_label=next_sentence_label).loss
    first, second = twin(**batch, labels=labels).loss, twin(**batch, next_sentence_label=next_sentence_label).loss
    assert_near(first + second, both)
    assert min(float(first.detach()), float(second.detach())) > 0.1
    next_model = theirs("BertForNextSentencePrediction")
    next_model.load_state_dict(model.state_dict(), strict=False)
    assert_near(second, next_model(**batch, labels=next_sentence_label).loss)


@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_last_layer_on_labelled_rows(name: str, rows: str) -> None:
    model = theirs(name)
    twin = ours(model)
    twin.needs_labelled_only = True
    mask = mask_of(rows)
    batch = inputs(mask)
    labels = {"labels": token_labels((len(mask), 13), 97)}
    if name == "BertForPreTraining":
        labels["next_sentence_label"] = BINARY[: len(mask)]
    assert_same_loss(model, twin, batch, labels)
    output = twin(**batch, **labels)
    assert len(output.encoder.packed) == int((labels["labels"] != -100).sum())
    plain = ours(model)
    assert_near(output.logits, plain(**batch, **labels).logits)
    if name == "BertForPreTraining":
        assert_near(output.next_sentence_logits, plain(**batch).next_sentence_logits)
    with pytest.raises(ValueError, match="the last layer was computed on"):
        _ = output.encoder.last_hidden_state
    assert twin(**batch).encoder.last_hidden_state.shape == (len(mask), 13, 51)  # without labels all rows are needed


def test_no_token_is_labelled() -> None:
    twin = ours(theirs("BertForPreTraining"))
    batch = inputs(mask_of(MIXED))
    for needs_labelled_only in (False, True):
        twin.needs_labelled_only = needs_labelled_only
        output = twin(**batch, labels=torch.full((8, 13), -100))
        assert float(output.loss.detach()) == 0.0
        assert output.logits.shape == (0, 97)
        assert all(float(grad.abs().max()) == 0.0 for grad in gradients(twin, output.loss).values())


def test_logits_are_not_made_for_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = ours(theirs("BertForMaskedLM"))
    calls: list[int] = []
    forward = twin.mlm.forward

    def counted(*args: Tensor) -> Tensor:
        calls.append(1)
        result: Tensor = forward(*args)
        return result

    monkeypatch.setattr(twin.mlm, "forward", counted)
    output = twin(**inputs(mask_of(MIXED)), labels=token_labels((8, 13), 97))
    output.loss.backward()
    assert not calls
    assert output.logits is output.logits
    assert calls == [1]


def test_hidden_states_of_some_rows_are_refused() -> None:
    model = bert_fast.BertModel(BertConfig(**SIZES))
    batch = inputs(mask_of(MIXED))
    keep = torch.zeros(8, 13, dtype=torch.bool)
    with pytest.raises(ValueError, match="output_hidden_states and needs_kept_rows_only are both True"):
        model(**batch, keep=keep, needs_kept_rows_only=True, output_hidden_states=True)


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_next_sentence_prediction() -> None:
    model = theirs("BertForNextSentencePrediction")
    twin = ours(model)
    batch = inputs(mask_of(MIXED))
    assert_near(twin(**batch).logits, model(**batch).logits)
    assert twin(**batch).loss is None
    assert_same_loss(model, twin, batch, {"labels": BINARY})


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (3, CLASSES),
        (1, torch.linspace(-3, 2, 8)),
        (1, torch.linspace(-3, 2, 8)[:, None]),
        (1, torch.arange(8) % 5),
        (3, (torch.arange(24).view(8, 3) % 5 < 2).float()),
        (2, torch.rand(8, 2, generator=torch.Generator().manual_seed(1))),
    ],
    ids=["single label", "regression", "column", "regression on integers", "multi label", "soft multi label"],
)
def test_sequence_classification(num_labels: int, labels: Tensor) -> None:
    model = theirs("BertForSequenceClassification", num_labels=num_labels)
    twin = ours(model)
    batch = inputs(mask_of(MIXED))
    found = twin(**batch)
    assert found.loss is None
    assert found.logits.shape == (8, num_labels)
    assert_near(found.logits, model(**batch).logits)
    assert_same_loss(model, twin, batch, {"labels": labels})


def test_multiple_choice() -> None:
    model = theirs("BertForMultipleChoice")
    twin = ours(model)
    batch = {name: x.view(4, 2, 13) for name, x in inputs(mask_of(MIXED)).items()}
    found = twin(**batch)
    assert found.loss is None
    assert found.logits.shape == (4, 2)
    assert_near(found.logits, model(**batch).logits)
    assert_same_loss(model, twin, batch, {"labels": torch.tensor([1, 0, -100, 1])})
    del batch["attention_mask"], batch["token_type_ids"]
    assert_near(twin(**batch).logits, model(**batch).logits)


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
def test_token_classification(rows: str) -> None:
    model = theirs("BertForTokenClassification", num_labels=7)
    twin = ours(model)
    mask = mask_of(rows)
    batch = inputs(mask)
    found = twin(**batch)
    assert found.loss is None
    assert found.logits.shape == (*mask.shape, 7)
    assert_near(found.logits[mask], model(**batch).logits[mask])
    assert_same_loss(model, twin, batch, {"labels": token_labels((len(mask), 13), 7)})


def test_question_answering_whole() -> None:
    model = theirs("BertForQuestionAnswering")
    twin = ours(model)
    batch = inputs(mask_of(WHOLE))
    found, expected = twin(**batch), model(**batch)
    assert found.loss is None
    assert_near(found.logits, torch.stack([expected.start_logits, expected.end_logits]))
    # 13 and beyond: answers that were cut off
    positions = {"start_positions": torch.tensor([0, 12, 13, 5]), "end_positions": torch.tensor([3, 12, 99, 13])}
    assert_same_loss(model, twin, batch, positions)
    assert twin(**batch, start_positions=positions["start_positions"]).loss is None


def test_question_answering_padded() -> None:
    # transformers lets padding compete for the answer; ours gives what the rows give alone, without padding.
    model = theirs("BertForQuestionAnswering")
    twin = ours(model)
    mask = mask_of("1111111111111 1111111000000 1111000000000")
    batch = inputs(mask)
    start, end = torch.tensor([12, 3, 0]), torch.tensor([0, 6, 1])
    found = twin(**batch, start_positions=start, end_positions=end)
    assert bool((found.logits[:, ~mask] == torch.finfo(torch.float32).min).all())
    losses = []
    for row, length in enumerate(mask.sum(1)):
        alone = {name: x[row : row + 1, :length] for name, x in batch.items()}
        expected = model(**alone, start_positions=start[row : row + 1], end_positions=end[row : row + 1])
        losses.append(expected.loss)
        assert_near(found.logits[0, row, :length], expected.start_logits[0])
        assert_near(found.logits[1, row, :length], expected.end_logits[0])
    expected_loss = torch.stack(losses).mean()
    assert_near(found.loss, expected_loss)
    assert_same_gradients(our_gradients(twin, found.loss), gradients(model, expected_loss))


@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
def test_question_answering_ignored_positions(rows: str) -> None:
    twin = ours(theirs("BertForQuestionAnswering"))
    mask = mask_of(rows)
    batch = inputs(mask)
    inside = torch.tensor([4, 5] + [-100] * (len(mask) - 2))
    beyond = inside.where(inside >= 0, torch.tensor([13]))
    found = twin(**batch, start_positions=inside, end_positions=inside).loss
    assert torch.equal(found, twin(**batch, start_positions=beyond, end_positions=beyond).loss)
    first = {name: x[:2] for name, x in batch.items()}
    assert_near(found, twin(**first, start_positions=inside[:2], end_positions=inside[:2]).loss)


# ---- all heads -------------------------------------------------------------------------------------------------------

NO_LABELS: dict[str, dict[str, Tensor]] = {
    "BertForMaskedLM": {"labels": torch.full((8, 13), -100)},
    "BertForMultipleChoice": {"labels": torch.full((4,), -100)},
    "BertForNextSentencePrediction": {"labels": torch.full((8,), -100)},
    "BertForPreTraining": {
        "labels": torch.full((8, 13), -100),
        "next_sentence_label": torch.full((8,), -100),
    },
    "BertForQuestionAnswering": {"start_positions": torch.full((8,), 13), "end_positions": torch.full((8,), 13)},
    "BertForSequenceClassification": {"labels": torch.full((8,), -100)},
    "BertForTokenClassification": {"labels": torch.full((8, 13), -100)},
}


def batch_for(name: str) -> dict[str, Tensor]:
    batch = inputs(mask_of(MIXED))
    return {key: x.view(4, 2, 13) for key, x in batch.items()} if name == "BertForMultipleChoice" else batch


@pytest.mark.parametrize("name", HEADS)
def test_nothing_labelled(name: str) -> None:
    twin = ours(theirs(name))
    loss = twin(**batch_for(name), **NO_LABELS[name]).loss
    assert float(loss.detach()) == 0.0
    assert magnitude(*gradients(twin, loss).values()) == 0.0


@pytest.mark.parametrize("name", HEADS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    twin = ours(theirs(name))
    twin.save_pretrained(tmp_path)
    loaded = getattr(bert_fast, name).from_pretrained(tmp_path).eval()
    batch = batch_for(name)
    assert torch.equal(loaded(**batch).logits, twin(**batch).logits)


@pytest.mark.parametrize("name", HEADS)
def test_dropout(name: str) -> None:
    twin = ours(theirs(name, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.1))
    batch = batch_for(name)
    evaluated = twin(**batch).logits
    assert torch.equal(twin(**batch).logits, evaluated)
    twin.train()
    logits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        logits.append(twin(**batch).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], evaluated)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_num_labels(name: str) -> None:
    with pytest.raises(ValueError, match="num_labels is 0"):
        getattr(bert_fast, name)(bert_fast.BertConfig(**SIZES), num_labels=0)


@pytest.mark.parametrize("name", HEADS)
def test_initial_weights(name: str) -> None:
    torch.manual_seed(3)
    std = 0.5
    twin = getattr(bert_fast, name)(bert_fast.BertConfig(**SIZES, initializer_range=std))
    head = {key: p.detach() for key, p in twin.named_parameters() if not key.startswith("bert.")}
    assert head
    for key, parameter in head.items():
        if key.endswith("bias"):
            assert magnitude(parameter) == 0.0, key
        elif "norm" in key:
            assert bool((parameter == 1).all()), key
        else:
            assert abs(float(parameter.std()) - std) < 5 * std / (2 * parameter.numel()) ** 0.5, key


@pytest.mark.parametrize(
    "name", ["BertForMultipleChoice", "BertForSequenceClassification", "BertForTokenClassification"]
)
def test_classifier_dropout(name: str, tmp_path: Path) -> None:
    # transformers has a rate for the head alone.
    model = theirs(name, hidden_dropout_prob=0.1, classifier_dropout=0.7)
    model.save_pretrained(tmp_path)
    assert model.dropout.p == 0.7
    assert getattr(bert_fast, name).from_pretrained(tmp_path).dropout.p == 0.7
