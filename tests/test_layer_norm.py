"""bert_fast.functional.layer_norm, forward and backward, against float64 on every path."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tolerance import Place, assert_twice_torch, threads
from torch import Tensor

from bert_fast import functional, ops, reference

CPP = Place("cpp", "cpu", torch.float32)
EPS = 1e-12

# Few rows, and features around the kernels' powers of two.
SHAPES = [(31, 2), (65, 7), (3, 132), (2, 384), (2, 768), (1, 1024), (2, 1031)]
LARGE_SHAPES = [
    *((rows, 132) for rows in (1, 2, 31, 63, 64, 65, 127, 257, 4099)),
    *((65, width) for width in (2, 7, 384, 768, 1024, 1031)),
    (4099, 1031),
    (3, ops.MAX_LAYER_NORM_WIDTH),
]


class Inputs(NamedTuple):
    """
    Attributes:
        x: (..., width), far from zero.
        residual: the same, or None.
        weight, bias: (width,).
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype, residual_dtype: torch.dtype, weight_dtype: torch.dtype, device: str) -> Inputs:
        return Inputs(
            self.x.to(device, dtype),
            None if self.residual is None else self.residual.to(device, residual_dtype),
            self.weight.to(device, weight_dtype),
            self.bias.to(device, weight_dtype),
        )

    def at(self, place: Place) -> Inputs:
        return self.to(place.dtype, place.dtype, place.dtype, place.device)

    def leaves(self) -> Inputs:
        residual = None if self.residual is None else self.residual.detach().requires_grad_()
        x, weight, bias = (t.detach().requires_grad_() for t in (self.x, self.weight, self.bias))
        return Inputs(x, residual, weight, bias)


Function = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


def make_inputs(*shape: int, has_residual: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    x, residual = -2.3 + 0.5 * draw(*shape), -2.3 + 0.5 * draw(*shape)
    return Inputs(x, residual if has_residual else None, 1 + 0.3 * draw(shape[-1]), 0.5 * draw(shape[-1]))


def make_grad(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)


def differentiate(function: Function, inputs: Inputs, grad_y: Tensor | None = None) -> dict[str, Tensor]:
    """The result and every gradient, by name; grad_y None: random."""
    leaves = inputs.leaves()
    y = function(*leaves)
    named = {name: leaf for name, leaf in leaves._asdict().items() if leaf is not None}
    grads = torch.autograd.grad(y, list(named.values()), make_grad(y) if grad_y is None else grad_y.to(y))
    return {"y": y.detach(), **{f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True)}}


def ours(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    return functional.layer_norm(x, weight, bias, eps, residual)


def torchs(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """torch's own, in the dtype of x + residual."""
    x = x if residual is None else x + residual
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def oracle(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    return reference.layer_norm(x, weight, bias, eps, residual)


def run(place: Place, inputs: Inputs, grad_y: Tensor | None = None, eps: float = EPS) -> dict[str, Tensor]:
    with place.forced():
        return differentiate(partial(ours, eps=eps), inputs, grad_y)


def check(place: Place, inputs: Inputs, eps: float = EPS) -> None:
    result, expected = run(place, inputs, eps=eps), differentiate(partial(torchs, eps=eps), inputs)
    exact_inputs = inputs.to(torch.float64, torch.float64, torch.float64, "cpu")
    exact = differentiate(partial(oracle, eps=eps), exact_inputs, make_grad(expected["y"]))
    for name, truth in exact.items():
        assert_twice_torch(name, result[name], expected[name], truth)


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_torchs(place: Place, shape: tuple[int, int], has_residual: bool) -> None:
    check(place, make_inputs(*shape, has_residual=has_residual).at(place))


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_error_is_at_most_twice_torchs_on_large_shapes(
    fast_place: Place, shape: tuple[int, int], has_residual: bool
) -> None:
    inputs = make_inputs(*shape, has_residual=has_residual)
    check(fast_place, inputs.at(fast_place))


@pytest.mark.parametrize("rows", [4, 5, 6, 11])
def test_backward_programs_that_own_several_rows(
    triton_place: Place, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bert_fast.kernels import layer_norm

    monkeypatch.setattr(layer_norm, "BACKWARD_PROGRAMS", 5)
    check(triton_place, make_inputs(rows, 34, has_residual=True).at(triton_place))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(place: Place, residual_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    if place.dtype == torch.float64:
        pytest.skip("float64 is mixed with nothing")
    inputs = make_inputs(5, 132, has_residual=True).to(place.dtype, residual_dtype, weight_dtype, place.device)
    y = run(place, inputs)["y"]
    assert y.dtype == torch.promote_types(place.dtype, residual_dtype)
    check(place, inputs)


def test_eps_is_added_to_the_variance(place: Place) -> None:
    inputs = make_inputs(5, 34, has_residual=True).at(place)
    inputs.x[2], inputs.x[3] = 1.5, inputs.x[3] * 1e-3  # rows without and with hardly any variance
    assert inputs.residual is not None
    inputs.residual[2:4] = -0.5
    check(place, inputs, eps=0.3)


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
def test_one_feature_is_its_own_mean(place: Place, has_residual: bool) -> None:
    if place.path == "torch":
        pytest.skip("torch's own subtracts the mean after it has scaled, and is off by more than the bias in float16")
    inputs = make_inputs(5, 1, has_residual=has_residual).at(place)
    with place.forced(), torch.no_grad():
        y = ours(*inputs)
    assert torch.equal(y, inputs.bias.expand(5, 1))


@pytest.mark.parametrize("shape", [(0, 132), (2, 0, 7)], ids=str)
def test_no_rows(place: Place, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(*shape, has_residual=True).at(place)
    result = run(place, inputs)
    assert result["y"].shape == shape
    assert result["gradient of residual"].shape == shape
    for name in ("weight", "bias"):
        assert torch.equal(result[f"gradient of {name}"], torch.zeros_like(inputs.weight))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 5, 7)], ids=str)
def test_leading_dimensions(place: Place, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(*shape, has_residual=True).at(place)
    check(place, inputs)


def test_strides_change_nothing(place: Place) -> None:
    inputs = make_inputs(6, 34, has_residual=True).at(place)
    assert inputs.residual is not None
    expected = run(place, inputs)
    strided = [
        inputs.x.t().contiguous().t(),
        torch.cat((inputs.residual, inputs.residual), 1)[:, :34],
        inputs.weight.repeat_interleave(3)[::3],
        torch.stack((inputs.bias, inputs.bias), 1)[:, 1],
    ]
    result = run(place, Inputs(*strided), make_grad(inputs.x).t().contiguous().t())
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("factor", [100.0, math.nan])
def test_no_row_sees_another(place: Place, factor: float) -> None:
    inputs = make_inputs(5, 132, has_residual=True).at(place)
    before = run(place, inputs)
    inputs.x[2] = inputs.x[2] * factor - 1  # scaling alone would change nothing
    after = run(place, inputs)
    others = torch.tensor([0, 1, 3, 4], device=place.device)
    for name in ("y", "gradient of x", "gradient of residual"):
        assert torch.equal(before[name][others], after[name][others])
        assert not torch.equal(before[name][2], after[name][2])
    if math.isnan(factor):
        assert after["y"][2].isnan().all()
        assert after["gradient of x"][2].isnan().all()


def test_two_runs_are_equal_to_the_bit(place: Place) -> None:
    inputs = make_inputs(33, 34, has_residual=True).at(place)
    first, second = run(place, inputs), run(place, inputs)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("rows", [1, 65, 4099])
def test_cpp_is_equal_to_the_bit_for_any_number_of_threads(rows: int) -> None:
    inputs = make_inputs(rows, 132, has_residual=True).at(CPP)
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append(run(CPP, inputs))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_without_statistics_the_result_is_the_same(place: Place) -> None:
    if place.path == "torch":
        pytest.skip("torch's path returns no statistics")
    inputs = make_inputs(5, 132, has_residual=True).at(place)
    with place.forced():
        y, mean, rstd = ops.launch_layer_norm(*inputs, EPS, has_statistics=True)
        same, none_mean, none_rstd = ops.launch_layer_norm(*inputs, EPS, has_statistics=False)
    assert torch.equal(y, same)
    assert none_mean is None
    assert none_rstd is None
    assert mean is not None
    assert rstd is not None
    assert mean.dtype == rstd.dtype == torch.float32
    x = sum(t.double() for t in inputs[:2] if t is not None)
    assert isinstance(x, Tensor)
    torch.testing.assert_close(mean.double(), x.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), x.var(-1, correction=0).rsqrt(), rtol=2e-6, atol=0)
