"""bert_fast.functional.gelu, forward and backward, against float64 on every path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tolerance import Place, assert_twice_torch, threads
from torch import Tensor

from bert_fast import functional, reference

CPP = Place("cpp", "cpu", torch.float32)

# Around the blocks of 4 rows and 1,024 columns.
SHAPES = [(1, 1), (3, 7), (5, 1031), (9, 132)]
LARGE_SHAPES = [*((rows, 132) for rows in (1, 2, 63, 64, 65, 257, 4099)), (65, 1536), (63, 3072), (1031, 1031)]

each_kind = pytest.mark.parametrize("approximate", ["none", "tanh"])
each_bias = pytest.mark.parametrize("has_bias", [False, True], ids=["alone", "bias"])


def make_inputs(*shape: int, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[-1:], generator=generator, dtype=torch.float64)
    return x, bias if has_bias else None


def make_grad(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)


def ours(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return functional.gelu(x, bias, approximate)


def torchs(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


def differentiate(
    function: object, x: Tensor, bias: Tensor | None, approximate: str, grad_y: Tensor
) -> dict[str, Tensor]:
    """The result and every gradient, by name."""
    assert callable(function)
    leaves = {name: t.detach().requires_grad_() for name, t in (("x", x), ("bias", bias)) if t is not None}
    y = function(leaves["x"], leaves.get("bias"), approximate)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y))
    return {"y": y.detach(), **{f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def run(
    place: Place, x: Tensor, bias: Tensor | None, approximate: str, grad_y: Tensor | None = None
) -> dict[str, Tensor]:
    with place.forced():
        return differentiate(ours, x, bias, approximate, make_grad(x) if grad_y is None else grad_y)


def check(place: Place, x: Tensor, bias: Tensor | None, approximate: str) -> None:
    grad_y = make_grad(x)
    result, expected = run(place, x, bias, approximate), differentiate(torchs, x, bias, approximate, grad_y)
    exact_inputs = (x.cpu().double(), None if bias is None else bias.cpu().double())
    exact = differentiate(reference.gelu, *exact_inputs, approximate, grad_y.cpu())
    for name, truth in exact.items():
        assert_twice_torch(name, result[name], expected[name], truth)


def put(place: Place, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return place.put(x), None if bias is None else place.put(bias)


@each_kind
@each_bias
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_torchs(place: Place, shape: tuple[int, int], has_bias: bool, approximate: str) -> None:
    check(place, *put(place, *make_inputs(*shape, has_bias=has_bias)), approximate)


@each_kind
@each_bias
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_error_is_at_most_twice_torchs_on_large_shapes(
    fast_place: Place, shape: tuple[int, int], has_bias: bool, approximate: str
) -> None:
    check(fast_place, *put(fast_place, *make_inputs(*shape, has_bias=has_bias)), approximate)


@each_kind
@pytest.mark.parametrize("rows", [8, 19, 41])
def test_backward_programs_that_own_several_blocks(
    triton_place: Place, rows: int, approximate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bert_fast.kernels import gelu

    monkeypatch.setattr(gelu, "BACKWARD_PROGRAMS", 3)
    check(triton_place, *put(triton_place, *make_inputs(rows, 34, has_bias=True)), approximate)


@each_kind
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(place: Place, bias_dtype: torch.dtype, approximate: str) -> None:
    x, bias = put(place, *make_inputs(5, 34, has_bias=True))
    assert bias is not None
    check(place, x, bias.to(bias_dtype), approximate)


@each_kind
@pytest.mark.parametrize("centre", [-8.0, -5.0, -3.0, -1.0, 0.0, 1.0, 3.0, 5.0, 8.0])
def test_error_along_the_curve(place: Place, centre: float, approximate: str) -> None:
    """Unit steps of the argument, each with its own largest value: the tails are small."""
    x = place.put(torch.linspace(centre - 1, centre + 1, 2057, dtype=torch.float64))
    check(place, x[None], None, approximate)


@each_kind
@each_bias
def test_extremes(place: Place, has_bias: bool, approximate: str) -> None:
    """Where exponentials over- or underflow, GELU is x or 0 and its slope 1 or 0."""
    tiny = torch.finfo(place.dtype).smallest_normal
    values = [0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4, 1e-3, 9.0, -9.0, 13.0, -13.0, 25.0, -25.0, 100.0, -100.0]
    x = place.put(torch.tensor([values, values[::-1]], dtype=torch.float64))
    bias = torch.zeros_like(x[0]) if has_bias else None
    result = run(place, x, bias, approximate, torch.ones_like(x))
    for value in result.values():
        assert value.isfinite().all()
    check(place, x, bias, approximate)
    far = x.abs() > 10
    torch.testing.assert_close(result["y"][far], x[far].clamp(min=0), rtol=0, atol=1e-28)
    torch.testing.assert_close(result["gradient of x"][far], (x[far] > 0).to(x), rtol=0, atol=1e-28)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, under the interpreter
@each_kind
def test_nan_stays_where_it_is(place: Place, approximate: str) -> None:
    x, bias = put(place, *make_inputs(3, 34, has_bias=True))
    before = run(place, x, bias, approximate)
    x[1, 5] = torch.nan
    after = run(place, x, bias, approximate)
    for name in ("y", "gradient of x"):
        assert after[name][1, 5].isnan()
        after[name][1, 5] = before[name][1, 5]
        assert torch.equal(after[name], before[name])


@each_kind
@pytest.mark.parametrize("shape", [(0, 34), (2, 0, 7)], ids=str)
def test_no_rows(place: Place, shape: tuple[int, ...], approximate: str) -> None:
    x, bias = put(place, *make_inputs(*shape, has_bias=True))
    assert bias is not None
    result = run(place, x, bias, approximate)
    assert result["y"].shape == result["gradient of x"].shape == shape
    assert torch.equal(result["gradient of bias"], torch.zeros_like(bias))


@each_kind
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5, 7)], ids=str)
def test_leading_dimensions(place: Place, shape: tuple[int, ...], approximate: str) -> None:
    check(place, *put(place, *make_inputs(*shape, has_bias=True)), approximate)


def test_strides_change_nothing(place: Place) -> None:
    if place.path == "torch":
        pytest.skip("torch's own takes another formula for the vector's rest, which depends on strides")
    x, bias = put(place, *make_inputs(6, 34, has_bias=True))
    assert bias is not None
    expected = run(place, x, bias, "none")
    grad_y = make_grad(x).t().contiguous().t()
    result = run(place, x.t().contiguous().t(), bias.repeat_interleave(3)[::3], "none", grad_y)
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


@each_kind
def test_two_runs_are_equal_to_the_bit(place: Place, approximate: str) -> None:
    x, bias = put(place, *make_inputs(41, 34, has_bias=True))
    first, second = (run(place, x, bias, approximate) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@each_kind
@pytest.mark.parametrize("rows", [1, 65, 4099])
def test_cpp_is_equal_to_the_bit_for_any_number_of_threads(rows: int, approximate: str) -> None:
    x, bias = put(CPP, *make_inputs(rows, 132, has_bias=True))
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append(run(CPP, x, bias, approximate))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_kinds_differ(place: Place) -> None:
    """Neither formula stands in for the other: they differ by up to 5e-4."""
    x = place.put(torch.linspace(-4, 4, 801, dtype=torch.float64))[None]
    with place.forced():
        difference = (functional.gelu(x) - functional.gelu(x, approximate="tanh")).abs().max()
    assert 3e-4 < float(difference) < (6e-4 if place.dtype in (torch.float32, torch.float64) else 2e-2)
