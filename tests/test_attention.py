"""bert_fast.functional.attention, forward and backward, against float64 on every path."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tolerance import Place, assert_twice_torch, magnitude, threads
from torch import Tensor

from bert_fast import functional, masking, ops, reference


class Case(NamedTuple):
    """
    Attributes:
        lengths: rows of each sequence.
        heads, head_size: of the tensors.
        num_keys: first rows of each sequence that are keys; None: all.
        scale: factor of the scores; None: the default.
        window: rows from a query to its farthest key; None: anywhere.
    """

    lengths: tuple[int, ...]
    heads: int
    head_size: int
    num_keys: tuple[int, ...] | None = None
    scale: float | None = None
    window: int | None = None

    @property
    def keys(self) -> tuple[int, ...]:
        return self.lengths if self.num_keys is None else self.num_keys

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)

    @property
    def tiles(self) -> Tensor:
        return masking.make_tiles(self.cu_seqlens, torch.tensor(self.keys, dtype=torch.int32))

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return list(pairwise(self.cu_seqlens.tolist()))

    def __str__(self) -> str:
        parts = ["+".join(map(str, self.lengths)), f"{self.heads}x{self.head_size}"]
        parts += [] if self.num_keys is None else ["keys" + "+".join(map(str, self.num_keys))]
        parts += [] if self.window is None else [f"window{self.window}"]
        return "-".join(parts + ([] if self.scale is None else [f"scale{self.scale}"]))

    def near(self, rows: int, keys: int) -> Tensor:
        """(rows, keys) bool: which keys the queries of a sequence see."""
        distance = torch.arange(rows)[:, None] - torch.arange(keys)
        return distance.abs() <= (rows + keys if self.window is None else self.window)


# Every edge of the blocks (16, 32, 64) and of the tiles (128) once, few programs: the interpreter takes a millisecond a
# program and block. Sequences without rows, without keys and with some keys stand among others.
CASES = [
    Case((1, 2, 31, 32, 33), 1, 16),
    Case((33, 0, 2), 5, 7),
    Case((63, 64, 65), 1, 44),
    Case((65, 1), 2, 80),
    Case((127, 0, 129), 1, 32, num_keys=(100, 0, 129)),
    Case((128, 3, 5), 1, 64, num_keys=(128, 0, 4), scale=0.31),
    Case((257, 2), 1, 64, num_keys=(193, 2)),
    Case((33, 2), 1, 96, scale=0.02),
    Case((34, 31), 1, 128, num_keys=(33, 31)),
    Case((17, 1), 3, 1),
    # Queries that see a part of a block, that see none at all, and blocks that nobody sees.
    Case((70, 0, 33), 2, 16, window=9),
    Case((200, 66, 5), 1, 32, num_keys=(150, 20, 0), window=31),
    Case((129, 1), 1, 64, num_keys=(3, 1), window=0),
    Case((35, 257), 1, 7, window=130, scale=0.31),
]

EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)

# Rows from which on the largest of torch's errors says something about the next one.
MIN_SAMPLE = 31

LARGE_CASES = [
    *(Case(EDGES, heads, size) for heads, size in ((3, 44), (1, 64), (1, 128), (5, 1))),
    *(
        Case((65, 2, 129), heads, size)
        for heads, size in ((3, 7), (1, 13), (1, 16), (5, 32), (3, 64), (1, 80), (3, 96))
    ),
    *(Case((length,), 3, 44) for length in EDGES if length >= MIN_SAMPLE),
    Case((129, 0, 64, 257, 0, 3), 3, 64, num_keys=(1, 0, 0, 128, 0, 2)),
    Case((512, 384), 2, 64, num_keys=(511, 384)),
    *(Case((512, 65, 384), 2, 64, num_keys=(511, 65, 200), window=window) for window in (1, 64, 127, 300, 10**12)),
]

CPP = Place("cpp", "cpu", torch.float32)

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_qkv(case: Case, seed: int = 0) -> Tensor:
    """(tokens, 3, heads, head_size) float64: q, k and v as slices of one tensor, as a fused linear layer gives them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(case.lengths), 3, case.heads, case.head_size)
    return 0.3 + torch.randn(shape, generator=generator, dtype=torch.float64)


def make_grad(case: Case) -> Tensor:
    return make_qkv(case, seed=1)[:, 0].contiguous()


def differentiate(function: Function, qkv: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the gradients of q, k and v as one (tokens, 3, heads, head_size)."""
    leaf = qkv.detach().requires_grad_()
    q, k, v = leaf.unbind(1)
    out = function(q, k, v)
    (grad,) = torch.autograd.grad(out, leaf, grad_out)
    return out.detach(), grad


def ours(case: Case, place: Place) -> Function:
    max_seqlen = max(case.lengths, default=0)
    cu_seqlens, tiles = case.cu_seqlens.to(place.device), case.tiles.to(place.device)
    return lambda q, k, v: functional.attention(
        q, k, v, cu_seqlens, max_seqlen, tiles=tiles, scale=case.scale, window=case.window
    )


def run(case: Case, place: Place, qkv: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    with place.forced():
        return differentiate(ours(case, place), qkv, grad_out)


def torch_attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, near: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if near is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    near = near.to(q.device)
    has_key = near.any(1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, near | ~has_key, scale=scale)
    return torch.where(has_key, out, 0)[0].transpose(0, 1)


def torchs(case: Case) -> Function:
    """torch's own attention, sequence after sequence."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for (start, stop), keys in zip(case.bounds, case.keys, strict=True):
            rows, columns = slice(start, stop), slice(start, start + keys)
            out = torch.zeros_like(q[rows])
            if keys > 0:
                near = None if case.window is None else case.near(stop - start, keys)
                out = torch_attend(q[rows], k[columns], v[columns], case.scale, near)
            outputs.append(out)
        return torch.cat(outputs)

    return function


def oracle(case: Case) -> Function:
    scale = case.head_size**-0.5 if case.scale is None else case.scale
    num_keys = torch.tensor(case.keys)
    return lambda q, k, v: reference.attention(q, k, v, case.cu_seqlens, scale, num_keys, case.window)


def check(case: Case, place: Place) -> None:
    """Forward and all gradients, of the batch and of its longer sequences: short ones have larger values and errors."""
    qkv, grad_out = place.put(make_qkv(case)), place.put(make_grad(case))
    out, grad = run(case, place, qkv, grad_out)
    out_torch, grad_torch = differentiate(torchs(case), qkv, grad_out)
    out_oracle, grad_oracle = differentiate(oracle(case), qkv.cpu().double(), grad_out.cpu().double())
    # A few rows are no sample of torch's error, so they count with the batch alone.
    samples = [slice(None), *(slice(start, stop) for start, stop in case.bounds if stop - start >= MIN_SAMPLE)]
    for rows in samples:
        assert_twice_torch("out", out[rows], out_torch[rows], out_oracle[rows])
        # The gradients of q and k are differences of terms as large as the gradient of v.
        scale = magnitude(grad_oracle[rows])
        for index, name in enumerate("qkv"):
            mine, theirs, truth = (x[rows, index] for x in (grad, grad_torch, grad_oracle))
            assert_twice_torch(f"gradient of {name}", mine, theirs, truth, scale)
    for (start, stop), keys in zip(case.bounds, case.keys, strict=True):
        assert not grad[start + keys : stop, 1:].any()
        is_blind = ~case.near(stop - start, keys).any(1)
        assert not out[start:stop][is_blind].any()
        assert not grad[start:stop, 0][is_blind].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_torchs(case: Case, attention_place: Place) -> None:
    check(case, attention_place)


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_error_is_at_most_twice_torchs_on_large_batches(case: Case, fast_place: Place) -> None:
    check(case, fast_place)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = tuple(draw(st.lists(st.integers(0, 140), min_size=1, max_size=5)))
    num_keys = tuple(draw(st.integers(0, length)) for length in lengths)
    assume(any(num_keys))
    window = draw(st.none() | st.integers(0, 150))
    return Case(lengths, draw(st.integers(1, 5)), draw(st.integers(1, ops.MAX_HEAD_SIZE)), num_keys, window=window)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
@example(Case((13, 0), 2, 57, (4, 0)))  # where gradients of scores are small differences of large numbers
def test_any_batch_on_cpp(case: Case) -> None:
    check(case, CPP)


def test_row_of_8192_tokens_on_cpp() -> None:
    """The oracle answers for every 61st query; the others pass no gradient on."""
    case = Case((8192, 3), 1, 16)
    qkv = make_qkv(case).float()
    queries = torch.arange(0, 8192, 61)
    grad_out = torch.zeros(8195, 1, 16)
    grad_out[queries] = make_grad(case)[queries].float()
    out, grad = run(case, CPP, qkv, grad_out)

    def attend_some(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attend(q[queries], k[:8192], v[:8192], 0.25)

    def torch_some(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch_attend(q[queries], k[:8192], v[:8192], 0.25)

    out_oracle, grad_oracle = differentiate(attend_some, qkv.double(), grad_out[queries].double())
    out_torch, grad_torch = differentiate(torch_some, qkv, grad_out[queries])
    assert_twice_torch("out", out[queries], out_torch, out_oracle)
    for index, name in enumerate("qkv"):
        mine, theirs, truth = (x[:, index] for x in (grad, grad_torch, grad_oracle))
        assert_twice_torch(f"gradient of {name}", mine, theirs, truth)


NEIGHBOURS = Case((33, 35, 0, 65, 3), 1, 16, num_keys=(33, 20, 0, 65, 0))
HIDDEN = [*range(33 + 20, 33 + 35), *range(33 + 35 + 65, 33 + 35 + 65 + 3)]

# The interpreter computes with NumPy, which warns of NaN.
with_nan = pytest.mark.filterwarnings(
    "ignore:All-NaN slice encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)


@with_nan
@pytest.mark.parametrize("factor", [100.0, math.nan])
@pytest.mark.parametrize("disturbed", [0, 1])
def test_no_sequence_sees_another(attention_place: Place, factor: float, disturbed: int) -> None:
    qkv, grad_out = attention_place.put(make_qkv(NEIGHBOURS)), attention_place.put(make_grad(NEIGHBOURS))
    before = run(NEIGHBOURS, attention_place, qkv, grad_out)
    rows = slice(*NEIGHBOURS.bounds[disturbed])
    qkv[rows] *= factor
    after = run(NEIGHBOURS, attention_place, qkv, grad_out)
    for x, y in zip(before, after, strict=True):
        others = torch.ones(len(x), dtype=torch.bool, device=x.device)
        others[rows] = False
        assert torch.equal(x[others], y[others])
        assert not torch.equal(x[rows], y[rows])
    if math.isnan(factor):
        assert after[0][rows].isnan().all()


@with_nan
@pytest.mark.parametrize("factor", [100.0, math.nan])
def test_no_row_sees_a_row_that_is_no_key(attention_place: Place, factor: float) -> None:
    qkv, grad_out = attention_place.put(make_qkv(NEIGHBOURS)), attention_place.put(make_grad(NEIGHBOURS))
    before = run(NEIGHBOURS, attention_place, qkv, grad_out)
    qkv[HIDDEN, 1:] *= factor
    after = run(NEIGHBOURS, attention_place, qkv, grad_out)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", [CASES[1], NEIGHBOURS, CASES[10]], ids=str)
def test_two_runs_are_equal_to_the_bit(attention_place: Place, case: Case) -> None:
    qkv, grad_out = attention_place.put(make_qkv(case)), attention_place.put(make_grad(case))
    first, second = (run(case, attention_place, qkv, grad_out) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", [LARGE_CASES[2], LARGE_CASES[-6], LARGE_CASES[-4]], ids=str)
def test_cpp_is_equal_to_the_bit_for_any_number_of_threads(case: Case) -> None:
    qkv, grad_out = CPP.put(make_qkv(case)), CPP.put(make_grad(case))
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append(run(case, CPP, qkv, grad_out))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.clone(),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # heads first
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # head_size before heads
        lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],  # gaps between the heads
        lambda x: torch.cat((x[:1], x))[1:],  # another first address
    ],
    ids=["contiguous", "heads_first", "size_first", "gaps", "offset"],
)
def test_strides_change_nothing(attention_place: Place, arrange: Callable[[Tensor], Tensor]) -> None:
    if attention_place.path == "torch":
        pytest.skip("the order of torch's own sums depends on strides")
    case = Case((3, 34), 3, 7)
    qkv, grad_out = attention_place.put(make_qkv(case)), attention_place.put(make_grad(case))
    out, grad = run(case, attention_place, qkv, grad_out)
    leaves = [arrange(x).detach().requires_grad_() for x in qkv.unbind(1)]
    with attention_place.forced():
        arranged_out = ours(case, attention_place)(*leaves)
        grads = torch.autograd.grad(arranged_out, leaves, arrange(grad_out))
    assert torch.equal(out, arranged_out)
    for index in range(3):
        assert torch.equal(grad[:, index], grads[index])


def test_expanded_gradient(attention_place: Place) -> None:
    """The gradient of a sum has stride 0 everywhere."""
    case = Case((5, 33), 3, 7)
    qkv = attention_place.put(make_qkv(case))
    ones = torch.ones_like(qkv[:, 0])
    _, expected = run(case, attention_place, qkv, ones)
    _, grad = run(case, attention_place, qkv, ones[:1, :1, :1].expand_as(ones))
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_tokens(attention_place: Place, lengths: tuple[int, ...]) -> None:
    case = Case(lengths, 3, 16)
    qkv = attention_place.put(make_qkv(case))
    out, grad = run(case, attention_place, qkv, qkv[:, 0])
    assert out.shape == (0, 3, 16)
    assert grad.shape == (0, 3, 3, 16)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[11]], ids=str)
def test_log_sum_exp(attention_place: Place, case: Case) -> None:
    if attention_place.path == "torch":
        pytest.skip("torch's path returns no log-sum-exp")
    qkv = attention_place.put(make_qkv(case))
    q, k, v = qkv.unbind(1)
    with attention_place.forced():
        tiles = case.tiles.to(attention_place.device)
        lse = ops.launch_attention(q, k, v, tiles, max(case.lengths), case.head_size**-0.5, window=case.window)[1]
    assert lse.dtype == torch.float32
    for (start, stop), keys in zip(case.bounds, case.keys, strict=True):
        near = case.near(stop - start, keys).to(lse.device)
        scores = [
            torch.einsum("qhd,khd->hqk", q[start:stop].to(dtype), k[start : start + keys].to(dtype))
            for dtype in (torch.float32, torch.float64)
        ]
        low, exact = (torch.logsumexp(torch.where(near, x * case.head_size**-0.5, -math.inf), -1) for x in scores)
        is_seeing = near.any(1)
        assert (lse[:, start:stop][:, ~is_seeing] == -math.inf).all()
        if is_seeing.any():
            mine = lse[:, start:stop][:, is_seeing]
            assert_twice_torch("log-sum-exp", mine, low[:, is_seeing], exact[:, is_seeing].cpu())


def test_no_query_sees_beyond_its_window(attention_place: Place) -> None:
    """Row 40's key is seen by rows 31 to 49 and by no other."""
    case = CASES[10]
    qkv, grad_out = attention_place.put(make_qkv(case)), attention_place.put(make_grad(case))
    out, grad = run(case, attention_place, qkv, grad_out)
    qkv[40, 1:] *= 100
    disturbed_out, disturbed_grad = run(case, attention_place, qkv, grad_out)
    changed = (disturbed_out != out).flatten(1).any(1).cpu()
    expected = torch.zeros_like(changed)
    expected[40 - 9 : 40 + 10] = True
    assert torch.equal(changed, expected)
    assert torch.equal(disturbed_grad[~expected, 0], grad[~expected, 0])


@pytest.mark.parametrize(("window", "has_bias"), [(-1, False), (3, True)])
def test_a_wrong_window_is_refused(attention_place: Place, window: int, has_bias: bool) -> None:
    x = attention_place.put(torch.zeros(9, 2, 16))
    bias = attention_place.put(torch.zeros(2, 17)) if has_bias else None
    cu_seqlens = torch.tensor([0, 9], dtype=torch.int32, device=attention_place.device)
    with (
        attention_place.forced(),
        pytest.raises(ValueError, match=rf"window is {window}; it must be at least 0, and None where there is a bias"),
    ):
        functional.attention(x, x, x, cu_seqlens, 9, bias=bias, window=window)


# The interpreter computes rows that are no keys, of infinite probabilities, before it masks them.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("shift", [-300.0, 300.0], ids=str)
def test_large_scores_do_not_overflow(attention_place: Place, shift: float) -> None:
    """Every score is near shift: its exponential is 0 or infinite, the softmax is not. (dQ, a sum of products of K with
    numbers that add to zero, is at K's shift no measure.)"""
    case = Case((33, 34), 1, 16, scale=1.0, num_keys=(33, 30))
    qkv = make_qkv(case)
    qkv[:, 0] = 1 + 0.1 * qkv[:, 0]
    qkv[:, 1] = shift / 16 + 0.1 * qkv[:, 1]
    qkv, grad_out = attention_place.put(qkv), attention_place.put(make_grad(case))
    out, grad = run(case, attention_place, qkv, grad_out)
    out_torch, grad_torch = differentiate(torchs(case), qkv, grad_out)
    out_oracle, grad_oracle = differentiate(oracle(case), qkv.cpu().double(), grad_out.cpu().double())
    assert_twice_torch("out", out, out_torch, out_oracle)
    for index, name in ((1, "k"), (2, "v")):
        mine, theirs, truth = (x[:, index] for x in (grad, grad_torch, grad_oracle))
        assert_twice_torch(f"gradient of {name}", mine, theirs, truth)
    assert grad.isfinite().all()
