"""Heads on tokens see packed rows, that of the vocabulary labelled ones; other logits are there when somebody reads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    MIXED,
    assert_near,
    assert_same_gradients,
    gradients,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
    transformers,
)
from test_families import FAMILIES, batch_for, build, head_of, labels_for, pair
from test_swap import LABELS
from torch import Tensor, nn

import bert_fast

MASKED_LMS = [f"{prefix}ForMaskedLM" for prefix in FAMILIES]
TOKEN_CLASSIFIERS = [f"{prefix}ForTokenClassification" for prefix in FAMILIES]

RARE = torch.full((8, 13), -100)
RARE[0, 3], RARE[0, 7], RARE[1, 2], RARE[4, 0] = 5, 96, 0, 11


def rows_seen(module: nn.Module) -> list[int]:
    """Receives how many rows each call of the module gets."""
    seen: list[int] = []
    module.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1].numel()))
    return seen


def bert(name: str, **config: Any) -> tuple[Any, Any]:
    model = getattr(transformers, name)(
        transformers.BertConfig(**{**build("RobertaModel").config.to_dict(), "pad_token_id": 0, **config})
    )
    return model.eval(), bert_fast.swap(copy.deepcopy(model).eval())


# ---- the vocabulary --------------------------------------------------------------------------------------------------


def vocabulary_of(model: Any) -> nn.Module:
    decoder: nn.Module = model.get_output_embeddings()
    return decoder


@pytest.mark.parametrize("name", MASKED_LMS)
def test_only_labelled_rows_meet_the_vocabulary(name: str) -> None:
    model, swapped = pair(name)
    batch = batch_for(name)
    hidden_labels = batch["attention_mask"] == 0
    labels = RARE.masked_fill(hidden_labels, -100)
    number = int((labels != -100).sum())
    seen = rows_seen(vocabulary_of(swapped))
    found, expected = swapped(**batch, labels=labels), model(**batch, labels=labels)
    assert_same_gradients(gradients(swapped, found.loss), gradients(model, expected.loss))
    assert_near(found.loss, expected.loss)
    assert seen == [number]
    mask = ~hidden_labels
    assert_near(found.logits[mask], expected.logits[mask])
    assert seen == [number, int(mask.sum())]
    assert found.logits.shape == expected.logits.shape
    assert len(seen) == 2  # computed once


@pytest.mark.parametrize("name", MASKED_LMS)
def test_without_labels_tokens_alone_meet_the_vocabulary(name: str) -> None:
    model, swapped = pair(name)
    batch = batch_for(name)
    mask = batch["attention_mask"] != 0
    seen = rows_seen(vocabulary_of(swapped))
    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            found = swapped(**batch)
            assert type(found) is type(model(**batch))
            assert_near(found.logits[mask], model(**batch).logits[mask])
    assert seen == [int(mask.sum())] * 2


def test_pretraining() -> None:
    model, swapped = bert("BertForPreTraining")
    batch = inputs(mask_of(MIXED)) | LABELS["BertForPreTraining"]
    seen = rows_seen(vocabulary_of(swapped))
    found, expected = swapped(**batch), model(**batch)
    assert_near(found.loss, expected.loss)
    assert_near(found.seq_relationship_logits, expected.seq_relationship_logits)
    assert_same_gradients(gradients(swapped, found.loss), gradients(model, expected.loss))
    assert seen == [int((batch["labels"] != -100).sum())]
    mask = batch["attention_mask"] != 0
    assert_near(found.prediction_logits[mask], expected.prediction_logits[mask])


def test_no_label_at_all() -> None:
    """A mean over nothing is not a number, in the original too."""
    model, swapped = pair("RobertaForMaskedLM")
    batch = batch_for("RobertaForMaskedLM") | {"labels": torch.full((8, 13), -100)}
    assert model(**batch).loss.isnan()
    assert swapped(**batch).loss.isnan()


def test_items_of_the_batch() -> None:
    """The Trainer's way to count labels over accumulated batches."""
    model, swapped = pair("ModernBertForMaskedLM")
    batch = batch_for("ModernBertForMaskedLM")
    labels = RARE.masked_fill(batch["attention_mask"] == 0, -100)
    items = torch.tensor(17)
    found = swapped(**batch, labels=labels, num_items_in_batch=items).loss
    assert_near(found, model(**batch, labels=labels, num_items_in_batch=items).loss)
    assert not torch.isclose(found, model(**batch, labels=labels).loss)


# ---- logits that come later ------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda output: output.logits,
    "name": lambda output: output["logits"],
    "number": lambda output: output[1],
    "get": lambda output: output.get("logits"),
    "tuple": lambda output: output.to_tuple()[1],
    "items": lambda output: dict(output.items())["logits"],
    "values": lambda output: list(output.values())[1],
    "unpacking": lambda output: dict(**output)["logits"],
    "copy": lambda output: copy.copy(output).logits,
    "deepcopy": lambda output: copy.deepcopy(output).logits,
    "pickle": lambda output: pickle.loads(pickle.dumps(output)).logits,
    "slice": lambda output: output[:2][1],
    "tree": lambda output: torch.utils._pytree.tree_flatten(output)[0][1],
}


@pytest.mark.parametrize("reader", READERS)
def test_readers(reader: str) -> None:
    model, swapped = pair("RobertaForMaskedLM")
    batch = batch_for("RobertaForMaskedLM")
    mask = batch["attention_mask"] != 0
    with torch.no_grad():
        found, expected = swapped(**batch, labels=RARE), model(**batch, labels=RARE)
        assert list(found) == list(found.keys()) == ["loss", "logits"]
        assert len(found) == 2
        assert isinstance(found, type(expected))
        assert_near(found["loss"], expected.loss)
        assert_near(found.get("loss"), expected.loss)
        assert_near(READERS[reader](found)[mask], expected.logits[mask])
        assert type(found) is type(expected)


def test_logits_have_the_graph_of_their_call() -> None:
    """Somebody else's loss on the logits."""
    model, swapped = pair("DistilBertForMaskedLM")
    batch = batch_for("DistilBertForMaskedLM")
    mask = batch["attention_mask"] != 0
    losses = []
    for each in (swapped, model):
        output = each(**batch, labels=RARE)
        with torch.no_grad():
            logits = output.logits
        losses.append(output.loss + logits[mask].square().mean())
    assert_same_gradients(gradients(swapped, losses[0]), gradients(model, losses[1]))


def test_logits_after_a_call_without_gradients() -> None:
    _, swapped = pair("DistilBertForMaskedLM")
    with torch.no_grad():
        output = swapped(**batch_for("DistilBertForMaskedLM"), labels=RARE)
    assert not output.logits.requires_grad


def test_logits_in_the_autocast_of_their_call() -> None:
    model, swapped = pair("RobertaForMaskedLM")
    batch = batch_for("RobertaForMaskedLM")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = swapped(**batch, labels=RARE), model(**batch, labels=RARE)
    assert found.logits.dtype == expected.logits.dtype == torch.bfloat16


def test_logits_of_weights_that_are_gone() -> None:
    _, swapped = pair("RobertaForMaskedLM")
    batch = batch_for("RobertaForMaskedLM")
    optimizer = torch.optim.SGD(swapped.parameters(), 0.1)
    output = swapped(**batch, labels=RARE)
    output.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"weights have changed since its forward pass; read them before"):
        _ = output.logits
    assert output.loss.isfinite()


# ---- few classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TOKEN_CLASSIFIERS, *(f"{prefix}ForQuestionAnswering" for prefix in FAMILIES)])
def test_heads_see_tokens_alone(name: str) -> None:
    model, swapped = pair(name)
    batch = batch_for(name)
    labels = labels_for(name, batch) if head_of(name) == "ForTokenClassification" else {}
    mask = batch["attention_mask"] != 0
    head: Any = swapped.qa_outputs if hasattr(swapped, "qa_outputs") else swapped.classifier
    seen = rows_seen(head)
    found, expected = swapped(**batch, **labels), model(**batch, **labels)
    kept = mask | (labels["labels"] != -100) if labels else mask
    assert seen == [int(kept.sum())]
    for key, value in expected.items():
        if key == "loss":
            assert_near(found.loss, value)
        else:
            assert_near(found[key][mask], value[mask])


def test_padding_wins_no_answer() -> None:
    """Whatever is asked for the best place finds one in the text."""
    _, swapped = pair("RobertaForQuestionAnswering")
    batch = batch_for("RobertaForQuestionAnswering")
    mask = batch["attention_mask"] != 0
    with torch.no_grad():
        swapped.qa_outputs.bias.sub_(100)
    output = swapped(**batch)
    for logits in (output.start_logits, output.end_logits):
        assert mask[mask.any(1)].gather(1, logits[mask.any(1)].argmax(1, keepdim=True)).all()
        assert logits.isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}, {"use_cache": False}],
    ids=str,
)
def test_other_wishes(arguments: dict[str, bool]) -> None:
    model, swapped = pair("RobertaForTokenClassification", attn_implementation="eager")
    batch = batch_for("RobertaForTokenClassification") | arguments
    mask = batch["attention_mask"] != 0
    with pytest.warns(UserWarning, match="original path") if "output_attentions" in arguments else torch.no_grad():
        found, expected = swapped(**batch), model(**batch)
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    assert_near(found[0][mask], expected[0][mask])


@pytest.mark.parametrize("where", ["encoder", "first layer"])
def test_hooks_see_padded_states(where: str) -> None:
    model, swapped = pair("RobertaForTokenClassification")
    batch = batch_for("RobertaForTokenClassification")
    seen: list[Tensor] = []
    module = swapped.roberta if where == "encoder" else swapped.roberta.encoder.layer[0]
    module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    with torch.no_grad() if where == "encoder" else pytest.warns(UserWarning, match="has hooks"):
        found = swapped(**batch).logits
    mask = batch["attention_mask"] != 0
    assert_near(found[mask], model(**batch).logits[mask])
    assert seen[0].shape[:2] == (8, 13) if where == "encoder" else len(seen) == 1


def test_first_rows_in_training() -> None:
    """Of the last layer's feed-forward part a classifier needs the first tokens alone."""
    model, swapped = pair("RobertaForSequenceClassification")
    batch = batch_for("RobertaForSequenceClassification") | {"labels": torch.arange(8) % 3}
    found, expected = swapped(**batch).loss, model(**batch).loss
    assert_near(found, expected)
    assert_same_gradients(gradients(swapped, found), gradients(model, expected))
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x

    for layer in swapped.roberta.encoder.layer:
        layer.output.dropout = Counting()
    swapped(**batch).loss.backward()
    tokens = int((batch["attention_mask"] != 0).sum())
    assert seen[0] > tokens > 8  # and rows that are kept for the sake of empty texts
    assert seen[1] == 8
