"""bert_fast.masking against its NumPy twin, and against what its contracts promise."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import pairwise
from typing import Any

import masking_twin as twin
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tolerance import threads
from torch import Tensor

import bert_fast._C
import bert_fast.functional
from bert_fast.masking import MaskedTokens, PackedBatch, make_tiles, mask_tokens, pack, pad, unpad
from bert_fast.ops import TILE_SIZE

Bools = NDArray[np.bool_]

# Around the tiles of 128 rows, the registers' blocks (256 bytes, 8 elements) and the 64 columns of one draw.
EDGES = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]

# What counts as "not zero": values whose low bytes or whose integer part are zero among them.
NONZERO: dict[torch.dtype, list[float]] = {
    torch.bool: [True],
    torch.uint8: [1, 2, 128, 255],
    torch.int8: [1, -1, -128],
    torch.int16: [1, -1, 256, -(2**15)],
    torch.int32: [1, -1, 2**16, -(2**31)],
    torch.int64: [1, -1, 2**32, -(2**63)],
    torch.float16: [1.0, -0.5, 6e-8, float("inf"), float("nan")],
    torch.bfloat16: [1.0, -0.5, 1e-40, float("-inf"), float("nan")],
    torch.float32: [1.0, -0.5, 1e-45, float("inf"), float("nan")],
    torch.float64: [1.0, -0.5, 5e-324, float("-inf"), float("nan")],
}

exactly = settings(deadline=None, max_examples=500)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # On a busy machine the thousands of small calls below would mostly wait for one another's threads.
    with threads(1):
        yield


def assert_same(found: Tensor, expected: NDArray[Any]) -> None:
    np.testing.assert_array_equal(found.numpy(), expected, strict=True)


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match="^" + re.escape(message))


# ---- philox ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    # The kat_vectors of Random123 1.14; the C++ generator is held to them through the twin.
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in twin.philox((c0, c1, c2, c3), (k0, k1))] == words.split()


# ---- unpad -----------------------------------------------------------------------------------------------------------


@st.composite
def masks(draw: st.DrawFn) -> Bools:
    """(rows, columns): full, empty, padded left or right, or with holes."""
    columns = draw(st.sampled_from(EDGES))
    rows = []
    for kind in draw(st.lists(st.sampled_from(["full", "empty", "left", "right", "holes"]), max_size=5)):
        edge = draw(st.integers(0, columns))
        column = np.arange(columns)
        if kind == "holes":
            rng = np.random.default_rng(edge)
            rows.append(rng.random(columns) < rng.random())
        else:
            low, high = {"full": (0, columns), "empty": (0, 0), "left": (edge, columns), "right": (0, edge)}[kind]
            rows.append((column >= low) & (column < high))
    return np.array(rows, bool).reshape(len(rows), columns)


def with_dtype(mask: Bools, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The mask with all the values of the dtype that are, and are not, zero."""
    rng = np.random.default_rng(seed)
    ones = torch.tensor(NONZERO[dtype], dtype=dtype)
    zeros = torch.tensor([0.0, -0.0] if dtype.is_floating_point else [0], dtype=dtype)
    places = torch.from_numpy(rng.integers(0, 2**16, mask.shape))
    return torch.where(torch.from_numpy(mask), ones[places % len(ones)], zeros[places % len(zeros)])


def assert_twin(batch: PackedBatch, mask: Bools, keep: Bools | None = None, keep_first: bool = False) -> None:
    expected = twin.unpad(mask, keep, keep_first, TILE_SIZE)
    if keep is None:
        assert batch.kept is None
    else:
        assert batch.kept is not None
        assert_same(batch.kept, np.flatnonzero(keep.reshape(-1)[expected.indices]))
    assert_same(batch.positions, expected.positions)
    assert_same(batch.cu_seqlens, expected.cu_seqlens)
    assert_same(batch.num_keys, expected.num_keys)
    assert_same(batch.tiles, expected.tiles)
    assert batch.max_seqlen == expected.max_seqlen
    assert batch.shape == mask.shape
    assert batch.total_tokens == len(expected.positions)
    assert (batch.indices is None) == mask.all()
    if batch.indices is not None:
        assert_same(batch.indices, expected.indices)


@exactly
@given(
    mask=masks(),
    dtype=st.sampled_from(list(NONZERO)),
    kept=st.sampled_from([None, 0.0, 0.3, 1.0]),
    keep_first=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_unpad_twin(mask: Bools, dtype: torch.dtype, kept: float | None, keep_first: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keep = None if kept is None else rng.random(mask.shape) < kept
    ids, types = rng.integers(0, 30011, (2, *mask.shape))
    batch = unpad(
        with_dtype(mask, dtype, seed),
        ids=torch.from_numpy(ids),
        token_types=torch.from_numpy(types),
        keep=None if keep is None else torch.from_numpy(keep),
        keep_first=keep_first,
    )
    assert_twin(batch, mask, keep, keep_first)
    indices = twin.unpad(mask, keep, keep_first, TILE_SIZE).indices
    assert batch.ids is not None
    assert batch.token_types is not None
    assert_same(batch.ids, ids.ravel()[indices])
    assert_same(batch.token_types, types.ravel()[indices])


@pytest.mark.parametrize("dtype", NONZERO, ids=str)
def test_unpad_every_prefix(dtype: torch.dtype) -> None:
    # A prefix of each length, alone and before one or two more tokens at each place, past two blocks of every type's
    # registers. Two tokens, because their values may cancel.
    columns = 521
    column = np.arange(columns)
    lengths = np.array([edge for edge in [*EDGES, 511, 512, 513] if edge < columns])
    alone = column < np.arange(columns + 1)[:, None]
    gaps = [
        (column < lengths[:, None, None]) | ((column >= column[:, None]) & (column < column[:, None] + width))
        for width in (1, 2)
    ]
    mask = np.concatenate([alone, *(gap.reshape(-1, columns) for gap in gaps)])
    batch = unpad(with_dtype(mask, dtype))
    assert batch.indices is not None
    assert_same(batch.indices, np.flatnonzero(mask))
    assert_same(batch.positions, np.nonzero(mask)[1].astype(np.int32))
    assert_same(batch.num_keys, mask.sum(1, dtype=np.int32))
    assert_same(batch.cu_seqlens, np.cumsum([0, *mask.sum(1)], dtype=np.int32))


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (3, 0), (1, 1)])
@pytest.mark.parametrize("value", [False, True])
def test_unpad_small(shape: tuple[int, int], value: bool) -> None:
    mask = np.full(shape, value)
    batch = unpad(torch.from_numpy(mask))
    assert_twin(batch, mask)
    assert batch.ids is None
    assert batch.token_types is None
    x = torch.randn(*shape, 3)
    assert torch.equal(batch.pad(batch.select(x)), x * value)


def test_unpad_strided() -> None:
    mask = np.random.default_rng(1).random((37, 131)) < 0.6
    keep = np.random.default_rng(2).random((37, 131)) < 0.3
    transposed = torch.from_numpy(mask.T.copy()).T
    batch = unpad(transposed, keep=torch.from_numpy(keep.T.astype(np.int64)).T)
    assert not transposed.is_contiguous()
    assert_twin(batch, mask, keep)


def test_unpad_threads() -> None:
    mask = np.random.default_rng(3).random((101, 257)) < 0.5
    mask[::3] = np.arange(257) < np.arange(34)[:, None] * 7
    for count in (1, 2, 4):
        with threads(count):
            batch = unpad(torch.from_numpy(mask), keep_first=True)
            assert_twin(batch, mask, keep_first=True)
            column = torch.arange(257).expand(101, 257)
            expected = column.where(torch.from_numpy(mask), 0)  # column 0, kept where the mask hides it, is 0 as well
            assert torch.equal(batch.pad(batch.positions), expected)


def test_unpad_device() -> None:
    mask, ids = torch.tensor([[1, 0, 1], [1, 1, 0]]), torch.arange(6).view(2, 3)
    batch = unpad(mask, ids=ids, keep_first=True, device="meta")
    host = unpad(mask, ids=ids, keep_first=True)
    moved = host.to("meta")
    for field in fields(PackedBatch):
        value = getattr(host, field.name)
        for other in (getattr(batch, field.name), getattr(moved, field.name)):
            if isinstance(value, Tensor):
                assert other.is_meta
                assert (other.shape, other.dtype) == (value.shape, value.dtype)
            else:
                assert other == value


@exactly
@given(mask=masks().filter(lambda mask: mask.shape[1] > 0), kept=st.sampled_from([None, 0.3]))
def test_first_rows(mask: Bools, kept: float | None) -> None:
    keep = None if kept is None else torch.from_numpy(np.random.default_rng(mask.shape[1]).random(mask.shape) < kept)
    columns = torch.arange(mask.size).view(mask.shape)
    batch = unpad(torch.from_numpy(mask), ids=columns, keep=keep, keep_first=True)
    assert batch.ids is not None
    assert torch.equal(batch.ids[batch.first_rows], columns[:, 0])


# ---- tiles -----------------------------------------------------------------------------------------------------------


@exactly
@given(st.lists(st.sampled_from(EDGES), max_size=7), st.integers(0, 2**16))
def test_tiles_cover_rows_once(lengths: list[int], seed: int) -> None:
    num_keys = np.random.default_rng(seed).integers(0, np.array(lengths, np.int64) + 1).astype(np.int32)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    tiles = make_tiles(torch.from_numpy(cu_seqlens), torch.from_numpy(num_keys))
    assert_same(tiles, twin.make_tiles(cu_seqlens.tolist(), num_keys.tolist(), TILE_SIZE))
    all_keys = make_tiles(torch.from_numpy(cu_seqlens))
    assert_same(all_keys, twin.make_tiles(cu_seqlens.tolist(), lengths, TILE_SIZE))
    covered = np.zeros(sum(lengths), np.int64)
    for start, num_rows, _, first in tiles.tolist():
        covered[start + first : start + min(first + TILE_SIZE, num_rows)] += 1
    assert (covered == 1).all()


# ---- pad and select --------------------------------------------------------------------------------------------------


@exactly
@given(mask=masks(), trailing=st.sampled_from([(), (1,), (3,), (2, 5), (0,)]), seed=st.integers(0, 2**16))
def test_round_trip(mask: Bools, trailing: tuple[int, ...], seed: int) -> None:
    shown = torch.from_numpy(mask)
    x = torch.randn(*mask.shape, *trailing, generator=torch.Generator().manual_seed(seed))
    batch = unpad(shown)
    rows = batch.select(x)
    assert torch.equal(rows, x[shown])
    padded = batch.pad(rows)
    assert torch.equal(padded, x.where(shown.view(*shown.shape, *(1 for _ in trailing)), 0.0))
    assert torch.equal(batch.select(padded), rows)


def as_bytes(x: Tensor) -> NDArray[np.uint8]:
    """(rows, bytes): equal bytes are the very same values."""
    values: NDArray[np.uint8] = x.contiguous().unsqueeze(-1).view(torch.uint8).flatten(1).numpy()
    return values


@pytest.mark.parametrize("trailing", [(), (1,), (3,), (5, 7)], ids=str)
@pytest.mark.parametrize(
    "dtype", [*NONZERO, torch.uint16, torch.complex64, torch.complex128, torch.float8_e4m3fn], ids=str
)
def test_pad_dtypes(dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    mask = rng.random((11, 13)) < 0.6
    batch = unpad(torch.from_numpy(mask))
    x = torch.from_numpy(rng.normal(-2.3, 1.7, (batch.total_tokens, *trailing)) * 5).abs().to(dtype)
    padded = pad(x, batch)
    assert padded.dtype == dtype
    assert padded.shape == (11, 13, *trailing)
    assert batch.indices is not None
    expected = twin.pad(as_bytes(x), batch.indices.numpy(), 143)
    np.testing.assert_array_equal(as_bytes(padded.flatten(0, 1)), expected, strict=True)


@pytest.mark.parametrize("dtype", NONZERO, ids=str)
def test_pad_nothing(dtype: torch.dtype) -> None:
    empty, holey = unpad(torch.zeros(3, 5)), unpad(torch.tensor([[0, 1], [1, 0]]))
    assert torch.equal(empty.pad(torch.ones(0, 7, dtype=dtype)), torch.zeros(3, 5, 7, dtype=dtype))
    assert torch.equal(empty.pad(torch.ones(0, dtype=dtype)), torch.zeros(3, 5, dtype=dtype))
    assert torch.equal(holey.pad(torch.ones(2, 0, dtype=dtype)), torch.zeros(2, 2, 0, dtype=dtype))


def test_pad_strided() -> None:
    mask = torch.rand(7, 11, generator=torch.Generator().manual_seed(1)) < 0.5
    batch = unpad(mask)
    x = torch.randn(13, batch.total_tokens).T
    expected = torch.zeros(7, 11, 13)
    expected[mask] = x
    assert not x.is_contiguous()
    assert torch.equal(batch.pad(x), expected)


def holey_batch(is_whole: bool) -> PackedBatch:
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    return unpad(mask | is_whole)


@pytest.mark.parametrize("is_whole", [False, True])
def test_pad_gradient(is_whole: bool) -> None:
    batch = holey_batch(is_whole)
    x = torch.randn(batch.total_tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(batch.pad, x)
    assert torch.autograd.gradgradcheck(batch.pad, x)


@pytest.mark.parametrize("is_whole", [False, True])
def test_select_gradient(is_whole: bool) -> None:
    batch = holey_batch(is_whole)
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(batch.select, x)
    assert torch.autograd.gradgradcheck(batch.select, x)


# ---- pack ------------------------------------------------------------------------------------------------------------


def bins_of(lengths: list[int], capacity: int) -> list[list[int]]:
    bins = pack(torch.tensor(lengths, dtype=torch.int64), capacity)
    assert bins.order.dtype == bins.offsets.dtype == torch.int64
    offsets = bins.offsets.tolist()
    assert (offsets[0], offsets[-1]) == (0, len(lengths))
    return [bins.order[start:stop].tolist() for start, stop in pairwise(offsets)]


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths and a capacity that takes each; small capacities give many equal lengths."""
    capacity = draw(st.sampled_from([1, 2, 3, 5, 7, 128, 509]))
    return draw(st.lists(st.integers(1, capacity), max_size=67)), capacity


@exactly
@given(sequences())
def test_pack_twin(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    bins = bins_of(lengths, capacity)
    assert bins == twin.pack(lengths, capacity)
    assert all(0 < sum(lengths[i] for i in numbers) <= capacity for numbers in bins)
    assert sorted(i for numbers in bins for i in numbers) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([], []),
        ([4, 4, 4, 4, 4], [[0, 1], [2, 3], [4]]),  # equal lengths: in the order given
        ([3, 7, 7], [[0, 1], [2]]),  # equally full bins: the oldest
        ([2, 4, 4, 7], [[3], [0, 1, 2]]),  # the fullest bin, not the oldest
        ([4, 1, 9], [[1, 2], [0]]),  # a bin may be filled to the brim
    ],
)
def test_pack_ties(lengths: list[int], bins: list[list[int]]) -> None:
    assert bins_of(lengths, 10) == bins


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pack_stable(dtype: torch.dtype) -> None:
    lengths = torch.randint(1, 31, (4001,), generator=torch.Generator().manual_seed(2)).to(dtype)
    first, second = pack(lengths, 127), pack(lengths, 127)
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.offsets, second.offsets)
    number = np.argsort(first.order.numpy())  # where each sequence went
    bin_of = np.searchsorted(first.offsets.numpy(), number, side="right")
    # All sequences of the longest length find empty or equally filled bins, so they fill those in order.
    longest = bin_of[(lengths == 30).numpy()]
    assert len(longest) > 100
    assert (np.diff(longest) >= 0).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pack_near_optimal(seed: int) -> None:
    # 101 full bins, cut up: the optimum is 101, and Johnson's bound 11/9 of it and 4.
    rng = np.random.default_rng(seed)
    cuts = [np.sort(rng.choice(np.arange(1, 512), rng.integers(1, 5), replace=False)) for _ in range(101)]
    lengths = np.concatenate([np.diff([0, *cut, 512]) for cut in cuts])
    assert lengths.sum() == 101 * 512
    assert 101 <= len(bins_of(rng.permutation(lengths).tolist(), 512)) <= 11 / 9 * 101 + 4


# ---- mask_tokens: against the twin -----------------------------------------------------------------------------------

VOCAB_SIZE = 211
SPECIAL_IDS = [0, 1, 2, 3, 103]
MASK_ID = 103
UNITS = ["token", "word", "span"]

seeds = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**32 - 1, 2**32, 2**64 - 1]))
first_row_numbers = st.one_of(st.integers(0, 5), st.sampled_from([2**32 - 2, 2**32, 2**63, 2**64 - 5]))


def make_ids(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Ids of which some are special."""
    return np.where(rng.random(shape) < 0.1, rng.choice(SPECIAL_IDS, shape), rng.integers(0, VOCAB_SIZE, shape))


def make_word_ids(rng: np.random.Generator, shape: tuple[int, int], rate: float) -> NDArray[np.int32]:
    """Words that start at `rate` of the tokens; numbers come again, and -1 is among them."""
    return (np.cumsum(rng.random(shape) < rate, axis=1) % 7 - 1).astype(np.int32)


@st.composite
def maskings(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of mask_tokens, as arrays."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([0, 1, 2, 3, 5, 7])), draw(st.sampled_from(EDGES))
    unit = draw(st.sampled_from(UNITS))
    rates = [0.1, 0.5, 1.0] if unit == "word" else [None, 0.1, 0.5, 1.0]
    rate = draw(st.sampled_from(rates))
    shares = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.15, 1.0]))
    mask_probability = draw(shares)
    return {
        "ids": make_ids(rng, shape),
        "word_ids": None if rate is None else make_word_ids(rng, shape, rate),
        "special_ids": draw(st.sampled_from([SPECIAL_IDS, [], [0, 0, 5]])),
        "mask_id": draw(st.sampled_from([0, MASK_ID, VOCAB_SIZE - 1])),
        "vocab_size": VOCAB_SIZE,
        "probability": draw(shares),
        "unit": unit,
        "max_span": draw(st.integers(1, 7)),
        "mask_probability": mask_probability,
        "random_probability": draw(st.floats(0.0, 1.0)) * (1.0 - mask_probability),
        "seed": draw(seeds),
        "first_row": draw(first_row_numbers),
    }


def plain_case(unit: str, ids: NDArray[np.int64], word_ids: NDArray[np.int32] | None) -> dict[str, Any]:
    return {
        "ids": ids,
        "word_ids": word_ids,
        "special_ids": SPECIAL_IDS,
        "mask_id": MASK_ID,
        "vocab_size": VOCAB_SIZE,
        "unit": unit,
        "seed": 1234567891,
    }


def run(case: dict[str, Any], **changes: Any) -> MaskedTokens:
    case = {**case, **changes}
    ids, word_ids = case.pop("ids"), case.pop("word_ids")
    return mask_tokens(torch.from_numpy(ids), word_ids=None if word_ids is None else torch.from_numpy(word_ids), **case)


def assert_equal(found: MaskedTokens, expected: MaskedTokens) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.positions, expected.positions)


@exactly
@given(maskings())
def test_mask_twin(case: dict[str, Any]) -> None:
    before = case["ids"].copy()
    found = run(case)
    expected = twin.mask_tokens(**case)
    assert_same(found.ids, expected.ids)
    assert_same(found.labels, expected.labels)
    assert_same(found.positions, expected.positions)
    assert (case["ids"] == before).all()


@exactly
@given(maskings(), st.integers(0, 7))
def test_mask_splits(case: dict[str, Any], split: int) -> None:
    whole = run(case)
    rows, columns = case["ids"].shape
    split = min(split, rows)
    words = case["word_ids"]
    first = run(case, ids=case["ids"][:split], word_ids=None if words is None else words[:split])
    second = run(
        case,
        ids=case["ids"][split:],
        word_ids=None if words is None else words[split:],
        first_row=(case["first_row"] + split) % 2**64,
    )
    assert torch.equal(torch.cat([first.ids, second.ids]), whole.ids)
    assert torch.equal(torch.cat([first.labels, second.labels]), whole.labels)
    assert torch.equal(torch.cat([first.positions, second.positions + split * columns]), whole.positions)


@exactly
@given(maskings(), st.integers(1, 131))
def test_mask_ignores_padding(case: dict[str, Any], width: int) -> None:
    case["special_ids"] = SPECIAL_IDS
    ids, words = case["ids"], case["word_ids"]
    padded = run(
        case,
        ids=np.pad(ids, ((0, 0), (0, width))),  # id 0 is special
        word_ids=None if words is None else np.pad(words, ((0, 0), (0, width)), constant_values=2),
    )
    plain = run(case)
    columns = ids.shape[1]
    assert torch.equal(padded.ids[:, :columns], plain.ids)
    assert torch.equal(padded.labels[:, :columns], plain.labels)
    assert len(padded.positions) == len(plain.positions)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("rows", [0, 1, 3, 101])
def test_mask_threads(unit: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    case = plain_case(unit, make_ids(rng, (rows, 131)), make_word_ids(rng, (rows, 131), 0.6))
    with threads(1):
        single = run(case)
    assert (len(single.positions) > 0) == (rows > 0)
    for count in (2, 4):
        with threads(count):
            assert_equal(run(case), single)


# ---- mask_tokens: what it promises -----------------------------------------------------------------------------------

ROWS, COLUMNS = 4441, 509  # both prime; 2.26 million tokens, of which 2.0 million can be chosen

Corpus = tuple[NDArray[np.int64], NDArray[np.int32]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Ids and word_ids, with special ids and words that are left alone."""
    rng = np.random.default_rng(11)
    ids = make_ids(rng, (ROWS, COLUMNS))
    words = np.cumsum(rng.random(ids.shape) < 0.6, axis=1, dtype=np.int32)
    words[:, rng.random(COLUMNS) < 0.01] = -1
    return ids, words


def number_words(case: dict[str, Any]) -> tuple[Bools, NDArray[np.int64]]:
    """Which tokens can be chosen, and the number of each one's word, counted over all rows."""
    ids, words = case["ids"], case["word_ids"]
    is_maskable = ~np.isin(ids, case["special_ids"])
    if words is not None:
        is_maskable &= words >= 0
    is_start = is_maskable.copy()
    if words is not None:
        is_start[:, 1:] &= ~is_maskable[:, :-1] | (words[:, 1:] != words[:, :-1])
    return is_maskable, np.cumsum(is_start.ravel()).reshape(ids.shape) - 1


def assert_binomial(count: int, trials: float, probability: float, variance: float | None = None) -> None:
    variance = trials * probability * (1.0 - probability) if variance is None else variance
    assert abs(count - trials * probability) <= 5.0 * variance**0.5


@pytest.mark.parametrize("unit", UNITS)
def test_mask_invariants(corpus: Corpus, unit: str) -> None:
    case = plain_case(unit, *corpus)
    ids = torch.from_numpy(corpus[0])
    masked, labels, positions = run(case)
    is_chosen = labels != -100
    assert torch.equal(positions, is_chosen.flatten().nonzero().flatten())
    assert torch.equal(labels[is_chosen], ids[is_chosen])
    assert torch.equal(masked[~is_chosen], ids[~is_chosen])
    assert not is_chosen[torch.from_numpy(~number_words(case)[0])].any()
    replaced = masked[is_chosen & (masked != ids)]
    assert set(np.unique(replaced)) == {MASK_ID} | set(range(VOCAB_SIZE)) - set(SPECIAL_IDS)


@pytest.mark.parametrize("unit", ["word", "span"])
def test_mask_whole_words(corpus: Corpus, unit: str) -> None:
    case = plain_case(unit, *corpus)
    is_maskable, number = number_words(case)
    is_chosen = run(case).labels.numpy() != -100
    sizes = np.bincount(number[is_maskable])
    chosen = np.bincount(number[is_maskable], is_chosen[is_maskable])
    assert sizes.max() > 5
    assert ((chosen == 0) | (chosen == sizes)).all()
    if unit == "word":
        assert_binomial(int((chosen > 0).sum()), len(sizes), 0.15)
        assert_binomial(int(chosen.sum()), int(sizes.sum()), 0.15, 0.15 * 0.85 * float((sizes**2).sum()))


@pytest.mark.parametrize("unit", ["token", "span"])
def test_mask_rate(corpus: Corpus, unit: str) -> None:
    case = plain_case(unit, corpus[0], None)
    is_maskable, _ = number_words(case)
    is_chosen = run(case).labels.numpy() != -100
    wanted = 0.15 * is_maskable.sum(1)
    if unit == "token":
        assert_binomial(int(is_chosen.sum()), int(is_maskable.sum()), 0.15)
        first, second = is_chosen[:, :-1][is_maskable[:, 1:]], is_chosen[:, 1:][is_maskable[:, 1:]]
        assert_binomial(int(second[first].sum()), int(first.sum()), 0.15)  # a neighbour tells nothing
    else:
        # Every row gets its budget, whose fraction is a coin of its own.
        rounded_up = is_chosen.sum(1) - np.floor(wanted)
        assert set(rounded_up) == {0.0, 1.0}
        share = wanted % 1.0
        assert_binomial(int(rounded_up.sum()), float(share.sum()), 1.0, float((share * (1.0 - share)).sum()))


def test_mask_span_budget(corpus: Corpus) -> None:
    case = plain_case("span", *corpus)
    is_maskable, _ = number_words(case)
    per_row = (run(case).labels.numpy() != -100).sum(1)
    wanted = 0.15 * is_maskable.sum(1)
    assert (per_row <= np.floor(wanted) + 1).all()
    assert per_row.sum() >= 0.99 * wanted.sum()  # a word that is too long for the rest of a budget is left out


@pytest.mark.parametrize("max_span", [2, 3, 5])
def test_mask_span_lengths(max_span: int) -> None:
    # The budget is that of one longest span, which is drawn with probability (1 / n) / (1 + 1/2 + ... + 1/n).
    rows, columns = 4001, 1009
    case = plain_case("span", np.full((rows, columns), 7), None)
    positions = run(case, max_span=max_span, probability=max_span / columns).positions.view(rows, max_span)
    is_run = positions[:, -1] - positions[:, 0] == max_span - 1
    expected = 1 / max_span / sum(1 / n for n in range(1, max_span + 1))
    # Shorter spans side by side look the same: fewer than max_span * 2 of 1009 starts.
    low, high = expected * (1 - max_span / columns), expected + 2 * max_span / columns
    margin = 5.0 * (rows * expected * (1 - expected)) ** 0.5
    assert rows * low - margin <= int(is_run.sum()) <= rows * high + margin


@pytest.mark.parametrize("unit", UNITS)
def test_mask_replacements(corpus: Corpus, unit: str) -> None:
    case = plain_case(unit, *corpus)
    ids = torch.from_numpy(corpus[0])
    masked, labels, positions = run(case)
    is_chosen = labels != -100
    chosen, stays = len(positions), 1.0 / (VOCAB_SIZE - len(SPECIAL_IDS))  # the random id may be the old one
    masks = int((masked[is_chosen] == MASK_ID).sum())
    unchanged = int((masked[is_chosen] == ids[is_chosen]).sum())
    assert_binomial(masks, chosen, 0.8)
    assert_binomial(unchanged, chosen, 0.1 + 0.1 * stays)
    assert_binomial(chosen - masks - unchanged, chosen, 0.1 - 0.1 * stays)


def test_mask_random_ids_uniform(corpus: Corpus) -> None:
    case = plain_case("token", corpus[0], None)
    masked, labels, _ = run(case, mask_probability=0.0, random_probability=1.0)
    counts = np.bincount(masked[labels != -100], minlength=VOCAB_SIZE)
    assert (counts[SPECIAL_IDS] == 0).all()
    counts = np.delete(counts, SPECIAL_IDS)
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - freedom) <= 5.0 * (2.0 * freedom) ** 0.5


@pytest.mark.parametrize("unit", UNITS)
def test_mask_all_or_nothing(unit: str) -> None:
    rng = np.random.default_rng(5)
    case = plain_case(unit, make_ids(rng, (7, 31)), make_word_ids(rng, (7, 31), 0.6))
    is_maskable = torch.from_numpy(number_words(case)[0])
    assert torch.equal(run(case, probability=1.0).labels != -100, is_maskable)
    assert len(run(case, probability=0.0).positions) == 0
    masked = run(case, probability=1.0, mask_probability=1.0, random_probability=0.0).ids
    assert torch.equal(masked, torch.from_numpy(case["ids"]).masked_fill(is_maskable, MASK_ID))


def test_mask_thresholds() -> None:
    # A word w stands for w / 2^32: below the probability means chosen, masked or random, to the last bit.
    ids = np.full((1, 67), 7)
    case = plain_case("token", ids, None) | {"probability": 1.0, "mask_probability": 0.0, "random_probability": 0.0}
    for column in (0, 15, 16, 63, 64, 66):
        chosen = int(twin.draw(case["seed"], column // 64 * 16 + column % 16, 0, twin.SELECT)[column // 16 % 4])
        replaced = int(twin.draw(case["seed"], column, 0, twin.REPLACE)[0])
        for more in (0, 1):
            assert (run(case, probability=(chosen + more) / 2**32).labels[0, column] == 7) == more
            share = (replaced + more) / 2**32
            assert (run(case, mask_probability=share).ids[0, column] == MASK_ID) == more
            assert (run(case, random_probability=share).ids[0, column] != 7) == more


def test_mask_all_special() -> None:
    ids = torch.arange(6).view(2, 3) % 3
    found = mask_tokens(ids, special_ids=[0, 1, 2], mask_id=0, vocab_size=3, probability=1.0, random_probability=0.0)
    assert torch.equal(found.ids, ids)
    assert len(found.positions) == 0
    with raises("every id in [0, 3) is special; random_probability"):
        mask_tokens(ids, special_ids=[0, 1, 2], mask_id=0, vocab_size=3, random_probability=0.1)


def test_mask_strided() -> None:
    rng = np.random.default_rng(7)
    case = plain_case("word", make_ids(rng, (37, 31)), make_word_ids(rng, (37, 31), 0.6))
    strided = {name: np.asfortranarray(case[name]) for name in ("ids", "word_ids")}
    assert_equal(run(case, **strided), run(case))


def test_mask_seed_from_torch() -> None:
    case = plain_case("token", make_ids(np.random.default_rng(3), (101, 131)), None)
    with torch.random.fork_rng():
        torch.manual_seed(17)
        first, second = run(case, seed=None), run(case, seed=None)
        torch.manual_seed(17)
        assert_equal(run(case, seed=None), first)
        assert_equal(run(case, seed=None), second)
    assert not torch.equal(first.labels, second.labels)


def test_mask_leaves_python_free() -> None:
    ids = np.full((4001, 1009), 7)
    is_inside = threading.Event()

    def call() -> None:
        is_inside.set()
        bert_fast._C.mask_tokens(ids, None, SPECIAL_IDS, "token", 0.15, 0.8, 0.1, MASK_ID, VOCAB_SIZE, 3, 1, 0, 1)
        is_inside.clear()

    def turns() -> int:
        """How often this thread gets its turn while the other is in the call: were the lock held, hardly ever."""
        running = pool.submit(call)
        is_inside.wait()
        count = 0
        while is_inside.is_set():
            time.sleep(0)  # lets go of the lock, and takes it again
            count += 1
        running.result()
        return count

    with ThreadPoolExecutor(1) as pool:
        assert max(turns() for _ in range(9)) > 100


# ---- refusals --------------------------------------------------------------------------------------------------------

MASK = torch.ones(3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unpad(torch.ones(5)), "attention_mask has shape (5,)"),
        (lambda: unpad(torch.ones(2, 3, 5)), "attention_mask has shape (2, 3, 5)"),
        (lambda: unpad(MASK, ids=torch.ones(5, 3)), "ids has shape (5, 3) and attention_mask (3, 5)"),
        (lambda: unpad(MASK, token_types=torch.ones(3, 7)), "token_types has shape (3, 7) and attention_mask (3, 5)"),
        (lambda: unpad(MASK, keep=torch.ones(15)), "keep has shape (15,) and attention_mask (3, 5)"),
        (lambda: unpad(MASK).select(torch.ones(3, 7)), "x has shape (3, 7); its first two dimensions must be (3, 5)"),
        (lambda: unpad(MASK).select(torch.ones(3)), "x has shape (3,); its first two dimensions must be (3, 5)"),
        (lambda: unpad(MASK).pad(torch.ones(14, 2)), "x has shape (14, 2); the batch has 15 tokens"),
        (lambda: pad(torch.ones(16), unpad(MASK)), "x has shape (16,); the batch has 15 tokens"),
    ],
)
def test_unpad_refuses(call: Callable[[], object], message: str) -> None:
    with raises(message):
        call()


def test_unpad_refuses_too_many_tokens() -> None:
    mask = np.zeros((2**15, 2**16), np.bool_)  # never touched, so it takes no memory
    with raises("mask has 32768 x 65536 elements; a batch may have at most 2147483647 tokens"):
        unpad(torch.from_numpy(mask))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([4, 0, 7], "indices[2] is 7; it must lie in [0, 7)"),
        ([4, -1, 2], "indices[1] is -1; it must lie in [0, 7)"),
        ([5, 1, 5], "indices[2] is 5, as is indices[0]; indices must be distinct"),
        ([5, 1], "x has shape (3, 2) and indices (2,)"),
        ([5, 1, 2, 3], "x has shape (3, 2) and indices (4,)"),
    ],
)
def test_pad_refuses(indices: list[int], message: str, requires_grad: bool) -> None:
    x = torch.ones(3, 2, requires_grad=requires_grad)
    with raises(message):
        bert_fast.functional.pad(x, torch.tensor(indices), 7)


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2, torch.complex64], ids=str
)
def test_rare_mask_dtypes(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])
    assert torch.equal(unpad(mask.to(dtype)).positions, unpad(mask).positions)


def test_pad_refuses_without_values() -> None:
    pad = bert_fast.functional.pad
    with raises("indices[1] is 0, as is indices[0]"):
        pad(torch.ones(2, 0), torch.tensor([0, 0]), 3)
    with raises("indices[1] is 9; it must lie in [0, 3)"):
        pad(torch.ones(2, 0), torch.tensor([0, 9]), 3)
    with raises("rows is -1; it must be at least 0"):
        pad(torch.ones(0, 3), torch.ones(0, dtype=torch.int64), -1)
    with raises("indices[0] is 0; it must lie in [0, 0)"):
        pad(torch.ones(2, 3), torch.tensor([0, 1]), 0)
    with raises("x has shape ()"):
        bert_fast.masking.pad(torch.tensor(1.0), unpad(torch.ones(1, 1)))


def test_pad_conjugate() -> None:
    x = torch.tensor([1j, 2j]).conj()
    assert bert_fast.functional.pad(x, torch.tensor([2, 0]), 4).tolist() == [-2j, 0, -1j, 0]


def test_integers_that_do_not_fit() -> None:
    with raises("cu_seqlens holds 4294967299"):
        bert_fast.masking.make_tiles(torch.tensor([0, 2**32 + 3]))
    with raises("lengths has dtype torch.float32; integers are needed"):
        pack(torch.tensor([1.9, 2.9]), 2)


@pytest.mark.parametrize(
    ("cu_seqlens", "num_keys", "message"),
    [
        ([], None, "cu_seqlens is empty"),
        ([1, 3], None, "cu_seqlens[0] is 1; it must be 0"),
        ([0, 5, 3], None, "cu_seqlens must ascend: cu_seqlens[1] is 5 and cu_seqlens[2] is 3"),
        ([[0, 5], [0, 3]], None, "cu_seqlens has shape (2, 2); 1 dimensions"),
        ([0, 5, 8], [5, 4], "num_keys[1] is 4; it must lie in [0, 3]"),
        ([0, 5, 8], [-1, 3], "num_keys[0] is -1; it must lie in [0, 5]"),
        ([0, 5, 8], [5], "num_keys has shape (1); (2) is needed"),
    ],
)
def test_tiles_refuses(cu_seqlens: list[int], num_keys: list[int] | None, message: str) -> None:
    with raises(message):
        make_tiles(torch.tensor(cu_seqlens, dtype=torch.int32), None if num_keys is None else torch.tensor(num_keys))


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([5, 8, 3], 7, "lengths[1] is 8; it must lie in [1, 7]"),
        ([5, 7, 0], 7, "lengths[2] is 0; it must lie in [1, 7]"),
        ([-3], 7, "lengths[0] is -3; it must lie in [1, 7]"),
        ([], 0, "capacity is 0; it must be at least 1"),
        ([1], -2, "capacity is -2; it must be at least 1"),
        ([[1, 2]], 7, "lengths has shape (1, 2); 1 dimensions"),
    ],
)
def test_pack_refuses(lengths: list[int], capacity: int, message: str) -> None:
    with raises(message):
        pack(torch.tensor(lengths, dtype=torch.int64), capacity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probability": -0.25}, "probability is -0.25"),
        ({"probability": 1.5}, "probability is 1.5"),
        ({"probability": float("nan")}, "probability is nan"),
        ({"mask_probability": -0.5}, "mask_probability is -0.5"),
        ({"mask_probability": 1.25}, "mask_probability is 1.25"),
        ({"mask_probability": float("nan")}, "mask_probability is nan"),
        ({"random_probability": -0.5}, "random_probability is -0.5"),
        ({"random_probability": 1.25}, "random_probability is 1.25"),
        ({"random_probability": 0.25}, "mask_probability + random_probability is 1.05"),
        ({"vocab_size": 0}, "vocab_size is 0; it must lie in [1, 2147483647]"),
        ({"vocab_size": -5}, "vocab_size is -5; it must lie in [1, 2147483647]"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648; it must lie in [1, 2147483647]"),
        ({"max_span": 0}, "max_span is 0; it must lie in [1, 1000]"),
        ({"max_span": 1001}, "max_span is 1001; it must lie in [1, 1000]"),
        ({"probability": -1e-9}, "probability is -1"),
        ({"ids": np.full((3, 5), 7.5)}, "ids has dtype torch.float64; integers are needed"),
        ({"word_ids": np.full((3, 5), 2**31)}, "word_ids holds 2147483648"),
        ({"mask_id": 211}, "mask_id is 211; it must lie in [0, 211)"),
        ({"mask_id": -1}, "mask_id is -1; it must lie in [0, 211)"),
        ({"special_ids": [0, 211]}, "special_ids holds 211; ids lie in [0, 211)"),
        ({"special_ids": [-7, 0]}, "special_ids holds -7; ids lie in [0, 211)"),
        ({"unit": "words"}, 'unit is "words"; it must be token, word or span'),
        ({"unit": "word"}, "word_ids is None; unit 'word'"),
        ({"seed": -1}, "seed is -1; it must lie in [0, 2^64)"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must lie in [0, 2^64)"),
        ({"first_row": -3}, "first_row is -3; it must lie in [0, 2^64)"),
        ({"first_row": 2**64}, "first_row is 18446744073709551616; it must lie in [0, 2^64)"),
        ({"word_ids": np.zeros((3, 7), np.int32)}, "word_ids has shape (3, 7); (3, 5) is needed"),
        ({"ids": np.full(5, 7)}, "ids has shape (5); 2 dimensions"),
        ({"ids": np.full((2, 3, 5), 7)}, "ids has shape (2, 3, 5); 2 dimensions"),
    ],
)
def test_mask_refuses(changes: dict[str, Any], message: str) -> None:
    case = plain_case("token", np.full((3, 5), 7), None)
    with raises(message):
        run(case, **changes)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("value", [VOCAB_SIZE, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("column", [0, 63, 64, 130])
@pytest.mark.parametrize("unit", UNITS)
def test_mask_refuses_bad_ids(unit: str, column: int, value: int, count: int) -> None:
    ids = np.full((11, 131), 7)
    ids[5, column] = value
    ids[5, column + 1 :] = ids[9] = VOCAB_SIZE + 1  # later ones: the first is named, with any number of threads
    case = plain_case(unit, ids, np.zeros((11, 131), np.int32))
    with threads(count), raises(f"ids[5, {column}] is {value}; ids lie in [0, 211)"):
        run(case)
