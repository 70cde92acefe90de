"""Odd masks and odd input to swapped models: the original's answer, or an error that says as much as the original's."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import test_families
import test_swap
import test_torch_encoder
import torch
from models import (
    MIXED,
    SIZES,
    any_path,
    assert_near,
    assert_same_gradients,
    gradients,
    mask_of,
    one_thread,  # noqa: F401
    transformers,
)
from test_families import FAMILIES, WITHOUT_TYPES, rows_for, width_of
from test_swap import assert_same_output, tensors
from test_torch_encoder import WIDTH, Kind, at_tokens
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

Call = dict[str, Any]

PREFIXES = ("Bert", *FAMILIES)
KINDS = [f"{prefix}-{kind}" for prefix in PREFIXES for kind in ("sdpa", "eager") if (prefix, kind) != ("MPNet", "sdpa")]
FIRST_KINDS = [next(kind for kind in KINDS if kind.startswith(f"{prefix}-")) for prefix in PREFIXES]

# Full and padded right, once to a single token; the place (1, 2) is a token's, (1, 9) is hidden.
ROWS = """
    1111111111111
    1111111000000
    1111100000000
    1000000000000
"""
BATCH = (4, 13)
TOKENS = mask_of(ROWS)
EVERYWHERE = torch.ones(BATCH, dtype=torch.bool)

ROWS_OF = {
    "left": "0001111111111 1111111111111 0000000000001",
    "holes": "1101100111010 0011011101000 0000010000000 1010101010101",
    "an empty row": "1111111111111 0000000000000 1111000000000",
    "empty rows first and last": "0000000000000 0000000000000 1111000000000 0000000000000",
    "nothing": "0000000000000 0000000000000 0000000000000",
    "nothing in one row": "0000000000000",
    "one row": "1111111111100",
    "length 1": "1 1 1",
    "length 1, one hidden": "1 0 1",
    "a token": "1",
    "a hidden token": "0",
}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_family = pytest.mark.parametrize("kind", FIRST_KINDS)


@functools.cache
def models(kind: str, head: str = "Model", is_training: bool = False) -> tuple[Any, Any]:
    """A model and its swapped copy, which no test may change. They train without dropout."""
    prefix, implementation = kind.split("-")
    make = test_swap.pair if prefix == "Bert" else test_families.pair
    pair = make(f"{prefix}{head}", attn_implementation=implementation)
    for module in (module for model in pair for module in model.modules()):
        module.train(is_training)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return pair


def has_types(kind: str) -> bool:
    return not kind.startswith(WITHOUT_TYPES)


def has_position_table(kind: str) -> bool:
    """Elsewhere positions are angles: every number, of whatever dtype, is one."""
    return not kind.startswith("ModernBert")


def ids_of(*shape: int) -> Tensor:
    return torch.randint(4, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def embeds_of(kind: str, *shape: int) -> Tensor:
    width = models(kind)[0].get_input_embeddings().weight.shape[1]
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(3))


def attempt(model: Any, *args: Any, has_grad: bool = True, **call: Any) -> Any:
    """The output, or the error."""
    try:
        with any_path(), torch.set_grad_enabled(has_grad):
            return model(*args, **call)
    except Exception as error:
        return error


def assert_finite(output: Any) -> None:
    assert not isinstance(output, Exception), repr(output)
    for name, value in tensors(output).items():
        assert bool(value.isfinite().all()), name


def is_clear(error: Exception, says: str | None) -> bool:
    return says is not None and isinstance(error, (IndexError, ValueError)) and re.search(says, str(error)) is not None


def assert_error(found: Any, expected: Exception, says: str | None = None) -> None:
    """An error of the original's kind, or one that says more."""
    kinds: tuple[type[Exception], ...] = (type(expected),)
    if isinstance(expected, RuntimeError):
        kinds = (RuntimeError,)
    elif isinstance(expected, (AttributeError, TypeError)):  # something else than a tensor
        kinds = (AttributeError, TypeError)
    assert isinstance(found, Exception), f"an answer in place of {expected!r}"
    assert isinstance(found, kinds) or is_clear(found, says), f"{found!r} in place of {expected!r}"


def assert_like_the_original(
    pair: tuple[Any, Any], call: Call, tokens: Tensor, says: str | None = None, has_answer: bool | None = None
) -> None:
    """The original's answer at tokens and numbers elsewhere, or its error; with gradients and through the engine.

    Args:
        pair: a model and its swapped copy.
        call: the arguments.
        tokens: where the answers are compared.
        says: what the message has of an IndexError or ValueError that is as good as what the original does.
        has_answer: whether the original is known to answer; None: that is its own affair.
    """
    expected = attempt(pair[0], **call)
    assert has_answer in (None, not isinstance(expected, Exception)), repr(expected)
    for has_grad in (True, False):
        found = attempt(pair[1], has_grad=has_grad, **call)
        if isinstance(expected, Exception):
            assert_error(found, expected, says)
        elif isinstance(found, Exception):
            assert is_clear(found, says), f"{found!r} in place of an answer"
        else:
            assert_same_output(found, expected, tokens)
            assert_finite(found)


# ---- masks with two dimensions ---------------------------------------------------------------------------------------

LOWEST = torch.finfo(torch.float32).min


def added(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """A mask that is to be added to scores."""
    return lambda mask: torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, value)


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda mask: mask.to(dtype)


# The mask in another form. What differs from zero is a token, whatever it says: that is how transformers reads it.
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": cast(torch.int8),
    "int16": cast(torch.int16),
    "uint16": cast(torch.uint16),
    "float8": cast(torch.float8_e4m3fn),
    "complex": cast(torch.complex64),
    "halves": lambda mask: 0.5 * mask.float(),
    "halves in float64": lambda mask: 0.5 * mask.double(),
    "quarters in float16": lambda mask: 0.25 * mask.half(),
    "soft": lambda mask: mask * torch.linspace(0.01, 1, mask.shape[1]),
    "subnormal": lambda mask: 1e-45 * mask.float(),
    "negative": lambda mask: -mask.long(),
    "256": lambda mask: 256 * mask.long(),
    "2 ** 32": lambda mask: 2**32 * mask.long(),
    "negative zero": lambda mask: torch.where(mask, 1.0, -0.0),
    "infinite": lambda mask: torch.where(mask, torch.inf, 0.0),
    "nan": lambda mask: torch.where(mask, torch.nan, 0.0),
    "added -inf": added(-torch.inf),
    "added lowest": added(LOWEST),
    "transposed in memory": lambda mask: mask.long().T.contiguous().T,
    "every other column": lambda mask: torch.stack((mask, ~mask), -1).flatten(1)[:, ::2],
    "expanded": lambda mask: mask[1:2].long().expand(mask.shape),
    "wants a gradient": lambda mask: mask.float().requires_grad_(),
}


@pytest.mark.parametrize("form", MASKS)
@each_kind
def test_masks(kind: str, form: str) -> None:
    mask = mask_of(rows_for(kind.partition("-")[0]))
    given = MASKS[form](mask)
    call = {"input_ids": ids_of(*mask.shape), "attention_mask": given}
    assert_like_the_original(models(kind), call, given.to(torch.complex64) != 0, has_answer=True)


@pytest.mark.parametrize("rows", ROWS_OF)
@each_kind
def test_rows(kind: str, rows: str) -> None:
    mask = mask_of(ROWS_OF[rows])
    for source in ({"input_ids": ids_of(*mask.shape)}, {"inputs_embeds": embeds_of(kind, *mask.shape)}):
        call = {**source, "attention_mask": mask.long()}
        assert_like_the_original(models(kind), call, mask, has_answer=True)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "2-D": lambda mask: mask.long(),
    "soft": MASKS["soft"],
    "bool 4-D": lambda mask: mask[:, None, None].expand(-1, 1, mask.shape[1], -1),
    "added 4-D": lambda mask: added(LOWEST)(mask)[:, None, None].repeat(1, 3, mask.shape[1], 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", ["left", "holes", "an empty row", "length 1, one hidden"])
@each_kind
def test_training(kind: str, rows: str, form: str) -> None:
    """Hidden states and gradients."""
    mask = mask_of(ROWS_OF[rows])
    pair = models(kind, is_training=True)
    weights = torch.randn(*mask.shape, width_of(pair[0]), generator=torch.Generator().manual_seed(5))[mask]
    call = {"input_ids": ids_of(*mask.shape), "attention_mask": FORMS[form](mask)}
    grads = []
    states = []
    for model in pair:
        with any_path():
            output = model(**call, output_hidden_states=True, return_dict=False)
        assert type(output) is tuple
        states.append(output[-1])
        grads.append(gradients(model, (output[0][mask] * weights).sum()))
    for expected, found in zip(*states, strict=True):
        assert_near(found[mask], expected[mask])
    assert_same_gradients(grads[1], grads[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_masks_in_another_dtype_than_the_model(dtype: torch.dtype) -> None:
    """Nothing is computed with a mask: bit by bit the same as with a bool one, which others compare."""
    _, swapped = test_swap.pair()
    swapped.to(dtype)
    mask = mask_of(MIXED)
    for has_grad in (True, False):
        expected = attempt(swapped, ids_of(*mask.shape), attention_mask=mask, has_grad=has_grad)
        for mask_dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            given = 0.5 * mask.to(mask_dtype)
            found = attempt(swapped, ids_of(*mask.shape), attention_mask=given, has_grad=has_grad)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "holes"])
@pytest.mark.parametrize(
    "shape", [(4, 11), (4, 15), (4, 1), (1, 13), (3, 13), (8, 13), (13, 4), (0, 13), (4, 0)], ids=str
)
@each_kind
def test_masks_of_another_shape(kind: str, shape: tuple[int, int], is_whole: bool) -> None:
    """To some of them transformers finds an answer; the error says both shapes."""
    mask = torch.ones(shape).long()
    if not is_whole:
        mask[1::2, ::3] = 0
    call = {"input_ids": ids_of(*BATCH), "attention_mask": mask}
    says = rf"attention_mask has shape {re.escape(str(shape))} and the batch \(4, 13\)"
    assert_like_the_original(models(kind), call, EVERYWHERE, says)


# ---- masks with other dimensions -------------------------------------------------------------------------------------

MASK_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "0-D": lambda mask: mask[0, 0],
    "1-D": lambda mask: mask[1],
    "1-D, all ones": lambda mask: mask[0],
    "batch, 1, length": lambda mask: mask[:, None],
    "batch, length, 1": lambda mask: mask[:, :, None],
    "batch, length, length": lambda mask: mask[:, None].expand(-1, 13, -1),
    "batch, 1, 1, length": lambda mask: mask[:, None, None],
    "batch, 1, length, length": lambda mask: mask[:, None, None].expand(-1, 1, 13, -1),
    "batch, heads, length, length": lambda mask: mask[:, None, None].repeat(1, 3, 13, 1),
    "1, 1, length, length": lambda mask: mask[1].expand(1, 1, 13, 13),
    "1, heads, length, length": lambda mask: mask[None, :3, None].expand(-1, -1, 13, -1),
    "triangles": lambda mask: mask[:, None, None] & torch.ones(13, 13).tril().bool(),
    "hidden rows": lambda mask: mask[:, None, None] & mask[:, None, :, None],
    "batch, 2, length, length": lambda mask: mask[:, None, None].expand(-1, 2, 13, -1),
    "batch, 1, 11, 11": lambda mask: mask[:, None, None, :11].expand(-1, 1, 11, -1),
    "5-D": lambda mask: mask[:, None, None, None].expand(-1, 1, 1, 13, -1),
}

NUMBERS = {
    "bool": cast(torch.bool),
    "uint8": cast(torch.uint8),
    "int64": cast(torch.int64),
    "float16": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "float32": cast(torch.float32),
    "float64": cast(torch.float64),
    "halves": MASKS["halves"],
    "added -inf": added(-torch.inf),
    "added lowest": added(LOWEST),
    "added in float64": added(-1e30, torch.float64),
    "wants a gradient": MASKS["wants a gradient"],
}


@pytest.mark.parametrize("shape", MASK_SHAPES)
@each_kind
def test_masks_with_other_dimensions(kind: str, shape: str) -> None:
    """Bit by bit what the original makes of them, errors word by word."""
    for name, make in NUMBERS.items():
        call: Call = {
            "input_ids": ids_of(*BATCH),
            "attention_mask": make(MASK_SHAPES[shape](TOKENS)),
            "output_hidden_states": True,
            "return_dict": False,
        }
        expected, found = (attempt(model, **call) for model in models(kind))
        assert type(found) is type(expected), f"{name}: {found!r} in place of {expected!r}"
        if isinstance(expected, Exception):
            assert str(found) == str(expected)
            continue
        ours, theirs = tensors(found), tensors(expected)
        assert list(ours) == list(theirs)
        assert all(torch.equal(one.nan_to_num(7e7), theirs[key].nan_to_num(7e7)) for key, one in ours.items()), name


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
@each_kind
def test_no_tokens(kind: str, head: str) -> None:
    """The original raises RuntimeError; an answer about nothing is empty."""
    for shape in ((0, 5), (0, 0), (1, 0), (3, 0)):
        for mask in (None, torch.ones(shape)):
            call: Call = {"input_ids": ids_of(*shape), "attention_mask": mask}
            expected = attempt(models(kind, head)[0], **call)
            assert isinstance(expected, RuntimeError)
            for has_grad in (True, False):
                found = attempt(models(kind, head)[1], has_grad=has_grad, **call)
                if isinstance(found, Exception):
                    assert_error(found, expected, rf"input_ids .*shape {re.escape(str(shape))}")
                else:
                    assert found[0].shape[:-1] == ((0,) if head == "ForSequenceClassification" else shape)
                    assert_finite(found)


@each_family
def test_no_loss_without_tokens(kind: str) -> None:
    """A mean over nothing is no number."""
    call: Call = {
        "input_ids": ids_of(3, 0),
        "start_positions": torch.zeros(3).long(),
        "end_positions": torch.zeros(3).long(),
    }
    for has_grad in (True, False):
        found = attempt(models(kind, "ForQuestionAnswering")[1], has_grad=has_grad, **call)
        assert isinstance(found, Exception) or bool(found.loss.isfinite())


@pytest.mark.parametrize("what", ["ids", "embeds", "hidden", "types"])
@each_family
def test_too_long(kind: str, what: str) -> None:
    call: Call = {"input_ids": ids_of(2, 38)}
    tokens = torch.ones(2, 38, dtype=torch.bool)
    if what == "embeds":
        call = {"inputs_embeds": embeds_of(kind, 2, 38)}
    elif what == "hidden":
        tokens[:, 20:] = False
        call["attention_mask"] = tokens
    elif what == "types":
        call["token_type_ids"] = torch.zeros(2, 38).long()
    says = r"length 38; max_position_embeddings is 37" if has_position_table(kind) else None
    assert_like_the_original(models(kind), call, tokens, says, has_answer=says is None)
    # There is no such limit where positions are given.
    call |= {"position_ids": torch.arange(38)[None] % 31, "token_type_ids": torch.zeros(2, 38).long()}
    assert_like_the_original(models(kind), call, tokens, has_answer=True)


# ---- indices ---------------------------------------------------------------------------------------------------------

ENTRIES = {"input_ids": 97, "token_type_ids": 5, "position_ids": 37}

NAMES = [(kind, name) for kind in FIRST_KINDS for name in ENTRIES if name != "token_type_ids" or has_types(kind)]

each_name = pytest.mark.parametrize(("kind", "name"), NAMES, ids=str)

OUT_OF_RANGE = r"index out of range|its table has \d+ entries"


def sparse_call(kind: str, name: str) -> Call:
    """A call with these indices. transformers takes positions of any shape where types are given."""
    call: Call = {"input_ids": ids_of(*BATCH), "attention_mask": TOKENS.long()}
    if name == "position_ids":
        call["position_ids"] = torch.arange(13).flip(0).repeat(4, 1) + 5
    if name != "input_ids" and has_types(kind):
        call["token_type_ids"] = torch.arange(52).view(BATCH) % 5
    return call


@each_name
def test_indices_of_another_dtype(kind: str, name: str) -> None:
    """Only int32 and int64 are indices to torch."""
    call = sparse_call(kind, name)
    is_index = name != "position_ids" or has_position_table(kind)
    for dtype in (torch.float32, torch.float16, torch.bool, torch.int8, torch.int16, torch.uint8):
        odd = {**call, name: call[name].to(dtype)}
        says = f"has dtype {dtype}" if is_index else None
        assert_like_the_original(models(kind), odd, TOKENS, says, has_answer=not is_index)
    for narrow in (call[name].int(), call[name].int().T.contiguous().T):
        assert_like_the_original(models(kind), {**call, name: narrow}, TOKENS, has_answer=True)


@pytest.mark.parametrize("value", [-1, None, 10**9, 2**40, -(2**62)], ids=str)
@each_name
def test_indices_out_of_range(kind: str, name: str, value: int | None) -> None:
    """An error at tokens, and at words under the mask; of padding nobody reads where it would stand."""
    call = sparse_call(kind, name)
    is_index = name != "position_ids" or has_position_table(kind)
    entry = torch.tensor(ENTRIES[name] if value is None else value)
    odd = call[name].index_put((torch.tensor(1), torch.tensor(2)), entry)
    says = OUT_OF_RANGE if is_index else None
    assert_like_the_original(models(kind), {**call, name: odd}, TOKENS, says, has_answer=not is_index)
    odd = call[name].index_put((torch.tensor(1), torch.tensor(9)), entry)
    if name == "input_ids":
        assert_like_the_original(models(kind), {**call, name: odd}, TOKENS, says)
        return
    call["input_ids"] = call["input_ids"].masked_fill(~TOKENS, models(kind)[0].config.pad_token_id)
    expected = attempt(models(kind)[0], **call)
    for has_grad in (True, False):
        found = attempt(models(kind)[1], has_grad=has_grad, **{**call, name: odd})
        assert_same_output(found, expected, TOKENS)
        assert_finite(found)


@each_family
def test_a_hidden_word_out_of_range(kind: str) -> None:
    """It is computed, as the original does, since somebody may read it."""
    ids = ids_of(*BATCH)
    ids[2, 0] = 97
    mask = TOKENS & (torch.arange(13) > 0)
    for has_grad in (True, False):
        found = attempt(models(kind)[1], ids, mask, has_grad=has_grad)
        assert_error(found, IndexError(), OUT_OF_RANGE)


ROW = torch.arange(13)

# Positions or types (batch, length), and what else stands for such; the original takes all, or none.
INDEX_SHAPES: dict[str, Callable[[int], Tensor]] = {
    "length": lambda size: ROW % size,
    "1, length": lambda size: ROW[None] % size,
    "batch, length": lambda size: torch.arange(52).view(BATCH) % size,
    "batch, 1": lambda size: torch.tensor([[3], [4], [1], [0]]) % size,
    "1, 1": lambda size: torch.tensor([[size - 1]]),
    "scalar": lambda size: torch.tensor(size - 1),
    "expanded": lambda size: (ROW % size).expand(BATCH),
    "every other column": lambda size: (torch.arange(104).view(4, 26) % size)[:, ::2],
    "2, length": lambda size: (ROW % size).repeat(2, 1),
    "batch, length + 2": lambda size: (torch.arange(15) % size).repeat(4, 1),
    "batch, length - 2": lambda size: (torch.arange(11) % size).repeat(4, 1),
    "1, batch, length": lambda size: torch.arange(52).view(1, *BATCH) % size,
    "batch, 1, length": lambda size: torch.arange(52).view(4, 1, 13) % size,
}


@pytest.mark.parametrize("shape", INDEX_SHAPES)
@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
@each_family
def test_shapes_of_indices(kind: str, name: str, shape: str) -> None:
    """Families without types overlook whatever is given as such."""
    for source in ({"input_ids": ids_of(*BATCH)}, {"inputs_embeds": embeds_of(kind, *BATCH)}):
        types = {"token_type_ids": torch.arange(52).view(BATCH) % 5} if has_types(kind) else {}
        call = {**source, "attention_mask": TOKENS, **types, name: INDEX_SHAPES[shape](ENTRIES[name])}
        assert_like_the_original(models(kind), call, TOKENS)


def test_scalars_and_rows_are_positions_everywhere() -> None:
    """Without types BERT refuses them, where DistilBERT does not."""
    for position, same in ((ROW + 3, (ROW + 3)[None]), (torch.tensor(3), torch.full((1, 13), 3))):
        original, swapped = models("Bert-sdpa")
        assert isinstance(attempt(original, ids_of(*BATCH), TOKENS, position_ids=position), Exception)
        expected = original(ids_of(*BATCH), TOKENS, position_ids=same)
        assert_same_output(swapped(ids_of(*BATCH), TOKENS, position_ids=position), expected, TOKENS)


# ---- ids and embeddings ----------------------------------------------------------------------------------------------

NEEDED_SHAPE = r"input_ids or inputs_embeds has shape .*\(batch, length\)"

SOURCES: dict[str, Callable[[Tensor], Any]] = {
    "1-D": lambda x: x[0],
    "0-D": lambda x: x[0, 0],
    "one more": lambda x: x[:, None],
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
}


@pytest.mark.parametrize("form", SOURCES)
@each_family
def test_dimensions_of_the_source(kind: str, form: str) -> None:
    """DistilBERT's original computes something from (batch, 1, length)."""
    make = SOURCES[form]
    for source in ({"input_ids": make(ids_of(*BATCH))}, {"inputs_embeds": make(embeds_of(kind, *BATCH))}):
        expected = attempt(models(kind)[0], **source)
        for has_grad in (True, False):
            found = attempt(models(kind)[1], has_grad=has_grad, **source)
            assert is_clear(found, NEEDED_SHAPE) or isinstance(expected, Exception)
            if isinstance(expected, Exception):
                assert_error(found, expected, NEEDED_SHAPE)


EMBEDS: dict[str, Callable[[Tensor], Tensor]] = {
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "int64": lambda x: (3 * x).long(),
    "transposed in memory": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "expanded": lambda x: x[1:2].expand(x.shape),
    "wide": lambda x: torch.cat((x, x), -1),
    "narrow": lambda x: x[..., :-3],
    "width 1": lambda x: x[..., :1],
    "width 0": lambda x: x[..., :0],
}


@pytest.mark.parametrize("form", EMBEDS)
@each_family
def test_embeds(kind: str, form: str) -> None:
    embeds = EMBEDS[form](embeds_of(kind, *BATCH))
    for mask in (None, TOKENS):
        call = {"inputs_embeds": embeds, "attention_mask": mask}
        assert_like_the_original(models(kind), call, TOKENS, r"inputs_embeds has (shape|width)")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38], ids=str)
@each_kind
def test_what_is_no_number_stays_where_it_is(kind: str, value: float) -> None:
    """Hidden, it spoils no token, though it does in the original; at a token it spoils one row."""
    embeds = embeds_of(kind, *BATCH)
    expected = models(kind)[0](inputs_embeds=embeds, attention_mask=TOKENS)
    hidden = embeds.masked_fill(~TOKENS[..., None], value)
    open_ = embeds.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value))
    rows = torch.arange(4) != 1
    for has_grad in (True, False):
        found = attempt(models(kind)[1], inputs_embeds=hidden, attention_mask=TOKENS, has_grad=has_grad)
        if kind != "ModernBert-eager":  # the original, since no key may be near to a hidden word
            assert_same_output(found, expected, TOKENS)
        found = attempt(models(kind)[1], inputs_embeds=open_, attention_mask=TOKENS, has_grad=has_grad)
        assert_same_output(found, expected, TOKENS & rows[:, None])


# ---- arguments -------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[tuple[Any, ...], Call]] = {
    "positional": ((ids_of(*BATCH), TOKENS), {}),
    "nothing": ((), {}),
    "mask alone": ((), {"attention_mask": TOKENS}),
    "None": ((None, None), {}),
    "mask twice": ((ids_of(*BATCH), TOKENS), {"attention_mask": TOKENS}),
    "ids twice": ((ids_of(*BATCH),), {"input_ids": ids_of(*BATCH)}),
    "too many": ((ids_of(*BATCH), *(30 * [None])), {}),
    "misspelt mask": ((ids_of(*BATCH),), {"attention_masks": TOKENS}),
    "list for a mask": ((ids_of(*BATCH), TOKENS.tolist()), {}),
    "array for a mask": ((ids_of(*BATCH), TOKENS.numpy()), {}),
    "dictionary for a mask": ((ids_of(*BATCH), {"full_attention": None}), {}),
    "sparse mask": ((ids_of(*BATCH), TOKENS.long().to_sparse()), {}),
    "one position": ((ids_of(*BATCH), TOKENS), {"position_ids": 3}),
    "flags that are numbers": ((ids_of(*BATCH), TOKENS), {"output_hidden_states": 1, "return_dict": 0}),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@each_family
def test_arguments(kind: str, name: str) -> None:
    args, call = ARGUMENTS[name]
    expected = attempt(models(kind)[0], *args, **call)
    for has_grad in (True, False):
        found = attempt(models(kind)[1], *args, has_grad=has_grad, **call)
        if isinstance(expected, Exception):
            assert_error(found, expected)
        else:
            assert not isinstance(found, Exception), repr(found)
            assert_same_output(found, expected, TOKENS)


@each_family
def test_both_sources(kind: str) -> None:
    call: Call = {"input_ids": ids_of(*BATCH), "inputs_embeds": embeds_of(kind, *BATCH)}
    expected, found = (attempt(model, **call) for model in models(kind))
    assert isinstance(expected, ValueError)
    assert repr(found) == repr(expected)


DEVICES = [
    (kind, name)
    for kind in FIRST_KINDS
    for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
    if name != "token_type_ids" or has_types(kind)
]


@pytest.mark.parametrize(("kind", "name"), DEVICES, ids=str)
def test_another_device(kind: str, name: str) -> None:
    """An error; without one, what happens to lie in memory would be an answer, as it is for some of the originals."""
    call: Call = {"input_ids": ids_of(*BATCH), "attention_mask": TOKENS}
    if name == "inputs_embeds":
        call = {name: embeds_of(kind, *BATCH), "attention_mask": TOKENS}
    call[name] = call.get(name, torch.zeros(BATCH).long()).to("meta")
    for has_grad in (True, False):
        found = attempt(models(kind)[1], has_grad=has_grad, **call)
        assert isinstance(found, (RuntimeError, TypeError, ValueError)), f"{found!r} in place of an error"


# ---- heads -----------------------------------------------------------------------------------------------------------


def token_labels() -> Tensor:
    labels = torch.randint(3, BATCH, generator=torch.Generator().manual_seed(7))
    return labels.masked_fill(~TOKENS, -100)


def put(labels: Tensor, column: int, value: int) -> Tensor:
    """With another value in the second row."""
    return labels.index_put((torch.tensor(1), torch.tensor(column)), torch.tensor(value))


LABELS: dict[str, Callable[[Tensor], Any]] = {
    "all -100": lambda labels: torch.full_like(labels, -100),
    "negative": lambda labels: put(labels, 2, -1),
    "too large": lambda labels: put(labels, 2, 999),
    "too large and hidden": lambda labels: put(labels, 9, 999),
    "hidden": lambda labels: put(labels, 9, 1),
    "int32": lambda labels: labels.int(),
    "uint8": lambda labels: labels.clamp(min=0).to(torch.uint8),
    "bool": lambda labels: labels > 0,
    "float32": lambda labels: labels.float(),
    "shares": lambda labels: torch.rand(*labels.shape, 3, generator=torch.Generator().manual_seed(2)),
    "one more dimension": lambda labels: labels[..., None],
    "flat": lambda labels: labels.flatten(),
    "one row": lambda labels: labels[:1],
    "one a row": lambda labels: labels[:, 0],
    "long rows": lambda labels: torch.cat((labels, labels[:, :2]), 1),
    "scalar": lambda labels: labels[0, 0],
    "none": lambda labels: labels[:0],
    "transposed in memory": lambda labels: labels.T.contiguous().T,
    "transposed": lambda labels: labels.T,
    "list": lambda labels: labels.tolist(),
    "meta": lambda labels: labels.to("meta"),
}

TOKEN_HEADS = ("ForMaskedLM", "ForTokenClassification", "ForPreTraining", "ForCausalLM", "LMHeadModel")


def head_cases(*heads: str) -> list[tuple[str, str]]:
    return [
        (kind, head)
        for kind in FIRST_KINDS
        for head in heads
        if hasattr(transformers, f"{kind.partition('-')[0]}{head}")
    ]


def assert_same_loss(pair: tuple[Any, Any], call: Call, tokens: Tensor) -> None:
    """The answer, and the original's loss: no number where that is none, as for a mean over nothing."""
    for model in pair:
        model.config.problem_type = None  # set by a first call's labels
    expected = attempt(pair[0], **call)
    for has_grad in (True, False):
        found = attempt(pair[1], has_grad=has_grad, **call)
        if isinstance(expected, Exception):
            assert_error(found, expected)
            continue
        assert not isinstance(found, Exception), f"{found!r} in place of an answer"
        expected_values, values = tensors(expected), tensors(found)
        assert list(values) == list(expected_values)
        for name, value in values.items():
            other = expected_values[name]
            if name == ".loss" and bool(other.isnan().all()):
                assert bool(value.isnan().all())
            elif other.dim() == 0:
                assert_near(value, other)
            else:
                places = tokens if other.shape[: tokens.dim()] == tokens.shape else tokens.any(-1)
                assert_near(value[places], other[places])
                assert bool(value.isfinite().all())


@pytest.mark.parametrize("form", LABELS)
@pytest.mark.parametrize(("kind", "head"), head_cases(*TOKEN_HEADS), ids=str)
def test_labels_of_tokens(kind: str, head: str, form: str) -> None:
    call = {"input_ids": ids_of(*BATCH), "attention_mask": TOKENS, "labels": LABELS[form](token_labels())}
    assert_same_loss(models(kind, head), call, TOKENS)


CLASSES = torch.tensor([0, 2, 1, 1])

CLASS_LABELS: dict[str, Any] = {
    "all -100": torch.full((4,), -100),
    "negative": torch.tensor([0, -1, 1, 1]),
    "too large": torch.tensor([0, 3, 1, 1]),
    "int32": CLASSES.int(),
    "uint8": CLASSES.to(torch.uint8),
    "float32": CLASSES.float(),
    "shares": torch.rand(4, 3, generator=torch.Generator().manual_seed(2)),
    "shares in float64": torch.rand(4, 3, generator=torch.Generator().manual_seed(2)).double(),
    "column": CLASSES[:, None],
    "too many": torch.ones(5).long(),
    "scalar": torch.tensor(1),
    "list": CLASSES.tolist(),
    "meta": CLASSES.to("meta"),
}


@pytest.mark.parametrize("name", CLASS_LABELS)
@each_family
def test_labels_of_rows(kind: str, name: str) -> None:
    call = {"input_ids": ids_of(*BATCH), "attention_mask": TOKENS, "labels": CLASS_LABELS[name]}
    assert_same_loss(models(kind, "ForSequenceClassification"), call, TOKENS)


@each_family
def test_regression(kind: str) -> None:
    prefix = kind.partition("-")[0]
    make = test_swap.pair if prefix == "Bert" else test_families.pair
    pair = make(f"{prefix}ForSequenceClassification", num_labels=1)
    values = torch.linspace(-3, 2, 4)
    for labels in (
        values,
        values[:, None],
        values.double(),
        values.half(),
        values.long(),
        values[:3],
        values * torch.nan,
    ):
        call = {"input_ids": ids_of(*BATCH), "attention_mask": TOKENS, "labels": labels}
        assert_same_loss(pair, call, TOKENS)


STARTS, ENDS = torch.tensor([0, 3, 2, 0]), torch.tensor([4, 5, 2, 0])

ANSWERS: dict[str, tuple[Any, Any]] = {
    "negative": (STARTS - 1, ENDS),
    "too large": (STARTS + 99, ENDS + 99),
    "at the end": (STARTS * 0 + 13, ENDS * 0 + 12),
    "hidden": (torch.tensor([0, 9, 2, 0]), torch.tensor([4, 10, 2, 3])),
    "columns": (STARTS[:, None], ENDS[:, None]),
    "rows": (STARTS[:, None].expand(4, 2), ENDS),
    "int32": (STARTS.int(), ENDS.int()),
    "float32": (STARTS.float(), ENDS.float()),
    "start alone": (STARTS, None),
    "end alone": (None, ENDS),
    "too few": (STARTS[:2], ENDS[:2]),
    "scalars": (torch.tensor(1), torch.tensor(2)),
}


@pytest.mark.parametrize("name", ANSWERS)
@each_family
def test_answers(kind: str, name: str) -> None:
    start, end = ANSWERS[name]
    call = {
        "input_ids": ids_of(*BATCH),
        "attention_mask": TOKENS,
        "start_positions": start if start is None else start.clone(),  # transformers clamps them in place
        "end_positions": end if end is None else end.clone(),
    }
    assert_same_loss(models(kind, "ForQuestionAnswering"), call, TOKENS)


ODD_CALLS: dict[str, tuple[Call, Tensor]] = {
    "holes": ({"attention_mask": mask_of(ROWS_OF["holes"])}, mask_of(ROWS_OF["holes"])),
    "left": ({"attention_mask": TOKENS.flip(1).long()}, TOKENS.flip(1)),
    "soft": ({"attention_mask": MASKS["soft"](TOKENS)}, TOKENS),
    "added": ({"attention_mask": MASKS["added -inf"](TOKENS)}, ~TOKENS),
    "4-D": ({"attention_mask": FORMS["bool 4-D"](TOKENS)}, TOKENS),
    "positions": ({"attention_mask": TOKENS, "position_ids": ROW[None].flip(1) + 5}, TOKENS),
    "tuple": ({"attention_mask": TOKENS, "output_hidden_states": True, "return_dict": False}, TOKENS),
    "1-D": ({"input_ids": ids_of(13)}, TOKENS),
    "3-D": ({"input_ids": ids_of(4, 2, 13)}, TOKENS),
    "empty rows": ({"attention_mask": TOKENS & (ROW[:4] % 2 == 0)[:, None]}, TOKENS & (ROW[:4] % 2 == 0)[:, None]),
}


@pytest.mark.parametrize("name", ODD_CALLS)
@pytest.mark.parametrize(
    ("kind", "head"),
    head_cases("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    ids=str,
)
def test_heads(kind: str, head: str, name: str) -> None:
    odd, tokens = ODD_CALLS[name]
    call = {"input_ids": ids_of(*BATCH), **odd}
    assert_like_the_original(models(kind, head), call, tokens, NEEDED_SHAPE)


CHOICES: dict[str, Call] = {
    "left": {"input_ids": ids_of(2, 2, 13), "attention_mask": TOKENS.flip(1).view(2, 2, 13)},
    "one choice": {"input_ids": ids_of(4, 1, 13), "attention_mask": TOKENS[:, None]},
    "mask in 2-D": {"input_ids": ids_of(2, 2, 13), "attention_mask": TOKENS},
    # ModernBERT's head reads the place where the mask is largest.
    "soft mask": {"input_ids": ids_of(2, 2, 13), "attention_mask": MASKS["soft"](TOKENS).view(2, 2, 13)},
    "numbers of texts": {"input_ids": ids_of(2, 2, 13), "attention_mask": (TOKENS * (1 + ROW // 4)).view(2, 2, 13)},
    "bool mask": {"input_ids": ids_of(2, 2, 13), "attention_mask": TOKENS.view(2, 2, 13)},
    "negative mask": {"input_ids": ids_of(2, 2, 13), "attention_mask": -TOKENS.long().view(2, 2, 13)},
    "infinite mask": {"input_ids": ids_of(2, 2, 13), "attention_mask": MASKS["added -inf"](TOKENS).view(2, 2, 13)},
    "ids in 2-D": {"input_ids": ids_of(*BATCH), "attention_mask": TOKENS},
    "ids in 1-D": {"input_ids": ids_of(13)},
    "ids in 4-D": {"input_ids": ids_of(2, 2, 1, 13)},
    "no choices": {"input_ids": ids_of(4, 0, 13)},
    "neither": {},
    "nobody's label": {"input_ids": ids_of(2, 2, 13), "labels": torch.tensor([-100, -100])},
    "label too large": {"input_ids": ids_of(2, 2, 13), "labels": torch.tensor([0, 2])},
    "label in float32": {"input_ids": ids_of(2, 2, 13), "labels": torch.tensor([0.0, 1.0])},
}


@pytest.mark.parametrize("name", CHOICES)
@each_family
def test_choices(kind: str, name: str) -> None:
    call = CHOICES[name]
    rows = call.get("input_ids", TOKENS).shape[0]
    assert_same_loss(models(kind, "ForMultipleChoice"), call, torch.ones(rows, 1, dtype=torch.bool))


# ---- torch.nn.TransformerEncoder and its layer -----------------------------------------------------------------------

ENCODERS = [
    Kind(),
    Kind(norm_first=True, has_norm=True),
    Kind(is_alone=True),
    Kind(activation="gelu", batch_first=False),
]

each_encoder = pytest.mark.parametrize("kind", ENCODERS, ids=str)


@functools.cache
def encoders(kind: Kind) -> tuple[Any, Any]:
    """An encoder and its swapped copy, which no test may change."""
    return test_torch_encoder.pair(kind)


def in_order(kind: Kind, x: Any) -> Any:
    return x.transpose(0, 1) if isinstance(x, Tensor) and x.dim() == 3 and not kind.batch_first else x


def assert_like_torch(kind: Kind, call: Call, tokens: Tensor, says: str | None = None) -> None:
    """As assert_like_the_original; the original is asked with gradients, for without it has a fast path of its own."""
    call = {key: in_order(kind, x) for key, x in call.items()}
    expected = attempt(encoders(kind)[0], **call)
    for has_grad in (True, False):
        found = attempt(encoders(kind)[1], has_grad=has_grad, **call)
        if isinstance(expected, Exception):
            assert_error(found, expected, says)
            continue
        assert not isinstance(found, Exception), f"{found!r} in place of an answer"
        places = {"src_key_padding_mask": ~tokens}
        assert_near(at_tokens(kind, found, places), at_tokens(kind, expected, places))
        assert bool(found.isfinite().all())


SOURCE = torch.randn(*BATCH, WIDTH, generator=torch.Generator().manual_seed(4))

# Made of what is hidden, which is True there.
PADDINGS: dict[str, Callable[[Tensor], Any]] = {
    "lowest": lambda hidden: added(LOWEST)(~hidden),
    "-inf": lambda hidden: added(-torch.inf)(~hidden),
    "one": lambda hidden: hidden.float(),
    "int64": lambda hidden: hidden.long(),
    "uint8": lambda hidden: hidden.to(torch.uint8),
    "transposed in memory": lambda hidden: hidden.T.contiguous().T,
    "every other column": lambda hidden: torch.stack((hidden, ~hidden), -1).flatten(1)[:, ::2],
    "row": lambda hidden: hidden[1],
    "one row": lambda hidden: hidden[:1],
    "short": lambda hidden: hidden[:, :5],
    "long": lambda hidden: torch.cat((hidden, hidden), 1),
    "transposed": lambda hidden: hidden.T,
    "3-D": lambda hidden: hidden[None],
    "no rows": lambda hidden: hidden[:0],
    "list": lambda hidden: hidden.tolist(),
}


@pytest.mark.parametrize("form", PADDINGS)
@each_encoder
def test_torch_masks(kind: Kind, form: str) -> None:
    """With and without padding: what is refused once is refused always."""
    for hidden in (~TOKENS, ~EVERYWHERE):
        tokens = EVERYWHERE if form == "one" else ~hidden  # a one is added, and hides nothing
        assert_like_torch(kind, {"src": SOURCE, "src_key_padding_mask": PADDINGS[form](hidden)}, tokens)


@each_encoder
def test_torch_rows_without_tokens(kind: Kind) -> None:
    """The original has no number for them."""
    for rows in ("an empty row", "nothing", "a hidden token"):
        tokens = mask_of(ROWS_OF[rows])
        source = SOURCE[: tokens.shape[0], : tokens.shape[1]]
        for hidden in (~tokens, added(-torch.inf)(tokens)):
            call = {"src": in_order(kind, source), "src_key_padding_mask": hidden}
            expected = attempt(encoders(kind)[0], **call)
            for has_grad in (True, False):
                found = attempt(encoders(kind)[1], has_grad=has_grad, **call)
                places = {"src_key_padding_mask": ~tokens}
                assert_near(at_tokens(kind, found, places), at_tokens(kind, expected, places))
                assert bool(found.isfinite().all())


@each_encoder
def test_the_gradient_of_a_torch_mask(kind: Kind) -> None:
    """What is added to scores may be learned."""
    grads = []
    for model in encoders(kind):
        mask = added(-torch.inf)(TOKENS).requires_grad_()
        with any_path():
            output = model(in_order(kind, SOURCE), src_key_padding_mask=mask)
        (grad,) = torch.autograd.grad((in_order(kind, output)[TOKENS] ** 2).sum(), mask, allow_unused=True)
        grads.append(grad)
    assert grads[1] is not None
    assert_near(grads[1], grads[0])


TORCH_SOURCES: dict[str, Callable[[Tensor], Any]] = {
    "wide": lambda x: torch.cat((x, x), -1),
    "width 1": lambda x: x[..., :1],
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "int64": lambda x: (3 * x).long(),
    "2-D": lambda x: x[0],
    "1-D": lambda x: x[0, 0],
    "4-D": lambda x: x[:, None],
    "transposed in memory": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "expanded": lambda x: x[:1].expand(x.shape),
    "meta": lambda x: x.to("meta"),
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("form", TORCH_SOURCES)
@each_encoder
def test_torch_sources(kind: Kind, form: str, has_mask: bool) -> None:
    source = TORCH_SOURCES[form](SOURCE)
    if form == "2-D" and not has_mask:
        found, expected = (attempt(model, source) for model in reversed(encoders(kind)))
        assert torch.equal(found, expected)
        return
    mask = {"src_key_padding_mask": ~TOKENS} if has_mask else {}
    assert_like_torch(kind, {"src": source, **mask}, TOKENS if has_mask else EVERYWHERE, "src has (shape|width)")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@each_encoder
def test_what_is_no_number_stays_hidden_in_torch(kind: Kind, value: float) -> None:
    padding = {"src_key_padding_mask": ~TOKENS}
    expected = encoders(kind)[0](in_order(kind, SOURCE), **padding)
    source = SOURCE.masked_fill(~TOKENS[..., None], value)
    for has_grad in (True, False):
        found = attempt(encoders(kind)[1], in_order(kind, source), has_grad=has_grad, **padding)
        assert_near(at_tokens(kind, found, padding), at_tokens(kind, expected, padding))
        assert bool(found.isfinite().all())


TORCH_ARGUMENTS: dict[str, tuple[tuple[Any, ...], Call]] = {
    "nothing": ((), {}),
    "mask alone": ((), {"src_key_padding_mask": ~TOKENS}),
    "source twice": ((SOURCE,), {"src": SOURCE}),
    "too many": ((SOURCE, None, None, None, None, None), {}),
    "the layers' name for a mask": ((SOURCE,), {"key_padding_mask": ~TOKENS}),
    "transformers' name for a mask": ((SOURCE,), {"attention_mask": TOKENS}),
    "misspelt, and None": ((SOURCE,), {"src_padding_mask": None}),
    "another class's name for a mask": ((SOURCE,), {"mask": None, "src_mask": None}),
}


@pytest.mark.parametrize("name", TORCH_ARGUMENTS)
@pytest.mark.parametrize("kind", [Kind(), Kind(is_alone=True)], ids=str)
def test_torch_arguments(kind: Kind, name: str) -> None:
    """A mask under a name that the class does not know is no mask."""
    args, call = TORCH_ARGUMENTS[name]
    for has_grad in (True, False):
        expected, found = (attempt(model, *args, has_grad=has_grad, **call) for model in encoders(kind))
        assert isinstance(expected, TypeError)
        assert isinstance(found, TypeError), f"{found!r} in place of {expected!r}"
