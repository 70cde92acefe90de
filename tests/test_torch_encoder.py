"""torch.nn.TransformerEncoder and TransformerEncoderLayer: swapped, the same answers, gradients and state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import MIXED, WHOLE, assert_near, assert_same_gradients, gradients, mask_of, one_thread, randomise  # noqa: F401
from tolerance import assert_twice_torch
from torch import Tensor, nn

import bert_fast
from bert_fast import engine, ops

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

WIDTH, HEADS, INNER, LAYERS = 51, 3, 71, 2


class Kind(NamedTuple):
    """
    Attributes:
        has_norm: whether a norm follows the last layer.
        is_alone: one layer, without an encoder around it.
    """

    norm_first: bool = False
    activation: Any = "relu"
    batch_first: bool = True
    has_norm: bool = False
    is_alone: bool = False
    bias: bool = True
    heads: int = HEADS
    width: int = WIDTH

    def __str__(self) -> str:
        names = ("pre" if self.norm_first else "post", str(getattr(self.activation, "__name__", self.activation)))
        flags = ("batch_first", "has_norm", "is_alone")
        return "-".join([*names, *(flag for flag in flags if getattr(self, flag)), f"{self.width}x{self.heads}"])


KINDS = [
    Kind(),
    Kind(norm_first=True, has_norm=True),
    Kind(activation="gelu", batch_first=False, has_norm=True),
    Kind(norm_first=True, activation=nn.GELU(approximate="tanh"), batch_first=False),
    Kind(is_alone=True),
    Kind(is_alone=True, norm_first=True, activation=nn.ReLU(), batch_first=False),
    Kind(heads=4, width=64),  # what torch's own fast path takes
    Kind(bias=False, has_norm=True),
]

each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def build(kind: Kind, dropout: float = 0.0) -> Any:
    layer = nn.TransformerEncoderLayer(
        kind.width, kind.heads, INNER, dropout, kind.activation, 1e-6, kind.batch_first, kind.norm_first, kind.bias
    )
    norm = nn.LayerNorm(kind.width) if kind.has_norm else None
    model = layer if kind.is_alone else nn.TransformerEncoder(layer, LAYERS, norm)
    randomise(model)
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.dim() == 1:
            parameter.data.mul_(0.3)
    return model.eval()


def pair(kind: Kind) -> tuple[Any, Any]:
    model = build(kind)
    return model, bert_fast.swap(copy.deepcopy(model))


def batch_for(kind: Kind, rows: str = MIXED) -> dict[str, Tensor]:
    mask = mask_of(rows)
    source = torch.randn(*mask.shape, kind.width, generator=torch.Generator().manual_seed(1))
    return {"src": source if kind.batch_first else source.transpose(0, 1), "src_key_padding_mask": ~mask}


def at_tokens(kind: Kind, output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(tokens, width)."""
    return (output if kind.batch_first else output.transpose(0, 1))[~batch["src_key_padding_mask"]]


def calls(model: Any) -> dict[str, int]:
    return dict(model.__dict__.get("bert_fast_calls", {}))


# ---- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [MIXED, WHOLE], ids=["mixed", "whole"])
@each_kind
def test_output(kind: Kind, rows: str) -> None:
    model, swapped = pair(kind)
    batch = batch_for(kind, rows)
    with torch.enable_grad():
        expected = at_tokens(kind, model(**batch), batch)
    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            found = swapped(**batch)
        assert found.shape == batch["src"].shape
        assert_near(at_tokens(kind, found, batch), expected)
    assert calls(swapped) == {"fast": 2}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_engine(norm_first: bool, activation: str, threads: int, rows: int) -> None:
    """Few rows, whose columns are shared out, and many; the engine's error against float64 beside torch's."""
    kind = Kind(norm_first, activation, has_norm=True)
    model, swapped = pair(kind)
    source = torch.randn(rows, 17, kind.width, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            found, expected = swapped(source), model(source)
            exact = copy.deepcopy(model).double()(source.double())
    finally:
        torch.set_num_threads(before)
    assert_twice_torch("output", found, expected, exact)
    assert calls(swapped) == {"fast": 1}


@each_kind
def test_gradients(kind: Kind) -> None:
    model, swapped = pair(kind)
    batch = batch_for(kind, WHOLE.replace("1111\n", "1100\n", 1))
    weights = torch.randn(at_tokens(kind, batch["src"], batch).shape, generator=torch.Generator().manual_seed(3))
    found, expected = (
        gradients(each, (at_tokens(kind, each(**batch), batch) * weights).sum()) for each in (swapped, model)
    )
    assert_same_gradients(found, expected)
    assert calls(swapped) == {"fast": 1}


def test_the_inputs_gradient() -> None:
    kind = Kind(norm_first=True)
    model, swapped = pair(kind)
    batch = batch_for(kind, WHOLE)
    grads: list[Tensor] = []
    for each in (swapped, model):
        source = batch["src"].clone().requires_grad_()
        grads += torch.autograd.grad(each(source).square().sum(), source)
    assert_near(grads[0], grads[1])


@pytest.mark.parametrize("value", [torch.bool, torch.float32])
@pytest.mark.parametrize("is_positional", [True, False])
def test_forms_of_the_mask(value: torch.dtype, is_positional: bool) -> None:
    kind = Kind()
    model, swapped = pair(kind)
    batch = batch_for(kind, "1111111000000\n1101100111010\n")
    padding = batch["src_key_padding_mask"]
    if value != torch.bool:
        padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
    found = (
        swapped(batch["src"], None, padding) if is_positional else swapped(batch["src"], src_key_padding_mask=padding)
    )
    assert_near(at_tokens(kind, found, batch), at_tokens(kind, model(**batch), batch))
    assert calls(swapped) == {"fast": 1}


@each_kind
def test_padding_is_zero_or_the_last_norms_bias_nowhere(kind: Kind) -> None:
    """Nothing is computed there: zeros, and never NaN."""
    _, swapped = pair(kind)
    batch = batch_for(kind)
    found = swapped(**batch)
    found = found if kind.batch_first else found.transpose(0, 1)
    assert not found[batch["src_key_padding_mask"]].any()
    assert found.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_small_batches(shape: tuple[int, int]) -> None:
    _, swapped = pair(Kind())
    source = torch.randn(*shape, WIDTH)
    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            assert swapped(source).shape == (*shape, WIDTH)


def test_dropout_is_drawn() -> None:
    model = build(Kind(), dropout=0.5)
    swapped = bert_fast.swap(copy.deepcopy(model)).train()
    source = batch_for(Kind(), WHOLE)["src"]
    first, second = swapped(source), swapped(source)
    assert not torch.allclose(first, second)
    first.sum().backward()
    mean = torch.stack([swapped(source).detach() for _ in range(300)]).mean(0)
    expected = torch.stack([model.train()(source).detach() for _ in range(300)]).mean(0)
    assert (mean - expected).abs().mean() < 0.1


# ---- the original path -----------------------------------------------------------------------------------------------


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "mask": (lambda batch: {"src": batch["src"], "mask": causal(13)}, "a mask of scores"),
    "causal": (lambda batch: {"src": batch["src"], "mask": causal(13), "is_causal": True}, "a mask of scores"),
    "unbatched": (lambda batch: {"src": batch["src"][0]}, "src has 2 dimensions"),
    "numbers": (
        lambda batch: {**batch, "src_key_padding_mask": torch.linspace(-2, 0, 13).expand(4, 13)},
        "other numbers than 0 and -inf",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served(name: str) -> None:
    model, swapped = pair(Kind())
    make, message = REFUSED[name]
    call = make(batch_for(Kind(), WHOLE))
    with pytest.warns(UserWarning, match=message):
        found = swapped(**call)
    assert torch.equal(found, model(**call))


def test_wrong_shapes_are_told_by_torch() -> None:
    _, swapped = pair(Kind())
    batch = batch_for(Kind(), WHOLE)
    with pytest.warns(UserWarning, match="src_key_padding_mask has shape"), pytest.raises(Exception, match="mask"):
        swapped(batch["src"], src_key_padding_mask=batch["src_key_padding_mask"][:, :5])


class Louder(nn.TransformerEncoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


def change_class(model: Any) -> None:
    model.layers[1].__class__ = Louder


def change_activation(model: Any) -> None:
    model.layers[1].activation = F.silu


def hook(model: Any) -> None:
    model.layers[1].linear2.register_forward_hook(lambda *_: None)


def add_zero_attention(model: Any) -> None:
    model.layers[1].self_attn.add_zero_attn = True


def change_norm(model: Any) -> None:
    model.norm = nn.Softmax(1)


CHANGES = {
    "norm is a Softmax, which may look beyond a token": change_norm,
    "is a Louder with a forward of its own": change_class,
    "has the activation": change_activation,
    "layers.1.linear2 has hooks": hook,
    "layers.1.self_attn has keys or values beside": add_zero_attention,
}


@pytest.mark.parametrize("message", CHANGES)
def test_changed_models(message: str) -> None:
    """Seen at the next call, whether the change came before swap or after."""
    model, swapped = pair(Kind())
    source = batch_for(Kind(), WHOLE)["src"]
    swapped(source)
    for each in (model, swapped):
        CHANGES[message](each)
    with pytest.warns(UserWarning, match=message):
        found = swapped(source)
    assert torch.equal(found, model(source))
    assert message in str(bert_fast.report(swapped))


def test_weights_that_change() -> None:
    """The engine packs parts of in_proj_weight; each way to change it shows."""
    model, swapped = pair(Kind())
    source = batch_for(Kind(), WHOLE)["src"]

    def scale(each: Any) -> None:
        with torch.no_grad():
            each.layers[0].self_attn.in_proj_weight.mul_(0.5)

    def replace_data(each: Any) -> None:
        parameter = each.layers[1].self_attn.in_proj_weight
        parameter.data = 2 * parameter.data

    def replace(each: Any) -> None:
        attention = each.layers[0].self_attn
        attention.in_proj_weight = nn.Parameter(attention.in_proj_weight.detach().flip(0))

    with torch.no_grad():
        swapped(source)
        for change in (scale, replace_data, replace):
            for each in (model, swapped):
                change(each)
            assert_near(swapped(source), model(source))
    swapped.double()
    assert_near(swapped(source.double()).float(), model(source))


# ---- swapping --------------------------------------------------------------------------------------------------------


@each_kind
def test_state_and_restore(kind: Kind) -> None:
    model, swapped = pair(kind)
    batch = batch_for(kind, WHOLE)
    assert type(swapped).__name__ == type(model).__name__
    assert isinstance(swapped, type(model))
    swapped(**batch)
    assert list(swapped.state_dict()) == list(model.state_dict())
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in swapped.state_dict().items())
    again = pickle.loads(pickle.dumps(swapped))
    assert_near(again(**batch), swapped(**batch))
    assert calls(copy.deepcopy(swapped)) == calls(swapped)
    bert_fast.restore(swapped)
    assert type(swapped) is type(model)
    assert torch.equal(swapped(**batch), model(**batch))


def test_layers_within_an_encoder_stay() -> None:
    _, swapped = pair(Kind())
    assert all(type(layer) is nn.TransformerEncoderLayer for layer in swapped.layers)
    assert [encoder.class_name for encoder in bert_fast.report(swapped).encoders] == ["TransformerEncoder"]
    assert bert_fast.swap(swapped) is swapped
    assert all(type(layer) is nn.TransformerEncoderLayer for layer in swapped.layers)


def test_a_model_of_ones_own() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build(Kind(norm_first=True))
            self.other = build(Kind(is_alone=True))
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, src: Tensor, padding: Tensor) -> Tensor:
            hidden = self.encoder(src, src_key_padding_mask=padding)
            tags: Tensor = self.head(self.other(hidden, src_key_padding_mask=padding))
            return tags

    model = Tagger().eval()
    swapped = bert_fast.swap(copy.deepcopy(model))
    batch = batch_for(Kind(), "1111111111111\n1111110000000\n")
    mask = ~batch["src_key_padding_mask"]
    assert_near(swapped(*batch.values())[mask], model(*batch.values())[mask])
    assert [encoder.name for encoder in bert_fast.report(swapped).encoders] == ["encoder", "other"]


@each_kind
def test_verify(kind: Kind) -> None:
    _, swapped = pair(kind)
    (check,) = bert_fast.verify(swapped, batch_for(kind)).checks
    assert check.name == "encoder: last hidden state"
    assert check.bound > 0


def test_verify_finds_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    _, swapped = pair(Kind())
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda *args, **named: [x * 1.01 for x in encode(*args, **named) or []])
    with pytest.raises(bert_fast.VerificationError):
        bert_fast.verify(swapped, batch_for(Kind()))


@pytest.mark.parametrize("norm_first", [False, True])
def test_int8_and_bf16(norm_first: bool) -> None:
    kind = Kind(norm_first, "gelu", has_norm=True)
    model = build(kind)
    batch = batch_for(kind)
    with torch.no_grad():
        expected = at_tokens(kind, model(**batch), batch)
        for options, tolerance in (({"int8": True}, 0.3), ({"bf16": True}, 0.1)):
            found = at_tokens(kind, bert_fast.swap(model, **options)(**batch), batch)  # type: ignore[arg-type]
            assert_near(found, expected, tolerance)
        exact = ["layers.0", "layers.1"]
        found = at_tokens(kind, bert_fast.swap(model, int8=True, int8_exact=exact)(**batch), batch)
        assert_near(found, expected)


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_compiled(kind: Kind) -> None:
    model, swapped = pair(kind)
    compiled: Any = torch.compile(swapped, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (WHOLE, MIXED):
        batch = batch_for(kind, rows)
        assert_near(at_tokens(kind, compiled(**batch), batch), at_tokens(kind, model(**batch), batch))


def test_through_triton() -> None:
    pytest.importorskip("triton")
    kind = Kind(norm_first=True, activation="gelu", heads=4, width=64)
    model, swapped = pair(kind)
    batch = batch_for(kind, "1111111000000\n1111111111111\n")
    with ops.forced_path("triton"):
        found = at_tokens(kind, swapped(**batch), batch)
    assert_near(found, at_tokens(kind, model(**batch), batch))
