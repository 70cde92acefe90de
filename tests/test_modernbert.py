"""ModernBERT: windows, rotary positions, gates and its heads' ways to pool, against the original model and float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from models import (
    WHOLE,
    any_path,
    assert_near,
    assert_same_gradients,
    gradients,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
)
from test_families import RIGHT, batch_for, build, pair
from test_swap import assert_identical, assert_same_output, calls, checkpointed
from tolerance import assert_twice_torch, error, threads
from torch import Tensor, nn

import bert_fast
from bert_fast import engine, ops
from bert_fast.swap.family import Family

NAME = "ModernBertModel"
FULL, SLIDING = "full_attention", "sliding_attention"
THETA: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0}

# Texts without an empty one, of which a mean is no number.
TEXTS = """
    1111111111111
    1111111000000
    1111100000000
    1000000000000
"""
LEFT = "0001111111111\n1111111111111\n0000000000001\n0000011111000"
HOLES = "1101100111010\n1111111111111\n1111111000000\n1111000000001"


def rotary(kind: str, *layers: str, **settings: Any) -> dict[str, Any]:
    """A configuration whose rotary positions are of this kind in these kinds of layers."""
    other = {"rope_type": kind, "rope_theta": 50.0, **settings}
    return {"rope_parameters": {layer: dict(other if layer in layers else THETA) for layer in (FULL, SLIDING)}}


YARN = {"factor": 4.625, "original_max_position_embeddings": 8}
LLAMA = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True}

# Windows reach local_attention // 2 to either side; texts have up to 13 tokens.
SETTINGS: dict[str, dict[str, Any]] = {
    "a window of the token itself": {"local_attention": 1},
    "the narrowest window": {"local_attention": 2},
    "a window of an odd number": {"local_attention": 9},
    "a window that reaches all but the farthest": {"local_attention": 22},
    "a window as wide as texts": {"local_attention": 24},
    "a window wider than texts": {"local_attention": 128},
    "all local": {"layer_types": [SLIDING] * 4},
    "all global": {"layer_types": [FULL] * 4},
    "local first": {"layer_types": [SLIDING, FULL, FULL, SLIDING]},
    "every layer global": {"global_attn_every_n_layers": 1},
    "every second layer global": {"global_attn_every_n_layers": 2},
    "the first layer global": {"global_attn_every_n_layers": 4},
    "other angles": rotary("default", FULL),
    "linear in global layers": rotary("linear", FULL, factor=3.0),
    "linear in local layers": rotary("linear", SLIDING, factor=0.5),
    "yarn": rotary("yarn", FULL, SLIDING, **YARN),
    "llama3": rotary("llama3", FULL, SLIDING, **LLAMA),
    "dynamic where no layer is": {**rotary("dynamic", SLIDING, factor=2.0), "layer_types": [FULL] * 4},
    "norm_bias": {"norm_bias": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all biases": BIASES,
    "gelu_new": {"hidden_activation": "gelu_new", **BIASES},
    "relu": {"hidden_activation": "relu"},
    "silu": {"hidden_activation": "silu", **BIASES},
    "one head": {"num_attention_heads": 1},
    "one layer": {"num_hidden_layers": 1},
    "eager": {"attn_implementation": "eager"},
}


def texts_of(*lengths: int) -> dict[str, Tensor]:
    """Padded right."""
    batch = inputs(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


# Several tiles of queries, and of keys that lie beyond every window.
LONG = texts_of(150, 233, 1, 17, 300)


def weighed(model: Any, batch: dict[str, Any]) -> Tensor:
    """A loss of the hidden states at tokens."""
    mask = batch["attention_mask"] != 0
    hidden: Tensor = model(**batch)[0][mask]
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))).sum()


def warns(match: str | None) -> AbstractContextManager[Any]:
    """That the original path is taken; None: the fast one."""
    return nullcontext() if match is None else pytest.warns(UserWarning, match=match)


def assert_same_answers(pair: tuple[Any, Any], batch: dict[str, Any], match: str | None = None) -> None:
    """With gradients and without, which goes through the engine; by the original path, with this warning, if any."""
    model, swapped = pair
    with warns(match):
        for has_grad in (True, False):
            with torch.set_grad_enabled(has_grad):
                assert_same_output(swapped(**batch), model(**batch), batch["attention_mask"] != 0)
    assert (calls(swapped) == {"fast": 2}) is (match is None)


def layers_path(swapped: Any) -> str:
    (encoder,) = bert_fast.report(swapped).encoders
    (path,) = [part.path for part in encoder.parts if part.name == "layers"]
    return path


# ---- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    """Answers and every gradient; without dropout training is no other."""
    model, swapped = pair(NAME, **SETTINGS[name])
    batch = batch_for(NAME, TEXTS)
    assert_same_answers((model, swapped), batch)
    assert layers_path(swapped) == ("torch" if name == "silu" else "cpp")
    found, expected = (gradients(each.train(), weighed(each, batch)) for each in (swapped, model))
    assert_same_gradients(found, expected)
    assert len(found) == len(list(model.parameters()))
    assert calls(swapped) == {"fast": 3}


def test_settings_matter() -> None:
    """Each but the name of a kernel changes the answer: a path that overlooked one would be found out."""
    batch = batch_for(NAME, TEXTS)
    states = {name: build(NAME, **setting)(**batch)[0][mask_of(TEXTS)] for name, setting in SETTINGS.items()}
    plain = build(NAME)(**batch)[0][mask_of(TEXTS)].double()
    same = [name for name, state in states.items() if error(state, plain) < 0.01]
    assert same == ["eager"]


@pytest.mark.parametrize("layers", [(FULL,), (SLIDING,), (FULL, SLIDING)], ids=["global", "local", "both"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dynamic", {"factor": 2.0}),
        (
            "longrope",
            {
                "factor": 4.625,
                "original_max_position_embeddings": 8,
                "short_factor": [1.0] * 9,
                "long_factor": [1.0 + i for i in range(9)],
            },
        ),
    ],
)
def test_angles_that_depend_on_the_padding(kind: str, settings: dict[str, Any], layers: tuple[str, ...]) -> None:
    """Texts of 13 and of 40 columns, more and fewer than the table of angles was made for."""
    pair_ = pair(NAME, **rotary(kind, *layers, **settings))
    assert_same_answers(pair_, batch_for(NAME, TEXTS), f"rotary positions of type '{kind}'")
    model, swapped = pair_
    for batch in (texts_of(40, 7), texts_of(5, 3)):
        assert_identical(swapped(**batch), model(**batch))
    assert "fast" not in calls(swapped)


def test_a_window_that_changes() -> None:
    """transformers reads it from the configuration at every call, and so do we."""
    model, swapped = pair(NAME)
    batch = batch_for(NAME, TEXTS)
    before = swapped(**batch)[0]
    for each in (model, swapped):
        each.config.local_attention = 2
    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            found = swapped(**batch)
            assert_same_output(found, model(**batch), mask_of(TEXTS))
    assert error(found[0], before.double()) > 0.1


# ---- long texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local_attention", [16, 128])
def test_long_texts(local_attention: int) -> None:
    """Every gradient, too, beside torch's in the same precision."""
    model, swapped = pair(NAME, local_attention=local_attention, **BIASES)
    exact = copy.deepcopy(model).double()
    mask = LONG["attention_mask"] != 0
    truth = exact(**LONG)[0][mask]
    with torch.no_grad():
        assert_twice_torch("hidden state", swapped(**LONG)[0][mask], model(**LONG)[0][mask], truth)
    ours, torchs, oracle = (gradients(each, weighed(each, LONG)) for each in (swapped, model, exact))
    assert ours.keys() == torchs.keys() == oracle.keys()
    for name, gradient in oracle.items():
        assert_twice_torch(name, ours[name], torchs[name], gradient)
    assert calls(swapped) == {"fast": 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, swapped = (each.to(dtype) for each in pair(NAME, local_attention=16))
    batch = texts_of(90, 41)
    mask = batch["attention_mask"] != 0
    expected = model(**batch)[0][mask]
    exact = copy.deepcopy(model).double()(**batch)[0][mask]
    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            assert_twice_torch("hidden state", swapped(**batch)[0][mask], expected, exact)
    assert calls(swapped) == {"fast": 2}


@pytest.mark.parametrize("options", [{}, {"int8": True}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("name", [NAME, "ModernBertForSequenceClassification"])
def test_whatever_the_threads(name: str, options: dict[str, bool]) -> None:
    """Bit by bit; few rows, whose columns are shared out, and many."""
    model = build(name, local_attention=16)
    if name != NAME:  # what is torch's own
        model.head = model.classifier = nn.Identity()
    swapped = bert_fast.swap(copy.deepcopy(model), **options)  # type: ignore[arg-type]
    for batch in (LONG, texts_of(3, 1), texts_of(1), texts_of(17, 11)):
        with torch.no_grad():
            expected = swapped(**batch)[0]
            if not options:
                assert_same_output(swapped(**batch), model(**batch), batch["attention_mask"] != 0)
            for count in (2, 4):
                with threads(count):
                    assert torch.equal(swapped(**batch)[0], expected), count


def test_whatever_the_batch() -> None:
    """Every text alone is bit by bit what it is in the batch; as a classifier reads it, too."""
    swapped = bert_fast.swap(build(NAME, local_attention=16))
    classifier = bert_fast.swap(build("ModernBertForSequenceClassification", local_attention=16))
    with torch.no_grad():
        together, logits = swapped(**LONG)[0], classifier(**LONG)[0]
        for row, length in enumerate(LONG["attention_mask"].sum(1).tolist()):
            ids = LONG["input_ids"][row : row + 1, :length]
            assert torch.equal(swapped(ids)[0][0], together[row, :length])
            assert_near(classifier(ids)[0][0], logits[row])
    assert layers_path(swapped) == "cpp"


def test_through_triton() -> None:
    pytest.importorskip("triton")
    model, swapped = pair(NAME, num_hidden_layers=2, **BIASES)
    batch = batch_for(NAME, "1111111000000\n1111111111111\n1000000000000\n")
    with ops.forced_path("triton"):
        found = gradients(swapped, weighed(swapped, batch))
        with torch.no_grad():
            assert_same_output(swapped(**batch), model(**batch), batch["attention_mask"] != 0)
    assert_same_gradients(found, gradients(model, weighed(model, batch)))
    assert calls(swapped) == {"fast": 2}


def test_replayed() -> None:
    """Where graphs are wanted: their positions are whole numbers of 32 bits, and others must not be cut to fit."""
    pytest.importorskip("triton")
    from test_graphs import call_again

    model, swapped = pair(NAME, num_hidden_layers=2)
    bert_fast.swap(swapped, cuda_graphs=True).bert_fast_graphs.capture = call_again
    batch: dict[str, Any] = batch_for(NAME, "1111111000000\n1111100000000\n")
    columns = torch.arange(13)[None]
    for positions in (None, columns * 3 + 7, columns * 0.5, columns * 2**30):
        batch["position_ids"] = positions
        with ops.forced_path("triton"), torch.no_grad():
            assert_same_output(swapped(**batch), model(**batch), batch["attention_mask"] != 0)
    assert len(swapped.bert_fast_graphs) == 1


def test_compiled() -> None:
    """Whether tokens are side by side is not known to a graph: with a mask the original is compiled."""
    model, swapped = pair(NAME, num_hidden_layers=2)
    compiled: Any = torch.compile(swapped, fullgraph=True, dynamic=True, backend="eager")
    for length in (13, 29):
        ids = texts_of(length, length)["input_ids"]
        assert_near(compiled(ids)[0], model(ids)[0])
    batch = batch_for(NAME, TEXTS)
    compiled = torch.compile(swapped, backend="eager")
    with any_path():
        assert_same_output(compiled(**batch), model(**batch), mask_of(TEXTS))


# ---- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "match"),
    [(TEXTS, None), (LEFT, None), (RIGHT, None), (HOLES, "side by side")],
    ids=["right", "left", "an empty text", "holes"],
)
@pytest.mark.parametrize("source", ["ids", "embeds", "positions", "positions of rows", "positions between"])
def test_calls(source: str, rows: str, match: str | None) -> None:
    """Nothing but holes keeps the encoder alone from packing; given positions may lie anywhere, between numbers too."""
    mask = mask_of(rows)
    batch: dict[str, Any] = batch_for(NAME, rows)
    generator = torch.Generator().manual_seed(4)
    if source == "embeds":
        del batch["input_ids"]
        batch["inputs_embeds"] = torch.randn(*mask.shape, 54, generator=generator) * mask[..., None]
    elif source == "positions":
        batch["position_ids"] = torch.arange(13)[None] * 3 + 100
    elif source == "positions of rows":
        batch["position_ids"] = torch.randint(0, 1000, mask.shape, generator=generator)
    elif source == "positions between":
        batch["position_ids"] = 40 * torch.rand(mask.shape, generator=generator)
    assert_same_answers(pair(NAME), batch, match)


def test_the_gradient_of_embeddings() -> None:
    model, swapped = pair(NAME)
    embeds = torch.randn(4, 13, 54, generator=torch.Generator().manual_seed(4))
    found, expected = (
        torch.autograd.grad(weighed(each, {"inputs_embeds": x, "attention_mask": mask_of(TEXTS)}), x)[0]
        for each, x in ((each, embeds.clone().requires_grad_()) for each in (swapped, model))
    )
    assert_near(found, expected)
    assert not found[~mask_of(TEXTS)].any()
    assert calls(swapped) == {"fast": 1}


@pytest.mark.parametrize("local_attention", [2, 6])
@pytest.mark.parametrize(
    ("column", "implementation", "match"),
    [(8, "sdpa", None), (8, "eager", "side by side"), (12, "sdpa", "side by side")],
    ids=["behind the text", "eager", "away from the text"],
)
def test_labels_of_hidden_tokens(column: int, implementation: str, match: str | None, local_attention: int) -> None:
    """They are computed behind the text; the narrower window leaves the second no key, of which eager makes a mean."""
    model, swapped = pair("ModernBertForMaskedLM", attn_implementation=implementation, local_attention=local_attention)
    batch = batch_for(NAME, "1111111111111\n1111111000000")
    labels = torch.full((2, 13), -100)
    labels[0, 3], labels[1, 7 : column + 1] = 5, 9
    if column == 12:
        labels[1, 7:12] = -100
    with warns(match):
        found = swapped(**batch, labels=labels).loss
    assert_same_gradients(gradients(swapped, found), gradients(model, model(**batch, labels=labels).loss))
    with torch.no_grad():
        assert_near(swapped(**batch, labels=labels).loss, found.detach())
    assert (calls(swapped) == {"fast": 2}) is (match is None)


# ---- heads -----------------------------------------------------------------------------------------------------------

CLASSIFIERS = ("ModernBertForSequenceClassification", "ModernBertForMultipleChoice")


@pytest.mark.parametrize("rows", [TEXTS, WHOLE, LEFT, HOLES], ids=["right", "whole", "left", "holes"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_pooling(name: str, pooling: str, rows: str) -> None:
    """Only multiple choice looks for the first token where texts are padded left."""
    config: dict[str, Any] = {"classifier_pooling": pooling, "classifier_bias": True, "norm_bias": True}
    model, swapped = pair(name, **config, classifier_activation="silu")
    batch = batch_for(name, rows)
    labels = torch.tensor([0, 2, 1, 1]) if name == CLASSIFIERS[0] else torch.tensor([1, 0])
    reads_hidden_rows = pooling == "cls" and rows == LEFT and name == CLASSIFIERS[0]
    with warns("side by side" if rows == HOLES or reads_hidden_rows else None):
        found, expected = (each(**batch, labels=labels) for each in (swapped, model))
    assert_near(found.logits, expected.logits)
    assert_same_gradients(gradients(swapped, found.loss), gradients(model, expected.loss))
    with torch.no_grad():
        assert_near(swapped(**batch).logits, expected.logits)
    assert (calls(swapped) == {"fast": 2}) is not (rows == HOLES or reads_hidden_rows)


@pytest.mark.parametrize("number", [-100, -1])
def test_sparse_prediction(number: int) -> None:
    """The head computes the rows with labels alone, those at hidden places among them."""
    model, swapped = pair("ModernBertForMaskedLM", sparse_prediction=True, sparse_pred_ignore_index=number)
    batch = batch_for(NAME, TEXTS)
    labels = torch.randint(97, (4, 13), generator=torch.Generator().manual_seed(5))
    labels = labels.masked_fill(torch.arange(13) % 3 > 0, number)
    labels[~mask_of(TEXTS)] = number
    labels[1, 7] = 3
    found, expected = (each(**batch, labels=labels) for each in (swapped, model))
    assert found.logits.shape == ((labels != number).sum(), 97)
    assert_near(found.logits, expected.logits)
    assert_near(found.loss, expected.loss)
    assert_same_gradients(gradients(swapped, found.loss), gradients(model, expected.loss))
    assert_near(swapped(**batch).logits[mask_of(TEXTS)], model(**batch).logits[mask_of(TEXTS)])
    assert calls(swapped) == {"fast": 2}


# ---- dropout ---------------------------------------------------------------------------------------------------------


def set_attention(model: Any, rate: float) -> None:
    model.layers[0].attn.attention_dropout = rate


def set_module(name: str) -> Callable[[Any, float], None]:
    def set_rate(model: Any, rate: float) -> None:
        model.get_submodule(name).p = rate

    return set_rate


# attention_dropout stands for two of them.
DROPOUTS: dict[str, Callable[[Any, float], None]] = {
    "probabilities": set_attention,
    "attention": set_module("layers.0.attn.out_drop"),
    "feed-forward": set_module("layers.0.mlp.drop"),
    "embeddings": set_module("embeddings.drop"),
}


@pytest.mark.parametrize("place", DROPOUTS)
def test_dropout_is_drawn(place: str) -> None:
    """Mean and spread over many draws are the original's; in evaluation nothing is dropped."""
    model, swapped = pair(NAME, num_hidden_layers=1, attention_dropout=0.1)
    batch = texts_of(*(5 for _ in range(2000)))
    batch["input_ids"] = batch["input_ids"][:1].expand(2000, 5)
    assert_same_output(swapped(**batch), model(**batch), batch["attention_mask"] != 0)
    assert layers_path(swapped) == "cpp"
    moments = []
    torch.manual_seed(0)
    for each in (model, swapped):
        for name, set_rate in DROPOUTS.items():
            set_rate(each, 0.4 if name == place else 0.0)
        states = each.train()(**batch)[0].detach()
        moments.append((states.mean(0), states.std(0)))
    (mean, spread), (our_mean, our_spread) = moments
    assert spread.median() > 0.05
    assert ((our_mean - mean).abs() < 5 * spread * (2 / 2000) ** 0.5 + 1e-5).all()
    assert ((our_spread - spread).abs() < 0.2 * spread + 1e-5).all()
    assert calls(swapped) == {"fast": 2}


class Fade(nn.Module):
    """What stands where dropout does, and does the same every time."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0.1, 1.7, x.shape[-1])


@pytest.mark.parametrize("name", ["embeddings.drop", "layers.1.attn.out_drop", "layers.2.mlp.drop"])
@pytest.mark.parametrize("is_all", [True, False])
def test_in_place_of_dropout(name: str, is_all: bool) -> None:
    """Also where everything is dropped."""
    model, swapped = pair(NAME, **BIASES)
    for each in (model, swapped):
        each.train().set_submodule(name, nn.Dropout(1.0) if is_all else Fade())
    batch = batch_for(NAME, TEXTS)
    assert_same_answers((model, swapped), batch)
    found, expected = (gradients(each, weighed(each, batch)) for each in (swapped, model))
    assert_same_gradients(found, expected)


# ---- changed models --------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """Around a linear map, as LoRA's."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        self.base = base
        self.down = nn.Parameter(torch.randn(3, base.in_features, generator=generator) / 3)
        self.up = nn.Parameter(torch.randn(base.out_features, 3, generator=generator) / 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return result


@pytest.mark.parametrize("name", ["layers.1.attn.Wqkv", "layers.2.mlp.Wi", "layers.0.attn.Wo", "layers.3.mlp.Wo"])
def test_adapters(name: str) -> None:
    """Put there after a call, which packed the weights; the adapter is called once for all its parts."""
    model, swapped = pair(NAME)
    batch = batch_for(NAME, TEXTS)
    with torch.no_grad():
        before = swapped(**batch)[0]
    for each in (model, swapped):
        each.set_submodule(name, Adapter(each.get_submodule(name)))
    found, expected = (gradients(each, weighed(each, batch)) for each in (swapped, model))
    assert_same_gradients(found, expected)
    assert f"{name}.up" in found
    with torch.no_grad():
        state = swapped(**batch)
        assert_same_output(state, model(**batch), mask_of(TEXTS))
    assert error(state[0], before.double()) > 0.1
    assert calls(swapped) == {"fast": 3}
    assert layers_path(swapped) == "torch"


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.tok_embeddings",
        "layers",
        "layers.1",
        "layers.1.attn",
        "layers.1.attn.Wqkv",
        "layers.0.attn_norm",
        "layers.2.mlp",
        "layers.2.mlp.Wi",
        "layers.2.mlp.act",
        "rotary_emb",
        "final_norm",
    ],
)
def test_hooks(name: str) -> None:
    """The original path, hooks called; and verify has its float64 all the same."""
    model, swapped = pair(NAME)
    batch = batch_for(NAME, TEXTS)
    swapped(**batch)
    seen = []
    swapped.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    with pytest.warns(UserWarning, match="has hooks"):
        assert_identical(swapped(**batch), model(**batch))
    assert seen or name == "layers"
    check, *_ = bert_fast.verify(swapped, batch).checks
    assert check.original_error < 1e-4


def test_gradient_checkpointing() -> None:
    model, swapped = pair(NAME)
    batch = batch_for(NAME, TEXTS)
    expected = gradients(model, weighed(model, batch))
    for each in (model, swapped):
        checkpointed(each)
    with pytest.warns(UserWarning, match="gradient checkpointing is on"):
        assert_same_gradients(gradients(swapped, weighed(swapped, batch)), expected)


def scale(model: Any) -> None:
    with torch.no_grad():
        model.layers[1].attn.Wqkv.weight.mul_(0.5)


def replace(model: Any) -> None:
    weight = model.layers[2].mlp.Wi.weight
    model.layers[2].mlp.Wi.weight = nn.Parameter(weight.detach().flip(0))


def replace_data(model: Any) -> None:
    model.layers[0].mlp.Wi.weight.data = 2 * model.layers[0].mlp.Wi.weight.data


def turn_faster(model: Any) -> None:
    model.rotary_emb.sliding_attention_inv_freq.mul_(3)


def lose_a_layer(model: Any) -> None:
    del model.layers[2]


def see_all(model: Any) -> None:
    model.layers[1].attention_type = FULL


def change_eps(model: Any) -> None:
    model.layers[3].mlp_norm.eps = 0.5


@pytest.mark.parametrize(
    "change", [scale, replace, replace_data, turn_faster, lose_a_layer, see_all, change_eps], ids=lambda x: x.__name__
)
def test_changes_are_seen(change: Callable[[Any], None]) -> None:
    """The engine packs parts of Wqkv and Wi."""
    model, swapped = pair(NAME)
    batch = batch_for(NAME, TEXTS)
    with torch.no_grad():
        before = swapped(**batch)[0]
        for each in (model, swapped):
            change(each)
        after = swapped(**batch)
        assert_same_output(after, model(**batch), mask_of(TEXTS))
    assert error(after[0], before.double()) > 1e-3
    assert calls(swapped) == {"fast": 2}


# ---- fewer bits, and verify ------------------------------------------------------------------------------------------


def test_int8_and_bf16() -> None:
    model, swapped = pair(NAME, local_attention=16, **BIASES)
    mask = LONG["attention_mask"] != 0
    names = [f"layers.{i}" for i in range(4)]
    with torch.no_grad():
        expected = model(**LONG)[0][mask]
        plain = swapped(**LONG)[0][mask]
        (check,) = bert_fast.verify(bert_fast.swap(swapped, int8=True), LONG).rounding_checks
        assert check.products == "int8"
        rounded = swapped(**LONG)[0][mask]
        assert error(rounded, expected.double()) > 1e-3
        # All that is split into parts, by the names of the whole.
        parts = [f"{name}.{part}" for name in names for part in ("attn.Wqkv", "mlp.Wi")]
        bert_fast.swap(swapped, int8=True, int8_exact=parts)
        partly = swapped(**LONG)[0][mask]
        assert error(partly, expected.double()) > 1e-3
        assert not torch.equal(partly, rounded)
        bert_fast.swap(swapped, int8=True, int8_exact=names)
        assert torch.equal(swapped(**LONG)[0][mask], plain)
        (check,) = bert_fast.verify(bert_fast.swap(swapped, bf16=True), LONG).rounding_checks
        assert check.products == "bfloat16"
    assert layers_path(swapped) == "cpp"


# In float64 transformers' eager formula has no number where a hidden token sees no key, nor where one sees that.
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "eager"])
def test_verify(name: str) -> None:
    """The float64 that decides is right, whatever the configuration: the original is near to it."""
    _, swapped = pair(NAME, **SETTINGS[name])
    checks = bert_fast.verify(swapped, batch_for(NAME, TEXTS)).checks
    assert len(checks) == 2
    assert all(0 < check.original_error < 1e-4 for check in checks)


def test_verify_in_float64() -> None:
    """Queries and keys are turned from float32 even there, as the original's are."""
    _, swapped = pair(NAME)
    checks = bert_fast.verify(swapped.double(), batch_for(NAME, TEXTS)).checks
    assert all(check.difference < 1e-12 for check in checks)


def test_verify_finds_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is one token too wide."""
    _, swapped = pair(NAME, local_attention=6)
    family: Family = type(swapped).bert_fast_family
    assert family.name == "ModernBERT"
    run = engine._own

    def wider(layer: Any) -> tuple[Any, ...]:
        *others, window, rotation = run(layer)
        return (*others, None if window is None else window + 1, rotation)

    monkeypatch.setattr(engine, "_own", wider)
    with pytest.raises(bert_fast.VerificationError):
        bert_fast.verify(swapped, batch_for(NAME, TEXTS))
