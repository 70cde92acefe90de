"""Products in bfloat16 on CPUs, by swap(bf16=True) or because a model is in 16 bits, against a twin in plain torch.

Where the machine, or the kernels that BERT_FAST_ISA names, have no instruction for them, float32 is expected instead.
"""

from __future__ import annotations

import copy
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from layer_arrays import NAMES, PRODUCTS, layer_arrays, layer_flags
from models import (
    MIXED,
    TEXTS,
    any_path,
    assert_near,
    inputs,
    mask_of,
    minilm,
    one_thread,  # noqa: F401
    ours,
    theirs,
)
from test_engine import (
    CHANGES,
    ROWS,
    Encoding,
    hidden_states,
    oracle,
    packings,  # noqa: F401
    part,
    part_of_report,
    served,  # noqa: F401
)
from test_int8 import (
    ALL,
    EPS,
    FEW,
    LENGTHS,
    LINEARS,
    LONG,
    NONE,
    SABOTAGES,
    Sizes,
    Weights,
    build,
    last_state,
    lossless,
)
from test_int8 import SHAPES as INT8_SHAPES
from tolerance import error, magnitude, threads
from torch import Tensor

import bert_fast
from bert_fast import _C, engine, reference
from bert_fast.swap.core import original
from bert_fast.swap.verify import RoundingCheck, VerificationError

HAS_BFLOAT16 = _C.has_bfloat16()
has_instruction = pytest.mark.skipif(not HAS_BFLOAT16, reason="no instruction for bfloat16")

HALVES = (torch.bfloat16, torch.float16)
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)

# And products so deep that they are cut, at a place that 384 does not divide.
SHAPES: dict[str, dict[str, Any]] = {
    **INT8_SHAPES,
    "520 in 5 heads": {
        "hidden_size": 520,
        "num_attention_heads": 5,
        "intermediate_size": 1030,
        "num_hidden_layers": 1,
    },
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def in_bfloat16(**config: Any) -> Any:
    return bert_fast.swap(build(**config), bf16=True)


# How a model comes to products in fewer bits than float32's, or to parameters in them.
WAYS: dict[str, Callable[[Any], Any]] = {
    "bf16=True": lambda model: bert_fast.swap(model, bf16=True),
    "bfloat16": lambda model: bert_fast.swap(model.bfloat16()),
    "float16": lambda model: bert_fast.swap(model.half()),
    "float16, bf16=True": lambda model: bert_fast.swap(model.half(), bf16=True),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def test_bfloat16_needs_the_instruction() -> None:
    flags = [line for line in open_cpuinfo() if line.startswith("flags")]
    if _C.instruction_set() != "avx512":
        assert not HAS_BFLOAT16
    elif flags:
        assert ("avx512_bf16" in flags[0].split()) == HAS_BFLOAT16


def open_cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.readlines()
    except OSError:
        return []


# ---- one layer -------------------------------------------------------------------------------------------------------

Round = Callable[[Tensor], Tensor]


def nearest(x: Tensor) -> Tensor:
    return x.float().bfloat16().to(x.dtype)


def round_bits(x: Tensor, added: int) -> Tensor:
    """Towards zero after so much was added to the last 16 bits of the float32."""
    bits = x.float().view(torch.int32) + added
    return (bits & ~0xFFFF).view(torch.float32).to(x.dtype)


truncated: Round = partial(round_bits, added=0)
ties_away: Round = partial(round_bits, added=0x8000)


def as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass
class Twin:
    """The layer in plain torch, in the weights' precision.

    Attributes:
        roundings: of each linear layer's two factors, the activation and the weight.
        distance: the smallest one of an activation from the middle between two numbers in bfloat16, relative to what is
            above 1, among those whose rounding to the other side would show.
    """

    sizes: Sizes
    weights: Weights
    roundings: dict[str, tuple[Round, Round]]
    activation: str
    distance: float = 1.0

    def see(self, x: Tensor) -> None:
        mantissa, exponent = torch.frexp(x)
        step = 2.0 ** (exponent - 8).to(x.dtype)
        place = mantissa.abs() * 256
        distance = ((place - place.floor() - 0.5).abs() * step / x.abs().clamp(min=1))[step > LARGEST_STEP]
        self.distance = min(self.distance, *distance.flatten().tolist(), 1.0)

    def linear(self, name: str, x: Tensor, is_given: bool = False) -> Tensor:
        of_activation, of_weight = self.roundings.get(name, (as_it_is, as_it_is))
        if of_activation is not as_it_is and not is_given:
            self.see(x)
        weight, bias = self.weights[name]
        return of_activation(x) @ of_weight(weight).T + bias

    def norm(self, name: str, x: Tensor, residual: Tensor) -> Tensor:
        return reference.layer_norm(x, *self.weights[name], EPS, residual)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weights["query"][0].dtype)
        q, k, v = (self.linear(name, x, is_given=True).unflatten(-1, (self.sizes.heads, -1)) for name in NAMES[:3])
        context = reference.attention(q, k, v, self.sizes.cu_seqlens, (self.sizes.hidden // self.sizes.heads) ** -0.5)
        attended = self.norm("attention_norm", self.linear("attention_output", context.flatten(1)), x)
        expanded = reference.gelu(self.linear("intermediate", attended), approximate=self.activation)
        return self.norm("output_norm", self.linear("output", expanded), attended)


def in_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: (weight.to(dtype), bias.to(dtype)) for name, (weight, bias) in weights.items()}


def roundings_of(flags: list[bool], how: Round = nearest) -> dict[str, tuple[Round, Round]]:
    return {name: (how, how) for name, flag in zip(PRODUCTS, flags, strict=True) if flag}


def with_ties(x: Tensor, generator: torch.Generator) -> Tensor:
    """x, an eighth of which lies in the middle between two numbers in bfloat16."""
    is_tie = torch.rand(x.shape, generator=generator) < 0.125
    return torch.where(is_tie, (truncated(x).view(torch.int32) | 0x8000).view(torch.float32), x)


def draw_weights(sizes: Sizes) -> Weights:
    generator = torch.Generator().manual_seed(1)
    outputs = {"intermediate": (sizes.inner, sizes.hidden), "output": (sizes.hidden, sizes.inner)}
    weights: Weights = {}
    for name in NAMES:
        if name.endswith("norm"):
            weight = 1 + 0.3 * torch.randn(sizes.hidden, generator=generator)
        else:
            rows, columns = outputs.get(name, (sizes.hidden, sizes.hidden))
            weight = with_ties(torch.randn(rows, columns, generator=generator) / columns**0.5, generator)
        weights[name] = weight, 0.2 * torch.randn(len(weight), generator=generator)
    return weights


def draw_input(sizes: Sizes, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return with_ties(torch.randn(sum(sizes.lengths), sizes.hidden, generator=generator), generator)


def run(
    sizes: Sizes,
    weights: Weights,
    x: Tensor,
    flags: list[bool],
    *,
    activation: str = "none",
    count: int = 1,
    products: str = "bfloat16",
) -> Tensor:
    encoder = _C.Encoder(sizes.hidden, sizes.heads, sizes.inner, activation, products)
    arrays = layer_arrays(weights)
    encoder.add_layer(arrays, EPS, EPS, layer_flags(flags), [], count)
    out = np.zeros((len(x), sizes.hidden), np.float32)
    encoder.run(x.numpy(), _C.tiles(sizes.cu_seqlens.numpy(), None, 128), 128, None, [out], count)
    return torch.from_numpy(out)


TWINS = [
    Sizes((2,), 7, 7, 5),
    Sizes((3, 1), 2, 20, 24),
    Sizes((2, 0, 1), 3, 51, 71),
    Sizes((1, 3), 3, 132, 385),
    Sizes((2,), 5, 400, 801),
    Sizes((2,), 4, 520, 1030),
]

# What the error of float32 in an activation may come to.
SMALLEST_DISTANCE = 7e-7

# Between numbers in bfloat16 next to each other, where it matters little which of them an activation becomes.
LARGEST_STEP = 2.0**-13


def mutants(flags: list[bool]) -> Iterator[tuple[str, dict[str, tuple[Round, Round]]]]:
    """The roundings as they might wrongly be."""
    right = roundings_of(flags)
    for name, how in (("truncated", truncated), ("ties away from zero", ties_away)):
        yield name, roundings_of(flags, how)
        yield f"weights {name}", dict.fromkeys(right, (nearest, how))
        yield f"activations {name}", dict.fromkeys(right, (how, nearest))
    for at, name in enumerate(PRODUCTS):
        yield f"{name} the other way", roundings_of([flag != (at == other) for other, flag in enumerate(flags)])
        if name in right:
            yield f"weight of {name} exact", {**right, name: (nearest, as_it_is)}
            yield f"input of {name} exact", {**right, name: (as_it_is, nearest)}


@has_instruction
@pytest.mark.parametrize("activation", ["none", "tanh"])
@pytest.mark.parametrize("sizes", TWINS, ids=lambda sizes: f"{sizes.hidden}-{sizes.inner}")
@pytest.mark.parametrize("flags", [ALL, [True, False] * 3, [False, True] * 3], ids=["all", "even", "odd"])
def test_bfloat16_twin(sizes: Sizes, activation: str, flags: list[bool]) -> None:
    """With the first input of which no activation is so near the middle that it may be rounded to either side.

    The error is far below that of the least mistake in rounding.
    """
    weights = draw_weights(sizes)
    exact_weights = in_dtype(weights, torch.float64)
    for seed in range(300):
        x = draw_input(sizes, seed)
        twin = Twin(sizes, exact_weights, roundings_of(flags), activation)
        exact = twin(x)
        if twin.distance > SMALLEST_DISTANCE:
            break
    assert twin.distance > SMALLEST_DISTANCE
    found = [run(sizes, weights, x, flags, activation=activation, count=count) for count in (1, 2, 4)]
    assert all(torch.equal(each, found[0]) for each in found)
    wrong = {name: Twin(sizes, exact_weights, mutant, activation)(x) for name, mutant in mutants(flags)}
    errors = {name: error(each, exact) for name, each in wrong.items()}
    smallest = min(errors, key=lambda name: errors[name])
    assert errors[smallest] > 64 * torch.finfo(torch.float32).eps * magnitude(exact), smallest
    assert error(found[0], exact) < 0.1 * errors[smallest], smallest


EXACT = [Sizes((1,) * 9, 4, 392, 801), Sizes((1,) * 70, 3, 51, 71), Sizes((1,) * 3, 4, 520, 1030)]


@has_instruction
@pytest.mark.parametrize("sizes", EXACT, ids=lambda sizes: f"{sizes.hidden}-{sizes.inner}")
@pytest.mark.parametrize("name", PRODUCTS)
def test_bfloat16_exact_products(name: str, sizes: Sizes) -> None:
    """Where rounding loses nothing, bfloat16 gives what float32 gives: the sums are exact in both."""
    weights, x = lossless(name, sizes)
    flags = [name == each for each in PRODUCTS]
    expected = run(sizes, weights, x, NONE)
    weight, bias = weights[name]
    # Of eight binary digits the nearest stay; of one token neither queries nor keys count.
    moved = weight * (1 + 2.0**-9 * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) - 0.5))
    for given in (weight, moved):
        for count in (1, 2, 4):
            assert torch.equal(run(sizes, weights | {name: (given, bias)}, x, flags, count=count), expected), count
    inexact = run(sizes, weights | {name: (moved, bias)}, x, NONE)
    assert torch.equal(inexact, expected) == (name in ("query", "key"))


@has_instruction
@pytest.mark.parametrize("name", ["query", "key"])
def test_bfloat16_exact_scores(name: str) -> None:
    sizes = Sizes((5, 3, 70), 4, 392, 71)
    weights, x = lossless(name, sizes)
    flags = [name == each for each in PRODUCTS]
    assert torch.equal(run(sizes, weights, x, flags), run(sizes, weights, x, NONE))


def of_bits(*bits: int) -> Tensor:
    return torch.tensor([struct.unpack("f", struct.pack("I", each))[0] for each in bits])


def simple(sizes: Sizes, **given: tuple[Tensor, Tensor]) -> Weights:
    """All linear layers pass on what they get, but for those given; a LayerNorm gives its bias, or normalises."""
    identity = torch.eye(sizes.hidden), torch.zeros(sizes.hidden)
    norm = torch.ones(sizes.hidden), torch.zeros(sizes.hidden)
    return {**{name: norm if "norm" in name else identity for name in NAMES}, **given}


def one_more(bits: int, steps: int) -> list[int]:
    """At the middle above these 16 bits, and beside it."""
    return [(bits << 16) + 0x8000 + step for step in range(-steps, steps + 1)]


# Even and odd numbers in bfloat16, at the end of a power of two, of both signs; of the last 16 bits none and all.
EDGES = of_bits(
    *(each for bits in (0x3F80, 0x3F81, 0x3FFF, 0x3FFE, 0xBF80, 0xBF81, 0xBFFF, 0xBF4D) for each in one_more(bits, 1)),
    *(0x3F800000, 0x3F80FFFF, 0x3F810000, 0x3F7FFFFF, 0xBF7FFFFF, 0x00000000, 0x80000000),
)


@has_instruction
@pytest.mark.parametrize("power", [-20, 0, 10])
@pytest.mark.parametrize("turn", [0, 8, 20])
def test_bfloat16_rounding_of_activations(power: int, turn: int) -> None:
    """At every place of a row, which ends within a vector: the rounded values as biases in float32 give the same."""
    values = (EDGES * 2.0**power).roll(turn)
    hidden = len(values)
    assert hidden % 16 != 0
    sizes = Sizes((1,), 1, hidden, hidden)
    attended = torch.zeros(hidden), values
    product = torch.eye(hidden), torch.zeros(hidden)
    constant = torch.zeros(hidden, hidden), nearest(values)
    x = torch.ones(1, hidden)
    flags = [name == "intermediate" for name in PRODUCTS]
    found = run(sizes, simple(sizes, attention_norm=attended, intermediate=product), x, flags)
    assert torch.equal(found, run(sizes, simple(sizes, attention_norm=attended, intermediate=constant), x, NONE))
    assert not torch.equal(found, run(sizes, simple(sizes, attention_norm=attended, intermediate=product), x, NONE))


@has_instruction
@pytest.mark.parametrize("name", PRODUCTS)
def test_bfloat16_rounding_of_weights(name: str) -> None:
    """At every place of a panel: weights that torch has rounded give the same."""
    sizes = Sizes((3, 1), 1, len(EDGES), len(EDGES))
    weights = draw_weights(sizes)
    x = draw_input(sizes, 1)
    index = torch.arange(len(EDGES))
    weight = EDGES[(index + index[:, None]) % len(EDGES)] / 8
    flags = [name == each for each in PRODUCTS]
    found = run(sizes, weights | {name: (weight, weights[name][1])}, x, flags)
    assert torch.equal(found, run(sizes, weights | {name: (nearest(weight), weights[name][1])}, x, flags))
    for how in (truncated, ties_away):
        assert not torch.equal(found, run(sizes, weights | {name: (how(weight), weights[name][1])}, x, flags))


@has_instruction
@pytest.mark.parametrize("place", [0, 5, 18])
@pytest.mark.parametrize("of_weight", [False, True], ids=["activation", "weight"])
def test_bfloat16_denormals_count_as_zero(of_weight: bool, place: int) -> None:
    """The context is the values' bias; what the product with its other factor would be is no small number."""
    hidden = 20
    small, large = 1.5 * 2.0**-130, 2.0**126
    sizes = Sizes((2,), 1, hidden, hidden)
    value, weight = torch.zeros(hidden), torch.zeros(hidden, hidden)
    value[place], weight[3, place] = (large, small) if of_weight else (small, large)
    weights = simple(sizes, value=(torch.zeros(hidden, hidden), value), attention_output=(weight, torch.zeros(hidden)))
    x = draw_input(sizes, 1)
    flags = [name == "attention_output" for name in PRODUCTS]
    without = run(sizes, weights | {"attention_output": (torch.zeros_like(weight), torch.zeros(hidden))}, x, NONE)
    assert torch.equal(run(sizes, weights, x, flags), without)
    assert not torch.equal(run(sizes, weights, x, NONE), without)


# Quiet and signalling, of both signs, with a payload in the last 16 bits alone or one that rounding would carry over.
NANS = of_bits(0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F80FFFF, 0x7F800001, 0xFF80FFFF)


@pytest.mark.parametrize("place", [0, 5, 18])
@pytest.mark.parametrize("bad", [*NANS, torch.tensor(torch.inf), torch.tensor(-torch.inf)], ids=lambda x: str(x.item()))
def test_bfloat16_nan_and_infinity_stay(bad: Tensor, place: int) -> None:
    """As a weight and as an activation, in which they are no more than one factor."""
    sizes = Sizes((2, 1), 1, 20, 20)
    weights, x = draw_weights(sizes), draw_input(sizes, 1)
    products: str = "bfloat16" if HAS_BFLOAT16 else "float32"
    for name in PRODUCTS:
        flags = [HAS_BFLOAT16 and name == each for each in PRODUCTS]
        weight = weights[name][0].clone()
        weight[7, place] = bad
        expected = run(sizes, weights | {name: (weight, weights[name][1])}, x, NONE, products="float32")
        found = run(sizes, weights | {name: (weight, weights[name][1])}, x, flags, products=products)
        assert torch.equal(found.isfinite(), expected.isfinite()), name
    bias = weights["value"][1].clone()
    bias[place] = bad
    flags = [HAS_BFLOAT16 and name == "attention_output" for name in PRODUCTS]
    assert run(sizes, weights | {"value": (weights["value"][0], bias)}, x, flags, products=products).isnan().all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("flags", [ALL, [True, False] * 3, [False, True] * 3], ids=["all", "even", "odd"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_bfloat16_bad_rows_stay_in_their_text(bad: float, flags: list[bool], count: int) -> None:
    sizes = Sizes((3, 1, 20, 2), 3, 51, 71)
    weights, x = draw_weights(sizes), draw_input(sizes, 1)
    options: dict[str, Any] = {"count": count} if HAS_BFLOAT16 else {"count": count, "products": "float32"}
    flags = [HAS_BFLOAT16 and flag for flag in flags]
    clean = run(sizes, weights, x, flags, **options)
    x[6, 50] = bad
    found = run(sizes, weights, x, flags, **options)
    assert torch.equal(found[:4], clean[:4])
    assert torch.equal(found[24:], clean[24:])
    assert found[4:24].isnan().all()


# ---- whole models ----------------------------------------------------------------------------------------------------


@each_shape
@each_way
def test_bfloat16_whatever_the_threads(way: Callable[[Any], Any], shape: dict[str, Any]) -> None:
    model = way(build(**shape))
    batches = [inputs(mask_of(rows)) for rows in (FEW, MIXED)]
    expected = [hidden_states(model, batch) for batch in batches]
    for count in (2, 4):
        with threads(count):
            engine.forget(model)
            for batch, states in zip(batches, expected, strict=True):
                found = hidden_states(model, batch)
                assert all(torch.equal(x, y) for x, y in zip(found, states, strict=True)), count


@each_shape
@each_way
def test_bfloat16_whatever_the_batch(way: Callable[[Any], Any], shape: dict[str, Any]) -> None:
    model, batch = way(build(**shape)), inputs(mask_of(LONG))
    together = last_state(model, batch)
    for count in (1, 2, 4):
        with threads(count):
            if count > 1:
                assert torch.equal(last_state(model, batch), together), count
            for row, length in enumerate(LENGTHS):
                alone = last_state(model, {name: x[row : row + 1, :length] for name, x in batch.items()})
                assert torch.equal(alone[0], together[row, :length]), length


@each_shape
def test_bfloat16_is_near_and_not_the_same(shape: dict[str, Any]) -> None:
    mask = mask_of(MIXED)
    found = last_state(in_bfloat16(**shape), inputs(mask))[mask]
    expected = last_state(bert_fast.swap(build(**shape)), inputs(mask))[mask]
    assert torch.equal(found, expected) == (not HAS_BFLOAT16)
    assert float(torch.cosine_similarity(found, expected, dim=-1).min()) > 0.999


def test_bfloat16_hidden_states() -> None:
    model, batch = in_bfloat16(), inputs(mask_of(MIXED))
    states = hidden_states(model, batch)
    assert len(states) == 3
    assert torch.equal(states[-1], last_state(model, batch))
    exact = hidden_states(bert_fast.swap(model), batch)
    assert torch.equal(states[0], exact[0])
    assert torch.equal(states[1], exact[1]) == (not HAS_BFLOAT16)


@pytest.mark.parametrize("count", [1, 4])
@each_way
def test_bfloat16_head_on_first_rows(way: Callable[[Any], Any], count: int, served: list[bool]) -> None:  # noqa: F811
    """The last layer for some rows alone gives them the bits that it gives them among all."""
    model, batch = way(theirs("BertForSequenceClassification")), inputs(mask_of(MIXED))
    with torch.no_grad(), threads(count):
        found = model(**batch)
        full = model(**batch, output_hidden_states=True)
    assert served == [True, True]
    assert len(full.hidden_states) == 3
    assert torch.equal(found.logits, full.logits)


class HalfEncoding(Encoding):
    """As Encoding, with these products and the model in this dtype."""

    def __init__(self, wanted: engine.Products, dtype: torch.dtype, **config: Any) -> None:
        super().__init__(**config)
        self.wanted = wanted
        self.put(dtype)

    def put(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.hidden = self.hidden.to(dtype)

    def run(self, **options: Any) -> list[Tensor]:
        stack = engine.stack(self.layers, self.wanted)
        with torch.no_grad():
            outputs = engine.encode(self.model, stack, self.hidden, self.batch, **options)
        assert outputs is not None
        return outputs


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_bfloat16_rows(dtype: torch.dtype, rows: list[int], count: int) -> None:
    encoding = HalfEncoding("bfloat16", dtype)
    full = encoding.run(needs_all=True)
    chosen = torch.tensor(rows, dtype=torch.int64)
    with threads(count):
        (found,) = encoding.run(rows=chosen)
        before, last = encoding.run(rows=chosen, needs_all=True)
    assert found.dtype == dtype
    assert torch.equal(found, full[-1][chosen])
    assert torch.equal(last, found)
    assert torch.equal(before, full[0])


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("way", [WAYS["bf16=True"], WAYS["bfloat16"]], ids=["bf16=True", "bfloat16"])
def test_bfloat16_bad_weights_show(way: Callable[[Any], Any], name: str, bad: float, count: int) -> None:
    model, mask = build(num_hidden_layers=1), mask_of(MIXED)
    model.get_submodule(f"encoder.layer.0.{name}").weight.data[7, 11] = bad
    expected = last_state(model, inputs(mask))[mask].isfinite()
    assert not expected.all()
    with threads(count):
        found = last_state(way(model), inputs(mask))[mask].isfinite()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@each_way
def test_bfloat16_bad_inputs_stay_in_their_text(way: Callable[[Any], Any], bad: float, count: int) -> None:
    model, mask = way(build()), mask_of(MIXED)
    embeds = torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(2)).to(model.dtype)
    with threads(count):
        clean = last_state(model, {"inputs_embeds": embeds, "attention_mask": mask.long()})
        embeds[3, 4, 5] = bad
        found = last_state(model, {"inputs_embeds": embeds, "attention_mask": mask.long()})
    others = torch.arange(8) != 3
    assert torch.equal(found[others], clean[others])
    assert found[3][mask[3]].isnan().all()


def test_bfloat16_gradients_are_those_of_float32() -> None:
    batch = inputs(mask_of(MIXED))
    gradients = []
    for model in (in_bfloat16(), bert_fast.swap(build())):
        last_state(model, batch)
        output = model(**batch)
        output.pooler_output.square().sum().backward()
        gradients.append([output[0].detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_bfloat16_of_float64() -> None:
    batch = inputs(mask_of(MIXED))
    found = last_state(in_bfloat16().double(), batch)
    assert torch.equal(found, last_state(bert_fast.swap(build()).double(), batch))


def test_bfloat16_sees_changed_weights() -> None:
    model, batch = in_bfloat16(), inputs(mask_of(MIXED))
    before = last_state(model, batch)
    part("output.dense")(model).weight.data.mul_(1.5)
    found = last_state(model, batch)
    assert not torch.equal(found, before)
    assert torch.equal(last_state(copy.deepcopy(model), batch), found)


# ---- on and off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [bert_fast.swap, partial(bert_fast.swap, bf16=False)], ids=["swap", "bf16=False"])
def test_bfloat16_ends(end: Callable[[Any], Any]) -> None:
    batch = inputs(mask_of(MIXED))
    model = bert_fast.swap(build())
    exact = last_state(model, batch)
    assert bert_fast.swap(model, bf16=True) is model
    assert torch.equal(last_state(model, batch), exact) == (not HAS_BFLOAT16)
    assert "bfloat16" in str(bert_fast.report(model))
    end(model)
    assert torch.equal(last_state(model, batch), exact)
    assert "bfloat16" not in str(bert_fast.report(model))


def test_bfloat16_and_int8_follow_each_other() -> None:
    batch = inputs(mask_of(MIXED))
    ways: dict[str, Callable[[Any], Any]] = {
        "float32": bert_fast.swap,
        "bfloat16": partial(bert_fast.swap, bf16=True),
        "int8": partial(bert_fast.swap, int8=True),
    }
    expected = {name: last_state(way(build()), batch) for name, way in ways.items()}
    model = build()
    for name in ("bfloat16", "int8", "float32", "int8", "bfloat16", "float32", "bfloat16"):
        assert torch.equal(last_state(ways[name](model), batch), expected[name]), name


def test_bfloat16_restore() -> None:
    batch = inputs(mask_of(MIXED))
    model = build()
    entries, expected = set(vars(model)), last_state(model, batch)
    bert_fast.swap(model, bf16=True)
    last_state(model, batch)
    bert_fast.restore(model)
    assert set(vars(model)) == entries
    assert model not in engine._packed
    assert torch.equal(last_state(model, batch), expected)


def test_bfloat16_excludes_int8() -> None:
    model = build()
    with pytest.raises(ValueError, match="int8 and bf16 are both True; at most one is allowed"):
        bert_fast.swap(model, int8=True, bf16=True)
    assert bert_fast.report(model).encoders == ()
    swapped = bert_fast.swap(model, bf16=True)
    before = last_state(swapped, inputs(mask_of(FEW)))
    with pytest.raises(ValueError, match="int8 and bf16 are both True"):
        bert_fast.swap(swapped, int8=True, bf16=True)
    assert torch.equal(last_state(swapped, inputs(mask_of(FEW))), before)


def test_bfloat16_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(), inputs(mask_of(FEW))
    expected = last_state(model, batch)
    monkeypatch.setenv("BERT_FAST", "off")
    with pytest.warns(UserWarning, match="BERT_FAST=off is set"):
        assert bert_fast.swap(model, bf16=True) is model
    assert "bert_fast_rounding" not in vars(model)
    assert torch.equal(last_state(model, batch), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@each_way
def test_bfloat16_copies(way: Callable[[Any], Any], copied: Callable[[Any], Any]) -> None:
    batch = inputs(mask_of(MIXED))
    model = way(build())
    expected = last_state(model, batch)
    twin = copied(model)
    assert torch.equal(last_state(twin, batch), expected)
    assert bert_fast.report(twin).encoders[0].parts == bert_fast.report(model).encoders[0].parts
    part("output.dense")(twin).weight.data.mul_(2)
    assert not torch.equal(last_state(twin, batch), expected)
    assert torch.equal(last_state(model, batch), expected)


def test_bfloat16_leaves_the_state_alone() -> None:
    model = build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bert_fast.swap(model, bf16=True)
    last_state(model, inputs(mask_of(MIXED)))
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name])


# ---- models in 16 bits -----------------------------------------------------------------------------------------------


@each_shape
@each_half
def test_bfloat16_models_in_16_bits(
    dtype: torch.dtype,
    shape: dict[str, Any],
    served: list[bool],  # noqa: F811
) -> None:
    """No further from float64 than transformers."""
    model, mask = build(**shape).to(dtype), mask_of(MIXED)
    batch = inputs(mask)
    exact, expected = oracle(model, batch), hidden_states(model, batch)
    found = hidden_states(bert_fast.swap(model), batch)
    assert served == [True]
    for number, (x, theirs_, truth) in enumerate(zip(found, expected, exact, strict=True)):
        assert x.dtype == dtype
        bound = error(theirs_[mask], truth[mask]) + torch.finfo(dtype).eps * magnitude(truth[mask])
        assert error(x[mask], truth[mask]) <= bound, number
    assert torch.equal(last_state(model, batch), found[-1])


@pytest.mark.parametrize(
    ("dtype", "wanted", "wide_wanted"),
    [
        (torch.bfloat16, "float32", "bfloat16"),
        (torch.bfloat16, "bfloat16", "bfloat16"),
        (torch.bfloat16, "int8", "int8"),
        (torch.float16, "float32", "float32"),
        (torch.float16, "bfloat16", "bfloat16"),
        (torch.float16, "int8", "int8"),
    ],
    ids=str,
)
@each_shape
def test_bfloat16_layers_in_16_bits(
    shape: dict[str, Any], dtype: torch.dtype, wanted: engine.Products, wide_wanted: engine.Products
) -> None:
    """The bits of the same weights and embeddings in float32, the outputs rounded."""
    encoding = HalfEncoding(wanted, dtype, **shape)
    found = encoding.run(needs_all=True)
    encoding.put(torch.float32)
    encoding.wanted = wide_wanted
    for x, y in zip(found, encoding.run(needs_all=True), strict=True):
        assert torch.equal(x, y.to(dtype))


@each_half
def test_bfloat16_our_model_in_16_bits(dtype: torch.dtype, served: list[bool]) -> None:  # noqa: F811
    source, batch = build(), inputs(mask_of(MIXED))
    with torch.no_grad():
        found = ours(source).to(dtype)(**batch)
        expected = bert_fast.swap(source.to(dtype))(**batch)
    assert served == [True, True]
    assert found.last_hidden_state.dtype == dtype
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooled, expected.pooler_output)


# Those that keep the dtype and the sizes; all keys moved alike change no more than the last bits of scores.
HALF_CHANGES = [
    "optimizer",
    "load_state_dict",
    "one element under no_grad",
    *(name for name in CHANGES if name.startswith(("data of", "bias of")) and name != "bias of attention.self.key"),
    "other memory",
    "exchanged memory",
    "other parameter",
    "other layer",
    "other eps",
    "other activation",
]


@pytest.mark.parametrize("name", HALF_CHANGES)
@each_half
def test_bfloat16_sees_changed_weights_in_16_bits(dtype: torch.dtype, name: str, served: list[bool]) -> None:  # noqa: F811
    mask = mask_of(MIXED)
    batch = inputs(mask)
    model = bert_fast.swap(build().to(dtype))
    before = last_state(model, batch)
    CHANGES[name](model)
    served.clear()
    found = last_state(model, batch)
    assert served == [True]
    assert found.dtype == dtype
    assert not torch.equal(found, before)
    assert torch.equal(last_state(copy.deepcopy(model), batch), found)
    exact = oracle(model, batch)[-1][mask]
    with original(model):
        expected = last_state(model, batch)[mask]
    assert error(found[mask], exact) <= error(expected, exact) + 2 * torch.finfo(dtype).eps * magnitude(exact)


@pytest.mark.parametrize("name", ["attention.output.LayerNorm", "output.LayerNorm", "intermediate.dense"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
@each_half
def test_bfloat16_sees_one_element_in_16_bits(dtype: torch.dtype, kind: str, name: str) -> None:
    """Of what is copied for a model in 16 bits, and read in place in float32."""
    batch = inputs(mask_of(MIXED))
    model = bert_fast.swap(build().to(dtype))
    before = last_state(model, batch)
    with torch.no_grad():
        getattr(part(name)(model), kind).view(-1)[3] += 2
    found = last_state(model, batch)
    assert not torch.equal(found, before)
    engine.forget(model)
    assert torch.equal(last_state(model, batch), found)


@each_way
def test_bfloat16_packs_once(way: Callable[[Any], Any], packings: list[engine.Stack]) -> None:  # noqa: F811
    model = way(build())
    for rows in (MIXED, FEW, MIXED):
        last_state(model, inputs(mask_of(rows)))
        model.train()
        model.eval()
    assert len(packings) == 1
    part("output.LayerNorm")(model).bias.data.add_(1)
    last_state(model, inputs(mask_of(FEW)))
    assert len(packings) == (1 if model.dtype == torch.float32 else 2)  # read in place, or copied


@each_way
def test_bfloat16_keeps_no_copy_of_the_weights(way: Callable[[Any], Any]) -> None:
    model = way(build())
    last_state(model, inputs(mask_of(FEW)))
    places = {(p.data_ptr(), p.nbytes) for p in model.parameters()}
    arrays = engine._packed[model].arrays
    copies = [x for x in arrays if (x.__array_interface__["data"][0], x.nbytes) not in places]
    vectors = sum(p.numel() for layer in model.encoder.layer for p in layer.parameters() if p.dim() == 1)
    assert sum(x.nbytes for x in copies) == (0 if model.dtype == torch.float32 else 4 * vectors)
    assert all(x.ndim == 1 for x in copies)


@each_half
def test_bfloat16_there_and_back(dtype: torch.dtype, served: list[bool]) -> None:  # noqa: F811
    """A model that changes its dtype; the roundings of its weights stay."""
    batch = inputs(mask_of(MIXED))
    model = bert_fast.swap(build())
    before = last_state(model, batch)
    found = last_state(model.to(dtype), batch)
    assert found.dtype == dtype
    wide = last_state(model.float(), batch)
    assert not torch.equal(wide, before)
    assert torch.equal(last_state(model.to(dtype), batch), found)
    assert served == [True] * 4


@each_half
def test_bfloat16_gradients_in_16_bits(dtype: torch.dtype, served: list[bool]) -> None:  # noqa: F811
    model, mask = bert_fast.swap(build().to(dtype)), mask_of(MIXED)
    last_state(model, inputs(mask))
    found = model(**inputs(mask))[0]
    found.float().square().mean().backward()
    assert served == [True, False]
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.encoder.parameters())
    with torch.no_grad():
        assert_near(last_state(model, inputs(mask))[mask], found[mask].detach(), 8 * torch.finfo(dtype).eps)


# ---- several dtypes --------------------------------------------------------------------------------------------------


def outcome(model: Any, batch: dict[str, Tensor]) -> Tensor | tuple[str, str]:
    """What the call gives, or what it raises."""
    try:
        with any_path():
            return last_state(model, batch)
    except (RuntimeError, TypeError, ValueError) as raised:
        return type(raised).__name__, str(raised)


def assert_same_outcome(model: Any, batch: dict[str, Tensor], mask: Tensor, tolerance: float) -> None:
    """Of the swapped model and the original; what raises there may raise in other words here."""
    found = outcome(model, batch)
    with original(model):
        expected = outcome(model, batch)
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        assert_near(found[mask], expected[mask], tolerance)
    else:
        assert isinstance(expected, tuple)
        assert isinstance(found, tuple)


@pytest.mark.parametrize(
    "place",
    [
        "embeddings",
        "embeddings.LayerNorm",
        "embeddings.word_embeddings",
        "encoder.layer.0.attention.output.LayerNorm",
        "encoder.layer.1.output.LayerNorm",
        "encoder.layer.1.intermediate.dense",
        "encoder.layer.0",
        "pooler",
    ],
)
@pytest.mark.parametrize("is_used_before", [False, True])
@each_half
def test_bfloat16_mixed_dtypes(
    dtype: torch.dtype,
    is_used_before: bool,
    place: str,
    served: list[bool],  # noqa: F811
) -> None:
    """A part of a model in 16 bits stays in float32."""
    model, mask = bert_fast.swap(build().to(dtype)), mask_of(MIXED)
    if is_used_before:
        last_state(model, inputs(mask))
    model.get_submodule(place).float()
    served.clear()
    assert_same_outcome(model, inputs(mask), mask, 8 * torch.finfo(dtype).eps)
    assert any(served) == (place in ("embeddings.LayerNorm", "pooler"))


@pytest.mark.parametrize("place", ["attention.output.LayerNorm", "output.LayerNorm"])
def test_bfloat16_norms_in_float32_then_not(place: str, served: list[bool]) -> None:  # noqa: F811
    model, batch = bert_fast.swap(build().bfloat16()), inputs(mask_of(MIXED))
    before = last_state(model, batch)
    part(place)(model).float()
    last_state(model, batch)
    part(place)(model).bfloat16()
    assert torch.equal(last_state(model, batch), before)
    assert served == [True, False, True]


@pytest.mark.parametrize("table", ["word_embeddings", "position_embeddings", "token_type_embeddings"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bfloat16_table_in_another_dtype(dtype: torch.dtype, table: str) -> None:
    """Embeddings are summed up in the larger dtype."""
    model, mask = build(), mask_of(MIXED)
    getattr(model.embeddings, table).to(dtype)
    assert_same_outcome(bert_fast.swap(model), inputs(mask), mask, 1e-5)


@pytest.mark.parametrize("other", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_bfloat16_embeddings_in_another_dtype(dtype: torch.dtype, other: torch.dtype) -> None:
    model, mask = bert_fast.swap(build().to(dtype)), mask_of(MIXED)
    embeds = torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(2)).to(other)
    batch = {"inputs_embeds": embeds, "attention_mask": mask.long()}
    assert_same_outcome(model, batch, mask, 8 * torch.finfo(dtype).eps)


def test_bfloat16_autocast(served: list[bool]) -> None:  # noqa: F811
    model, mask = in_bfloat16(), mask_of(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outcome(model, inputs(mask), mask, 0.05)
    assert served == [False]


# ---- the report ------------------------------------------------------------------------------------------------------

IN_ONE_CALL = "without gradients all in one call, products in "
NO_INSTRUCTION = ": this machine has no instruction for bfloat16, with which they would be slower"


@pytest.mark.parametrize(
    ("dtype", "options", "products"),
    [
        (torch.float32, {}, "float32"),
        (torch.float32, {"bf16": True}, "bfloat16"),
        (torch.bfloat16, {}, "bfloat16"),
        (torch.bfloat16, {"bf16": True}, "bfloat16"),
        (torch.bfloat16, {"int8": True}, "int8"),
        (torch.float16, {}, "float32"),
        (torch.float16, {"bf16": True}, "bfloat16"),
    ],
    ids=str,
)
def test_bfloat16_report(dtype: torch.dtype, options: dict[str, Any], products: str) -> None:
    model = bert_fast.swap(build().to(dtype), **options)
    text = f"{products} on packed weights"
    if products == "bfloat16" and not HAS_BFLOAT16:
        text = f"float32 on packed weights{NO_INSTRUCTION}"
    assert part_of_report(model) == ("cpp", IN_ONE_CALL + text)
    assert IN_ONE_CALL + text in str(bert_fast.report(model))


def test_bfloat16_report_of_mixed_dtypes() -> None:
    model = bert_fast.swap(build().bfloat16())
    part("output.LayerNorm")(model).float()
    assert part_of_report(model) == ("torch", "each part by itself, since the parameters have several dtypes")


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "int8"])
def test_bfloat16_flags(wanted: Literal["float32", "bfloat16", "int8"]) -> None:
    """Which linear layers multiply in fewer bits, some of them exact."""
    model = ours(build())
    expected = "float32" if wanted == "bfloat16" and not HAS_BFLOAT16 else wanted
    is_narrow = expected != "float32"
    stack = engine.stack(list(model.layers), wanted, frozenset([model.layers[1].key]))
    assert stack.products == expected
    assert stack.are_narrow == [layer_flags([is_narrow] * 6), layer_flags([is_narrow, False, *[is_narrow] * 4])]


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_bfloat16_verify(dtype: torch.dtype) -> None:
    batch = inputs(mask_of(MIXED))
    model = bert_fast.swap(build().to(dtype), bf16=True)
    before = last_state(model, batch)
    result = bert_fast.verify(model, batch)
    (check,) = result.rounding_checks
    assert result.is_within
    assert check.is_within
    assert (check.name, check.products) == ("encoder", "bfloat16")
    assert check.cosine > 0.9999
    assert check.distance < 0.02
    assert check.rank_correlation is not None
    assert check.rank_correlation > 0.99
    text = str(result)
    assert "encoder in bfloat16: smallest cosine of a text" in text
    assert "(bound 0.999)" in text
    assert "out of bounds" not in text
    assert torch.equal(last_state(model, batch), before)
    exact = bert_fast.verify(bert_fast.swap(model), batch)
    assert exact.rounding_checks == ()
    assert exact.checks == result.checks


@each_half
def test_bfloat16_verify_in_16_bits(dtype: torch.dtype) -> None:
    """Their error is part of the ordinary figures."""
    model = bert_fast.swap(theirs("BertForTokenClassification").to(dtype))
    result = bert_fast.verify(model, inputs(mask_of(MIXED)))
    assert result.rounding_checks == ()
    assert [check.name for check in result.checks] == ["bert: last hidden state", "logits"]
    assert all(0 < check.error <= check.bound for check in result.checks)


def test_bfloat16_verify_of_few_texts() -> None:
    (check,) = bert_fast.verify(in_bfloat16(), inputs(mask_of("11111 11100"))).rounding_checks
    assert check.rank_correlation is None
    assert "too few texts to rank" in str(check)


@pytest.mark.parametrize(
    ("cosine", "distance", "ranks", "is_within"),
    [
        (0.999, 0.05, 0.99, True),
        (0.9989, 0.0, 1.0, False),
        (1.0, 0.0501, 1.0, False),
        (1.0, 0.0, 0.9899, False),
        (1.0, 0.0, None, True),
        (float("nan"), 0.0, 1.0, False),
        (1.0, float("nan"), 1.0, False),
        (1.0, 0.0, float("nan"), False),
    ],
)
def test_bfloat16_bounds(cosine: float, distance: float, ranks: float | None, is_within: bool) -> None:
    check = RoundingCheck("x", "bfloat16", cosine, distance, ranks)
    assert check.is_within == is_within
    assert str(check).startswith("x in bfloat16: ")
    assert str(check).endswith("out of bounds") != is_within


@pytest.mark.parametrize("name", SABOTAGES)
def test_bfloat16_sabotage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the outputs that bf16=True asked for alone."""
    real = engine.encode

    def encode(owner: Any, stack: Any, *rest: Any, **others: Any) -> Any:
        outputs = real(owner, stack, *rest, **others)
        is_asked = stack.wanted == "bfloat16"
        return [SABOTAGES[name](x) for x in outputs] if outputs is not None and is_asked else outputs

    model, batch = in_bfloat16(), inputs(mask_of(MIXED))
    monkeypatch.setattr(engine, "encode", encode)
    with pytest.raises(VerificationError, match=r"in bfloat16.*out of bounds") as caught:
        bert_fast.verify(model, batch)
    assert all(check.is_within for check in caught.value.result.checks)
    bert_fast.swap(model)
    assert bert_fast.verify(model, batch).is_within


@each_half
@pytest.mark.parametrize("name", SABOTAGES)
def test_bfloat16_sabotage_in_16_bits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.encode

    def encode(*args: Any, **others: Any) -> Any:
        outputs = real(*args, **others)
        return None if outputs is None else [SABOTAGES[name](x.float()).to(dtype) for x in outputs]

    model, batch = bert_fast.swap(build().to(dtype)), inputs(mask_of(MIXED))
    monkeypatch.setattr(engine, "encode", encode)
    with pytest.raises(VerificationError) as caught:
        bert_fast.verify(model, batch)
    assert not caught.value.result.checks[0].is_within


# ---- what the C++ module refuses -------------------------------------------------------------------------------------

TINY = Sizes((3, 1), 2, 6, 5)
TINY_WEIGHTS = draw_weights(TINY)
TINY_ARRAYS = layer_arrays(TINY_WEIGHTS)  # which must outlive the encoders


@pytest.mark.parametrize("name", ["bf16", "float16", "", "BFLOAT16", *([] if HAS_BFLOAT16 else ["bfloat16"])])
def test_bfloat16_products_are_checked(name: str) -> None:
    allowed = '"bfloat16", "float32" or "int8"' if HAS_BFLOAT16 else '"float32" or "int8"'
    with pytest.raises(ValueError, match=f'^products is "{name}"; {allowed} is allowed here$'):
        _C.Encoder(6, 2, 5, "none", name)


@pytest.mark.parametrize("at", range(7))
def test_bfloat16_flags_are_checked(at: int) -> None:
    encoder = _C.Encoder(6, 2, 5, "none", "float32")
    flags = [other == at for other in range(7)]
    with pytest.raises(ValueError, match=r'are_narrow names a linear layer, but .* products are "float32"'):
        encoder.add_layer(TINY_ARRAYS, EPS, EPS, flags, [], 1)


@pytest.mark.parametrize("products", ["float32", "int8", *(["bfloat16"] if HAS_BFLOAT16 else [])])
def test_bfloat16_watched_arrays_are_checked(products: str) -> None:
    encoder = _C.Encoder(6, 2, 5, "none", products)
    for bad, size in (
        (np.zeros(4), 8),
        (np.zeros(4, np.int64), 8),
        (np.zeros(4, np.complex128), 16),
        (np.zeros(8, np.float32)[::2], 4),
        (np.zeros((3, 4), np.int16).T, 2),
    ):
        with pytest.raises(
            ValueError, match=f"watched holds an array of {size} bytes an element; dense ones of at most 4"
        ):
            encoder.add_layer(TINY_ARRAYS, EPS, EPS, layer_flags(NONE), [np.zeros(4, np.float32), bad], 1)
    # A layer that was refused is not there.
    x, out = np.ones((4, 6), np.float32), np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="the encoder has no layers"):
        encoder.run(x, _C.tiles(TINY.cu_seqlens.numpy(), None, 128), 128, None, [], 1)
    encoder.add_layer(TINY_ARRAYS, EPS, EPS, layer_flags(NONE), [], 1)
    encoder.run(x, _C.tiles(TINY.cu_seqlens.numpy(), None, 128), 128, None, [out], 1)
    assert out.any()


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.float16, np.float32], ids=lambda x: x.__name__)
def test_bfloat16_watched_arrays_are_seen(dtype: Any) -> None:
    """With up to eight elements each of them counts; of more the first one does, and others spread over the array."""
    for size in (1, 7, 8, 100):
        encoder = _C.Encoder(6, 2, 5, "none", "float32")
        first, second = np.ones(3, dtype), np.ones(size, dtype)
        encoder.add_layer(
            TINY_ARRAYS, EPS, EPS, layer_flags(NONE), [first, np.zeros(0, dtype), second.reshape(1, -1)], 1
        )
        assert encoder.is_current()
        for array, at in ((first, 2), (second, 0), *((second, at) for at in range(size) if size <= 8)):
            array[at] = 2
            assert not encoder.is_current()
            array[at] = 1
            assert encoder.is_current()
        second *= 2
        assert not encoder.is_current()


# ---- a model that people use -----------------------------------------------------------------------------------------


def test_bfloat16_sentence_transformer() -> None:
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = SentenceTransformer(str(minilm()), device="cpu")
    options = {"batch_size": 7, "convert_to_tensor": True, "show_progress_bar": False}
    expected = model.encode(TEXTS[:10], **options)
    exact = bert_fast.swap(model).encode(TEXTS[:10], **options)
    bert_fast.swap(model, bf16=True)
    found = model.encode(TEXTS[:10], **options)
    assert torch.equal(found, exact) == (not HAS_BFLOAT16)
    (check,) = bert_fast.verify(model, TEXTS[:6]).rounding_checks
    assert check.cosine > 0.9999
    bert_fast.swap(model.bfloat16())
    in_16_bits = model.encode(TEXTS[:10], **options).float()
    for each, bound in ((found, 0.9999), (in_16_bits, 0.9998)):
        assert float(torch.cosine_similarity(each, expected).min()) > bound
