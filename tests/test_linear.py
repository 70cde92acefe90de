"""functional.linear against float64, and the C++ matrix product under every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tolerance import assert_twice_torch, threads
from torch import Tensor

from bert_fast import _C, functional, ops

# (rows, inputs, outputs): one row block and several, depths of one part and several, every width of a last panel.
SHAPES = [(64, 1, 1), (65, 7, 16), (97, 33, 17), (70, 132, 396), (200, 513, 49), (129, 1100, 97), (1500, 40, 24)]


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    """Our product, whatever this machine would choose."""
    with ops.forced_path("cpp"):
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def differentiate(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    leaves = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    y = function(leaves["x"], leaves["weight"], leaves.get("bias"))
    grads = torch.autograd.grad(y, list(leaves.values()), draw(*y.shape, seed=3).to(y))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, int, int], has_bias: bool) -> None:
    rows, inputs, outputs = shape
    x, weight = draw(rows, inputs), draw(outputs, inputs, seed=1)
    bias = draw(outputs, seed=2) if has_bias else None
    found, theirs = differentiate(functional.linear, x, weight, bias), differentiate(F.linear, x, weight, bias)
    exact = differentiate(F.linear, x.double(), weight.double(), None if bias is None else bias.double())
    for name, truth in exact.items():
        assert_twice_torch(name, found[name], theirs[name], truth)
    with torch.no_grad():
        assert torch.equal(functional.linear(x, weight, bias), found["y"])


def test_integers_are_exact() -> None:
    # Sums of integers have no rounding: a wrong term shows, however small.
    x, weight = draw(130, 700).mul(3).round(), draw(60, 700, seed=1).mul(3).round()
    found = differentiate(functional.linear, x, weight, None)
    assert torch.equal(found["y"], (x.double() @ weight.double().t()).float())


@pytest.mark.parametrize("transposes", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_layouts(transposes: tuple[bool, bool]) -> None:
    a = draw(83, 55).round() if not transposes[0] else draw(55, 83).round().t()
    b = draw(55, 77, seed=1).round() if not transposes[1] else draw(77, 55, seed=1).round().t()
    out = np.full((83, 77), np.nan, np.float32)
    _C.matrix_product(a.numpy(), b.numpy(), None, out, 2)
    assert np.array_equal(out, (a.double() @ b.double()).float().numpy())


def test_a_view_of_a_larger_matrix() -> None:
    a, b = draw(90, 40).round()[5:75, 3:30], draw(64, 50, seed=1).round()[10:37, 7:44]
    out = np.empty((70, 37), np.float32)
    _C.matrix_product(a.numpy(), b.numpy(), None, out, 1)
    assert np.array_equal(out, (a.double() @ b.double()).float().numpy())


def test_threads_change_nothing() -> None:
    x, weight, bias = draw(333, 600), draw(100, 600, seed=1), draw(100, seed=2)
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append(differentiate(functional.linear, x, weight, bias))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in ("y", "x", "weight"))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen(frozen: str) -> None:
    tensors = {"x": draw(70, 9), "weight": draw(5, 9, seed=1), "bias": draw(5, seed=2)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    functional.linear(**tensors).sum().backward()
    expected = {name: t.detach().clone().requires_grad_(name != frozen) for name, t in tensors.items()}
    F.linear(expected["x"], expected["weight"], expected["bias"]).sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name == frozen)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected[name].grad)


def test_leading_dimensions_and_strides() -> None:
    x, weight = draw(3, 9, 40, 8).transpose(1, 2)[..., ::2], draw(6, 4, seed=1)
    torch.testing.assert_close(functional.linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(functional.linear(x, weight.t().contiguous().t()), F.linear(x, weight))


def took_ours(monkeypatch: pytest.MonkeyPatch, *args: Any) -> bool:
    real, calls = _C.matrix_product, 0

    def counted(*inner: Any) -> None:
        nonlocal calls
        calls += 1
        real(*inner)

    with monkeypatch.context() as patch:
        patch.setattr(_C, "matrix_product", counted)
        functional.linear(*args)
    return calls > 0


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    many, few, weight = draw(64, 8), draw(63, 8), draw(5, 8)
    assert took_ours(monkeypatch, many, weight)
    assert not took_ours(monkeypatch, few, weight)
    assert not took_ours(monkeypatch, many.double(), weight.double())
    assert not took_ours(monkeypatch, draw(64, 0), draw(5, 0))
    with ops.forced_path("torch"):
        assert not took_ours(monkeypatch, many, weight)
    with torch.autocast("cpu"):
        assert not took_ours(monkeypatch, many, weight)
        assert functional.linear(many, weight).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "path"), [("avx512", "cpp"), ("avx2", "torch"), ("portable", "torch")])
def test_it_is_ours_with_avx512(monkeypatch: pytest.MonkeyPatch, name: str, path: str) -> None:
    monkeypatch.setattr(_C, "instruction_set", lambda: name)
    choice = ops._path._choose.__wrapped__("linear", "cpu", torch.float32, 8, None)
    assert choice.path == path
    assert ("library" in choice.reason) == (path == "torch")


def test_second_derivative_is_refused() -> None:
    x, weight = draw(64, 8).requires_grad_(), draw(5, 8).requires_grad_()
    (grad,) = torch.autograd.grad(functional.linear(x, weight).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (draw(4, 3), draw(5, 2), None, r"\(4, 3\) and weight \(5, 2\)"),
        (draw(4, 3), draw(3), None, r"weight \(3,\)"),
        (draw(4, 3), draw(5, 3), draw(4), r"bias has shape \(4,\); \(5,\)"),
    ],
)
def test_shapes_that_do_not_fit(x: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.linear(x, weight, bias)


@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), r"\(m, k\) and"),
        (np.zeros((2, 3), np.float64), np.zeros((3, 2), np.float32), np.zeros((2, 2), np.float32), "float64"),
        (np.zeros((2, 0), np.float32), np.zeros((0, 2), np.float32), np.zeros((2, 2), np.float32), "k > 0"),
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float32), r"\(2, 2\)"),
        (np.zeros((4, 6), np.float32)[::2, ::2], np.zeros((3, 2), np.float32), np.zeros((2, 2), np.float32), "contig"),
    ],
)
def test_arrays_that_do_not_fit(a: Any, b: Any, out: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.matrix_product(a, b, None, out, 1)
