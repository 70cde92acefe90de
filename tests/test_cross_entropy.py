"""bert_fast.functional.linear_cross_entropy, forward and backward, against float64 on every path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from test_dropout import draw
from tolerance import Place, assert_twice_torch, magnitude
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bert_fast import functional, ops

IGNORED = functional.IGNORED


class Case(NamedTuple):
    """
    Attributes:
        rows, classes, width: sizes.
        has_bias: whether there is one.
        ignored: every so many-th row does not count; 0: all count.
        factor: of the logits.
    """

    rows: int
    classes: int
    width: int
    has_bias: bool = True
    ignored: int = 0
    factor: float = 1.0

    def __str__(self) -> str:
        parts = [f"{self.rows}x{self.classes}x{self.width}", "bias" if self.has_bias else "no_bias"]
        parts += [f"ignored{self.ignored}"] if self.ignored else []
        return "-".join(parts + ([f"factor{self.factor:g}"] if self.factor != 1 else []))


class Inputs(NamedTuple):
    """x (rows, width), weight (classes, width), bias (classes,) or None, targets (rows,)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor


CASES = [
    Case(1, 1, 1),
    Case(5, 2, 7, has_bias=False),
    Case(67, 37, 13, ignored=3),
    Case(4, 131, 5, ignored=2, has_bias=False),
    Case(3, 1031, 7),
    Case(9, 67, 5, factor=30.0),
]

SMALL = Case(7, 131, 5, ignored=3)

Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows a chunk and 64 classes a block, so that every loop turns more than once."""
    from bert_fast.ops import cross_entropy as op

    monkeypatch.setattr(op, "CHUNK_BYTES", 1)
    if ops.has_triton():
        from bert_fast.kernels import cross_entropy as kernel

        monkeypatch.setattr(kernel, "LAUNCH", kernel.LAUNCH._replace(columns=64, num_warps=2))


@pytest.fixture
def loss_place(place: Place) -> Place:
    if place.dtype == torch.float64:
        pytest.skip("the loss is computed in float32")
    return place


def make_inputs(case: Case, place: Place) -> Inputs:
    """Targets at both ends and in the middle; the ignored ones are negative in several ways."""
    targets = torch.randint(case.classes, (case.rows,), generator=torch.Generator().manual_seed(5))
    targets[:1], targets[1:2] = case.classes - 1, 0
    if case.ignored:
        number = torch.arange(case.rows)
        negative = torch.tensor([IGNORED, -1, -(2**40)])[number % 3]
        targets = torch.where(number % case.ignored == case.ignored - 1, negative, targets)
    weight = (0.2 + draw(case.classes, case.width, seed=1)) * case.factor / math.sqrt(case.width)
    bias = draw(case.classes, seed=2) if case.has_bias else None
    return Inputs(
        place.put(0.5 + draw(case.rows, case.width)),
        place.put(weight),
        None if bias is None else place.put(bias),
        targets.to(place.device),
    )


def exact_inputs(inputs: Inputs) -> Inputs:
    x, weight, bias, targets = inputs
    return Inputs(x.cpu().double(), weight.cpu().double(), None if bias is None else bias.cpu().double(), targets.cpu())


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """All logits at once; the loss of a 16-bit format is taken in float32, as ours."""
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if not (targets >= 0).any():
        return logits.sum() * 0
    return F.cross_entropy(logits, torch.where(targets < 0, IGNORED, targets))


def differentiate(loss: Loss, inputs: Inputs, factor: float = 1.0) -> dict[str, Tensor]:
    """The loss, and the gradients of its product with the factor."""
    named = {name: t for name, t in zip(("x", "weight", "bias"), inputs, strict=False) if t is not None}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items()}
    value = loss(leaves["x"], leaves["weight"], leaves.get("bias"), inputs.targets)
    grads = torch.autograd.grad(value * factor, list(leaves.values()))
    return {"loss": value.detach(), **{f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}}


def run(place: Place, inputs: Inputs, factor: float = 1.0) -> dict[str, Tensor]:
    with place.forced():
        return differentiate(functional.linear_cross_entropy, inputs, factor)


def check(place: Place, inputs: Inputs, factor: float = 1.0) -> None:
    result = run(place, inputs, factor)
    expected, exact = differentiate(torchs, inputs, factor), differentiate(torchs, exact_inputs(inputs), factor)
    logits = F.linear(*exact_inputs(inputs)[:3])
    logits = logits[logits.isfinite()]
    for name, truth in exact.items():
        # A loss is the difference of numbers as large as the logits.
        scale = magnitude(truth, logits) if name == "loss" else magnitude(truth)
        assert_twice_torch(name, result[name], expected[name], truth, scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_torchs(loss_place: Place, case: Case) -> None:
    check(loss_place, make_inputs(case, loss_place))


@pytest.mark.parametrize("rows", [63, 64, 65, 128, 129])
def test_chunks(rows: int) -> None:
    """Chunks have 64 rows here; the interpreter, which takes a while, is asked above."""
    place = Place("cpp", "cpu", torch.float32)
    check(place, make_inputs(Case(rows, 37, 5, ignored=5), place))


def test_chunk_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_fast.ops import cross_entropy

    assert cross_entropy.chunk_rows(30522, 2) == 64
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 64 << 20)
    assert cross_entropy.chunk_rows(30522, 2) == 1088  # 63.3 MiB
    assert cross_entropy.chunk_rows(2**30, 4) == 64
    assert cross_entropy.chunk_rows(1, 4) == 2**24


@pytest.mark.parametrize("columns", [16, 32, 1024])
@pytest.mark.parametrize("classes", [15, 16, 17, 32, 33])
def test_blocks_of_classes(triton_place: Place, classes: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_fast.kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "LAUNCH", cross_entropy.LAUNCH._replace(columns=columns, num_warps=1))
    check(triton_place, make_inputs(Case(3, classes, 5), triton_place))


@pytest.mark.parametrize("factor", [0.25, 64.0])
def test_the_loss_may_be_scaled(loss_place: Place, factor: float) -> None:
    check(loss_place, make_inputs(SMALL, loss_place), factor)


@pytest.mark.parametrize("negative", [IGNORED, -1, -(2**62)])
def test_where_no_row_counts_the_loss_is_zero(loss_place: Place, negative: int) -> None:
    inputs = make_inputs(Case(5, 37, 7), loss_place)
    inputs.targets.fill_(negative)
    result = run(loss_place, inputs)
    assert result["loss"] == 0
    for name, value in result.items():
        assert not value.any(), name


def test_rows_that_do_not_count_change_nothing(loss_place: Place) -> None:
    case = Case(8, 37, 7)
    inputs = make_inputs(case, loss_place)
    inputs.targets[5] = IGNORED
    before = run(loss_place, inputs)
    inputs.x[5] *= 5
    inputs.targets[5] = -7
    after = run(loss_place, inputs)
    assert not after["gradient of x"][5].any()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_no_rows(loss_place: Place) -> None:
    inputs = make_inputs(Case(0, 37, 7), loss_place)
    result = run(loss_place, inputs)
    assert result["loss"] == 0
    assert result["gradient of x"].shape == (0, 7)
    assert torch.equal(result["gradient of weight"], torch.zeros_like(inputs.weight))


def test_impossible_classes(loss_place: Place) -> None:
    """A bias of -inf rules a class out: also a whole block of them, and the first."""
    inputs = make_inputs(Case(5, 200, 7), loss_place)
    assert inputs.bias is not None
    hidden = torch.tensor([0, 7, *range(64, 128), 199], device=loss_place.device)
    inputs.bias[hidden] = -math.inf
    inputs.targets[:] = torch.tensor([1, 63, 128, 198, IGNORED])
    check(loss_place, inputs)
    result = run(loss_place, inputs)
    assert not result["gradient of weight"][hidden].any()
    assert not result["gradient of bias"][hidden].any()


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_large_logits_do_not_overflow(loss_place: Place, shift: float) -> None:
    inputs = make_inputs(Case(5, 131, 7), loss_place)
    assert inputs.bias is not None
    inputs.bias[:] = inputs.bias + shift
    result = run(loss_place, inputs)
    for name, value in result.items():
        assert value.isfinite().all(), name
    check(loss_place, inputs)


def test_certain_rows_have_no_loss(loss_place: Place) -> None:
    """One logit is far above the others."""
    inputs = make_inputs(Case(3, 131, 7), loss_place)
    assert inputs.bias is not None
    inputs.targets.fill_(100)
    inputs.bias[100] = 3e4
    result = run(loss_place, inputs)
    assert result["loss"] == 0
    assert not result["gradient of weight"].any()
    inputs.targets.fill_(99)
    assert run(loss_place, inputs)["loss"] > 2.9e4


def test_without_gradients_the_loss_is_the_same(loss_place: Place) -> None:
    inputs = make_inputs(SMALL, loss_place)
    before = [None if t is None else t.clone() for t in inputs]
    expected = run(loss_place, inputs)["loss"]
    with loss_place.forced():
        plain = functional.linear_cross_entropy(*inputs)
        leaves = [None if t is None else t.clone().requires_grad_() for t in inputs[:3]]
        with torch.no_grad():
            silent = functional.linear_cross_entropy(*leaves, inputs.targets)  # type: ignore[arg-type, call-arg]
    for loss in (plain, silent):
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        assert not loss.requires_grad
        assert torch.equal(loss, expected)
    for original, after in zip(before, inputs, strict=True):
        assert (original is None and after is None) or torch.equal(original, after)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_one_gradient_alone(loss_place: Place, name: str) -> None:
    inputs = make_inputs(SMALL, loss_place)
    expected = run(loss_place, inputs)[f"gradient of {name}"]
    leaf = getattr(inputs, name).clone().requires_grad_()
    with loss_place.forced():
        loss = functional.linear_cross_entropy(*inputs._replace(**{name: leaf}))
    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(grad, expected)
    (again,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(again, expected)


def test_two_runs_are_equal_to_the_bit(loss_place: Place) -> None:
    inputs = make_inputs(SMALL, loss_place)
    first, second = run(loss_place, inputs), run(loss_place, inputs)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("strided", ["x", "weight", "bias", "targets"])
def test_strides_change_hardly_anything(loss_place: Place, strided: str) -> None:
    """Matrix products may take another order."""
    inputs = make_inputs(SMALL, loss_place)
    value = getattr(inputs, strided)
    apart = torch.stack((value, torch.ones_like(value)), -1)[..., 0]
    assert not apart.is_contiguous()
    check(loss_place, inputs._replace(**{strided: apart}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_takes_the_products_in_its_dtype(place: Place, dtype: torch.dtype) -> None:
    if place.dtype != torch.float32:
        pytest.skip("autocast is for weights in float32")
    inputs = make_inputs(SMALL, place)
    lowered = Inputs(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs))  # type: ignore[arg-type]
    expected = run(place, lowered)
    with torch.autocast(place.device, dtype):
        result = run(place, inputs)
    assert torch.equal(result["loss"], expected["loss"])
    for name in ("x", "weight", "bias"):
        grad = result[f"gradient of {name}"]
        assert grad.dtype == torch.float32
        assert torch.equal(grad.to(dtype), expected[f"gradient of {name}"])


class Sizes(TorchDispatchMode):
    """Records how many elements the largest floating-point result of an operator has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        # The interpreter of Triton copies storages as bytes: no floating point.
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
        self.largest = max([self.largest, *(t.numel() for t in found)])
        return result


@pytest.mark.parametrize("has_gradient", [False, True], ids=["loss", "gradient"])
def test_no_tensor_holds_all_logits(loss_place: Place, has_gradient: bool) -> None:
    if loss_place.dtype != torch.float32:
        pytest.skip("one format is enough")
    rows, classes = 129, 131
    x, weight, bias, targets = make_inputs(Case(rows, classes, 3), loss_place)
    with loss_place.forced(), Sizes() as sizes:
        ops.launch_linear_cross_entropy(x, weight, bias, targets, has_gradient)
    # A chunk of 64 rows, each padded to a whole line.
    assert 64 * classes <= sizes.largest <= 64 * 192
    assert sizes.largest < rows * classes
    with Sizes() as sizes:
        torchs(x, weight, bias, targets)
    assert sizes.largest >= rows * classes


@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("has_gradient", [False, True], ids=["loss", "gradient"])
def test_the_operator_is_registered_as_torch_wants_it(loss_place: Place, has_gradient: bool, has_bias: bool) -> None:
    if loss_place.dtype != torch.float32:
        pytest.skip("one format is enough")
    inputs = make_inputs(Case(3, 17, 5, has_bias=has_bias), loss_place)
    leaves = [None if t is None else t.requires_grad_(has_gradient) for t in inputs[:3]]
    with loss_place.forced():
        results = torch.library.opcheck(
            torch.ops.bert_fast.linear_cross_entropy.default, (*leaves, inputs.targets, has_gradient)
        )
    assert set(results.values()) == {"SUCCESS"}


X, WEIGHT, TARGETS = torch.ones(4, 7), torch.ones(5, 7), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], WEIGHT, None, TARGETS), r"shapes \(7,\), \(5, 7\) and \(4,\)"),
        ((X, WEIGHT[:, :6], None, TARGETS), r"shapes \(4, 7\), \(5, 6\) and \(4,\)"),
        ((X, WEIGHT[0], None, TARGETS), r"shapes \(4, 7\), \(7,\) and \(4,\)"),
        ((X, WEIGHT, None, TARGETS[:3]), r"shapes \(4, 7\), \(5, 7\) and \(3,\)"),
        ((X, WEIGHT, None, TARGETS[:, None]), r"and \(4, 1\)"),
        ((X, WEIGHT, X[0], TARGETS), r"bias has shape \(7,\); \(5,\) is needed"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.linear_cross_entropy(*arguments)


def test_a_gradient_that_was_not_asked_for_is_refused() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="has_gradient is False"):
        torch.ops.bert_fast.linear_cross_entropy(x, WEIGHT, None, TARGETS, False)


def test_a_target_beyond_the_classes_shows(triton_place: Place) -> None:
    x, weight = triton_place.put(draw(3, 5)), triton_place.put(draw(7, 5))
    with triton_place.forced():
        losses = [
            functional.linear_cross_entropy(x, weight, None, torch.tensor([1, target, 2], device=triton_place.device))
            for target in (6, 7, 2**40)
        ]
    assert [bool(loss.isnan()) for loss in losses] == [False, True, True]
