"""bert_fast.functional.attention with a relative bias, forward and backward, against float64 on every path."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from test_attention import Case
from test_dropout import attend, check_attention, differentiate, draw
from tolerance import Place, magnitude
from torch import Tensor

from bert_fast import functional, ops


class Biased(NamedTuple):
    """
    Attributes:
        case: the batch.
        excess: how far the table reaches beyond what is needed.
    """

    case: Case
    excess: int = 0

    @property
    def needed(self) -> int:
        return max(self.case.lengths) - 1

    def __str__(self) -> str:
        return f"{self.case}-excess{self.excess}"


# Blocks of the gradient of the bias have 16 or 32 distances and queries; of the forward pass 32 and more.
CASES = [
    Biased(Case((33, 0, 1, 17), 2, 16)),
    Biased(Case((5, 70), 1, 7, num_keys=(0, 41), scale=0.31)),
    Biased(Case((16, 15, 2), 3, 1), excess=20),
    Biased(Case((34,), 1, 80), excess=1),
    Biased(Case((1, 1), 2, 16)),
    Biased(Case((129,), 1, 16, num_keys=(97,))),
]


SMALL = Biased(Case((9, 0, 4), 2, 16), excess=2)


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs, which own several blocks each."""
    if ops.has_triton():
        from bert_fast.kernels import attention

        monkeypatch.setattr(attention, "BIAS_PARTS", 3)


def assert_near(x: Tensor, expected: Tensor) -> None:
    """torch's attention takes another algorithm for other tensors that need gradients."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(x, expected, rtol=0, atol=16 * eps * magnitude(expected))


def make_inputs(biased: Biased) -> dict[str, Tensor]:
    case = biased.case
    shape = (sum(case.lengths), case.heads, case.head_size)
    inputs = {name: 0.3 + draw(*shape, seed=seed) for seed, name in enumerate("qkv")}
    return {**inputs, "bias": 0.7 * draw(case.heads, 2 * (biased.needed + biased.excess) + 1, seed=3)}


def run(place: Place, biased: Biased, inputs: dict[str, Tensor] | None = None, **options: Any) -> dict[str, Tensor]:
    inputs = {name: place.put(x) for name, x in (make_inputs(biased) if inputs is None else inputs).items()}

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(q, k, v, bias, case=biased.case, **options)

    with place.forced():
        return differentiate(function, inputs, draw(*inputs["q"].shape, seed=9))


@pytest.mark.parametrize("biased", CASES, ids=str)
def test_error_is_at_most_twice_torchs(attention_place: Place, biased: Biased) -> None:
    check_attention(biased.case, attention_place, make_inputs(biased), None)


@pytest.mark.parametrize("biased", [CASES[0], CASES[1]], ids=str)
def test_with_the_twins_mask(attention_place: Place, biased: Biased) -> None:
    if attention_place.path == "torch":
        pytest.skip("not the operator")
    check_attention(biased.case, attention_place, make_inputs(biased), (-5, 3, 0.3))


@pytest.mark.parametrize("biased", [SMALL, CASES[1]], ids=str)
def test_distances_that_do_not_occur_get_no_gradient(attention_place: Place, biased: Biased) -> None:
    grad = run(attention_place, biased)["gradient of bias"]
    reach = biased.needed + biased.excess
    occurring = {
        key - query + reach
        for rows, keys in zip(biased.case.lengths, biased.case.keys, strict=True)
        for query in range(rows)
        for key in range(keys)
    }
    found = set(grad.any(0).nonzero().flatten().tolist())
    assert found <= occurring
    assert len(found) >= 0.9 * len(occurring)  # in 16 bits some vanish


def test_the_sign_of_a_distance(attention_place: Place) -> None:
    """Column key - query + reach: a large bias there makes each query see the key that is two rows on."""
    case = Case((5, 7), 2, 16)
    inputs = {name: attention_place.put(x) for name, x in make_inputs(Biased(case, excess=2)).items()}
    bias = torch.zeros_like(inputs["bias"])
    bias[:, 8 + 2] = 100
    with attention_place.forced():
        out = attend(inputs["q"], inputs["k"], inputs["v"], bias, case=case)
    for start, stop in case.bounds:
        torch.testing.assert_close(out[start : stop - 2], inputs["v"][start + 2 : stop])


def test_a_constant_bias_changes_nothing(attention_place: Place) -> None:
    biased = SMALL
    inputs = {name: attention_place.put(x) for name, x in make_inputs(biased).items()}
    inputs["bias"].zero_()
    with attention_place.forced():
        expected = attend(inputs["q"], inputs["k"], inputs["v"], case=biased.case)
        zero, shifted = (
            attend(inputs["q"], inputs["k"], inputs["v"], inputs["bias"] + shift, case=biased.case) for shift in (0, 3)
        )
    for out in (zero, shifted):
        assert_near(out, expected)


def test_two_runs_are_equal_to_the_bit(attention_place: Place) -> None:
    options: dict[str, Any] = {}
    if attention_place.path == "triton":
        options = {"dropout_p": 0.3, "seed": torch.tensor([4], device=attention_place.device)}
    first, second = (run(attention_place, SMALL, **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("parts", [1, 16])
def test_the_partial_sums_are_all_taken(attention_place: Place, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if attention_place.path == "torch":
        pytest.skip("not the operator")
    from bert_fast.kernels import attention

    monkeypatch.setattr(attention, "BIAS_PARTS", parts)
    check_attention(SMALL.case, attention_place, make_inputs(SMALL), None)


def test_a_strided_bias(attention_place: Place) -> None:
    """A slice of a wider table."""
    biased = SMALL
    inputs = make_inputs(biased)
    expected = run(attention_place, biased, inputs)
    sliced = torch.cat((inputs["bias"], 1 + inputs["bias"]), 1)
    leaf = attention_place.put(sliced).requires_grad_()
    q, k, v = (attention_place.put(inputs[name]) for name in "qkv")
    with attention_place.forced():
        out = attend(q, k, v, leaf[:, : inputs["bias"].shape[1]], case=biased.case)
        (grad,) = torch.autograd.grad(out, leaf, draw(*q.shape, seed=9).to(out))
    width = inputs["bias"].shape[1]
    assert_near(out, expected["y"])
    assert_near(grad[:, :width], expected["gradient of bias"])
    assert not grad[:, width:].any()


def test_a_bias_of_another_dtype(attention_place: Place) -> None:
    """The table in float32 beside activations of 16 bits."""
    if attention_place.dtype == torch.float64:
        pytest.skip("float64 is mixed with nothing")
    biased = SMALL
    inputs = {name: attention_place.put(x) for name, x in make_inputs(biased).items()}
    bias = inputs.pop("bias").float().requires_grad_()
    with attention_place.forced():
        out = attend(**inputs, bias=bias, case=biased.case)
        (grad,) = torch.autograd.grad(out, bias, draw(*out.shape, seed=9).to(out))
    assert out.dtype == attention_place.dtype
    assert grad.dtype == torch.float32
    expected = run(attention_place, biased)
    assert_near(out, expected["y"])
    assert_near(grad.to(out.dtype), expected["gradient of bias"])


def test_a_frozen_bias(attention_place: Place) -> None:
    """Gradients of q, k and v alone."""
    expected = run(attention_place, SMALL)
    inputs = {name: attention_place.put(x) for name, x in make_inputs(SMALL).items()}
    bias = inputs.pop("bias")
    with attention_place.forced():
        result = differentiate(partial(attend, bias=bias, case=SMALL.case), inputs, draw(*inputs["q"].shape, seed=9))
    for name, value in result.items():
        assert_near(value, expected[name])


def test_without_gradients_the_result_is_the_same(attention_place: Place) -> None:
    biased = SMALL
    with attention_place.forced(), torch.no_grad():
        out = attend(**{name: attention_place.put(x) for name, x in make_inputs(biased).items()}, case=biased.case)
    assert_near(out, run(attention_place, biased)["y"])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens(attention_place: Place, lengths: tuple[int, ...]) -> None:
    case = Case(lengths, 2, 16)
    empty = attention_place.put(torch.zeros(0, 2, 16)).requires_grad_()
    bias = attention_place.put(torch.ones(2, 3)).requires_grad_()
    cu_seqlens = case.cu_seqlens.to(attention_place.device)
    with attention_place.forced():
        out = functional.attention(empty, empty, empty, cu_seqlens, 0, bias=bias)
        grad_q, grad_bias = torch.autograd.grad(out.sum(), (empty, bias), allow_unused=True)
    assert out.shape == grad_q.shape == (0, 2, 16)
    assert grad_bias is None or torch.equal(grad_bias, torch.zeros_like(bias))


@pytest.mark.parametrize("shape", [(2, 9), (2, 12), (3, 11), (11,), (1, 11), (2, 11, 1)], ids=str)
def test_a_bias_of_a_wrong_shape_is_refused(attention_place: Place, shape: tuple[int, ...]) -> None:
    x = attention_place.put(torch.zeros(9, 2, 16))
    cu_seqlens = torch.tensor([0, 3, 9], dtype=torch.int32, device=attention_place.device)
    numbers = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    message = rf"bias has shape \({numbers}\); \(2, 2 \* reach \+ 1\) with reach at least 5 is needed"
    with attention_place.forced(), pytest.raises(ValueError, match=message):
        functional.attention(x, x, x, cu_seqlens, 6, bias=attention_place.put(torch.zeros(shape)))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_operators_are_registered_as_torch_wants_it(attention_place: Place, rate: float) -> None:
    if attention_place.path == "torch":
        pytest.skip("not the operator")
    if attention_place.dtype != torch.float32:
        pytest.skip("one format is enough")
    biased = Biased(Case((5, 0, 3), 1, 16))
    inputs = {name: attention_place.put(x) for name, x in make_inputs(biased).items()}
    device, bias = attention_place.device, inputs["bias"]
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    tiles, seed = biased.case.tiles.to(device), torch.tensor([4], device=device)
    extras = (tiles, 5, 0.25, seed, 2, rate)
    with attention_place.forced():
        out, lse = torch.ops.bert_fast.attention(q.detach(), k.detach(), v.detach(), *extras, bias)
        results = [
            torch.library.opcheck(
                torch.ops.bert_fast.attention.default, (q, k, v, *extras, bias.clone().requires_grad_())
            ),
            torch.library.opcheck(
                torch.ops.bert_fast.attention_backward.default,
                (torch.ones_like(out), q.detach(), k.detach(), v.detach(), out, lse, *extras, bias, None, True),
            ),
        ]
    for result in results:
        assert set(result.values()) == {"SUCCESS"}
