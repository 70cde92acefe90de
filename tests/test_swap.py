"""bert_fast.swap: the swapped model against the same model unswapped, and what swapping leaves alone."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    HEADS,
    MIXED,
    TEXTS,
    WHOLE,
    any_path,
    assert_near,
    assert_same_gradients,
    gradients,
    inputs,
    mask_of,
    minilm,
    one_thread,  # noqa: F401
    randomise,
    theirs,
    transformers,
)
from tolerance import assert_twice_torch, magnitude
from torch import Tensor, nn

import bert_fast
from bert_fast import engine
from bert_fast.swap import calls as served_calls
from bert_fast.swap.core import Swapped

IMPLEMENTATIONS = ("sdpa", "eager")

CONTAINERS = (
    "embeddings",
    "encoder",
    "encoder.layer.0",
    "encoder.layer.1.attention",
    "encoder.layer.0.attention.self",
    "encoder.layer.1.attention.output",
    "encoder.layer.0.intermediate",
    "encoder.layer.1.output",
)

EMBEDDINGS = (
    "embeddings.word_embeddings",
    "embeddings.position_embeddings",
    "embeddings.token_type_embeddings",
)

LINEARS = (
    "encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.self.key",
    "encoder.layer.1.attention.self.value",
    "encoder.layer.1.attention.output.dense",
    "encoder.layer.0.intermediate.dense",
    "encoder.layer.1.output.dense",
)

NORMS = (
    "embeddings.LayerNorm",
    "encoder.layer.1.attention.output.LayerNorm",
    "encoder.layer.0.output.LayerNorm",
)

DROPOUTS = (
    "embeddings.dropout",
    "encoder.layer.0.attention.output.dropout",
    "encoder.layer.1.output.dropout",
)

ACTIVATION = "encoder.layer.1.intermediate.intermediate_act_fn"

LEAVES = (*EMBEDDINGS, *LINEARS, *NORMS, *DROPOUTS, ACTIVATION)

POOLER = ("pooler", "pooler.dense")


def token_labels(classes: int) -> Tensor:
    """Labels of the mixed batch, at tokens and at hidden places, a third of them -100."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(classes, (8, 13), generator=generator)
    labels = labels.masked_fill(torch.rand(8, 13, generator=generator) < 0.33, -100)
    labels[5] = -100
    return labels


# The sixth row is empty: what eager attention makes of it means nothing, so nothing is asked of it.
CLASSES = torch.tensor([0, 2, 1, 0, -100, -100, 2, 1])

LABELS: dict[str, dict[str, Tensor]] = {
    "BertForMaskedLM": {"labels": token_labels(97)},
    "BertForMultipleChoice": {"labels": torch.tensor([1, 0, -100, 1])},
    "BertForNextSentencePrediction": {"labels": CLASSES.clamp(max=1)},
    "BertForPreTraining": {"labels": token_labels(97), "next_sentence_label": CLASSES.clamp(max=1)},
    "BertForQuestionAnswering": {
        "start_positions": torch.tensor([0, 12, 1, 5, 99, 13, 2, 0]),
        "end_positions": torch.tensor([3, 13, 9, 12, 6, 13, 5, 7]),
    },
    "BertForSequenceClassification": {"labels": CLASSES},
    "BertForTokenClassification": {"labels": token_labels(3)},
    "BertLMHeadModel": {"labels": token_labels(97)},
}


def pair(name: str = "BertModel", **config: Any) -> tuple[Any, Any]:
    """A model and its swapped copy."""
    if name in ("BertForSequenceClassification", "BertForTokenClassification"):
        config = {"num_labels": 3, **config}
    model = theirs(name, **config)
    return model, bert_fast.swap(copy.deepcopy(model))


def batch_for(name: str, rows: str = MIXED) -> dict[str, Tensor]:
    batch = inputs(mask_of(rows))
    return {key: x.view(-1, 2, 13) for key, x in batch.items()} if name == "BertForMultipleChoice" else batch


def calls(model: nn.Module) -> dict[str, int]:
    (encoder,) = bert_fast.report(model).encoders
    return dict(encoder.calls)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every floating tensor of an output, by its place."""
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() else {}
    found: dict[str, Tensor] = {}
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, item in items:
        found |= tensors(item, f"{name}.{key}")
    return found


def assert_same_output(found: Any, expected: Any, mask: Tensor) -> None:
    """Values at tokens, and of rows that have one."""
    assert type(found) is type(expected)
    ours, others = tensors(found), tensors(expected)
    assert list(ours) == list(others)
    assert others
    for name, other in others.items():
        places = mask if other.shape[: mask.dim()] == mask.shape else mask.any(-1)
        if other.dim() == 0:
            assert_near(ours[name], other)
        else:
            assert other.shape[: places.dim()] == places.shape, name
            assert ours[name].shape == other.shape, name
            assert_near(ours[name][places], other[places])


def assert_identical(found: Any, expected: Any) -> None:
    """Bit by bit, everywhere."""
    ours, others = tensors(found), tensors(expected)
    assert list(ours) == list(others)
    assert others
    for name, other in others.items():
        assert torch.equal(ours[name], other), name


def weigh(output: Any, mask: Tensor) -> Tensor:
    """A scalar in which every value at a token, and every pooled one of a row with tokens, has another weight."""
    values = [output.last_hidden_state[mask], output.pooler_output[mask.any(1)]]
    return sum(
        ((x * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))).sum() for i, x in enumerate(values)),
        torch.zeros(()),
    )


# ---- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
@pytest.mark.parametrize("name", ["BertModel", *HEADS])
def test_output(name: str, rows: str, implementation: str) -> None:
    model, swapped = pair(name, attn_implementation=implementation)
    batch = batch_for(name, rows)
    assert_same_output(swapped(**batch), model(**batch), batch["attention_mask"] != 0)
    assert calls(swapped) == {"fast": 1}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [*HEADS, "BertLMHeadModel"])
def test_loss(name: str, implementation: str) -> None:
    # Labels at hidden places count: heads read what the encoder makes of hidden tokens there.
    model, swapped = pair(name, attn_implementation=implementation)
    batch = batch_for(name) | LABELS[name]
    expected, found = model(**batch).loss, swapped(**batch).loss
    assert_near(found, expected)
    assert_same_gradients(gradients(swapped, found), gradients(model, expected))
    assert calls(swapped) == {"fast": 1}


@pytest.mark.parametrize("shape", [(104,), (8, 13, 1)], ids=str)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_loss_of_labels_in_another_shape(name: str, shape: tuple[int, ...]) -> None:
    # transformers flattens the labels, whatever shape they have.
    model, swapped = pair(name)
    batch = inputs(mask_of(MIXED)) | {"labels": LABELS[name]["labels"].view(shape)}
    expected = model(**batch).loss
    with any_path():
        assert_near(swapped(**batch).loss, expected)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_labels_that_do_not_fit(name: str) -> None:
    model, swapped = pair(name)
    batch = inputs(mask_of(MIXED)) | {"labels": torch.ones(8, 11).long()}
    with pytest.raises(ValueError, match="batch_size") as expected:
        model(**batch)
    with pytest.raises(ValueError, match="batch_size") as found:
        swapped(**batch)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
def test_gradients(rows: str, implementation: str) -> None:
    model, swapped = pair(attn_implementation=implementation)
    mask = mask_of(rows)
    batch = inputs(mask)
    found = gradients(swapped, weigh(swapped(**batch), mask))
    assert_same_gradients(found, gradients(model, weigh(model(**batch), mask)))


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [(1, torch.linspace(-3, 2, 7)), (3, (torch.arange(21).view(7, 3) % 5 < 2).float())],
    ids=["regression", "multi label"],
)
def test_sequence_losses(num_labels: int, labels: Tensor) -> None:
    model, swapped = pair("BertForSequenceClassification", num_labels=num_labels)
    mask = mask_of(MIXED)
    batch = {name: x[mask.any(1)] for name, x in inputs(mask).items()} | {"labels": labels}
    expected, found = model(**batch).loss, swapped(**batch).loss
    assert_near(found, expected)
    assert_same_gradients(gradients(swapped, found), gradients(model, expected))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64],
    ids=str,
)
def test_mask_dtypes(dtype: torch.dtype) -> None:
    model, swapped = pair()
    mask = mask_of(MIXED)
    batch = inputs(mask) | {"attention_mask": mask.to(dtype)}
    assert_same_output(swapped(**batch), model(**batch), mask)
    assert calls(swapped) == {"fast": 1}


@pytest.mark.parametrize(
    "hidden_act",
    ["gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "gelu_10", "relu", "silu"],
)
def test_activations(hidden_act: str) -> None:
    model, swapped = pair("BertForMaskedLM", hidden_act=hidden_act)
    batch = inputs(mask_of(MIXED)) | LABELS["BertForMaskedLM"]
    expected, found = model(**batch).loss, swapped(**batch).loss
    assert_near(found, expected)
    assert_same_gradients(gradients(swapped, found), gradients(model, expected))
    assert calls(swapped) == {"fast": 1}


POSITIONS = torch.arange(13).flip(0)[None] * 2 + 1

# Arguments besides the ids and the mask.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no mask": {"attention_mask": None},
    "types": {"token_type_ids": torch.arange(104).view(8, 13) % 5},
    "types of one row": {"token_type_ids": torch.arange(13)[None] % 5},
    "positions": {"position_ids": torch.arange(104).view(8, 13) % 37},
    "positions of one row": {"position_ids": POSITIONS},
    "hidden states": {"output_hidden_states": True},
    "no hidden states": {"output_hidden_states": False, "output_attentions": False},
    "tuple": {"return_dict": False},
    "dict": {"return_dict": True},
    "undecided": {"return_dict": None, "use_cache": None},
    "tuple with hidden states": {"return_dict": False, "output_hidden_states": True},
    "cache": {"use_cache": True},
    "hidden states by number": {"output_hidden_states": [0, -1, 7]},
    "one hidden state by number": {"output_hidden_states": -2},
    "number of no hidden state": {"output_hidden_states": [-4, 3]},
    "tuple with hidden states by number": {"return_dict": False, "output_hidden_states": [1]},
}


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(arguments: dict[str, Any], name: str) -> None:
    model, swapped = pair(name)
    mask = mask_of(MIXED)
    batch = {key: x for key, x in inputs(mask).items() if key != "token_type_ids"} | arguments
    expected, found = model(**batch), swapped(**batch)
    if batch["attention_mask"] is None:
        mask = torch.ones_like(mask)
    assert_same_output(found, expected, mask)
    assert calls(swapped) == {"fast": 1}
    if name == "BertModel" and arguments.get("output_hidden_states") is True and arguments.get("return_dict") is None:
        assert found.hidden_states[-1] is found.last_hidden_state


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification"])
@pytest.mark.parametrize(
    "flags",
    [{"output_hidden_states": True}, {"return_dict": False}, {"output_hidden_states": True, "return_dict": False}],
)
def test_flags_of_the_configuration(flags: dict[str, bool], name: str) -> None:
    model, swapped = pair(name, **flags)
    mask = mask_of(MIXED)
    assert_same_output(swapped(**inputs(mask)), model(**inputs(mask)), mask)
    assert calls(swapped) == {"fast": 1}
    # A flag that is given goes before the configuration's.
    given = {flag: not value for flag, value in flags.items()}
    assert_same_output(swapped(**inputs(mask), **given), model(**inputs(mask), **given), mask)


def test_positional_arguments() -> None:
    mask = mask_of(MIXED)
    first = [*inputs(mask).values(), POSITIONS]
    model, swapped = pair()
    assert_same_output(swapped(*first), model(*first), mask)
    model, swapped = pair("BertForTokenClassification")
    full = [*first, None, LABELS["BertForTokenClassification"]["labels"]]
    assert_near(swapped(*full).loss, model(*full).loss)


@pytest.mark.parametrize("name", ["BertModel", "BertForQuestionAnswering"])
def test_inputs_embeds(name: str) -> None:
    mask = mask_of(MIXED)
    embeds = torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(3))
    grads = []
    for model in pair(name):
        leaf = embeds.clone().requires_grad_()
        labels = LABELS.get(name, {})
        output = model(inputs_embeds=leaf, attention_mask=mask, **labels)
        loss = output.loss if labels else weigh(output, mask)
        grads.append((output, *torch.autograd.grad(loss, leaf)))
    (expected, expected_grad), (found, found_grad) = grads
    assert_same_output(found, expected, mask)
    assert_near(found_grad, expected_grad)


@pytest.mark.parametrize(
    "arguments", [{}, {"input_ids": torch.ones(2, 3).long(), "inputs_embeds": torch.ones(2, 3, 51)}]
)
def test_ids_or_embeds(arguments: dict[str, Tensor]) -> None:
    model, swapped = pair()
    with pytest.raises(ValueError, match="exactly one") as expected:
        model(**arguments)
    with any_path(), pytest.raises(ValueError, match="exactly one") as found:
        swapped(**arguments)
    assert str(found.value) == str(expected.value)


def test_no_pooler() -> None:
    model = transformers.BertModel(theirs("BertModel").config, add_pooling_layer=False).eval()
    randomise(model)
    swapped = bert_fast.swap(copy.deepcopy(model))
    mask = mask_of(MIXED)
    for flag in (True, False):
        assert_same_output(swapped(**inputs(mask), return_dict=flag), model(**inputs(mask), return_dict=flag), mask)
    nothing = torch.zeros_like(mask)
    assert magnitude(swapped(**inputs(nothing)).last_hidden_state) == 0.0


def test_neighbours_do_not_leak() -> None:
    _, swapped = pair()
    mask = mask_of(MIXED)
    batch = inputs(mask)
    batch["input_ids"] = batch["input_ids"] % 48 + 1
    batch["input_ids"][[1, 4]] += 48
    quiet = [0, 2, 3, 5, 6, 7]
    with torch.no_grad():
        before = swapped(**batch)
        swapped.embeddings.word_embeddings.weight[49:] *= 100
        after = swapped(**batch)
    assert torch.equal(after.last_hidden_state[quiet], before.last_hidden_state[quiet])
    assert torch.equal(after.pooler_output[quiet], before.pooler_output[quiet])
    assert not torch.equal(after.last_hidden_state[1], before.last_hidden_state[1])


def test_too_long() -> None:
    model, swapped = pair()
    assert_near(swapped(torch.ones(2, 37).long())[0], model(torch.ones(2, 37).long())[0])
    with pytest.raises(ValueError, match=r"38.*37"):
        swapped(torch.ones(2, 38).long())


@pytest.mark.parametrize("shape", [(8, 11), (4, 13)], ids=str)
def test_mask_of_another_shape(shape: tuple[int, int]) -> None:
    _, swapped = pair()
    with pytest.raises(ValueError, match=r"attention_mask.*\(8, 13\)"):
        swapped(inputs(mask_of(MIXED))["input_ids"], torch.ones(shape))


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "BertForMultipleChoice", "BertForNextSentencePrediction"]
)
def test_head_that_reads_first_rows(name: str) -> None:
    # The last layer is computed for the pooler's rows alone, unless somebody may see the others.
    original, swapped = pair(name)
    batch = batch_for(name)
    seen: list[Any] = []
    with torch.no_grad():
        expected = original(**batch)
        for arguments in ({}, {"return_dict": False}, {"output_hidden_states": True}):
            found = swapped(**batch, **arguments)
            torch.testing.assert_close(found[0], expected[0])
        states = found.hidden_states[-1]
        assert states.shape == (*batch["attention_mask"].flatten(0, -2).shape, original.config.hidden_size)
        handle = swapped.bert.register_forward_hook(lambda module, args, output: seen.append(output))  # noqa: ARG005
        torch.testing.assert_close(swapped(**batch)[0], expected[0])
        handle.remove()
    assert seen[0].last_hidden_state.shape == states.shape
    shapes: list[torch.Size] = []
    real = engine.encode

    def encode(*args: Any, **others: Any) -> Any:
        outputs = real(*args, **others)
        assert outputs is not None
        shapes.append(outputs[-1].shape)
        return outputs

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "encode", encode)
        swapped(**batch)
    assert shapes == [(len(states), original.config.hidden_size)]


def test_inference_mode() -> None:
    model, swapped = pair()
    mask = mask_of(MIXED)
    with torch.inference_mode():
        assert_same_output(swapped(**inputs(mask)), model(**inputs(mask)), mask)
    assert calls(swapped) == {"fast": 1}


@pytest.mark.parametrize("has_gradients", [False, True])
def test_autocast(has_gradients: bool) -> None:
    model, swapped = pair()
    mask = mask_of(MIXED)
    batch = inputs(mask)
    exact = copy.deepcopy(model).double()(**batch)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(has_gradients):
        expected, found = model(**batch), swapped(**batch)
    assert_twice_torch("hidden", found[0][mask], expected[0][mask], exact[0][mask])
    assert_twice_torch("pooled", found[1], expected[1], exact[1])
    if has_gradients:
        exact_grads = gradients(exact_model := copy.deepcopy(model).double(), weigh(exact_model(**batch), mask))
        expected_grads = gradients(model, weigh(expected, mask))
        for name, grad in gradients(swapped, weigh(found, mask)).items():
            scale = magnitude(exact_grads[name.replace("key", "query")])  # that of the keys' bias is rounding alone
            assert_twice_torch(name, grad, expected_grads[name], exact_grads[name], 256 * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_cast(dtype: torch.dtype) -> None:
    model, swapped = pair()
    mask = mask_of(MIXED)
    batch = inputs(mask)
    swapped.to(dtype)
    model.to(dtype)
    exact = copy.deepcopy(model).double()(**batch)
    found, expected = swapped(**batch), model(**batch)
    assert_twice_torch("hidden", found[0][mask], expected[0][mask], exact[0][mask])
    assert_twice_torch("pooled", found[1], expected[1], exact[1])
    assert calls(swapped) == {"fast": 1}
    if dtype == torch.float64:
        swapped.float()
        assert_near(swapped(**batch)[0][mask], model.float()(**batch)[0][mask])


# ---- calls that take the original path -------------------------------------------------------------------------------


class OwnAttention(transformers.models.bert.modeling_bert.BertSelfAttention):  # type: ignore[misc]
    """Twice what the class gives."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, *rest = super().forward(*args, **kwargs)
        return (2 * out, *rest)


class OwnEmbeddings(transformers.models.bert.modeling_bert.BertEmbeddings):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) - 1


def nothing(model: Any) -> None:
    del model


def set_class(name: str, cls: type) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(name), "__class__", cls)


def scaled(output: Any, factor: float = 1.5) -> Any:
    if isinstance(output, Mapping):
        values: Any = {**output, "last_hidden_state": factor * output["last_hidden_state"]}
        return transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions(**values)
    return (factor * output[0], *output[1:]) if isinstance(output, tuple) else factor * output


def set_forward(name: str) -> Callable[[Any], None]:
    """Gives the module a forward on the instance, as accelerate does."""

    def prepare(model: Any) -> None:
        module = model.get_submodule(name)
        module.forward = lambda *args, **kwargs: scaled(type(module).forward(module, *args, **kwargs))

    return prepare


def hook(name: str, kind: str) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        module = model.get_submodule(name)
        if kind == "forward":
            module.register_forward_hook(lambda module, args, output: scaled(output))  # noqa: ARG005
        elif kind == "before":
            module.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))  # noqa: ARG005
        else:
            module.register_full_backward_hook(lambda module, grad_in, grad_out: None)  # noqa: ARG005

    return prepare


def set_config(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


def checkpointed(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        model.gradient_checkpointing_enable()
    model.train()


STATES = torch.randn(8, 7, 51, generator=torch.Generator().manual_seed(7))
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}

# (configuration, what happens to both models, further arguments, reason)
ORIGINAL: dict[str, tuple[dict[str, Any], Callable[[Any], None], dict[str, Any], str]] = {
    "attentions": ({"attn_implementation": "eager"}, nothing, {"output_attentions": True}, "attention probabilities"),
    "attentions of the configuration": (
        {"attn_implementation": "eager", "output_attentions": True}, nothing, {}, "attention probabilities",
    ),
    "4-D mask": (
        {}, nothing, {"attention_mask": torch.ones(8, 1, 13, 13).tril().bool()}, "attention_mask has 4 dimensions",
    ),
    "additive mask": (
        {}, nothing, {"attention_mask": -3 * torch.rand(8, 1, 13, 13)}, "attention_mask has 4 dimensions",
    ),
    "unknown argument": ({}, nothing, {"is_causal": False}, "is_causal is given"),
    "encoder states": ({}, nothing, {"encoder_hidden_states": STATES}, "encoder_hidden_states is given"),
    "decoder": ({"is_decoder": True}, nothing, {"use_cache": False}, "decoder"),
    "cross-attention": (DECODER, nothing, {"encoder_hidden_states": STATES, "use_cache": False}, "is given|decoder"),
    "causal": ({}, set_config("is_causal", True), {}, "causal"),
    "checkpointing": (NO_DROPOUT, checkpointed, {}, "gradient checkpointing"),
    "class of a layer": (
        {}, set_class("encoder.layer.1.attention.self", OwnAttention), {}, r"encoder\.layer\.1\..* is a OwnAttention",
    ),
    "class of the embeddings": ({}, set_class("embeddings", OwnEmbeddings), {}, "embeddings is a OwnEmbeddings"),
    "forward of a layer": ({}, set_forward("encoder.layer.0.output"), {}, "output has a forward of its own"),
    "forward hook": ({}, hook("encoder.layer.0.attention.self", "forward"), {}, "self has hooks"),
    "hook before": ({}, hook("encoder.layer.1.intermediate", "before"), {}, "intermediate has hooks"),
    "backward hook": ({}, hook("encoder.layer.1", "backward"), {}, r"layer\.1 has hooks"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter:UserWarning")
@pytest.mark.parametrize(("config", "prepare", "arguments", "reason"), ORIGINAL.values(), ids=ORIGINAL)
def test_original_path(
    config: dict[str, Any], prepare: Callable[[Any], None], arguments: dict[str, Any], reason: str
) -> None:
    models = pair(**config)
    for model in models:
        prepare(model)
    model, swapped = models
    batch = inputs(mask_of(MIXED)) | arguments
    expected = model(**batch)
    with pytest.warns(UserWarning, match=f"BertModel takes its original path: .*({reason})") as caught:
        found = swapped(**batch)
    assert len(caught) == 1
    assert_identical(found, expected)
    assert_identical(swapped(**batch), expected)  # no second warning: it would be an error
    ((name, number),) = calls(swapped).items()
    assert number == 2
    assert str(caught[0].message).endswith(name)
    assert f"2 calls: original path, because {name}" in str(bert_fast.report(swapped))


def test_hidden_states_by_number_where_transformers_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_calls, "_has_numbered_states", lambda: False)
    model, swapped = pair()
    batch = inputs(mask_of(MIXED)) | {"output_hidden_states": [0, -1]}
    with pytest.warns(UserWarning, match="hidden states .* by number"):
        assert_identical(swapped(**batch), model(**batch))


def test_original_path_is_left_again() -> None:
    model, swapped = pair()
    mask = mask_of(MIXED)
    handle = swapped.encoder.layer[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="has hooks"):
        swapped(**inputs(mask))
    handle.remove()
    assert_same_output(swapped(**inputs(mask)), model(**inputs(mask)), mask)
    assert calls(swapped) == {"encoder.layer.0 has hooks": 1, "fast": 1}
    with pytest.warns(UserWarning, match="4 dimensions"):  # another reason is another warning
        swapped(inputs(mask)["input_ids"], mask[:, None, None].expand(-1, 1, 13, -1))


def test_own_attention_implementation() -> None:
    def halved(*args: Any, **kwargs: Any) -> Any:
        out, weights = transformers.models.bert.modeling_bert.eager_attention_forward(*args, **kwargs)
        return out / 2, weights

    transformers.AttentionInterface.register("halved", halved)
    transformers.AttentionMaskInterface.register("halved", transformers.masking_utils.eager_mask)
    model, swapped = pair(attn_implementation="halved")
    with pytest.warns(UserWarning, match="attn_implementation is 'halved'"):
        found = swapped(**inputs(mask_of(MIXED)))
    assert_identical(found, model(**inputs(mask_of(MIXED))))


def test_three_dimensional_mask() -> None:
    # What transformers makes of one is up to transformers: 5 refuses it.
    model, swapped = pair()
    batch = inputs(mask_of(MIXED)) | {"attention_mask": torch.ones(8, 13, 13)}

    def attempt(each: Any) -> Any:
        try:
            return each(**batch)[0].sum().item()
        except (RuntimeError, ValueError, IndexError) as error:
            return str(error)

    expected = attempt(model)
    with pytest.warns(UserWarning, match="attention_mask has 3 dimensions"):
        found = attempt(swapped)
    assert found == expected


@pytest.mark.parametrize("name", ["BertLMHeadModel", "BertForMaskedLM"])
def test_decoder(name: str) -> None:
    model, swapped = pair(name, is_decoder=True)
    batch = inputs(mask_of(MIXED)) | LABELS[name]
    expected = model(**batch)
    with pytest.warns(UserWarning, match="the model is a decoder"):
        found = swapped(**batch)
    assert_identical(found, expected)
    assert_same_gradients(gradients(swapped, found.loss), gradients(model, expected.loss))


def test_generate() -> None:
    model, swapped = pair("BertLMHeadModel", is_decoder=True)
    ids = inputs(mask_of(WHOLE))["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with pytest.warns(UserWarning, match="original path"):
        found = swapped.generate(ids, **options)
    assert torch.equal(found, expected)


def test_checkpointing_counts_in_training_alone() -> None:
    model, swapped = pair(**NO_DROPOUT)
    mask = mask_of(MIXED)
    checkpointed(swapped)
    swapped.eval()
    swapped(**inputs(mask))
    assert calls(swapped) == {"fast": 1}
    swapped.train()
    with pytest.warns(UserWarning, match="gradient checkpointing is on"):
        found = gradients(swapped, weigh(swapped(**inputs(mask)), mask))
    assert_same_gradients(found, gradients(model, weigh(model(**inputs(mask)), mask)))


# ---- modules within --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONTAINERS, *LEAVES, *POOLER])
def test_hook_within(name: str) -> None:
    models = pair()
    mask = mask_of(MIXED)
    outputs = []
    for model in models:
        hook(name, "forward")(model)
        with any_path():
            outputs.append(model(**inputs(mask)))
    assert_same_output(outputs[1], outputs[0], mask)


def shapes_seen(name: str) -> list[list[torch.Size]]:
    """The shapes that a hook within sees come out of the module, in the model and in the swapped model."""
    mask = mask_of(MIXED)
    seen: list[list[torch.Size]] = []
    for model in pair():
        shapes: list[torch.Size] = []
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, shapes=shapes: shapes.append(tensors(output, "x").popitem()[1].shape)  # noqa: ARG005
        )
        with any_path():
            model(**inputs(mask))
        seen.append(shapes)
    return seen


@pytest.mark.parametrize("name", [*CONTAINERS, *POOLER])
def test_hook_within_sees_the_same(name: str) -> None:
    expected, found = shapes_seen(name)
    assert expected
    assert found == expected


@pytest.mark.parametrize("name", LEAVES)
def test_hook_on_a_leaf_sees_the_same(name: str) -> None:
    expected, found = shapes_seen(name)
    assert expected
    assert found == expected


@pytest.mark.parametrize("name", [*CONTAINERS, *LEAVES, *POOLER])
def test_forward_within(name: str) -> None:
    models = pair()
    mask = mask_of(MIXED)
    outputs = []
    for model in models:
        set_forward(name)(model)
        with any_path():
            outputs.append(model(**inputs(mask)))
    assert_same_output(outputs[1], outputs[0], mask)


class LowRank(nn.Module):
    """A linear layer and a product of two thin matrices beside it (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.base = base
        self.a = nn.Parameter(torch.randn(3, base.in_features, generator=generator) / 5)
        self.b = nn.Parameter(torch.randn(base.out_features, 3, generator=generator) / 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return result


class Around(nn.Module):
    """Some module, and something after it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 1.5 * self.base(x) - 0.1
        return result


@pytest.mark.parametrize("name", [*LINEARS, *EMBEDDINGS, *NORMS, *DROPOUTS, ACTIVATION])
@pytest.mark.parametrize("is_before", [True, False], ids=["before swap", "after swap"])
def test_replaced_module(name: str, is_before: bool) -> None:
    def replace(model: Any) -> Any:
        parent, _, leaf = name.rpartition(".")
        old = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, LowRank(old) if name in LINEARS else Around(old))
        return model

    model = theirs("BertModel")
    plain = model(**inputs(mask_of(MIXED)))[0]
    if is_before:
        swapped = bert_fast.swap(copy.deepcopy(replace(model)))
    else:
        swapped = replace(bert_fast.swap(copy.deepcopy(model)))
        replace(model)
    mask = mask_of(MIXED)
    expected, found = model(**inputs(mask)), swapped(**inputs(mask))
    assert magnitude(expected[0] - plain) > 0.01
    assert_same_output(found, expected, mask)
    assert calls(swapped) == {"fast": 1}
    assert_same_gradients(gradients(swapped, weigh(found, mask)), gradients(model, weigh(expected, mask)))


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_replaced_linear_keeps_the_activation(hidden_act: str) -> None:
    model, swapped = pair(hidden_act=hidden_act)
    mask = mask_of(MIXED)
    for each in (model, swapped):
        for layer in each.encoder.layer:
            layer.intermediate.dense = LowRank(layer.intermediate.dense)
    assert_same_output(swapped(**inputs(mask)), model(**inputs(mask)), mask)
    assert calls(swapped) == {"fast": 1}


class ClippedGELU(nn.GELU):
    """A subclass of what the fast path knows, with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).clamp(max=0.5)


class ClippedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).clamp(max=0.5)


class ClippedNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).clamp(max=0.5)


class LoudEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("encoder.layer.0.intermediate.dense", ClippedLinear),
        ("encoder.layer.1.output.dense", ClippedLinear),
        ("encoder.layer.0.output.LayerNorm", ClippedNorm),
        ("embeddings.LayerNorm", ClippedNorm),
        ("embeddings.token_type_embeddings", LoudEmbedding),
    ],
)
def test_subclass_within(name: str, cls: type[nn.Module]) -> None:
    models = pair()
    batch = inputs(mask_of(MIXED))
    del batch["token_type_ids"]
    for model in models:
        set_class(name, cls)(model)
    with any_path():
        assert_same_output(models[1](**batch), models[0](**batch), mask_of(MIXED))


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh(), ClippedGELU(), ClippedGELU("tanh")],
    ids=["relu", "gelu", "tanh gelu", "tanh", "own gelu", "own tanh gelu"],
)
def test_activation_module(activation: nn.Module) -> None:
    models = pair()
    mask = mask_of(MIXED)
    for model in models:
        for layer in model.encoder.layer:
            layer.intermediate.intermediate_act_fn = activation
    with any_path():
        assert_same_output(models[1](**inputs(mask)), models[0](**inputs(mask)), mask)


def test_activation_function() -> None:
    models = pair()
    mask = mask_of(MIXED)
    for model in models:
        for layer in model.encoder.layer:
            del layer.intermediate.intermediate_act_fn
            layer.intermediate.intermediate_act_fn = torch.tanh
    assert_same_output(models[1](**inputs(mask)), models[0](**inputs(mask)), mask)
    assert calls(models[1]) == {"fast": 1}


def test_adapters_on_frozen_weights() -> None:
    # As PEFT trains: everything frozen but the adapters, and a hook that asks for the gradient of the embeddings.
    grads = []
    for model in (models := pair("BertForTokenClassification")):
        model.requires_grad_(False)
        for layer in model.bert.encoder.layer:
            layer.attention.self.query = LowRank(layer.attention.self.query)
        model.enable_input_require_grads()
        batch = inputs(mask_of(MIXED)) | LABELS["BertForTokenClassification"]
        grads.append(gradients(model, model(**batch).loss))
    assert len(grads[0]) == 4
    assert_same_gradients(grads[1], grads[0])
    assert calls(models[1]) == {"fast": 1}


def test_hook_after_the_model() -> None:
    models = pair()
    mask = mask_of(MIXED)
    for model in models:
        hook("", "forward")(model)
    expected, found = (model(**inputs(mask)) for model in models)
    assert_same_output(found, expected, mask)
    assert magnitude(found[0] - theirs("BertModel")(**inputs(mask))[0]) > 0.1
    assert calls(models[1]) == {"fast": 1}


def test_hook_before_the_encoder() -> None:
    models = pair("BertForTokenClassification")
    mask = mask_of(MIXED)
    for model in models:
        model.bert.register_forward_pre_hook(lambda module, args: (args[0].flip(0), *args[1:]))  # noqa: ARG005
    assert_same_output(models[1](**inputs(mask)), models[0](**inputs(mask)), mask)
    assert magnitude(models[1](**inputs(mask))[0] - pair("BertForTokenClassification")[0](**inputs(mask))[0]) > 0.1
    assert calls(models[1]) == {"fast": 2}


# ---- dropout ---------------------------------------------------------------------------------------------------------


def set_dropouts(model: nn.Module, is_training: bool) -> None:
    """The usual way to have dropout in evaluation, or none in training."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train(is_training)


def test_dropout_modules_in_training_alone() -> None:
    # transformers asks the attention module, not its dropout, whether to drop probabilities.
    model, swapped = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    mask = mask_of(MIXED)
    for each in (model, swapped):
        set_dropouts(each, True)
    assert_same_output(swapped(**inputs(mask)), model(**inputs(mask)), mask)


def test_dropout_modules_in_evaluation_alone() -> None:
    for model in pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5):
        model.train()
        set_dropouts(model, False)
        torch.manual_seed(1)
        first = model(**inputs(mask_of(MIXED)))[0]
        assert not torch.equal(model(**inputs(mask_of(MIXED)))[0], first)


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3), (0.1, 0.1)], ids=["hidden", "attention", "both"])
def test_dropout(rates: tuple[float, float]) -> None:
    _, swapped = pair("BertForMaskedLM", hidden_dropout_prob=rates[0], attention_probs_dropout_prob=rates[1])
    batch = inputs(mask_of(MIXED)) | LABELS["BertForMaskedLM"]
    evaluated = swapped(**batch).loss
    swapped.train()
    steps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loss = swapped(**batch).loss
        steps.append((loss, gradients(swapped, loss)))
    assert torch.equal(steps[0][0], steps[1][0])
    assert all(torch.equal(grad, steps[1][1][name]) for name, grad in steps[0][1].items())
    assert not torch.equal(steps[0][0], steps[2][0])
    assert not torch.equal(steps[0][0], evaluated)
    assert all(bool(grad.isfinite().all()) for grad in steps[0][1].values())
    swapped.eval()
    assert torch.equal(swapped(**batch).loss, evaluated)
    assert calls(swapped) == {"fast": 5}


@pytest.mark.parametrize("rates", [(0.4, 0.0), (0.0, 0.4)], ids=["hidden", "attention"])
def test_dropout_is_as_strong_as_transformers(rates: tuple[float, float]) -> None:
    # How far training strays from evaluation, in the mean over many draws.
    models = pair(hidden_dropout_prob=rates[0], attention_probs_dropout_prob=rates[1])
    mask = mask_of(MIXED)
    strays = []
    for model in models:
        evaluated = model(**inputs(mask))[0][mask]
        model.train()
        torch.manual_seed(3)
        with torch.no_grad():
            draws = [(model(**inputs(mask))[0][mask] - evaluated).square().mean() for _ in range(60)]
        strays.append(float(torch.stack(draws).mean()))
    assert 0.9 < strays[1] / strays[0] < 1.1


def test_training_learns() -> None:
    _, swapped = pair("BertForTokenClassification", num_labels=3)
    batch = inputs(mask_of(MIXED)) | LABELS["BertForTokenClassification"]
    swapped.train()
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(swapped.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = swapped(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.3 * losses[0]


def test_training_is_the_same() -> None:
    model, swapped = pair("BertForMaskedLM", **NO_DROPOUT)
    batch = inputs(mask_of(MIXED)) | LABELS["BertForMaskedLM"]
    for each in (model, swapped):
        each.train()
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            each(**batch).loss.backward()
            optimizer.step()
    start = theirs("BertForMaskedLM").state_dict()
    for name, value in model.state_dict().items():
        assert_near(swapped.state_dict()[name], value)
    assert (
        magnitude(
            model.state_dict()["bert.encoder.layer.0.output.dense.weight"]
            - start["bert.encoder.layer.0.output.dense.weight"]
        )
        > 1e-3
    )


# ---- other transformations of torch ----------------------------------------------------------------------------------


def test_functional_call() -> None:
    model, swapped = pair()
    mask = mask_of(MIXED)
    weights = {name: 1.1 * value for name, value in model.named_parameters()}
    found = torch.func.functional_call(swapped, weights, (), inputs(mask))
    assert_same_output(found, torch.func.functional_call(model, weights, (), inputs(mask)), mask)
    assert magnitude(found[0] - swapped(**inputs(mask))[0]) > 0.01


def test_functional_gradient() -> None:
    mask = mask_of(MIXED)
    results = []
    for model in pair():
        weights = {name: value.detach() for name, value in model.named_parameters()}

        def loss(values: dict[str, Tensor], model: Any = model) -> Tensor:
            return weigh(torch.func.functional_call(model, values, (), inputs(mask)), mask)

        with any_path():
            results.append(torch.func.grad(loss)(weights))
    assert_same_gradients(results[1], results[0])


def second_derivative(model: Any, mask: Tensor) -> Tensor:
    """The gradient, by a weight, of the size of the gradient by the embeddings."""
    embeds = torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss = weigh(model(inputs_embeds=embeds, attention_mask=mask), mask)
    (first,) = torch.autograd.grad(loss, embeds, create_graph=True)
    weight: Tensor = model.encoder.layer[0].attention.self.query.weight
    return torch.autograd.grad(first.square().sum(), weight)[0]


def test_second_derivative() -> None:
    # Right or refused. What torch's fallback has to say of it is no refusal: users see a warning and a wrong number.
    model, swapped = pair(attn_implementation="eager")
    mask = mask_of(MIXED)
    expected = second_derivative(model, mask)
    found = None
    with any_path(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "bert_fast::.*autograd kernel was not registered", UserWarning)
        try:
            found = second_derivative(swapped, mask)
        except RuntimeError as error:
            assert "bert_fast" in str(error)  # noqa: PT017
    if found is not None:
        assert_near(found, expected, 1e-4)


# ---- what swapping leaves alone --------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, tuple[type, list[str]]]:
    """Class and attributes of every module."""
    return {name: (type(module), list(vars(module))) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", ["BertModel", *HEADS, "BertLMHeadModel"])
def test_restore(name: str) -> None:
    model: Any = bert_fast.restore(pair(name)[1])
    labelled = batch_for(name) | LABELS.get(name, {})
    before, output = snapshot(model), model(**labelled)
    assert bert_fast.swap(model) is model
    assert any(isinstance(module, Swapped) for module in model.modules())
    model(**labelled)
    assert bert_fast.restore(model) is model
    assert snapshot(model) == before
    assert_identical(model(**labelled), output)
    assert bert_fast.report(model).encoders == ()
    assert "nothing is swapped" in str(bert_fast.report(model))


@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining"])
def test_state_dict(name: str) -> None:
    model = theirs(name)
    state = model.state_dict(keep_vars=True)
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    buffers = list(model.named_buffers())

    def assert_untouched() -> None:
        now = model.state_dict(keep_vars=True)
        assert list(now) == list(state)
        assert all(value is state[key] for key, value in now.items())
        for found, expected in (
            (list(model.named_modules()), modules),
            (list(model.named_parameters()), parameters),
            (list(model.named_buffers()), buffers),
        ):
            assert [key for key, _ in found] == [key for key, _ in expected]
            assert all(one is other for (_, one), (_, other) in zip(found, expected, strict=True))

    values = {key: value.clone() for key, value in state.items()}
    bert_fast.swap(model)
    assert_untouched()
    model(**inputs(mask_of(MIXED)))
    assert_untouched()
    bert_fast.restore(model)
    assert_untouched()
    assert all(torch.equal(value, values[key]) for key, value in state.items())


def test_same_class_to_the_eye() -> None:
    for name in ("BertModel", "BertForMaskedLM"):
        model = theirs(name)
        base = type(model)
        before = (repr(model), inspect.signature(model.forward), model.forward.__doc__)
        bert_fast.swap(model)
        assert (repr(model), inspect.signature(model.forward), model.forward.__doc__) == before
        assert isinstance(model, base)
        assert (type(model).__name__, type(model).__module__) == (base.__name__, base.__module__)
        assert type(model).__doc__ == base.__doc__


def test_idempotent() -> None:
    model = theirs("BertForMaskedLM")
    bert_fast.swap(model)
    model(**inputs(mask_of(MIXED)))
    before = snapshot(model)
    assert bert_fast.swap(model) is model
    assert snapshot(model) == before
    assert calls(model) == {"fast": 1}
    bert_fast.restore(bert_fast.restore(model))
    assert not any(isinstance(module, Swapped) for module in model.modules())


def test_swapped_in_parts() -> None:
    model = theirs("BertForMaskedLM")
    expected = model(**inputs(mask_of(MIXED)), **LABELS["BertForMaskedLM"]).loss
    bert_fast.swap(model.bert)
    bert_fast.swap(model)
    assert_near(model(**inputs(mask_of(MIXED)), **LABELS["BertForMaskedLM"]).loss, expected)


def test_training_mode_stays() -> None:
    model = theirs("BertModel")
    model.train()
    model.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    bert_fast.swap(model)
    assert [module.training for module in model.modules()] == modes
    bert_fast.restore(model)
    assert [module.training for module in model.modules()] == modes


def test_two_encoders() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.text = theirs("BertModel", seed=1), theirs("BertForMaskedLM", seed=2)

        def forward(self, **batch: Tensor) -> Any:
            return self.query(**batch)[0], self.text(**batch)[0]

    towers = Towers()
    mask = mask_of(MIXED)
    expected = towers(**inputs(mask))
    bert_fast.swap(towers)
    assert_same_output(towers(**inputs(mask)), expected, mask)
    assert [encoder.name for encoder in bert_fast.report(towers).encoders] == ["query", "text.bert"]
    bert_fast.restore(towers)
    assert type(towers.query) is transformers.BertModel


def test_load_state_dict() -> None:
    other = theirs("BertModel", seed=9)
    _, swapped = pair()
    mask = mask_of(MIXED)
    before = swapped(**inputs(mask))[0]
    swapped.load_state_dict(other.state_dict())
    assert_same_output(swapped(**inputs(mask)), other(**inputs(mask)), mask)
    assert magnitude(swapped(**inputs(mask))[0] - before) > 0.1


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification"])
def test_copies(name: str, way: str, tmp_path: Path) -> None:
    model, swapped = pair(name)
    batch = inputs(mask_of(MIXED)) | LABELS.get(name, {})
    expected = swapped(**batch)
    if way == "deepcopy":
        twin = copy.deepcopy(swapped)
    elif way == "copy":
        twin = copy.copy(swapped)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(swapped))
    else:
        torch.save(swapped, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(twin) is type(swapped)
    assert_identical(twin(**batch), expected)
    assert twin is not swapped
    if way != "copy":
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert_identical(swapped(**batch), expected)
    assert type(bert_fast.restore(twin)) is type(model)
    assert type(swapped) is not type(model)


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_save_pretrained(name: str, tmp_path: Path) -> None:
    model, swapped = pair(name)
    model.save_pretrained(tmp_path / "model")
    swapped.save_pretrained(tmp_path / "swapped")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "swapped" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    assert swapped.config.architectures == [name]
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "swapped").eval()
    assert type(loaded) is type(model)
    mask = mask_of(MIXED)
    assert_identical(loaded(**inputs(mask)), model(**inputs(mask)))
    again = type(swapped).from_pretrained(tmp_path / "swapped").eval()
    assert_same_output(again(**inputs(mask)), model(**inputs(mask)), mask)


def test_resized_vocabulary() -> None:
    model, swapped = pair("BertForMaskedLM")
    mask = mask_of(MIXED)
    for each in (model, swapped):
        each.resize_token_embeddings(103, mean_resizing=False)
        randomise(each, seed=4)
    batch = inputs(mask)
    batch["input_ids"][0, :6] = torch.arange(97, 103)
    labels = LABELS["BertForMaskedLM"]["labels"] + 6 * (LABELS["BertForMaskedLM"]["labels"] > 0)
    expected, found = model(**batch, labels=labels), swapped(**batch, labels=labels)
    assert found.logits.shape == (8, 13, 103)
    assert_near(found.loss, expected.loss)
    assert_near(found.logits[mask], expected.logits[mask])


def test_two_threads() -> None:
    # Each call's labels keep their own rows.
    model, swapped = pair("BertForMaskedLM")
    mask = mask_of(MIXED)
    batches = []
    for seed in (1, 2):
        labels = torch.randint(97, (8, 13), generator=torch.Generator().manual_seed(seed))
        hidden = torch.rand(8, 13, generator=torch.Generator().manual_seed(seed + 7)) < 0.5
        batches.append(inputs(mask.flip(seed - 1), seed) | {"labels": labels.masked_fill(hidden, -100)})
    expected = [model(**batch).loss for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(lambda batch: swapped(**batch).loss, batches[i % 2]) for i in range(40)]
        losses = [run.result() for run in runs]
    for i, loss in enumerate(losses):
        assert_near(loss, expected[i % 2])
    assert set(calls(swapped)) == {"fast"}


# ---- what is refused -------------------------------------------------------------------------------------------------


class OwnForward(transformers.BertModel):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output


class OwnName(transformers.BertModel):  # type: ignore[misc]
    """A subclass that keeps the forward."""


class OwnMasks(transformers.BertModel):  # type: ignore[misc]
    """A subclass that keeps the forward, and changes a step of it."""

    def _create_attention_masks(self, attention_mask: Any, **kwargs: Any) -> Any:
        del attention_mask
        return super()._create_attention_masks(attention_mask=None, **kwargs)


class OwnHead(transformers.BertForMaskedLM):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_subclass() -> None:
    model = theirs("BertModel")
    model.__class__ = OwnName
    mask = mask_of(MIXED)
    expected = model(**inputs(mask))
    bert_fast.swap(model)
    assert type(model).__name__ == "OwnName"
    assert_same_output(model(**inputs(mask)), expected, mask)
    assert calls(model) == {"fast": 1}
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
    assert type(bert_fast.restore(model)) is OwnName


def test_subclass_with_own_step() -> None:
    # Refused, left to the original path, or served right.
    model = theirs("BertModel")
    model.__class__ = OwnMasks
    mask = mask_of(MIXED)
    expected = model(**inputs(mask))
    found = None
    with any_path():
        try:
            found = bert_fast.swap(model)(**inputs(mask))
        except ValueError as error:
            assert "OwnMasks" in str(error)  # noqa: PT017
    if found is not None:
        assert_same_output(found, expected, mask)


def test_subclass_with_own_forward() -> None:
    model = theirs("BertModel")
    model.__class__ = OwnForward
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"OwnForward.*BERT.*BertModel"):
        bert_fast.swap(model)
    assert snapshot(model) == before


def test_encoder_with_own_forward_in_a_head() -> None:
    model = theirs("BertForMaskedLM")
    model.bert.__class__ = OwnForward
    before = snapshot(model)
    with pytest.raises(ValueError, match="BertForMaskedLM"):
        bert_fast.swap(model)
    assert snapshot(model) == before


def test_head_with_own_forward() -> None:
    model = theirs("BertForMaskedLM")
    model.__class__ = OwnHead
    mask = mask_of(MIXED)
    expected = model(**inputs(mask))
    bert_fast.swap(model)
    assert type(model) is OwnHead
    assert_same_output(model(**inputs(mask)), expected, mask)
    assert calls(model) == {"fast": 1}


@pytest.mark.parametrize("model", [nn.Linear(2, 3), nn.TransformerDecoderLayer(4, 2)])
def test_unknown_model(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"{type(model).__name__}.*transformers\.models\.bert.*BertModel"):
        bert_fast.swap(model)


@pytest.mark.parametrize("model", [None, "bert-base-uncased", {"weight": torch.ones(2)}, transformers.BertModel])
def test_no_module(model: Any) -> None:
    with pytest.raises(TypeError, match=f"model is {type(model).__name__};"):
        bert_fast.swap(model)


@pytest.mark.parametrize("name", ["", "bert"])
def test_forward_on_the_instance(name: str) -> None:
    model = theirs("BertForMaskedLM")
    wrapped = model.get_submodule(name)
    inner = wrapped.forward
    wrapped.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{type(wrapped).__name__} has a forward of its own on the instance"):
        bert_fast.swap(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("value", ["off", "OFF"])
def test_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERT_FAST", value)
    model = theirs("BertModel")
    before = snapshot(model)
    with pytest.warns(UserWarning, match="BERT_FAST=off") as caught:
        assert bert_fast.swap(model) is model
    assert [Path(warning.filename).name for warning in caught] == ["test_swap.py"]
    assert snapshot(model) == before
    assert "BERT_FAST=off" in str(bert_fast.report(model))


@pytest.mark.parametrize("value", ["", "on", "0"])
def test_not_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERT_FAST", value)
    assert bert_fast.report(pair()[1]).encoders[0].class_name == "BertModel"


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "path"), [(torch.float32, "cpp"), (torch.bfloat16, "torch"), (torch.float64, "torch")]
)
def test_report(dtype: torch.dtype, path: str) -> None:
    _, swapped = pair("BertForMaskedLM")
    swapped.to(dtype)
    report = bert_fast.report(swapped)
    (encoder,) = report.encoders
    assert (encoder.name, encoder.class_name, encoder.calls) == ("bert", "BertModel", {})
    paths = {part.name: part.path for part in encoder.parts}
    assert {name: paths[name] for name in ("attention", "layer_norm", "gelu")} == dict.fromkeys(
        ("attention", "layer_norm", "gelu"), path
    )
    assert all(part.reason for part in encoder.parts)
    swapped(**inputs(mask_of(MIXED)))
    assert bert_fast.report(swapped).encoders[0].calls == {"fast": 1}
    text = str(bert_fast.report(swapped))
    assert "bert: BertModel" in text
    assert "1 call: fast path" in text


# ---- sentence-transformers -------------------------------------------------------------------------------------------


def test_sentence_transformer() -> None:
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = SentenceTransformer(str(minilm()), device="cpu")
    options = {"batch_size": 7, "convert_to_tensor": True, "show_progress_bar": False}
    expected = model.encode(TEXTS, **options)
    assert bert_fast.swap(model) is model
    found = model.encode(TEXTS, **options)
    assert calls(model) == {"fast": 3}
    assert float((found - expected).abs().max()) <= 1e-6
    assert float(torch.cosine_similarity(found, expected).min()) >= 0.999999
    assert float(torch.cosine_similarity(found[:1], found[1:2])) < 0.99
    bert_fast.restore(model)
    assert torch.equal(model.encode(TEXTS, **options), expected)


@pytest.mark.parametrize("by", ["input_ids", "inputs_embeds"])
def test_words_under_the_mask(by: str) -> None:
    """They are computed as the original does, whether they come as ids or as embeddings; padding is zeros."""
    model = theirs("BertModel")
    mask = mask_of(MIXED)
    words = inputs(mask, padding=None)
    padded = {**words, "input_ids": words["input_ids"].masked_fill(~mask & (torch.arange(13) > 8), 0)}
    batch = dict(padded)
    if by == "inputs_embeds":
        batch["inputs_embeds"] = model.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    expected = model(**batch)[0]
    swapped = bert_fast.swap(model)
    has_key = mask.any(1)[:, None]
    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            found = swapped(**batch)[0]
        is_read = (mask | (padded["input_ids"] != 0)) & has_key
        assert_near(found[is_read], expected[is_read])
        assert not found[~mask & (padded["input_ids"] == 0) & (torch.arange(13) > 0)].any()
    assert calls(swapped) == {"fast": 2}
