"""bert_fast.engine: encoder layers in one C++ call, against float64, and whatever batch, threads or weights."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from layer_arrays import ARRAY_NAMES
from models import (
    MIXED,
    WHOLE,
    any_path,
    assert_near,
    assert_same_gradients,
    gradients,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
    ours,
    theirs,
)
from tolerance import assert_twice_torch, threads
from torch import Tensor, nn

import bert_fast
from bert_fast import _C, BertConfig, engine, masking, ops, reference
from bert_fast.nn import EncoderLayerParts
from bert_fast.swap.core import original

# Head sizes from 1 to 128, widths at and beside those of the vectors, products in one, two and four slices.
SHAPES: dict[str, dict[str, Any]] = {
    "51 in 3 heads": {},
    "132 in 3 heads": {"hidden_size": 132, "intermediate_size": 131, "hidden_act": "gelu_new"},
    "128 in 2 heads": {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 390},
    "96 in 6 heads": {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 384, "num_hidden_layers": 1},
    "160 in 2 heads": {"hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 383},
    "128 in 1 head": {"hidden_size": 128, "num_attention_heads": 1, "intermediate_size": 33, "num_hidden_layers": 1},
    "64 in 2 heads": {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 1536, "num_hidden_layers": 3},
    "402 in 6 heads": {
        "hidden_size": 402,
        "num_attention_heads": 6,
        "intermediate_size": 769,
        "hidden_act": "gelu_new",
    },
    "7 in 7 heads": {"hidden_size": 7, "num_attention_heads": 7, "intermediate_size": 1},
}

LONG_LENGTHS = (1, 2, 127, 128, 129, 65, 200)
LONG = "\n".join(("1" * length).ljust(200, "0") for length in LONG_LENGTHS)
"""Texts at the edges of attention's tiles, more rows than fit into a block."""

FEW = "11111 11110 01011 00000"

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

LAYER = "encoder.layer.1"
ROOT = Path(__file__).resolve().parents[1]


def build(**config: Any) -> Any:
    return theirs("BertModel", **{"max_position_embeddings": 200, **config})


@pytest.fixture
def swapped() -> Any:
    return bert_fast.swap(build())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows with each encoder's call: whether it ran in the engine."""
    real, calls = engine.encode, []

    def encode(*args: Any, **keywords: Any) -> list[Tensor] | None:
        outputs = real(*args, **keywords)
        calls.append(outputs is not None)
        return outputs

    monkeypatch.setattr(engine, "encode", encode)
    return calls


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[engine.Stack]:
    """Grows each time that weights are packed."""
    real, stacks = engine._Packed, []

    def pack(stack: engine.Stack, state: list[Any]) -> Any:
        stacks.append(stack)
        return real(stack, state)

    monkeypatch.setattr(engine, "_Packed", pack)
    return stacks


def hidden_states(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(model(**batch, output_hidden_states=True).hidden_states)


def last_state(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return cast("Tensor", model(**batch)[0])


def oracle(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    weights = {name: value.double() for name, value in model.state_dict().items()}
    return reference.bert(weights, BertConfig.from_dict(model.config.to_dict()), **batch).hidden_states


# ---- the answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [MIXED, WHOLE, LONG], ids=["mixed", "whole", "long"])
@each_shape
def test_engine_hidden_states(shape: dict[str, Any], rows: str, served: list[bool]) -> None:
    model, mask = build(**shape), mask_of(rows)
    batch = inputs(mask)
    expected, exact = hidden_states(model, batch), oracle(model, batch)
    found = hidden_states(bert_fast.swap(model), batch)
    assert served == [True]
    assert len(found) == len(exact)
    for number, (x, torchs, truth) in enumerate(zip(found, expected, exact, strict=True)):
        assert_twice_torch(f"hidden state {number}", x[mask], torchs[mask], truth[mask])
        assert not x[~mask].any() or number == 0 or bool((~mask[:, 0]).any())
    assert torch.equal(last_state(model, batch), found[-1])


@pytest.mark.parametrize("rows", [FEW, MIXED, LONG], ids=["few", "mixed", "long"])
@each_shape
def test_engine_whatever_the_threads(shape: dict[str, Any], rows: str) -> None:
    """2 and 4 threads share out columns of few rows, and rows of many: the bits stay."""
    model, batch = bert_fast.swap(build(**shape)), inputs(mask_of(rows))
    expected = hidden_states(model, batch)
    for count in (2, 4):
        with threads(count):
            engine.forget(model)
            for x, y in zip(hidden_states(model, batch), expected, strict=True):
                assert torch.equal(x, y), count


@pytest.mark.parametrize("count", [1, 2, 4])
@each_shape
def test_engine_whatever_the_batch(shape: dict[str, Any], count: int) -> None:
    """Every text alone, one of a single token among them, and two beside others."""
    model, mask = bert_fast.swap(build(**shape)), mask_of(LONG)
    batch = inputs(mask)
    with threads(count):
        together = last_state(model, batch)
        for row, length in enumerate(LONG_LENGTHS):
            alone = last_state(model, {name: x[row : row + 1, :length] for name, x in batch.items()})
            assert torch.equal(alone[0], together[row, :length]), length
        few = last_state(model, {name: x[[1, 0]] for name, x in batch.items()})
        assert torch.equal(few[0, :2], together[1, :2])
        assert torch.equal(few[1, :1], together[0, :1])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_engine_kept_rows_are_queries_alone(count: int) -> None:
    """Also in the empty row, whose queries find no key."""
    source, mask = build(), mask_of(MIXED)
    keep = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    places = mask | keep
    batch = inputs(mask)
    model = ours(source)
    with torch.no_grad(), threads(count):
        found = model(**batch, keep=keep).last_hidden_state
        with ops.forced_path("torch"):
            torchs = model(**batch, keep=keep).last_hidden_state
    assert_twice_torch("hidden state", found[places], torchs[places], oracle(source, batch)[-1][places])


def test_engine_empty_batch(swapped: Any) -> None:
    empty = torch.zeros(0, 5, dtype=torch.int64)
    states = hidden_states(swapped, {"input_ids": empty, "attention_mask": empty})
    assert [tuple(x.shape) for x in states] == [(0, 5, 51)] * 3


def test_engine_no_tokens(served: list[bool]) -> None:
    model = build()
    model.pooler = None
    found = last_state(bert_fast.swap(model), inputs(torch.zeros(3, 5, dtype=torch.bool)))
    assert served == [False]
    assert torch.equal(found, torch.zeros(3, 5, 51))


# ---- the last layer on some rows -------------------------------------------------------------------------------------


class Encoding:
    """A model of ours on the mixed batch, called as it calls the engine."""

    def __init__(self, **config: Any) -> None:
        self.model = ours(build(**config))
        self.layers = cast("list[EncoderLayerParts]", list(self.model.layers))
        batch = inputs(mask_of(MIXED))
        self.batch = masking.unpad(batch["attention_mask"], ids=batch["input_ids"], keep_first=True)
        with torch.no_grad():
            self.hidden = self.model.embeddings(self.batch)

    def run(self, **options: Any) -> list[Tensor]:
        with torch.no_grad():
            outputs = engine.encode(self.model, engine.stack(self.layers), self.hidden, self.batch, **options)
        assert outputs is not None
        return outputs


ROWS = {
    "ascending": [0, 3, 11, 12, 40],
    "unsorted": [40, 3, 12, 0, 11],
    "repeated": [7, 3, 7, 7, 0, 3],
    "one": [47],
    "none": [],
    "all": list(range(48)),
    "more than there are": [*range(48), *range(40)],
}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("layers", [1, 2])
def test_engine_rows(layers: int, rows: list[int], count: int) -> None:
    encoding = Encoding(num_hidden_layers=layers)
    assert encoding.batch.total_tokens < len(ROWS["more than there are"])
    full = encoding.run(needs_all=True)
    chosen = torch.tensor(rows, dtype=torch.int64)
    with threads(count):
        (found,) = encoding.run(rows=chosen)
        *before, last = encoding.run(rows=chosen, needs_all=True)
    assert torch.equal(found, full[-1][chosen])
    assert torch.equal(last, found)
    assert len(before) == layers - 1
    assert all(torch.equal(x, y) for x, y in zip(before, full, strict=False))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("has_pooler", [True, False])
def test_engine_needs_kept_rows_only(has_pooler: bool, share: float, count: int, served: list[bool]) -> None:
    model = ours(build())
    if not has_pooler:
        model.pooler = None
    mask = mask_of(MIXED)
    keep = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) < share
    with torch.no_grad(), threads(count):
        full = model(**inputs(mask), keep=keep)
        some = model(**inputs(mask), keep=keep, needs_kept_rows_only=True)
    assert served == [True, True]
    assert some.rows.tolist() == full.batch.kept.tolist()
    assert torch.equal(some.packed, full.packed[full.batch.kept])
    assert (some.pooled is None) == (not has_pooler)
    assert not has_pooler or torch.equal(some.pooled, full.pooled)


# ---- weights that change ---------------------------------------------------------------------------------------------


def step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs(mask_of(FEW)))[0].square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def under_no_grad(model: Any) -> None:
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.weight[5, 3] = 9.0


def part(name: str) -> Callable[[Any], Any]:
    return lambda model: model.get_submodule(f"{LAYER}.{name}")


def scale_data(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        part(name)(model).weight.data.mul_(1.5)

    return change


def shift_bias(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        part(name)(model).bias.data.add_(0.5)

    return change


def other_memory(model: Any) -> None:
    weight = part("output.dense")(model).weight
    weight.data = weight.data.flip(0).contiguous()


def exchanged_memory(model: Any) -> None:
    query, key = part("attention.self.query")(model).weight, part("attention.self.value")(model).weight
    query.data, key.data = key.data, query.data


def numpy_write(model: Any) -> None:
    weight = part("intermediate.dense")(model).weight.detach().numpy()
    np.multiply(weight, 2, out=weight)


def other_parameter(model: Any) -> None:
    linear = part("attention.output.dense")(model)
    linear.weight = nn.Parameter(linear.weight.detach().flip(0))


def other_module(model: Any) -> None:
    part("output")(model).dense = nn.Linear(71, 51)


def other_layer(model: Any) -> None:
    model.encoder.layer[1] = copy.deepcopy(model.encoder.layer[0])


def other_eps(model: Any) -> None:
    part("output.LayerNorm")(model).eps = 0.3


def other_activation(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU("tanh")


def one_layer_less(model: Any) -> None:
    del model.encoder.layer[0]


def parametrised(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(part("attention.self.query")(model))
    part("attention.self.query")(model).parametrizations.weight.original0.data.mul_(2)


def pruned(model: Any) -> None:
    layer = part("intermediate")(model)
    output = part("output")(model)
    layer.dense = nn.Linear(51, 33)
    output.dense = nn.Linear(33, 51)


def without_bias(model: Any) -> None:
    part("attention.self.value")(model).bias = None


def narrower_memory(model: Any) -> None:
    first, last = part("intermediate.dense")(model), part("output.dense")(model)
    for linear, name, size in ((first, "weight", (33, 51)), (first, "bias", (33,)), (last, "weight", (51, 33))):
        parameter = getattr(linear, name)
        parameter.data = parameter.data[tuple(slice(n) for n in size)].contiguous()


def transposed_memory(model: Any) -> None:
    weight = part("attention.self.key")(model).weight
    weight.data = weight.data.clone().t()


LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")

CHANGES: dict[str, Callable[[Any], object]] = {
    "optimizer": step,
    "load_state_dict": lambda model: model.load_state_dict(theirs_state()),
    "load_state_dict, assigned": lambda model: model.load_state_dict(theirs_state(), assign=True),
    "one element under no_grad": under_no_grad,
    **{f"data of {name}": scale_data(name) for name in (*LINEARS, *NORMS)},
    **{f"bias of {name}": shift_bias(name) for name in (*LINEARS, *NORMS)},
    "other memory": other_memory,
    "exchanged memory": exchanged_memory,
    "through numpy": numpy_write,
    "other parameter": other_parameter,
    "other module": other_module,
    "other layer": other_layer,
    "other eps": other_eps,
    "other activation": other_activation,
    "one layer less": one_layer_less,
    "narrower": pruned,
    "narrower, in data": narrower_memory,
    "rounded to bfloat16": lambda model: model.bfloat16().float(),
    "no bias": without_bias,
    "transposed": transposed_memory,
    "parametrised": parametrised,
}

OUTSIDE = (
    "narrower",
    "narrower, in data",
    "transposed",
    "parametrised",
)  # what the engine leaves to the general path


def theirs_state() -> dict[str, Tensor]:
    return cast("dict[str, Tensor]", theirs("BertModel", seed=9, max_position_embeddings=200).state_dict())


@pytest.mark.parametrize("name", CHANGES)
def test_engine_sees_changed_weights(swapped: Any, name: str, served: list[bool]) -> None:
    mask = mask_of(MIXED)
    batch = inputs(mask)
    before = last_state(swapped, batch)
    CHANGES[name](swapped)
    served.clear()
    found = last_state(swapped, batch)
    assert served == [name not in OUTSIDE]
    assert not torch.equal(found, before)
    with original(swapped):
        assert_near(found[mask], last_state(swapped, batch)[mask])
    assert torch.equal(last_state(copy.deepcopy(swapped), batch), found)


def test_engine_packs_once(swapped: Any, packings: list[engine.Stack]) -> None:
    for rows in (MIXED, FEW, WHOLE):
        last_state(swapped, inputs(mask_of(rows)))
        swapped.train()
        swapped.eval()
    assert len(packings) == 1
    for each in swapped.modules():  # biases and norms are read where they are
        if isinstance(each, nn.Linear):
            each.bias.data.add_(1)
    last_state(swapped, inputs(mask_of(FEW)))
    assert len(packings) == 1
    engine.forget(swapped)
    last_state(swapped, inputs(mask_of(FEW)))
    assert len(packings) == 2


def test_engine_forget_is_for_writes_that_leave_no_trace(swapped: Any) -> None:
    batch = inputs(mask_of(MIXED))
    before = last_state(swapped, batch)
    part("output.dense")(swapped).weight.data[3, 5] = 7.0
    engine.forget(swapped)
    assert not torch.equal(last_state(swapped, batch), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_engine_dtypes_there_and_back(swapped: Any, dtype: torch.dtype, served: list[bool]) -> None:
    mask = mask_of(MIXED)
    batch = inputs(mask)
    before = last_state(swapped, batch)
    swapped.to(dtype)
    found = last_state(swapped, batch)
    assert found.dtype == dtype
    with original(swapped):
        assert_near(found[mask], last_state(swapped, batch)[mask], 8 * torch.finfo(dtype).eps)
    swapped.to(torch.float32)
    after = last_state(swapped, batch)
    assert torch.equal(after, before) == (dtype == torch.float64)
    assert served == [True, dtype != torch.float64, True]


def test_engine_weights_made_in_inference_mode(served: list[bool]) -> None:
    mask = mask_of(MIXED)
    with torch.inference_mode():
        model = build()
        weight = part("output.dense")(model).weight
        expected = last_state(model, inputs(mask))
        bert_fast.swap(model)
        assert weight.is_inference()
        assert_near(last_state(model, inputs(mask))[mask], expected[mask])
        weight.mul_(2)
        found = last_state(model, inputs(mask))
        with original(model):
            assert_near(found[mask], last_state(model, inputs(mask))[mask])
    assert served == [True, True]
    assert not torch.equal(found, expected)


def test_engine_in_inference_mode(swapped: Any) -> None:
    batch = inputs(mask_of(MIXED))
    expected = last_state(swapped, batch)
    with torch.inference_mode():
        found = swapped(**batch)[0]
    assert found.is_inference()
    assert torch.equal(found, expected)


# ---- what the engine leaves to the general path ----------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_engine_hooks_added_later(swapped: Any, name: str, kind: str) -> None:
    batch = inputs(mask_of(MIXED))
    before, heard = last_state(swapped, batch), []
    handle = getattr(part(name)(swapped), f"register_{kind}")(lambda *_: heard.append(name))
    with any_path():
        assert_near(last_state(swapped, batch)[0], before[0])
        swapped(**batch)[0].sum().backward()
    assert heard
    handle.remove()
    heard.clear()
    assert torch.equal(last_state(swapped, batch), before)
    assert not heard


@pytest.mark.parametrize("name", ["query", "attention_norm", "output"])
def test_engine_hooks_on_our_model(name: str, served: list[bool]) -> None:
    model, batch, heard = ours(build()), inputs(mask_of(MIXED)), []
    with torch.no_grad():
        before = model(**batch).packed
        getattr(model.layers[1], name).register_forward_hook(lambda *_: heard.append(name))
        assert_near(model(**batch).packed, before)
        assert served == [True, False]
        model.layers[0].register_forward_pre_hook(lambda *_: heard.append("layer"))
        assert_near(model(**batch).packed, before)
    assert sorted(set(heard)) == sorted({name, "layer"})


def test_engine_training_mode(served: list[bool]) -> None:
    model, batch = bert_fast.swap(build()), inputs(mask_of(MIXED))
    before = last_state(model, batch)
    model.train()
    once, again = last_state(model, batch), last_state(model, batch)
    assert not torch.equal(once, again)
    model.eval()
    assert torch.equal(last_state(model, batch), before)
    model.encoder.layer[0].output.dropout.train()
    assert not torch.equal(last_state(model, batch), before)
    assert served == [True, False, False, True, False]


def test_engine_training_mode_without_dropout(served: list[bool]) -> None:
    model = build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = inputs(mask_of(MIXED))
    before = last_state(bert_fast.swap(model), batch)
    model.train()
    assert torch.equal(last_state(model, batch), before)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert not torch.equal(last_state(model, batch), before)
    assert served == [True, True, False]


def test_engine_autocast(swapped: Any, served: list[bool]) -> None:
    mask = mask_of(MIXED)
    before = last_state(swapped, inputs(mask))
    with torch.autocast("cpu", torch.bfloat16):
        found = last_state(swapped, inputs(mask))
        with original(swapped):
            expected = last_state(swapped, inputs(mask))
    assert served == [True, False]
    assert found.dtype == expected.dtype
    assert_near(found[mask].float(), expected[mask].float(), 0.05)
    assert not torch.equal(found.float(), before)


def test_engine_gradients_after_a_call_without(swapped: Any, served: list[bool]) -> None:
    mask = mask_of(MIXED)
    weight = torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    last_state(swapped, inputs(mask))
    found = gradients(swapped, (swapped(**inputs(mask))[0] * weight).sum())
    assert served == [True, False]
    with original(swapped):
        expected = gradients(swapped, (swapped(**inputs(mask))[0] * weight).sum())
    assert_same_gradients(found, expected)


def test_engine_gradient_of_one_bias(swapped: Any, served: list[bool]) -> None:
    for parameter in swapped.parameters():
        parameter.requires_grad_(False)
    batch = inputs(mask_of(MIXED))
    assert not swapped(**batch)[0].requires_grad
    bias = part("attention.self.value")(swapped).bias.requires_grad_()
    swapped(**batch)[0].square().sum().backward()
    assert served == [True, False]
    assert float(bias.grad.abs().min()) > 0


def test_engine_gradient_of_inputs_alone(swapped: Any, served: list[bool]) -> None:
    for parameter in swapped.parameters():
        parameter.requires_grad_(False)
    embeds = torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mask = mask_of(MIXED)
    (grad,) = torch.autograd.grad(
        swapped(inputs_embeds=embeds, attention_mask=mask.long())[0][mask].square().sum(), embeds
    )
    assert served == [False]
    assert bool(grad[mask].abs().sum(-1).min() > 0)


# ---- the report ------------------------------------------------------------------------------------------------------


def part_of_report(model: Any) -> tuple[str, str]:
    (encoder,) = bert_fast.report(model).encoders
    found = next(each for each in encoder.parts if each.name == "layers")
    return found.path, found.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "dropout is on"),
        (lambda model: model.double(), "float64 on the CPU: the C++ kernels take float32"),
        (
            lambda model: part("output.dense")(model).register_forward_hook(print),
            "encoder.layer.1.output.dense has hooks",
        ),
        (parametrised, "layer 1 has a ParametrizedLinear that is hooked or not torch's own"),
        (pruned, "the layers are of several shapes"),
        (lambda model: setattr(part("intermediate")(model), "intermediate_act_fn", nn.SiLU()), "neither GELU nor"),
        (lambda model: setattr(part("intermediate")(model), "intermediate_act_fn", nn.GELU("tanh")), "several kinds"),
    ],
    ids=["training", "float64", "hook", "parametrised", "narrower", "silu", "two activations"],
)
def test_engine_report(swapped: Any, change: Callable[[Any], object], reason: str) -> None:
    expected = ("cpp", "without gradients all in one call, products in float32 on packed weights")
    assert part_of_report(swapped) == expected
    change(swapped)
    path, found = part_of_report(swapped)
    assert path == "torch"
    assert found.startswith("each part by itself, since ")
    assert reason in found
    batch = inputs(mask_of(MIXED))
    with any_path():
        assert torch.isfinite(last_state(swapped, batch)).all()


# ---- copies, threads and lives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_engine_copies(swapped: Any, way: Callable[[Any], Any], served: list[bool]) -> None:
    batch = inputs(mask_of(MIXED))
    before = last_state(swapped, batch)
    twin = way(swapped)
    assert torch.equal(last_state(twin, batch), before)
    scale_data("output.dense")(twin)
    assert not torch.equal(last_state(twin, batch), before)
    assert torch.equal(last_state(swapped, batch), before)
    assert served == [True] * 4


def test_engine_restore_and_swap_again(swapped: Any, served: list[bool]) -> None:
    mask = mask_of(MIXED)
    before = last_state(swapped, inputs(mask))
    bert_fast.restore(swapped)
    assert swapped not in engine._packed
    expected = last_state(swapped, inputs(mask))
    assert served == [True]
    assert_near(before[mask], expected[mask])
    assert torch.equal(last_state(bert_fast.swap(swapped), inputs(mask)), before)
    assert served == [True, True]


def test_engine_called_from_many_threads() -> None:
    """From the first call on, which packs the weights."""
    batches = [inputs(mask_of(rows), seed) for seed, rows in enumerate((MIXED, FEW, WHOLE, "1", LONG))]
    expected = [last_state(bert_fast.swap(build()), batch) for batch in batches]
    for _ in range(3):
        model = bert_fast.swap(build())
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(last_state, model, batches[i % 5]) for i in range(20)]
        assert all(torch.equal(run.result(), expected[i % 5]) for i, run in enumerate(runs))


@pytest.mark.parametrize("make", [lambda: bert_fast.swap(build()), lambda: ours(build())], ids=["swapped", "ours"])
def test_engine_keeps_no_model_alive(make: Callable[[], Any]) -> None:
    model = make()
    with torch.no_grad():
        model(**inputs(mask_of(FEW)))
    assert model in engine._packed
    gone = [weakref.ref(model), weakref.ref(engine._packed[model])]
    parameter = weakref.ref(next(p for name, p in model.named_parameters() if "query" in name))
    del model
    gc.collect()
    assert [each() for each in (*gone, parameter)] == [None] * 3


# ---- what is not finite ----------------------------------------------------------------------------------------------


@pytest.fixture(params=[float("nan"), float("inf"), float("-inf")], ids=str)
def bad(request: pytest.FixtureRequest) -> Iterator[float]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", LINEARS)
def test_engine_bad_weights_show(name: str, bad: float, count: int) -> None:
    model, mask = build(num_hidden_layers=1), mask_of(MIXED)
    model.get_submodule(f"encoder.layer.0.{name}").weight.data[7, 11] = bad
    expected = last_state(model, inputs(mask))[mask]
    assert not expected.isfinite().all()
    with threads(count):
        found = last_state(bert_fast.swap(model), inputs(mask))[mask]
    assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.parametrize("count", [1, 4])
def test_engine_bad_inputs_stay_in_their_text(swapped: Any, bad: float, count: int) -> None:
    mask = mask_of(MIXED)
    embeds = torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(2))
    with threads(count):
        clean = last_state(swapped, {"inputs_embeds": embeds, "attention_mask": mask.long()})
        embeds[3, 4, 5] = bad
        found = last_state(swapped, {"inputs_embeds": embeds, "attention_mask": mask.long()})
    others = torch.arange(8) != 3
    assert torch.equal(found[others], clean[others])
    assert found[3][mask[3]].isnan().all()


# ---- what the C++ module refuses -------------------------------------------------------------------------------------

HIDDEN, HEADS, INNER = 6, 2, 5
FLAGS = [False] * 7
GATED_NAMES = [*ARRAY_NAMES[:5], "gate", *ARRAY_NAMES[5:]]
SIZES = [(6, 6), (6,)] * 4 + [(5, 6), (5,)] * 2 + [(6, 5), (6,)] + [(6,)] * 4


def arrays(has_gate: bool = False) -> list[Any]:
    missing = () if has_gate else (10, 11)
    return [None if at in missing else np.full(size, 0.5, np.float32) for at, size in enumerate(SIZES)]


ARRAYS, GATED_ARRAYS = arrays(), arrays(has_gate=True)  # which must outlive the encoders


def make_encoder(layers: int = 1) -> _C.Encoder:
    encoder = _C.Encoder(HIDDEN, HEADS, INNER, "none", "float32")
    for _ in range(layers):
        encoder.add_layer(ARRAYS, 1e-5, 1e-5, FLAGS, [], 1)
    return encoder


@pytest.mark.parametrize("sizes", [(6, 4, 5), (0, 1, 5), (-6, 2, 5), (6, 0, 5), (6, -2, 5), (6, 2, 0), (6, 2, -1)])
def test_engine_sizes_are_checked(sizes: tuple[int, int, int]) -> None:
    message = rf"hidden_size is {sizes[0]}, num_heads {sizes[1]}, intermediate_size {sizes[2]};"
    with pytest.raises(ValueError, match=message):
        _C.Encoder(*sizes, "none", "float32")


def test_engine_activation_is_checked() -> None:
    with pytest.raises(ValueError, match=r"activation is .erf."):
        _C.Encoder(HIDDEN, HEADS, INNER, "erf", "float32")


@pytest.mark.parametrize("count", [0, 16, 17, 19])
def test_engine_number_of_arrays_is_checked(count: int) -> None:
    with pytest.raises(ValueError, match=f"arrays has {count} entries; 18 are needed"):
        make_encoder().add_layer((ARRAYS * 2)[:count], 1e-5, 1e-5, FLAGS, [], 1)


@pytest.mark.parametrize("index", range(18))
def test_engine_arrays_are_checked(index: int) -> None:
    encoder, name = _C.Encoder(HIDDEN, HEADS, INNER, "none", "float32", False, True), GATED_NAMES[index // 2]
    size = SIZES[index]
    for wrong, message in (
        (np.zeros((*size[:-1], size[-1] + 1), np.float32), rf"{name} has shape \(.*{size[-1] + 1},?\)"),
        (np.zeros((1, *size), np.float32), rf"{name} has shape \(1, "),
        (np.zeros(size, np.float64), f"{name} has dtype float64; float32 is needed"),
        (np.zeros((*size[:-1], 2 * size[-1]), np.float32)[..., ::2], f"{name} must be contiguous"),
    ):
        given = arrays(has_gate=True)
        given[index] = wrong
        with pytest.raises(ValueError, match=message):
            encoder.add_layer(given, 1e-5, 1e-5, FLAGS, [], 1)
    if index >= 14 or index % 2 == 0:
        given = arrays(has_gate=True)
        given[index] = None
        with pytest.raises(ValueError, match=f"{name} is None; an array is needed"):
            encoder.add_layer(given, 1e-5, 1e-5, FLAGS, [], 1)
    # A layer that was refused is not there.
    encoder.add_layer(GATED_ARRAYS, 1e-5, 1e-5, FLAGS, [], 1)
    encoder.run(**call())


@pytest.mark.parametrize(("rotation", "head_size"), [(-2, 2), (0, 3)])
def test_engine_rotation_is_checked(rotation: int, head_size: int) -> None:
    encoder = _C.Encoder(HIDDEN, HIDDEN // head_size, INNER, "none", "float32")
    with pytest.raises(ValueError, match=f"rotation is {rotation} and head_size {head_size}; -1 or, for an even"):
        encoder.add_layer(ARRAYS, 1e-5, 1e-5, FLAGS, [], 1, rotation=rotation)


def test_engine_rotations_are_checked() -> None:
    encoder = _C.Encoder(HIDDEN, 3, INNER, "none", "float32")
    encoder.add_layer(ARRAYS, 1e-5, 1e-5, FLAGS, [], 1, rotation=1)
    right = np.zeros((4, 1), np.float32)
    with pytest.raises(ValueError, match="rotations has 1 entries; the layers name 2"):
        encoder.run(**call(), rotations=[(right, right)])
    for wrong in (np.zeros((3, 1), np.float32), np.zeros((4, 2), np.float32), np.zeros(4, np.float32)):
        with pytest.raises(ValueError, match="rotations has shape"):
            encoder.run(**call(), rotations=[(right, right), (right, wrong)])
    encoder.run(**call(), rotations=[(right, right), (right, right)])


def test_engine_window_with_a_bias_is_refused() -> None:
    encoder = make_encoder(0)
    encoder.add_layer(ARRAYS, 1e-5, 1e-5, FLAGS, [], 1, window=3)
    with pytest.raises(ValueError, match="bias is given, but layers have windows"):
        encoder.run(**call(), bias=np.zeros((HEADS, 7), np.float32))


@pytest.mark.parametrize("count", [0, 6, 8])
def test_engine_number_of_flags_is_checked(count: int) -> None:
    with pytest.raises(TypeError):
        make_encoder().add_layer(ARRAYS, 1e-5, 1e-5, [False] * count, [], 1)


def call(**changed: Any) -> dict[str, Any]:
    lengths = np.array([0, 3, 4], np.int32)
    return {
        "x": np.ones((4, HIDDEN), np.float32),
        "tiles": _C.tiles(lengths, None, 128),
        "tile_size": 128,
        "rows": None,
        "outputs": [np.zeros((4, HIDDEN), np.float32)],
        "threads": 1,
        **changed,
    }


def read_only(shape: tuple[int, ...]) -> Any:
    result = np.zeros(shape, np.float32)
    result.flags.writeable = False
    return result


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.ones(HIDDEN, np.float32)}, r"x has shape \(6,?\); 2 dimensions"),
        ({"x": np.ones((4, 7), np.float32)}, r"x has shape \(4, 7\); \(4, 6\)"),
        ({"x": np.ones((4, HIDDEN))}, "x has dtype float64; float32"),
        ({"x": np.ones((4, 12), np.float32)[:, ::2]}, "x must be contiguous"),
        ({"x": np.ones((3, HIDDEN), np.float32), "outputs": [np.zeros((3, HIDDEN), np.float32)]}, "tile"),
        ({"tiles": np.array([[0, 4, 4]], np.int32)}, r"tiles has shape \(1, 3\)"),
        ({"tiles": np.array([[0, 4, 4, 0]])}, "tiles has dtype int64; int32"),
        ({"tiles": np.array([[0, 5, 4, 0]], np.int32)}, "tile"),
        ({"tiles": np.array([[0, 4, 5, 0]], np.int32)}, "tile"),
        ({"tiles": np.array([[-1, 4, 4, 0]], np.int32)}, "tile"),
        ({"tiles": np.array([[0, 4, 4, -1]], np.int32)}, "tile"),
        ({"tiles": np.array([[0, 4, -1, 0]], np.int32)}, "tile"),
        ({"tile_size": 0}, "tile_size is 0"),
        ({"tile_size": -1}, "tile_size is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"rows": np.zeros((1, 1), np.int64)}, r"rows has shape \(1, 1\); 1 dimension"),
        ({"rows": np.zeros(1, np.int32)}, "rows has dtype int32; int64"),
        ({"rows": np.array([1, 0])}, r"rows\[1\] is 0; ascending rows in \[0, 4\)"),
        ({"rows": np.array([0, 4])}, r"rows\[1\] is 4"),
        ({"rows": np.array([-1])}, r"rows\[0\] is -1"),
        ({"rows": np.array([0, 1])}, r"outputs has shape \(4, 6\); \(2, 6\)"),
        ({"outputs": []}, "outputs has 0 entries; 1 are needed, one for each layer"),
        ({"outputs": [np.zeros((4, HIDDEN), np.float32)] * 2}, "outputs has 2 entries; 1 are needed"),
        ({"outputs": [np.zeros((4, 5), np.float32)]}, r"outputs has shape \(4, 5\); \(4, 6\)"),
        ({"outputs": [np.zeros((4, HIDDEN))]}, "outputs has dtype float64"),
        ({"outputs": [read_only((4, HIDDEN))]}, "writeable"),
    ],
)
def test_engine_calls_are_checked(changed: dict[str, Any], message: str) -> None:
    encoder = make_encoder()
    with pytest.raises(ValueError, match=message):
        encoder.run(**call(**changed))
    given = call()
    encoder.run(**given)
    assert np.isfinite(given["outputs"][0]).all()


@pytest.mark.parametrize("count", [1, 2, 64])
def test_engine_more_threads_than_work(count: int) -> None:
    found, expected = call(threads=count), call()
    for each in (found, expected):
        make_encoder().run(**each)
    np.testing.assert_array_equal(found["outputs"][0], expected["outputs"][0])


def test_engine_without_layers() -> None:
    assert engine.stack([]).refusal == "there are no layers"
    code = """
import numpy as np
from bert_fast import _C
tiles, x = _C.tiles(np.array([0, 2], np.int32), None, 128), np.ones((2, 4), np.float32)
try:
    _C.Encoder(4, 1, 4, "none", "float32").run(x, tiles, 128, None, [], 1)
except ValueError as error:
    print(error)
"""
    # A process of its own: what this is about is a read past the end.
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "layer" in result.stdout
