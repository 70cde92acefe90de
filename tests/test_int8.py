"""swap(int8=True): products in 8 bits on CPUs, against a twin in plain torch, and what they leave as it was."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from layer_arrays import NAMES, layer_arrays, layer_flags
from models import (
    MIXED,
    TEXTS,
    assert_near,
    inputs,
    mask_of,
    minilm,
    one_thread,  # noqa: F401
    theirs,
)
from tolerance import assert_twice_torch, threads
from torch import Tensor

import bert_fast
from bert_fast import _C, engine, reference
from bert_fast.swap.verify import RoundingCheck, VerificationError

GROUP = 384  # features of a token that share a scale
LARGEST = 127

LENGTHS = (1, 2, 127, 9, 65, 200)
LONG = "\n".join(("1" * length).ljust(200, "0") for length in LENGTHS)
FEW = "11111 11110 01011 00000"

# Below a group, one and several of them; widths at and beside those of quads and vectors.
SHAPES: dict[str, dict[str, Any]] = {
    "51 in 3 heads": {},
    "132 in 3 heads": {"hidden_size": 132, "intermediate_size": 385, "hidden_act": "gelu_new"},
    "400 in 5 heads": {
        "hidden_size": 400,
        "num_attention_heads": 5,
        "intermediate_size": 801,
        "num_hidden_layers": 1,
    },
    "7 in 7 heads": {"hidden_size": 7, "num_attention_heads": 7, "intermediate_size": 1},
}

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def build(**config: Any) -> Any:
    return theirs("BertModel", **{"max_position_embeddings": 200, **config})


def in_8_bits(**config: Any) -> Any:
    return bert_fast.swap(build(**config), int8=True)


def last_state(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return cast("Tensor", model(**batch)[0])


# ---- one layer -------------------------------------------------------------------------------------------------------

EPS = 1e-5


class Sizes(NamedTuple):
    lengths: tuple[int, ...]
    heads: int
    hidden: int
    inner: int

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)


Weights = dict[str, tuple[Tensor, Tensor]]


def lattice(generator: torch.Generator, *shape: int, steps: int = 1) -> Tensor:
    """Multiples of 1 / steps up to 127, which every row and, where there are several, group reaches."""
    values = torch.randint(-LARGEST * steps, LARGEST * steps + 1, shape, generator=generator).float() / steps
    values[..., ::GROUP] = float(LARGEST)
    return values


def draw(sizes: Sizes, seed: int) -> tuple[Weights, Tensor]:
    """A layer and its input. Halves and quarters of a quantum lie on the edge, where rounding is to even."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = sizes.hidden, sizes.inner
    outputs = {"intermediate": (inner, hidden), "output": (hidden, inner)}
    weights: Weights = {}
    for name in NAMES:
        if name.endswith("norm"):
            factor = 1 + 0.3 * torch.randn(hidden, generator=generator)
            weights[name] = factor, 0.2 * torch.randn(hidden, generator=generator)
        else:
            shape = outputs.get(name, (hidden, hidden))
            exponents = torch.randint(-10, -7, (shape[0], 1), generator=generator)
            weight = lattice(generator, *shape, steps=4) * 2.0**exponents
            weights[name] = weight, 0.3 * torch.randn(shape[0], generator=generator)
    rows = sum(sizes.lengths)
    return weights, lattice(generator, rows, hidden, steps=2) * 2.0 ** torch.randint(
        -7, -5, (rows, 1), generator=generator
    )


def run(
    sizes: Sizes, weights: Weights, x: Tensor, flags: list[bool], activation: str = "none", count: int = 1
) -> Tensor:
    encoder = _C.Encoder(sizes.hidden, sizes.heads, sizes.inner, activation, "int8")
    arrays = layer_arrays(weights)
    encoder.add_layer(arrays, EPS, EPS, layer_flags(flags), [], count)
    out = np.zeros((len(x), sizes.hidden), np.float32)
    encoder.run(x.numpy(), _C.tiles(sizes.cu_seqlens.numpy(), None, 128), 128, None, [out], count)
    return torch.from_numpy(out)


class Twin:
    """The layer in plain torch, in the weights' precision.

    Attributes:
        margin: how near a value before rounding came to the middle between two integers, but for those exactly there.
    """

    def __init__(self, sizes: Sizes, weights: Weights, flags: list[bool], activation: str, dtype: torch.dtype) -> None:
        self.sizes, self.activation = sizes, activation
        self.weights = {name: (w.to(dtype), b.to(dtype)) for name, (w, b) in weights.items()}
        self.is_quantised = dict(zip((name for name in NAMES if "norm" not in name), flags, strict=True))
        self.margin = 0.5

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integers and scales (rows, 1)."""
        scale = x.abs().amax(-1, keepdim=True) / LARGEST
        steps = x / torch.where(scale > 0, scale, 1)
        distance = ((steps - steps.floor()) - 0.5).abs()
        self.margin = min(self.margin, *distance[distance > 1e-9].tolist(), 0.5)
        return steps.round(), scale

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[name]
        if not self.is_quantised[name]:
            return x @ weight.T + bias
        columns, scales = self.quantise(weight)
        total = torch.zeros(len(x), len(weight), dtype=x.dtype)
        for start in range(0, x.shape[1], GROUP):
            rows, row_scales = self.quantise(x[:, start : start + GROUP])
            total += (rows @ columns[:, start : start + GROUP].T) * (row_scales * scales.T)
        return total + bias

    def norm(self, name: str, x: Tensor, residual: Tensor) -> Tensor:
        return reference.layer_norm(x, *self.weights[name], EPS, residual)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weights["query"][0].dtype)
        q, k, v = (self.linear(name, x).unflatten(-1, (self.sizes.heads, -1)) for name in NAMES[:3])
        context = reference.attention(q, k, v, self.sizes.cu_seqlens, (self.sizes.hidden // self.sizes.heads) ** -0.5)
        attended = self.norm("attention_norm", self.linear("attention_output", context.flatten(1)), x)
        expanded = reference.gelu(self.linear("intermediate", attended), approximate=self.activation)
        return self.norm("output_norm", self.linear("output", expanded), attended)


TWINS = [
    Sizes((3, 1), 2, 20, 24),
    Sizes((2, 0, 1), 3, 51, 71),
    Sizes((2,), 2, 8, 400),
    Sizes((1, 1), 4, 392, 390),
]

ALL, NONE = [True] * 6, [False] * 6

# In quanta: what the error of float32 in an activation may come to, many times over.
SMALLEST_MARGIN = 3e-4


@pytest.mark.parametrize("activation", ["none", "tanh"])
@pytest.mark.parametrize("sizes", TWINS, ids=lambda sizes: f"{sizes.hidden}-{sizes.inner}")
@pytest.mark.parametrize("flags", [ALL, [True, False] * 3, [False, True] * 3], ids=["all", "even", "odd"])
def test_int8_twin(sizes: Sizes, activation: str, flags: list[bool]) -> None:
    """With the first weights for which no activation is so near an edge that it may be rounded to either side."""
    for seed in range(300):
        weights, x = draw(sizes, seed)
        twin = Twin(sizes, weights, flags, activation, torch.float64)
        exact = twin(x)
        if twin.margin > SMALLEST_MARGIN:
            break
    assert twin.margin > SMALLEST_MARGIN
    torchs = Twin(sizes, weights, flags, activation, torch.float32)(x)
    unquantised = Twin(sizes, weights, NONE, activation, torch.float64)(x)
    found = [run(sizes, weights, x, flags, activation, count) for count in (1, 2, 4)]
    assert_twice_torch("layer", found[0], torchs, exact)
    assert float((exact - unquantised).abs().max()) > 1e-3
    assert all(torch.equal(each, found[0]) for each in found)


def lossless(name: str, sizes: Sizes) -> tuple[Weights, Tensor]:
    """A layer in which the input and the weights of this linear layer are integers up to 127 times powers of two."""
    generator = torch.Generator().manual_seed(4)
    weights, x = draw(sizes, seed=5)
    x = lattice(generator, *x.shape) / 64
    weight = weights[name][0]
    weights[name] = lattice(generator, *weight.shape) / 1024, torch.arange(len(weight)) / 1024.0
    identity = torch.eye(sizes.hidden), torch.zeros(sizes.hidden)
    if name == "attention_output":  # each text is one token, whose value is its context
        weights["value"] = identity
    elif name == "intermediate":
        weights["attention_norm"] = torch.zeros(sizes.hidden), lattice(generator, sizes.hidden) / 64
    elif name == "output":  # GELU leaves these as they are
        values = lattice(generator, sizes.inner).abs()
        weights["intermediate"] = torch.zeros(sizes.inner, sizes.hidden), values * (values > 8)
    return weights, x


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("sizes", [Sizes((1,) * 9, 4, 392, 801), Sizes((1,) * 70, 3, 51, 71)], ids=["wide", "many"])
@pytest.mark.parametrize("name", [name for name in NAMES if "norm" not in name])
def test_int8_exact_products(name: str, sizes: Sizes, count: int) -> None:
    """Where quantising loses nothing, 8 bits give what float32 gives: the sums are exact in both."""
    weights, x = lossless(name, sizes)
    flags = [name == each for each in NAMES if "norm" not in each]
    expected = run(sizes, weights, x, NONE, count=count)
    assert torch.equal(run(sizes, weights, x, flags, count=count), expected)
    weight, bias = weights[name]
    weights[name] = weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 1024, bias
    changed = run(sizes, weights, x, flags, count=count)
    # One token attends to itself alone: neither queries nor keys count.
    assert torch.equal(changed, expected) == (name in ("query", "key"))


@pytest.mark.parametrize("name", ["query", "key"])
def test_int8_exact_scores(name: str) -> None:
    sizes = Sizes((5, 3, 70), 4, 392, 71)
    weights, x = lossless(name, sizes)
    flags = [name == each for each in NAMES if "norm" not in each]
    assert torch.equal(run(sizes, weights, x, flags), run(sizes, weights, x, NONE))


@pytest.mark.parametrize("flags", [ALL, [True, True, False, False, False, False]], ids=["all", "query and key"])
def test_int8_zeros(flags: list[bool]) -> None:
    """Rows and columns of zeros have no scale."""
    sizes = Sizes((3, 1), 2, 20, 24)
    weights, x = draw(sizes, 1)
    for name in ("query", "value", "intermediate", "output"):
        weights[name][0][::3] = 0
    x[1] = 0
    found, expected = run(sizes, weights, x, flags), run(sizes, weights, x, NONE)
    assert_near(found, expected, 0.05)
    for name in NAMES:
        if "norm" not in name:
            weights[name] = torch.zeros_like(weights[name][0]), weights[name][1]
    assert torch.equal(run(sizes, weights, x, flags), run(sizes, weights, x, NONE))


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [FEW, MIXED, LONG], ids=["few", "mixed", "long"])
@each_shape
def test_int8_whatever_the_threads(shape: dict[str, Any], rows: str) -> None:
    model, batch = in_8_bits(**shape), inputs(mask_of(rows))
    expected = last_state(model, batch)
    for count in (2, 4):
        with threads(count):
            engine.forget(model)
            assert torch.equal(last_state(model, batch), expected), count


@pytest.mark.parametrize("count", [1, 2, 4])
@each_shape
def test_int8_whatever_the_batch(shape: dict[str, Any], count: int) -> None:
    model, batch = in_8_bits(**shape), inputs(mask_of(LONG))
    with threads(count):
        together = last_state(model, batch)
        for row, length in enumerate(LENGTHS):
            alone = last_state(model, {name: x[row : row + 1, :length] for name, x in batch.items()})
            assert torch.equal(alone[0], together[row, :length]), length


@each_shape
def test_int8_is_near_and_not_the_same(shape: dict[str, Any]) -> None:
    mask = mask_of(MIXED)
    found = last_state(in_8_bits(**shape), inputs(mask))[mask]
    expected = last_state(bert_fast.swap(build(**shape)), inputs(mask))[mask]
    assert not torch.equal(found, expected)
    assert float(torch.cosine_similarity(found, expected, dim=-1).min()) > 0.98


def test_int8_hidden_states() -> None:
    model, mask = in_8_bits(), mask_of(MIXED)
    with torch.no_grad():
        output = model(**inputs(mask), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], last_state(model, inputs(mask)))
    with torch.no_grad():
        exact = bert_fast.swap(model)(**inputs(mask), output_hidden_states=True).hidden_states
    assert torch.equal(output.hidden_states[0], exact[0])
    assert not torch.equal(output.hidden_states[1], exact[1])


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_int8_bad_weights_show(name: str, bad: float, count: int) -> None:
    model, mask = build(num_hidden_layers=1), mask_of(MIXED)
    model.get_submodule(f"encoder.layer.0.{name}").weight.data[7, 11] = bad
    expected = last_state(model, inputs(mask))[mask].isfinite()
    assert not expected.all()
    with threads(count):
        found = last_state(bert_fast.swap(model, int8=True), inputs(mask))[mask].isfinite()
    assert not (found & ~expected).any()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_int8_bad_inputs_stay_in_their_text(bad: float, count: int) -> None:
    model, mask = in_8_bits(), mask_of(MIXED)
    embeds = torch.randn(8, 13, 51, generator=torch.Generator().manual_seed(2))
    with threads(count):
        clean = last_state(model, {"inputs_embeds": embeds, "attention_mask": mask.long()})
        embeds[3, 4, 5] = bad
        found = last_state(model, {"inputs_embeds": embeds, "attention_mask": mask.long()})
    others = torch.arange(8) != 3
    assert torch.equal(found[others], clean[others])
    assert found[3][mask[3]].isnan().all()


def test_int8_sees_changed_weights() -> None:
    model, batch = in_8_bits(), inputs(mask_of(MIXED))
    before = last_state(model, batch)
    model.encoder.layer[1].output.dense.weight.data.mul_(1.5)
    found = last_state(model, batch)
    assert not torch.equal(found, before)
    assert torch.equal(last_state(copy.deepcopy(model), batch), found)


def test_int8_gradients_are_those_of_float32() -> None:
    batch = inputs(mask_of(MIXED))
    gradients = []
    for model in (in_8_bits(), bert_fast.swap(build())):
        last_state(model, batch)
        output = model(**batch)
        output.pooler_output.square().sum().backward()
        gradients.append([output[0].detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_int8_of_float64() -> None:
    batch = inputs(mask_of(MIXED))
    found = last_state(in_8_bits().double(), batch)
    assert torch.equal(found, last_state(bert_fast.swap(build()).double(), batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_of_16_bits(dtype: torch.dtype) -> None:
    """As the float32 model with the same weights, but for the embeddings, which are summed up in the model's dtype."""
    mask = mask_of(MIXED)
    batch = inputs(mask)
    model = in_8_bits().to(dtype)
    found = last_state(model, batch)
    assert found.dtype == dtype
    assert not torch.equal(found, last_state(bert_fast.swap(model), batch))
    wide = bert_fast.swap(bert_fast.restore(model).float(), int8=True)
    assert_near(found[mask], last_state(wide, batch)[mask].to(dtype), 0.1)  # roundings turn over


# ---- what multiplies in float32 --------------------------------------------------------------------------------------

LAYERS = ("encoder.layer.0", "encoder.layer.1")


@pytest.mark.parametrize(
    "names",
    [
        LAYERS,
        ("",),
        ("encoder",),
        ("encoder.layer",),
        tuple(f"{layer}.{linear}" for layer in LAYERS for linear in LINEARS),
        (
            "encoder.layer.1",
            "encoder.layer.0.attention",
            "encoder.layer.0.intermediate",
            "encoder.layer.0.output.dense",
        ),
    ],
    ids=["layers", "model", "encoder", "list", "linears", "parts"],
)
def test_int8_with_all_exact(names: tuple[str, ...]) -> None:
    batch = inputs(mask_of(MIXED))
    model = bert_fast.swap(build(), int8=True, int8_exact=names)
    assert torch.equal(last_state(model, batch), last_state(bert_fast.swap(build()), batch))


@pytest.mark.parametrize("name", ["encoder.layer.1", *(f"encoder.layer.0.{linear}" for linear in LINEARS)])
def test_int8_with_some_exact(name: str) -> None:
    batch = inputs(mask_of(MIXED))
    states = [
        last_state(bert_fast.swap(build(), int8=int8, int8_exact=exact), batch)
        for int8, exact in ((True, [name]), (True, ()), (False, ()))
    ]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(states, 2))


def test_int8_flags() -> None:
    """The names reach the engine: which linear layers multiply in 8 bits."""
    names = ["encoder.layer.0.attention.self.key", "encoder.layer.1"]
    model = bert_fast.swap(build(), int8=True, int8_exact=names)
    stack = model.bert_fast_family.stack(model)
    assert stack.are_narrow == [[True, False, True, True, True, False, True], [False] * 7]
    assert bert_fast.swap(model).bert_fast_family.stack(model).are_narrow == [[False] * 7] * 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["encoder.layer.2"], r"int8_exact names 'encoder\.layer\.2', which is no module of an encoder"),
        (["encoder.layer.0", "nonsense"], "int8_exact names 'nonsense'"),
        ("encoder.layer.0", r"int8_exact is the string 'encoder\.layer\.0'; a sequence"),
    ],
    ids=["layer", "second", "string"],
)
def test_int8_unknown_names(names: Any, message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        bert_fast.swap(model, int8=True, int8_exact=names)
    assert bert_fast.report(model).encoders == ()


def test_int8_exact_needs_int8() -> None:
    for options in ({}, {"bf16": True}):
        with pytest.raises(ValueError, match=r"int8_exact is \['encoder'\], but int8 is not True"):
            bert_fast.swap(build(), int8_exact=["encoder"], **options)


def test_int8_names_in_a_head() -> None:
    model = theirs("BertForTokenClassification")
    with pytest.raises(ValueError, match=r"int8_exact names 'classifier'.*the encoders are 'bert'"):
        bert_fast.swap(model, int8=True, int8_exact=["classifier"])
    bert_fast.swap(model, int8=True, int8_exact=["bert.encoder.layer.0"])
    reason = next(part.reason for part in bert_fast.report(model).encoders[0].parts if part.name == "layers")
    assert reason.endswith("products in int8 on packed weights, but float32 in encoder.layer.0")


# ---- on and off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [lambda x: bert_fast.swap(x, int8=False), bert_fast.swap], ids=["int8=False", "swap"])
def test_int8_ends(end: Callable[[Any], Any]) -> None:
    batch = inputs(mask_of(MIXED))
    model = bert_fast.swap(build())
    exact = last_state(model, batch)
    assert bert_fast.swap(model, int8=True) is model
    assert not torch.equal(last_state(model, batch), exact)
    assert "products in int8" in str(bert_fast.report(model))
    end(model)
    assert torch.equal(last_state(model, batch), exact)
    assert "8 bits" not in str(bert_fast.report(model))


def test_int8_restore() -> None:
    batch = inputs(mask_of(MIXED))
    model = build()
    entries, expected = set(vars(model)), last_state(model, batch)
    bert_fast.swap(model, int8=True)
    last_state(model, batch)
    bert_fast.restore(model)
    assert set(vars(model)) == entries
    assert torch.equal(last_state(model, batch), expected)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_int8_copies(way: Callable[[Any], Any]) -> None:
    batch = inputs(mask_of(MIXED))
    model = bert_fast.swap(build(), int8=True, int8_exact=["encoder.layer.0.output"])
    expected = last_state(model, batch)
    twin = way(model)
    assert torch.equal(last_state(twin, batch), expected)
    assert bert_fast.report(twin).encoders[0].parts == bert_fast.report(model).encoders[0].parts
    bert_fast.swap(twin)
    assert not torch.equal(last_state(twin, batch), expected)
    assert torch.equal(last_state(model, batch), expected)


def test_int8_leaves_checkpoints_alone(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "model")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bert_fast.swap(model, int8=True)
    last_state(model, inputs(mask_of(MIXED)))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "swapped")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "swapped" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_int8_verify() -> None:
    batch = inputs(mask_of(MIXED))
    result = bert_fast.verify(in_8_bits(), batch)
    (check,) = result.rounding_checks
    assert result.is_within
    assert check.is_within
    assert check.name == "encoder"
    assert 0.98 <= check.cosine < 1 - 1e-7
    assert check.rank_correlation is not None
    assert 0.95 <= check.rank_correlation <= 1
    assert "encoder in int8: smallest cosine of a text" in str(result)
    exact = bert_fast.verify(bert_fast.swap(build()), batch)
    assert exact.rounding_checks == ()
    assert exact.checks == result.checks


def test_int8_verify_leaves_the_model_in_8_bits() -> None:
    model, batch = in_8_bits(), inputs(mask_of(MIXED))
    before = last_state(model, batch)
    bert_fast.verify(model, batch)
    assert torch.equal(last_state(model, batch), before)


def test_int8_verify_of_few_texts() -> None:
    (check,) = bert_fast.verify(in_8_bits(), inputs(mask_of("11111 11100"))).rounding_checks
    assert check.rank_correlation is None
    assert "too few texts to rank" in str(check)


@pytest.mark.parametrize(
    ("cosine", "distance", "ranks", "is_within"),
    [
        (0.98, 0.25, 0.95, True),
        (0.9799, 0.0, 1.0, False),
        (1.0, 0.2501, 1.0, False),
        (1.0, 0.0, 0.9499, False),
        (1.0, 0.0, None, True),
        (float("nan"), 0.0, 1.0, False),
        (1.0, float("nan"), 1.0, False),
        (1.0, 0.0, float("nan"), False),
    ],
)
def test_int8_bounds(cosine: float, distance: float, ranks: float | None, is_within: bool) -> None:
    check = RoundingCheck("x", "int8", cosine, distance, ranks)
    assert check.is_within == is_within
    assert str(check).endswith("out of bounds") != is_within


SABOTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one feature ten times as large": lambda x: x * torch.cat([torch.full((1,), 10.0), torch.ones(x.shape[1] - 1)]),
    "features moved on": lambda x: x.roll(1, -1),
    "tokens moved on": lambda x: x.roll(5, 0),
    "negative": lambda x: -x,
    "zeros": torch.zeros_like,
    "nan": lambda x: x * float("nan"),
    "twice as large": lambda x: 2 * x,
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_int8_sabotage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the outputs in 8 bits alone."""
    real = engine.encode

    def encode(owner: Any, stack: Any, *rest: Any, **others: Any) -> Any:
        outputs = real(owner, stack, *rest, **others)
        is_in_8_bits = any(itertools.chain(*stack.are_narrow))
        return [SABOTAGES[name](x) for x in outputs] if outputs is not None and is_in_8_bits else outputs

    model, batch = in_8_bits(), inputs(mask_of(MIXED))
    monkeypatch.setattr(engine, "encode", encode)
    with pytest.raises(VerificationError, match=r"in int8.*out of bounds") as caught:
        bert_fast.verify(model, batch)
    assert all(check.is_within for check in caught.value.result.checks)
    bert_fast.swap(model)
    assert bert_fast.verify(model, batch).is_within


# ---- a model that people use -----------------------------------------------------------------------------------------


def test_int8_sentence_transformer() -> None:
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = SentenceTransformer(str(minilm()), device="cpu")
    options = {"batch_size": 7, "convert_to_tensor": True, "show_progress_bar": False}
    expected = model.encode(TEXTS, **options)
    bert_fast.swap(model, int8=True)
    found = model.encode(TEXTS, **options)
    cosines = torch.cosine_similarity(found, expected)
    assert float(cosines.min()) >= 0.98
    assert float(cosines.max()) < 1 - 1e-6
    (check,) = bert_fast.verify(model, TEXTS[:6]).rounding_checks
    assert check.cosine >= 0.98
    bert_fast.swap(model)
    assert float((model.encode(TEXTS, **options) - expected).abs().max()) <= 1e-6
