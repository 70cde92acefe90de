"""bert_fast.nn against the torch modules that it stands in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    assert_near,
    mask_of,
    one_thread,  # noqa: F401,
)
from tolerance import assert_twice_torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bert_fast
from bert_fast import functional, masking, ops

# (constructor arguments of torch.nn.LayerNorm, shape of the input)
LAYER_NORMS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({"normalized_shape": 37}, (5, 37)),
    "int list": ({"normalized_shape": [37], "eps": 1e-12}, (5, 37)),
    "one row": ({"normalized_shape": 37}, (37,)),
    "three dimensions": ({"normalized_shape": 41, "eps": 0.3}, (3, 7, 41)),
    "no rows": ({"normalized_shape": 41}, (0, 41)),
    "width 1": ({"normalized_shape": 1, "eps": 1e-5}, (5, 1)),
    "many axes": ({"normalized_shape": (5, 7)}, (3, 5, 7)),
    "no affine": ({"normalized_shape": 37, "elementwise_affine": False}, (5, 37)),
    "no bias": ({"normalized_shape": 37, "bias": False}, (5, 37)),
    "double": ({"normalized_shape": 37, "dtype": torch.float64}, (5, 37)),
}


def off_centre(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return -2.3 + 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_norms(arguments: dict[str, Any]) -> tuple[nn.LayerNorm, bert_fast.nn.LayerNorm]:
    """torch's and ours with the same random weights."""
    theirs, twin = nn.LayerNorm(**arguments), bert_fast.nn.LayerNorm(**arguments)
    for index, parameter in enumerate(theirs.parameters()):
        parameter.data.copy_(off_centre(*parameter.shape, seed=index, dtype=parameter.dtype))
    twin.load_state_dict(theirs.state_dict())
    return theirs, twin


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("arguments", "shape"), LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_layer_norm(arguments: dict[str, Any], shape: tuple[int, ...], has_residual: bool) -> None:
    theirs, twin = layer_norms(arguments)
    dtype = arguments.get("dtype", torch.float32)
    data = [off_centre(*shape, seed=seed, dtype=dtype) for seed in (7, 8)[: 1 + has_residual]]
    upstream = off_centre(*shape, seed=9, dtype=dtype)

    def run(module: Any, precision: torch.dtype) -> list[Tensor]:
        module = module.to(precision)
        values = [x.to(precision).requires_grad_() for x in data]
        out = module(*values) if module is twin else module(sum(values))
        return [out, *torch.autograd.grad(out, [*values, *module.parameters()], upstream.to(precision))]

    results = [run(twin, dtype), run(theirs, dtype), run(theirs, torch.float64)]
    for index, (found, torchs, oracle) in enumerate(zip(*results, strict=True)):
        assert_twice_torch(f"tensor {index}", found, torchs, oracle)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 37), (3, 7, 41), (0, 37), (37,)], ids=str)
def test_gelu(shape: tuple[int, ...], has_bias: bool, approximate: str) -> None:
    theirs, twin = nn.GELU(approximate), bert_fast.nn.GELU(approximate)
    x = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    bias = off_centre(shape[-1], seed=2) if has_bias else None
    upstream = off_centre(*shape, seed=3)

    def run(module: Any, precision: torch.dtype) -> list[Tensor]:
        values = [value.to(precision).requires_grad_() for value in (x, bias) if value is not None]
        out = module(*values) if module is twin else module(sum(values))
        return [out, *torch.autograd.grad(out, values, upstream.to(precision))]

    results = [run(twin, torch.float32), run(theirs, torch.float32), run(theirs, torch.float64)]
    for index, (found, torchs, oracle) in enumerate(zip(*results, strict=True)):
        assert_twice_torch(f"tensor {index}", found, torchs, oracle)


def test_gelu_forms_differ() -> None:
    x = torch.linspace(-3, 3, 101)
    difference = (bert_fast.nn.GELU()(x) - bert_fast.nn.GELU("tanh")(x)).abs().max()
    assert 1e-4 < difference < 1e-3


@pytest.mark.parametrize(
    ("theirs", "twin", "arguments"),
    [(nn.LayerNorm, bert_fast.nn.LayerNorm, arguments) for arguments, _ in LAYER_NORMS.values()]
    + [(nn.GELU, bert_fast.nn.GELU, {"approximate": name}) for name in ("none", "tanh")],
)
def test_is_torchs_own(theirs: type[nn.Module], twin: type[nn.Module], arguments: dict[str, Any]) -> None:
    assert issubclass(twin, theirs)
    one, other = theirs(**arguments), twin(**arguments)
    assert other.extra_repr() == one.extra_repr()
    assert repr(other) == repr(one)
    assert list(other.state_dict()) == list(one.state_dict())
    for (name, value), expected in zip(other.state_dict().items(), one.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
        assert value.dtype == expected.dtype


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_encoder_layer(activation: str) -> None:
    torch.manual_seed(5)
    theirs = nn.TransformerEncoderLayer(
        51, 3, 71, dropout=0.4, activation=activation, layer_norm_eps=1e-12, batch_first=True
    ).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    layer = bert_fast.nn.EncoderLayer(
        hidden_size=51,
        num_heads=3,
        intermediate_size=71,
        activation="none" if activation == "gelu" else torch.relu,
        attention_dropout=0.4,
        hidden_dropout=0.4,
        layer_norm_eps=1e-12,
    ).eval()
    weights = dict(theirs.named_parameters())
    in_weights, in_biases = weights["self_attn.in_proj_weight"].chunk(3), weights["self_attn.in_proj_bias"].chunk(3)
    state = {f"{name}.weight": x for name, x in zip(("query", "key", "value"), in_weights, strict=True)}
    state |= {f"{name}.bias": x for name, x in zip(("query", "key", "value"), in_biases, strict=True)}
    for name, other in {
        "attention_output": "self_attn.out_proj",
        "attention_norm": "norm1",
        "intermediate": "linear1",
        "output": "linear2",
        "output_norm": "norm2",
    }.items():
        state |= {f"{name}.{kind}": weights[f"{other}.{kind}"] for kind in ("weight", "bias")}
    layer.load_state_dict(state)

    # Every row has a token: torch's layer gives NaN where none has.
    mask = mask_of("1111111 1110000 0011111 1010011")
    batch = masking.unpad(mask)
    x = torch.randn(4, 7, 51)
    out = layer(batch.select(x), batch)
    # With autograd on, torch's layer takes its plain path, which treats masks as it says.
    assert_near(out, batch.select(theirs(x, src_key_padding_mask=~mask)))


# ---- training in Triton ----------------------------------------------------------------------------------------------


def small_layer(dropout: float) -> bert_fast.nn.EncoderLayer:
    torch.manual_seed(3)
    layer = bert_fast.nn.EncoderLayer(
        hidden_size=34, num_heads=2, intermediate_size=41, activation="none", attention_dropout=dropout,
        hidden_dropout=dropout, layer_norm_eps=1e-12,
    )  # fmt: skip
    for parameter in layer.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return layer.train()


def small_batch() -> tuple[Tensor, masking.PackedBatch]:
    batch = masking.unpad(mask_of("1111111 1110000 1010011"))
    return torch.randn(batch.total_tokens, 34, generator=torch.Generator().manual_seed(1)).requires_grad_(), batch


def results(layer: nn.Module, call: Callable[..., Tensor], x: Tensor, *args: Any) -> list[Tensor]:
    out = call(x, *args)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    leaves = (x, *layer.parameters())
    for leaf in leaves:
        leaf.grad = None
    out.backward(grad)  # which the older form of checkpointing asks for
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_fused_projections_are_what_their_parts_are() -> None:
    pytest.importorskip("triton")
    layer, (x, batch) = small_layer(0.0), small_batch()
    with ops.forced_path("triton"):
        found = results(layer, layer, x, batch)
    with ops.forced_path("torch"):
        expected = results(layer, layer, x, batch)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout(use_reentrant: bool) -> None:
    pytest.importorskip("triton")
    layer, (x, batch) = small_layer(0.3), small_batch()
    with ops.forced_path("triton"):
        torch.manual_seed(7)
        expected = results(layer, layer, x, batch)
        torch.manual_seed(7)
        found = results(layer, lambda *args: checkpoint(layer, *args, use_reentrant=use_reentrant), x, batch)
        other = results(layer, layer, x, batch)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(other[0], expected[0])


def test_dropouts_of_a_layer_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed, three streams; attention's own is that of functional.attention."""
    pytest.importorskip("triton")
    layer, (x, batch) = small_layer(0.3), small_batch()
    seen: list[tuple[int, int]] = []
    for name in ("attention", "layer_norm"):
        original = getattr(functional, name)

        def spy(*args: Any, original: Any = original, **options: Any) -> Tensor:
            seen.append((int(options["seed"]), options["stream"]))
            result: Tensor = original(*args, **options)
            return result

        monkeypatch.setattr(functional, name, spy)
    with ops.forced_path("triton"):
        layer(x, batch)
    assert [stream for _, stream in seen] == [0, 1, 2]
    assert len({seed for seed, _ in seen}) == 1


def test_a_layer_on_some_rows() -> None:
    layer, (x, batch) = small_layer(0.0), small_batch()
    rows = torch.tensor([11, 0, 3, 3])
    whole = layer(x, batch)
    assert_near(layer(x, batch, rows), whole[rows])
    assert layer(x, batch, rows[:0]).shape == (0, 34)
