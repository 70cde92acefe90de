"""torch.nn.TransformerEncoder, and TransformerEncoderLayer where it stands alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .. import engine, reference
from .. import nn as fast
from ..guard import Kept
from ..masking import unpad
from .family import Call, Family
from .parts import Layer, Refused, activation_in, is_listened_to, leaf, run_layers, stack_of, tracing_refusal

MODULE = "torch.nn.modules.transformer"


class Plan(NamedTuple):
    """
    Attributes:
        norm: after the last layer, if there is one.
        stack: the layers as the CPU engine sees them.
        is_batch_first: whether inputs are (batch, length, width), not (length, batch, width).
    """

    layers: list[Layer]
    norm: nn.Module | None
    stack: engine.Stack
    is_batch_first: bool


_plans: Kept[Plan] = Kept()


def _layers(model: Any) -> list[Any]:
    return list(model.layers) if isinstance(model, nn.TransformerEncoder) else [model]


def _activation(layer: Any) -> fast.Activation:
    """
    Raises:
        Refused: it is not known to work on each number alone.
    """
    activation = layer.activation
    if activation is F.relu or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu:
        return "none"
    fused = activation_in(layer, "activation")
    if not isinstance(fused, str):
        raise Refused(layer, f"has the activation {activation!r}; relu and gelu are known")
    return fused


def _attention(layer: Any) -> Any:
    """The layer's attention, which the fast path steps over.

    Raises:
        Refused: it does more than attend.
    """
    attention: Any = leaf(layer, "self_attn")
    if type(attention) is not nn.MultiheadAttention or "forward" in attention.__dict__:
        raise Refused(attention, f"is a {type(attention).__name__} with a forward of its own")
    has_extras = attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn
    if has_extras or attention.in_proj_weight is None:
        raise Refused(attention, "has keys or values beside those of the tokens, or of other widths")
    return attention


def _layer(layer: Any) -> Layer:
    attention = _attention(layer)
    width = attention.embed_dim
    query, key, value = (
        fast.Slice(attention, part * width, (part + 1) * width, "in_proj_weight", "in_proj_bias") for part in range(3)
    )
    return Layer(
        query=query,
        key=key,
        value=value,
        attention_output=leaf(attention, "out_proj"),
        attention_norm=leaf(layer, "norm1"),
        intermediate=leaf(layer, "linear1"),
        output=leaf(layer, "linear2"),
        output_norm=leaf(layer, "norm2"),
        activation=_activation(layer),
        attention_dropout_p=attention.dropout if attention.training else 0.0,
        attention_output_dropout=leaf(layer, "dropout1"),
        output_dropout=leaf(layer, "dropout2"),
        head_size=attention.head_dim,
        inner_dropout=leaf(layer, "dropout"),
        norm_first=layer.norm_first,
    )


def _parts(model: Any) -> Plan:
    """
    Raises:
        Refused: a module within is hooked, or not torch's own where it would be stepped over.
    """
    layers = _layers(model)
    for layer in layers:
        if layer is model:
            continue
        if type(layer) is not nn.TransformerEncoderLayer or "forward" in layer.__dict__:
            raise Refused(layer, f"is a {type(layer).__name__} with a forward of its own")
        if is_listened_to(layer):
            raise Refused(layer, "has hooks")
    parts = [_layer(layer) for layer in layers]
    orders = {layer.self_attn.batch_first for layer in layers}
    if len(orders) != 1:
        raise Refused(model, f"has {len(layers)} layers, which do not agree on batch_first")
    norm = leaf(model, "norm") if getattr(model, "norm", None) is not None else None
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm, nn.Identity, type(None))):
        raise Refused(norm, f"is a {type(norm).__name__}, which may look beyond a token")
    return Plan(parts, norm, stack_of(model, parts), orders.pop())


def _in_order(model: Any, x: Tensor) -> Tensor:
    """(batch, length, width) of what a call takes or gives, and the other way round."""
    return x if _layers(model)[0].self_attn.batch_first else x.transpose(0, 1)


def _keys(call: Call) -> Tensor | None:
    """(batch, length) bool: where tokens are attended to; None: everywhere."""
    padding = call.get("src_key_padding_mask")
    if padding is None:
        return None
    keys: Tensor = ~padding if padding.dtype == torch.bool else padding == 0
    return keys


def _call_refusal(call: Call) -> str | None:
    source = call["src"]
    if call.get("mask") is not None or call.get("src_mask") is not None:
        return "a mask of scores is given"
    if call.get("is_causal"):
        return "attention is causal"
    if source.is_nested or source.dim() != 3:
        return f"src has {source.dim()} dimensions" if not source.is_nested else "src is a nested tensor"
    return None


def _shape_refusal(model: Any, call: Call) -> str | None:
    """Why torch is to say what is wrong."""
    width, needed = call["src"].shape[2], _layers(model)[0].self_attn.embed_dim
    return None if width == needed else f"src has width {width}, not {needed}"


def _padding_refusal(call: Call, is_batch_first: bool) -> str | None:
    padding = call.get("src_key_padding_mask")
    if padding is None:
        return None
    if padding.dtype != torch.bool and not padding.is_floating_point():
        return f"src_key_padding_mask has dtype {padding.dtype}"
    if padding.requires_grad and torch.is_grad_enabled():
        return "src_key_padding_mask wants a gradient"
    first, second = call["src"].shape[:2]
    if tuple(padding.shape) != ((first, second) if is_batch_first else (second, first)):
        return f"src_key_padding_mask has shape {tuple(padding.shape)}"
    if padding.dtype != torch.bool:
        if torch.compiler.is_compiling():
            return "src_key_padding_mask holds numbers, which cannot be looked at while the call is traced"
        if not bool(((padding == 0) | (padding == float("-inf"))).all()):
            return "src_key_padding_mask holds other numbers than 0 and -inf"
    return None


@dataclass(frozen=True, eq=False)
class TorchEncoder:
    """The family of one of the two classes.

    Attributes:
        name: for people.
        encoder: the class.
        steps: its methods that the fast forward stands in for.
    """

    name: str
    encoder: str
    steps: tuple[str, ...]

    def family(self) -> Family:
        return Family(
            name=self.name,
            module=MODULE,
            encoder=self.encoder,
            steps=self.steps,
            plan=self.plan,
            run=self.run,
            stack=self.stack,
            widths=self.widths,
            oracle=self.oracle,
            view=self.view,
            kept_rows={},
        )

    def plan(self, model: Any, call: Call) -> Plan | str:
        """The model's parts, or why the call takes the original path."""
        reason = tracing_refusal() or _call_refusal(call)
        if reason is not None:
            return reason
        try:
            if torch.compiler.is_compiling():
                parts = _parts(model)
            else:
                parts = _plans.get(model, functools.partial(_parts, model))
        except Refused as refused:
            return refused.text(model)
        return _shape_refusal(model, call) or _padding_refusal(call, parts.is_batch_first) or parts

    def stack(self, model: Any) -> engine.Stack:
        try:
            return _parts(model).stack
        except Refused as refused:
            return engine.Stack([], refusal=refused.text(model))

    def widths(self, model: Any) -> Mapping[str, int]:
        try:
            layer = _parts(model).layers[0]
        except Refused:
            return {}
        width: Any = layer.intermediate.in_features
        inner: Any = layer.intermediate.out_features
        widths = {"attention": layer.head_size, "layer_norm": width}
        return widths if layer.activation == "relu" else {**widths, "gelu": inner}

    def run(self, model: Any, call: Call, parts: Plan) -> Tensor:
        """The forward, without padding between the first layer and the last norm; zeros at the padding."""
        source = _in_order(model, call["src"])
        keys = _keys(call)
        if keys is None:
            keys = torch.ones(source.shape[:2], dtype=torch.bool)
        batch = unpad(keys, device=source.device)
        hidden = run_layers(model, parts.stack, parts.layers, batch.select(source), batch)
        if parts.norm is not None:
            hidden = fast.normalise(parts.norm, hidden)
        return _in_order(model, batch.pad(hidden))

    def view(self, model: Any, call: Call, output: Any) -> tuple[Tensor, Tensor | None]:
        keys = _keys(call)
        return _in_order(model, output), None if keys is None else keys.cpu()

    def oracle(self, model: Any, call: Call) -> Tensor:
        """The output (batch, length, width) in float64 on the CPU, by bert_fast.reference."""
        source = call["src"].detach().to("cpu", torch.float64)
        keys = _keys(call)
        layers = [
            reference.TorchLayer(
                {name: value.detach().to("cpu", torch.float64) for name, value in layer.state_dict().items()},
                layer.self_attn.num_heads,
                str(_activation(layer)),
                layer.norm_first,
                (layer.norm1.eps, layer.norm2.eps),
            )
            for layer in _layers(model)
        ]
        hidden = reference.torch_encoder(layers, _in_order(model, source), None if keys is None else keys.cpu())
        norm = getattr(model, "norm", None)
        if norm is not None:
            hidden = copy.deepcopy(norm).to("cpu", torch.float64)(hidden).detach()
        return hidden


TRANSFORMER_ENCODER = TorchEncoder(
    "torch.nn.TransformerEncoder", "TransformerEncoder", ("__call__", "forward")
).family()
TRANSFORMER_ENCODER_LAYER = TorchEncoder(
    "torch.nn.TransformerEncoderLayer",
    "TransformerEncoderLayer",
    ("__call__", "forward", "_sa_block", "_ff_block"),
).family()
