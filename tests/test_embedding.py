"""bert_fast.functional.embedding, forward and backward, against float64 on every path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from test_dropout import differentiate, draw
from tolerance import Place, assert_twice_torch
from torch import Tensor

from bert_fast import functional, ops, reference

EPS = 1e-5
WORDS, POSITIONS, TYPES = 13, 7, 2
TABLES = ("word", "position", "token_type")

Function = Callable[..., Tensor]


class Case(NamedTuple):
    """
    Attributes:
        ids, positions: of each row.
        token_types: of each row; None: 0 everywhere.
        width: features.
        padding_idx: entry of the word table without a gradient.
        positions_dtype: of the positions.
        has_table: whether there are token types at all.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    token_types: tuple[int, ...] | None = None
    width: int = 34
    padding_idx: int | None = None
    positions_dtype: torch.dtype = torch.int64
    has_table: bool = True

    def indices(self, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
        types = None if self.token_types is None else torch.tensor(self.token_types, dtype=torch.int64, device=device)
        ids = torch.tensor(self.ids, dtype=torch.int64, device=device)
        return ids, torch.tensor(self.positions, dtype=self.positions_dtype, device=device), types

    def all_indices(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        ids, positions, types = self.indices(device)
        assert types is not None
        return ids, positions, types

    def __str__(self) -> str:
        types = "types" if self.token_types else "no_types" if self.has_table else "no_table"
        parts = [f"{len(self.ids)}x{self.width}", types]
        parts += [] if self.padding_idx is None else [f"padding{self.padding_idx}"]
        return "-".join([*parts, str(self.positions_dtype).removeprefix("torch.")])


REPEATED = (3, 12, 3, 0, 3, 5, 0)

CASES = [
    Case(REPEATED, (0, 1, 2, 3, 4, 5, 6)),
    Case(REPEATED, (0, 1, 2, 0, 1, 2, 0), (0, 0, 1, 1, 0, 1, 0), padding_idx=0),
    Case(REPEATED, (0, 6, 2, 0, 1, 2, 0), (1,) * 7, padding_idx=3, positions_dtype=torch.int32),
    Case((4,), (6,), (1,), width=1031),
    Case((4, 2), (6, 6), width=7),
    Case((1, 1, 1), (0, 1, 2), (0, 1, 0), width=131),
    Case(REPEATED, (0, 1, 2, 0, 1, 2, 0), padding_idx=3, has_table=False),
]


def make_inputs(place: Place, width: int, has_table: bool = True) -> dict[str, Tensor]:
    inputs = {
        "word": 0.4 + draw(WORDS, width),
        "position": -2.3 + 0.5 * draw(POSITIONS, width, seed=1),
        "token_type": 1 + draw(TYPES, width, seed=2),
        "weight": 1 + 0.3 * draw(width, seed=3),
        "bias": 0.5 * draw(width, seed=4),
    }
    return {name: place.put(x) for name, x in inputs.items() if has_table or name != "token_type"}


def ours(case: Case, device: str, **options: Any) -> Function:
    ids, positions, types = case.indices(device)

    def function(
        word: Tensor, position: Tensor, weight: Tensor, bias: Tensor, token_type: Tensor | None = None
    ) -> Tensor:
        return functional.embedding(
            word, position, token_type, ids, positions, types, weight, bias, EPS,
            padding_idx=case.padding_idx, **options,
        )  # fmt: skip

    return function


def torchs(case: Case, device: str) -> Function:
    """torch's own lookups, summed as BERT does, and its own layer_norm."""
    ids, positions, types = case.indices(device)

    def function(
        word: Tensor, position: Tensor, weight: Tensor, bias: Tensor, token_type: Tensor | None = None
    ) -> Tensor:
        x = F.embedding(ids, word, case.padding_idx)
        if token_type is not None:
            x = x + F.embedding(torch.zeros_like(ids) if types is None else types, token_type)
        return F.layer_norm(x + F.embedding(positions, position), word.shape[1:], weight, bias, EPS)

    return function


def oracle(case: Case) -> Function:
    """Rows of one-hot products, so that nothing of torch's lookups is shared."""
    ids, positions, types = case.indices("cpu")

    def look_up(indices: Tensor, table: Tensor) -> Tensor:
        return F.one_hot(indices.long(), table.shape[0]).to(table) @ table

    def function(
        word: Tensor, position: Tensor, weight: Tensor, bias: Tensor, token_type: Tensor | None = None
    ) -> Tensor:
        if case.padding_idx is not None:
            is_padding = torch.arange(WORDS)[:, None] == case.padding_idx
            word = torch.where(is_padding, word.detach(), word)
        x = look_up(ids, word)
        if token_type is not None:
            x = x + look_up(torch.zeros_like(ids) if types is None else types, token_type)
        return reference.layer_norm(x + look_up(positions, position), weight, bias, EPS)

    return function


def run(place: Place, case: Case, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    inputs = make_inputs(place, case.width, case.has_table) if inputs is None else inputs
    with place.forced():
        return differentiate(ours(case, place.device), inputs, draw(len(case.ids), case.width, seed=9))


def check(place: Place, case: Case) -> dict[str, Tensor]:
    inputs, grad_y = make_inputs(place, case.width, case.has_table), place.put(draw(len(case.ids), case.width, seed=9))
    result = run(place, case, inputs)
    expected = differentiate(torchs(case, place.device), inputs, grad_y)
    exact_inputs = {name: x.cpu().double() for name, x in inputs.items()}
    exact = differentiate(oracle(case), exact_inputs, grad_y.cpu().double())
    for name, truth in exact.items():
        assert_twice_torch(name, result[name], expected[name], truth)
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_torchs(place: Place, case: Case) -> None:
    check(place, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_entries_that_nobody_looks_up_get_no_gradient(place: Place, case: Case) -> None:
    result = run(place, case)
    used = [set(case.ids) - {case.padding_idx}, set(case.positions)]
    if case.has_table:
        used.append(set(case.token_types or (0,)))
    for name, entries in zip(TABLES, used, strict=False):
        found = result[f"gradient of {name}"].any(1).nonzero().flatten().tolist()
        assert set(found) == entries, name


def test_backward_programs_that_own_several_rows(triton_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_fast.kernels import embedding

    monkeypatch.setattr(embedding, "BACKWARD_PROGRAMS", 3)
    check(triton_place, CASES[1])


@pytest.mark.parametrize("token_types", [None, ()], ids=["no_types", "types"])
def test_no_rows(place: Place, token_types: tuple[int, ...] | None) -> None:
    result = run(place, Case((), (), token_types))
    assert result["y"].shape == (0, 34)
    for name, x in make_inputs(place, 34).items():
        assert torch.equal(result[f"gradient of {name}"], torch.zeros_like(x))


def test_without_gradients_the_result_is_the_same(place: Place) -> None:
    case = CASES[1]
    with place.forced(), torch.no_grad():
        y = ours(case, place.device)(**make_inputs(place, case.width))
    assert torch.equal(y, run(place, case)["y"])


def test_two_runs_are_equal_to_the_bit(place: Place) -> None:
    first, second = run(place, CASES[1]), run(place, CASES[1])
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("strided", ["tables", "indices", "gradient"])
def test_strides_change_nothing(place: Place, strided: str) -> None:
    case = CASES[1]
    inputs, grad_y = make_inputs(place, case.width), place.put(draw(len(case.ids), case.width, seed=9))
    expected = run(place, case, inputs)
    ids, positions, types = case.all_indices(place.device)
    if strided == "tables":
        inputs = {name: torch.stack((x, x + 1), -1)[..., 0] for name, x in inputs.items()}
    elif strided == "indices":
        ids, positions, types = (torch.stack((x, 1 - x), 1)[:, 0] for x in (ids, positions, types))
    else:
        grad_y = grad_y.t().contiguous().t()

    def function(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.embedding(
            word, position, token_type, ids, positions, types, weight, bias, EPS, padding_idx=case.padding_idx
        )

    with place.forced():
        result = differentiate(function, inputs, grad_y)
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("excess", [-1, 0, 2**40])
def test_rows_that_lie_in_no_table_are_nan_and_alone(triton_place: Place, index: int, excess: int) -> None:
    """excess: from the first entry down, or from the last one up."""
    case = CASES[1]
    entry = excess if excess < 0 else (WORDS, POSITIONS, TYPES)[index] + excess
    inputs = make_inputs(triton_place, case.width)
    ids, positions, types = case.all_indices(triton_place.device)
    spoilt = [ids.clone(), positions.clone(), types.clone()]
    spoilt[index][2] = entry
    with triton_place.forced(), torch.no_grad():
        expected, y = (
            functional.embedding(
                inputs["word"], inputs["position"], inputs["token_type"], *at, inputs["weight"], inputs["bias"]
            )
            for at in ((ids, positions, types), (spoilt[0], spoilt[1], spoilt[2]))
        )
    assert y[2].isnan().all()
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(y[others], expected[others])
    assert not expected.isnan().any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_gradients_on_a_cpu(case: Case) -> None:
    """One pass in C++, against float64 and the composition that gradients take."""
    place = Place("cpp", "cpu", torch.float32)
    inputs, indices = make_inputs(place, case.width, case.has_table), case.indices("cpu")

    def call(x: dict[str, Tensor]) -> Tensor:
        ids, positions, token_types = indices
        return functional.embedding(
            x["word"], x["position"], x.get("token_type"), ids, positions, token_types, x["weight"], x["bias"]
        )

    with place.forced(), torch.no_grad():
        found = call(inputs)
    with place.forced():
        composed = call({name: x.clone().requires_grad_() for name, x in inputs.items()}).detach()
    with ops.forced_path("torch"):
        exact = call({name: x.double() for name, x in inputs.items()})
    assert_twice_torch("y", found, composed, exact)
    assert found.shape == (len(case.ids), case.width)


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_rows_that_lie_in_no_table_raise_elsewhere(index: int, has_gradients: bool) -> None:
    case = CASES[1]
    place = Place("cpp", "cpu", torch.float32)
    inputs, indices = make_inputs(place, case.width), case.all_indices("cpu")
    indices[index][2] = 100
    inputs["word"].requires_grad_(has_gradients)
    with place.forced(), pytest.raises(IndexError):
        functional.embedding(
            inputs["word"], inputs["position"], inputs["token_type"], *indices, inputs["weight"], inputs["bias"]
        )


def test_padding_idx_may_count_from_the_end(place: Place) -> None:
    """As torch's does."""
    case = Case((WORDS - 1, 2, WORDS - 1), (0, 1, 2), padding_idx=-1)
    grad = run(place, case)["gradient of word"]
    assert not grad[-1].any()
    assert grad[2].any()


GOOD: dict[str, Tensor | None] = {
    "word": torch.ones(5, 7),
    "position": torch.ones(4, 7),
    "token_type": torch.ones(2, 7),
    "ids": torch.zeros(3, dtype=torch.int64),
    "positions": torch.zeros(3, dtype=torch.int64),
    "token_types": None,
    "weight": torch.ones(7),
    "bias": torch.ones(7),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "position",
            torch.ones(4, 6),
            r"position has shape \(4, 6\) and torch.float32; \(entries, 7\) and torch.float",
        ),
        ("position", torch.ones(7), r"position has shape \(7,\)"),
        ("token_type", torch.ones(2, 8), r"token_type has shape \(2, 8\)"),
        ("token_type", torch.ones(2, 7).double(), r"token_type has shape \(2, 7\) and torch.float64"),
        ("ids", torch.zeros(3, 1, dtype=torch.int64), r"shapes \(3, 1\), \(3,\) and None; one shape \(tokens,\)"),
        ("positions", torch.zeros(2, dtype=torch.int64), r"shapes \(3,\), \(2,\) and None"),
        ("token_types", torch.zeros(4, dtype=torch.int64), r"shapes \(3,\), \(3,\) and \(4,\)"),
        ("weight", torch.ones(6), r"shapes \(6,\) and \(7,\); \(7,\) is needed"),
        ("bias", torch.ones(1), r"shapes \(7,\) and \(1,\); \(7,\) is needed"),
    ],
)
@pytest.mark.parametrize("path", ["triton", "cpp"])
def test_wrong_arguments_are_named(path: Any, name: str, value: Tensor, message: str) -> None:
    with Place(path, "cpu", torch.float32).forced(), pytest.raises(ValueError, match=message):
        functional.embedding(**{**GOOD, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [*CASES[:2], CASES[-1]], ids=str)
def test_the_operators_are_registered_as_torch_wants_it(triton_place: Place, case: Case) -> None:
    if triton_place.dtype != torch.float32:
        pytest.skip("one format is enough")
    inputs, width = make_inputs(triton_place, case.width, case.has_table), case.width
    tables = [inputs[name].requires_grad_() if name in inputs else None for name in TABLES]
    weight, bias = inputs["weight"].requires_grad_(), inputs["bias"].requires_grad_()
    indices = case.indices(triton_place.device)
    padding_idx = -1 if case.padding_idx is None else case.padding_idx
    extras = (padding_idx, -1, torch.tensor([3], device=triton_place.device), 1, 0.5)
    rows = len(case.ids)
    mean, rstd = (x.float().to(triton_place.device) for x in (draw(rows, seed=5), 1 + draw(rows, seed=6).abs()))
    grad_y = triton_place.put(draw(rows, width))
    detached = [None if x is None else x.detach() for x in tables]
    with triton_place.forced():
        results = [
            torch.library.opcheck(
                torch.ops.bert_fast.embedding.default, (*tables, *indices, weight, bias, EPS, *extras)
            ),
            torch.library.opcheck(
                torch.ops.bert_fast.embedding_backward.default,
                (grad_y, *detached, *indices, weight.detach(), mean, rstd, *extras),
            ),
        ]
    for result in results:
        assert set(result.values()) == {"SUCCESS"}


def test_second_derivatives_are_refused(triton_place: Place) -> None:
    case = CASES[4]
    inputs = {name: x.requires_grad_() for name, x in make_inputs(triton_place, case.width).items()}
    with triton_place.forced():
        y = ours(case, triton_place.device)(**inputs)
        (grad,) = torch.autograd.grad(y.sum(), inputs["word"], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_token_types_need_a_table() -> None:
    wrong = {**GOOD, "token_type": None, "token_types": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"token_types has shape \(3,\), but token_type is None"):
        functional.embedding(**wrong)  # type: ignore[arg-type]
