"""Dropout of attention, layer_norm and embedding: masks against their twin, gradients against float64, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import dropout_twin as twin
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from test_attention import Case
from tolerance import Place, assert_twice_torch, magnitude, threads
from torch import Tensor

from bert_fast import functional, ops

CPP = Place("cpp", "cpu", torch.float32)
EPS = 1e-5

# (seed, stream, rate): negative and wide seeds, the upper half of the key, rates of one step in 2^16 and of none.
DRAWS = [
    (152, 0, 0.5),  # a number of its features is the threshold itself, which is kept
    (-1, 3, 0.1),
    (2**32 + 7, 1, 0.9),
    (-(2**63), 2**20 + 1, 0.3),
    (2**63 - 1, 5, 2**-16),
    (12345, 2, 1e-9),
]
SEED, STREAM, RATE = -987654321987654321, 3, 0.3

Function = Callable[..., Tensor]


@pytest.fixture
def kernel_attention_place(attention_place: Place) -> Place:
    """Where attention has a kernel, which draws the twin's masks."""
    if attention_place.path == "torch":
        pytest.skip("torch draws other masks")
    return attention_place


@pytest.fixture
def triton_attention_place(attention_place: Place) -> Place:
    if attention_place.path != "triton":
        pytest.skip("of Triton's kernels")
    return attention_place


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seed_at(place: Place, seed: int) -> Tensor:
    return torch.tensor([seed], dtype=torch.int64, device=place.device)


def same(x: Tensor, expected: NDArray[np.bool_]) -> bool:
    return np.array_equal(x.cpu().numpy(), expected)


def differentiate(function: Function, inputs: dict[str, Tensor], grad_y: Tensor) -> dict[str, Tensor]:
    """The result y and every gradient, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = function(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y))
    return {"y": y.detach(), **{f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def to_oracle(x: Tensor) -> Tensor:
    return x.cpu().double()


# ---- attention -------------------------------------------------------------------------------------------------------


def score_masks(case: Case, seed: int, stream: int, rate: float) -> list[Tensor]:
    """The twin's masks, (heads, queries, keys) of each sequence."""
    return [
        torch.from_numpy(
            np.stack([twin.keep_scores(seed, stream, start, h, stop - start, keys, rate) for h in range(case.heads)])
        )
        for (start, stop), keys in zip(case.bounds, case.keys, strict=True)
    ]


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    case: Case,
    masks: list[Tensor] | None = None,
    rate: float = 0.0,
) -> Tensor:
    """dropout(softmax(scale * Q K^T + bias)) V, sequence after sequence, in plain torch."""
    scale = case.head_size**-0.5 if case.scale is None else case.scale
    outputs = []
    for index, ((start, stop), keys) in enumerate(zip(case.bounds, case.keys, strict=True)):
        if keys == 0:
            outputs.append(torch.zeros_like(q[start:stop]))
            continue
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start : start + keys]) * scale
        if bias is not None:
            distance = torch.arange(keys)[None] - torch.arange(stop - start)[:, None]
            scores = scores + bias[:, (distance + bias.shape[1] // 2).to(bias.device)]
        near = case.near(stop - start, keys).to(scores.device)
        # A query without keys has zeros, whatever is computed for it.
        scores = torch.where(near | ~near.any(1, keepdim=True), scores, float("-inf"))
        probs = torch.softmax(scores, -1) * near.any(1, keepdim=True)
        if masks is not None:
            probs = torch.where(masks[index].to(probs.device), probs * twin.scale(rate), 0.0)
        outputs.append(torch.einsum("hqk,khd->qhd", probs, v[start : start + keys]))
    return torch.cat(outputs)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, case: Case, **options: Any) -> Tensor:
    cu_seqlens, tiles = case.cu_seqlens.to(q.device), case.tiles.to(q.device)
    return functional.attention(
        q, k, v, cu_seqlens, max(case.lengths), tiles=tiles, scale=case.scale, bias=bias, window=case.window, **options
    )


def check_attention(case: Case, place: Place, inputs: dict[str, Tensor], draws: tuple[int, int, float] | None) -> None:
    """Forward and all gradients, with the twin's mask of (seed, stream, rate) if there is one."""
    inputs = {name: place.put(x) for name, x in inputs.items()}
    grad_out = place.put(draw(*inputs["q"].shape, seed=9))
    options: dict[str, Any] = {}
    expected_options: dict[str, Any] = {}
    if draws is not None:
        seed, stream, rate = draws
        options = {"seed": seed_at(place, seed), "stream": stream, "dropout_p": rate}
        expected_options = {"masks": score_masks(case, seed, stream, rate), "rate": rate}
    with place.forced():
        result = differentiate(partial(attend, case=case, **options), inputs, grad_out)
    expected_formula = partial(formula, case=case, **expected_options)
    expected = differentiate(expected_formula, inputs, grad_out)
    exact_inputs = {name: to_oracle(x) for name, x in inputs.items()}
    exact = differentiate(expected_formula, exact_inputs, to_oracle(grad_out))
    # The gradients of q, k and the bias are differences of terms as large as the gradient of v.
    scale = magnitude(*(exact[f"gradient of {name}"] for name in "qkv"))
    for name, truth in exact.items():
        assert_twice_torch(name, result[name], expected[name], truth, magnitude(truth) if name == "y" else scale)


def kept_scores(case: Case, place: Place, seed: int, stream: int, rate: float) -> list[Tensor]:
    """(heads, queries, keys) of each sequence, read off the result: all probabilities are equal, so a feature is the
    sum of what was kept of four keys, the powers of two."""
    column = torch.cat([torch.arange(length) for length in case.lengths])[:, None]
    powers = torch.where(column // 4 == torch.arange(case.head_size), 2.0 ** (column % 4), 0.0)
    v = place.put(powers[:, None].repeat(1, case.heads, 1))
    with place.forced():
        options: dict[str, Any] = {"seed": seed_at(place, seed), "stream": stream, "dropout_p": rate}
        out = attend(torch.zeros_like(v), torch.zeros_like(v), v, case=case, **options).double().cpu()
    kept = []
    for (start, stop), keys in zip(case.bounds, case.keys, strict=True):
        sums = (out[start:stop] * keys / twin.scale(rate)).round().long()
        bits = sums[..., None] >> torch.arange(4) & 1
        kept.append(bits.flatten(2)[..., :keys].transpose(0, 1) != 0)
    return kept


@pytest.mark.parametrize(("seed", "stream", "rate"), DRAWS)
def test_kept_scores_are_the_twins(kernel_attention_place: Place, seed: int, stream: int, rate: float) -> None:
    case = Case((33, 0, 1, 66), 2, 17, num_keys=(33, 0, 1, 50))
    masks = score_masks(case, seed, stream, rate)
    for kept, mask in zip(kept_scores(case, kernel_attention_place, seed, stream, rate), masks, strict=True):
        assert same(kept, mask.numpy())


def test_kept_scores_beyond_a_tile(kernel_attention_place: Place) -> None:
    case = Case((5, 131), 1, 33)
    (_, kept), (_, mask) = kept_scores(case, kernel_attention_place, 7, 1, 0.5), score_masks(case, 7, 1, 0.5)
    assert same(kept, mask.numpy())


@pytest.mark.parametrize("sizes", [(16, 64), (64, 16), (128, 32)], ids=str)
def test_launch_sizes_change_no_mask(
    triton_attention_place: Place, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bert_fast.kernels import attention
    from bert_fast.kernels._launch import Launch

    launch = Launch(*sizes, num_warps=4, num_stages=1)
    monkeypatch.setattr(attention, "forward_launch", lambda *_, **__: launch)
    monkeypatch.setattr(attention, "backward_launch", lambda *_, **__: launch)
    place, case, draws = triton_attention_place, Case((70, 3), 1, 18), (SEED, STREAM, RATE)
    for kept, mask in zip(kept_scores(case, place, *draws), score_masks(case, *draws), strict=True):
        assert same(kept, mask.numpy())
    inputs = {name: draw(73, 1, 18, seed=seed) for seed, name in enumerate("qkv")}
    check_attention(case, place, inputs, draws)


ATTENTION_CASES = [
    (Case((33, 0, 1, 35), 2, 16), 0.1),
    (Case((5, 64), 2, 7, num_keys=(0, 41), scale=0.31), 0.5),
    (Case((35, 2), 1, 80), 0.9),
    (Case((129,), 1, 16, num_keys=(97,)), 0.5),
    (Case((90, 40), 2, 16, num_keys=(90, 11), window=17), 0.3),
]


@pytest.mark.parametrize(("case", "rate"), ATTENTION_CASES, ids=str)
def test_attention_with_the_twins_mask(kernel_attention_place: Place, case: Case, rate: float) -> None:
    shape = (sum(case.lengths), case.heads, case.head_size)
    inputs = {name: 0.3 + draw(*shape, seed=seed) for seed, name in enumerate("qkv")}
    check_attention(case, kernel_attention_place, inputs, (SEED, STREAM, rate))


def test_attention_backward_replays_the_mask(kernel_attention_place: Place) -> None:
    """Of each kernel: what reaches v is the mask itself, what reaches q and k is positive where a score was kept."""
    place, case, size = kernel_attention_place, Case((37,), 1, 64), 64
    mask = score_masks(case, SEED, STREAM, 0.5)[0][0].numpy()
    identity = place.put(torch.eye(37, size, dtype=torch.float64))[:, None]
    zeros, first = torch.zeros_like(identity), torch.zeros_like(identity)
    first[..., 0] = 1

    def gradient(name: str, grad_out: Tensor, **inputs: Tensor) -> Tensor:
        function = partial(attend, case=case, seed=seed_at(place, SEED), stream=STREAM, dropout_p=0.5)
        with place.forced():
            return differentiate(function, inputs, grad_out)[f"gradient of {name}"][:, 0, :37]

    assert same(gradient("v", identity, q=zeros, k=zeros, v=zeros) != 0, mask.T)
    # Every row keeps some scores and drops some, so a kept one gains and a dropped one loses.
    assert mask.any(1).all()
    assert not mask.all(1).any()
    assert same(gradient("q", first, q=zeros, k=identity, v=first) > 0, mask)
    assert same(gradient("k", first, q=identity, k=zeros, v=first) > 0, mask.T)


# ---- features --------------------------------------------------------------------------------------------------------


WIDTH = 264 + 7  # many counters, the last of them not of eight features


@pytest.mark.parametrize(("seed", "stream", "rate"), DRAWS)
def test_kept_features_of_layer_norm_are_the_twins(kernel_place: Place, seed: int, stream: int, rate: float) -> None:
    """The statistics undo the normalisation: what was normalised is the scale or zero."""
    x = kernel_place.put(torch.ones(4, WIDTH))
    weight = torch.ones_like(x[0])
    extras = (None, seed_at(kernel_place, seed), stream, rate)
    with kernel_place.forced():
        y, mean, rstd = ops.launch_layer_norm(x, None, weight, torch.zeros_like(weight), 1e-12, *extras)
    assert mean is not None
    assert rstd is not None
    summed = y.double() / rstd.double()[:, None] + mean.double()[:, None]
    assert same(summed > twin.scale(rate) / 2, twin.keep_features(seed, stream, 4, WIDTH, rate))


@pytest.mark.parametrize(("seed", "stream", "rate"), DRAWS)
def test_kept_features_of_embedding_are_the_twins(triton_place: Place, seed: int, stream: int, rate: float) -> None:
    """Before dropout every feature is one."""
    table = triton_place.put(torch.ones(3, WIDTH))
    ids = torch.zeros(4, dtype=torch.int64, device=triton_place.device)
    with triton_place.forced():
        y = functional.embedding(
            table, table, table, ids, ids, None, torch.zeros_like(table[0]), torch.ones_like(table[0]),
            dropout_p=rate, seed=seed_at(triton_place, seed), stream=stream,
        )  # fmt: skip
    mask = twin.keep_features(seed, stream, 4, WIDTH, rate)
    assert same(y != 0, mask)
    eps = torch.finfo(y.dtype).eps  # the interpreter rounds to bfloat16 towards zero
    np.testing.assert_allclose(y[y != 0].double().cpu(), twin.scale(rate), rtol=eps)


def layer_norm_inputs(place: Place, rows: int, width: int, *, has_residual: bool) -> dict[str, Tensor]:
    inputs = {
        "x": -2.3 + 0.5 * draw(rows, width),
        "input_bias": 0.4 + draw(width, seed=1),
        "weight": 1 + 0.3 * draw(width, seed=2),
        "bias": 0.5 * draw(width, seed=3),
    }
    if has_residual:
        inputs["residual"] = 1.1 + 0.7 * draw(rows, width, seed=4)
    return {name: place.put(x) for name, x in inputs.items()}


def normalise_dropped(mask: Tensor, rate: float) -> Function:
    """layer_norm with this mask, in plain torch."""

    def function(x: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        x = torch.where(mask.to(x.device), (x + input_bias) * twin.scale(rate), 0.0)
        x = x if residual is None else x + residual
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    return function


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", [(5, 2), (3, 131)], ids=str)
@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.5])  # of the first nothing is dropped
def test_layer_norm_with_the_twins_mask(
    kernel_place: Place, shape: tuple[int, int], rate: float, has_residual: bool
) -> None:
    place = kernel_place
    inputs = layer_norm_inputs(place, *shape, has_residual=has_residual)
    grad_y = place.put(draw(*shape, seed=9))
    options: dict[str, Any] = {"dropout_p": rate, "seed": seed_at(place, SEED), "stream": STREAM}
    with place.forced():
        result = differentiate(partial(functional.layer_norm, eps=EPS, **options), inputs, grad_y)
    mask = torch.from_numpy(twin.keep_features(SEED, STREAM, *shape, rate))
    function = normalise_dropped(mask, rate)
    expected = differentiate(function, inputs, grad_y)
    exact = differentiate(function, {name: to_oracle(x) for name, x in inputs.items()}, to_oracle(grad_y))
    for name, truth in exact.items():
        assert_twice_torch(name, result[name], expected[name], truth)
    assert same(result["gradient of x"] == 0, ~mask.numpy())


def test_programs_that_own_several_rows_replay_the_mask(triton_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_fast.kernels import layer_norm

    monkeypatch.setattr(layer_norm, "BACKWARD_PROGRAMS", 3)
    test_layer_norm_with_the_twins_mask(triton_place, (7, 34), 0.5, True)


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
def test_layer_norms_operators_are_registered_as_torch_wants_it(kernel_place: Place, has_residual: bool) -> None:
    if kernel_place.dtype != torch.float32:
        pytest.skip("one format is enough")
    inputs = layer_norm_inputs(kernel_place, 3, 7, has_residual=has_residual)
    x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
    input_bias = None if kernel_place.path == "cpp" else inputs["input_bias"]
    residual, extras = inputs.get("residual"), (seed_at(kernel_place, SEED), STREAM, RATE)
    with kernel_place.forced():
        _, mean, rstd = torch.ops.bert_fast.layer_norm(x, residual, weight, bias, EPS, input_bias, *extras)
        backward = torch.library.opcheck(
            torch.ops.bert_fast.layer_norm_backward.default,
            (torch.ones_like(x), x, residual, weight, mean, rstd, input_bias, *extras),
        )
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, residual, weight, bias, input_bias)]
        forward = torch.library.opcheck(torch.ops.bert_fast.layer_norm.default, (*leaves[:4], EPS, leaves[4], *extras))
    for result in (forward, backward):
        assert set(result.values()) == {"SUCCESS"}


def embedding_inputs(place: Place, width: int) -> dict[str, Tensor]:
    inputs = {
        "word": draw(11, width),
        "position": draw(7, width, seed=1),
        "token_type": draw(2, width, seed=2),
        "weight": 1 + 0.3 * draw(width, seed=3),
        "bias": 0.5 + draw(width, seed=4),
    }
    return {name: place.put(x) for name, x in inputs.items()}


@pytest.mark.parametrize("width", [2, 131])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_embedding_with_the_twins_mask(triton_place: Place, width: int, rate: float) -> None:
    place = triton_place
    inputs, grad_y = embedding_inputs(place, width), place.put(draw(6, width, seed=9))
    ids = torch.tensor([3, 3, 0, 10, 3, 5], device=place.device)
    positions = torch.tensor([0, 1, 2, 0, 1, 6], device=place.device)
    types = torch.tensor([0, 1, 1, 0, 0, 0], device=place.device)
    mask = torch.from_numpy(twin.keep_features(SEED, STREAM, 6, width, rate))

    def ours(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.embedding(
            word, position, token_type, ids, positions, types, weight, bias, EPS,
            dropout_p=rate, seed=seed_at(place, SEED), stream=STREAM,
        )  # fmt: skip

    def torchs(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        device = word.device
        x = F.embedding(ids.to(device), word) + F.embedding(types.to(device), token_type)
        x = x + F.embedding(positions.to(device), position)
        y = F.layer_norm(x, (width,), weight, bias, EPS)
        return torch.where(mask.to(y.device), y * twin.scale(rate), 0.0)

    with place.forced():
        result = differentiate(ours, inputs, grad_y)
    expected = differentiate(torchs, inputs, grad_y)
    exact = differentiate(torchs, {name: to_oracle(x) for name, x in inputs.items()}, to_oracle(grad_y))
    for name, truth in exact.items():
        assert_twice_torch(name, result[name], expected[name], truth)
    assert same(result["y"] == 0, ~mask.numpy())


def test_embedding_backward_replays_the_mask(triton_place: Place) -> None:
    """The bias of a single row receives a gradient where the row was kept."""
    inputs = embedding_inputs(triton_place, 70)
    zero = torch.zeros(1, dtype=torch.int64, device=triton_place.device)

    def ours(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.embedding(
            word, position, token_type, zero, zero, None, weight, bias, dropout_p=0.5, seed=seed_at(triton_place, SEED)
        )

    with triton_place.forced():
        result = differentiate(ours, inputs, torch.ones(1, 70))
    assert same(result["gradient of bias"][None] != 0, twin.keep_features(SEED, 0, 1, 70, 0.5))


# ---- every function --------------------------------------------------------------------------------------------------


CASE = Case((7, 2), 2, 16)


def attention_of(x: Tensor, **options: Any) -> Tensor:
    q = x.view(9, 2, 16)
    return attend(q, q, q, case=CASE, **options)


def layer_norm_of(x: Tensor, **options: Any) -> Tensor:
    return functional.layer_norm(x, x[0], x[1], EPS, x + 1, input_bias=x[2], **options)


def embedding_of(x: Tensor, **options: Any) -> Tensor:
    ids = torch.arange(9, device=x.device)
    return functional.embedding(x, x, x, ids, ids, None, x[0], x[1], EPS, **options)


each_function = pytest.mark.parametrize("function", [attention_of, layer_norm_of, embedding_of])


@each_function
def test_without_a_rate_nothing_is_dropped(attention_place: Place, function: Function) -> None:
    x = attention_place.put(draw(9, 32))
    with attention_place.forced():
        expected = function(x)
        result = function(x, dropout_p=0.0, seed=seed_at(attention_place, 3), stream=5)
        assert not torch.equal(function(x, dropout_p=0.5), expected)
    assert torch.equal(result, expected)


@each_function
def test_a_seed_repeats_the_mask(triton_attention_place: Place, function: Function) -> None:
    x = triton_attention_place.put(draw(9, 32)).requires_grad_()
    with triton_attention_place.forced():
        first, second, other_seed, other_stream = (
            function(x, dropout_p=0.5, seed=seed_at(triton_attention_place, seed), stream=stream)
            for seed, stream in ((3, 1), (3, 1), (4, 1), (3, 2))
        )
        with torch.no_grad():  # without the dispatcher
            third = function(x, dropout_p=0.5, seed=seed_at(triton_attention_place, 3), stream=1)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, other_stream)


@each_function
def test_without_a_seed_torchs_generator_draws_one(attention_place: Place, function: Function) -> None:
    x = attention_place.put(draw(9, 32))
    with attention_place.forced(), torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = (function(x, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(1)
        again = function(x, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@each_function
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_rates_outside_0_and_1_are_refused(attention_place: Place, function: Function, rate: float) -> None:
    x = attention_place.put(draw(9, 32))
    with attention_place.forced(), pytest.raises(ValueError, match=rf"dropout_p is {rate}; it must lie in \[0, 1\)"):
        function(x, dropout_p=rate)


def test_drawn_seeds_differ_and_fill_63_bits() -> None:
    seeds = torch.cat([functional.draw_seed(torch.device("cpu")) for _ in range(200)])
    assert seeds.dtype == torch.int64
    assert len(seeds.unique()) == 200
    assert bool((seeds >= 0).all())  # a difference of bounds that fits 64 bits is what compilers take
    for bit in range(63):
        ones = (seeds >> bit & 1).sum()
        assert 50 < ones < 150, f"bit {bit} is set in {ones} of 200"


# ---- C++ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_attention_on_cpp_is_the_same_on_any_number_of_threads(count: int) -> None:
    case = Case((200, 100, 3), 3, 20)
    inputs = {name: draw(303, 3, 20, seed=seed).float() for seed, name in enumerate("qkv")}
    results = []
    for number in (1, count):
        with threads(number), CPP.forced():
            function = partial(attend, case=case, dropout_p=0.3, seed=torch.tensor([5]))
            results.append(differentiate(function, inputs, draw(303, 3, 20, seed=9).float()))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


@pytest.mark.parametrize("rows", [1, 65, 301])
def test_layer_norm_on_cpp_is_the_same_on_any_number_of_threads(rows: int) -> None:
    inputs = layer_norm_inputs(CPP, rows, 131, has_residual=True)
    function = partial(functional.layer_norm, eps=EPS, dropout_p=0.3, seed=torch.tensor([SEED]), stream=STREAM)
    results = []
    for count in (1, 3):
        with threads(count), CPP.forced():
            results.append(differentiate(function, inputs, draw(rows, 131, seed=9).float()))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


def test_layer_norm_on_cpp_tells_rows_apart() -> None:
    """Rows of equal values are dropped each in its own way, in the backward pass as in the forward pass."""
    function = partial(functional.layer_norm, eps=EPS, dropout_p=0.5, seed=torch.tensor([SEED]), stream=STREAM)
    ones = torch.ones(67, 131)
    with CPP.forced():
        found = differentiate(lambda x: function(x, ones[0], ones[0]), {"x": ones}, draw(67, 131, seed=9))
    assert same(found["gradient of x"] == 0, ~twin.keep_features(SEED, STREAM, 67, 131, 0.5))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_embedding_on_cpp_drops_as_torch(rate: float) -> None:
    table, ids = torch.ones(3, 200), torch.zeros(100, dtype=torch.int64)
    with CPP.forced():
        y = functional.embedding(table, table, table, ids, ids, None, 0 * table[0], table[0], EPS, dropout_p=rate)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / (1 - rate)]))
    assert abs(int((y == 0).sum()) - rate * 20_000) < 5 * math.sqrt(rate * (1 - rate) * 20_000)


def test_input_bias(place: Place) -> None:
    """Without dropout, on every path."""
    inputs = layer_norm_inputs(place, 5, 70, has_residual=True)
    grad_y = place.put(draw(5, 70, seed=9))
    with place.forced():
        result = differentiate(partial(functional.layer_norm, eps=EPS), inputs, grad_y)
    function = normalise_dropped(torch.ones(5, 70, dtype=torch.bool), 0.0)
    expected = differentiate(function, inputs, grad_y)
    exact = differentiate(function, {name: to_oracle(x) for name, x in inputs.items()}, to_oracle(grad_y))
    for name, truth in exact.items():
        assert_twice_torch(name, result[name], expected[name], truth)


# ---- the twin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)  # fmt: skip
def test_philox_gives_its_authors_numbers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """philox4x32 with seven rounds, from Random123's known answers."""
    assert tuple(twin.philox(counter, key).tolist()) == words


@pytest.mark.parametrize("rate", [0.0, 1e-6, 2**-16, 0.1, 0.5, 0.9, 1 - 2**-16, 0.9999999])
def test_threshold_and_scale_are_the_twins(triton_place: Place, rate: float) -> None:
    del triton_place  # says whether Triton is there
    from bert_fast.kernels import _random

    assert _random.threshold(rate) == twin.steps(rate)
    assert _random.scale(rate) == pytest.approx(twin.scale(rate), rel=1e-15)
    assert abs(twin.steps(rate) / 2**16 - rate) <= 2**-16


def score_samples(rate: float) -> NDArray[np.bool_]:
    return np.stack([twin.keep_scores(SEED, 0, 1000 * i, i, 512, 512, rate) for i in range(4)])


def feature_samples(rate: float) -> NDArray[np.bool_]:
    return twin.keep_features(SEED, 0, 1024, 1024, rate)


@pytest.mark.parametrize("samples", [score_samples, feature_samples])
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_rate_holds_and_the_expectation_is_kept(samples: Callable[[float], NDArray[np.bool_]], rate: float) -> None:
    kept = samples(rate)
    true_rate = twin.steps(rate) / 2**16
    error = math.sqrt(true_rate * (1 - true_rate) / kept.size)
    assert abs((1 - kept.mean()) - true_rate) < 5 * error
    assert abs(kept.mean() * twin.scale(rate) - 1) < 5 * error * twin.scale(rate)
    # No column, row or place in a group of eight is preferred.
    for axis in range(kept.ndim):
        means = kept.mean(tuple(other for other in range(kept.ndim) if other != axis))
        assert abs(means - (1 - true_rate)).max() < 5.5 * error * math.sqrt(kept.shape[axis])


def agreement(x: NDArray[np.bool_], y: NDArray[np.bool_]) -> float:
    """How many standard errors the share of equal elements is from that of independent masks."""
    p, q = x.mean(), y.mean()
    expected = p * q + (1 - p) * (1 - q)
    return float(abs((x == y).mean() - expected) / math.sqrt(expected * (1 - expected) / x.size))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_of_other_places_are_independent(rate: float) -> None:
    def scores(seed: int = 5, stream: int = 1, start: int = 64, head: int = 1) -> NDArray[np.bool_]:
        return twin.keep_scores(seed, stream, start, head, 256, 256, rate)

    others = [scores(seed=6), scores(seed=5 + 2**32), scores(stream=0), scores(stream=2), scores(start=65)]
    others += [scores(head=0), scores(head=2), scores(seed=-5)]
    for other in others:
        assert agreement(scores(), other) < 5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_in_a_mask_are_independent(rate: float) -> None:
    """Also those that share a counter: eight keys apart, eight queries apart, in one group of eight features."""
    scores, features = twin.keep_scores(5, 1, 0, 0, 512, 512, rate), twin.keep_features(5, 1, 512, 512, rate)
    for mask in (scores, features):
        for shift in (1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32):
            assert agreement(mask[shift:], mask[:-shift]) < 5
            assert agreement(mask[:, shift:], mask[:, :-shift]) < 5
