"""The CPU engine: all encoder layers in one call of the C++ module, from packed weights, where no gradient is wanted.

A weight is packed when it is first used, and again when it has changed: when its parameter holds other memory, when
autograd's version counter has moved (optimizers, load_state_dict, any operation in place), or when one of 64 elements
of it differs. Only a write behind autograd's back (`weight.data[i, j] = x`) that misses all of these goes unseen;
`forget` is for that. Biases and LayerNorm parameters are read where they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _C, ops
from .masking import PackedBatch
from .nn import EncoderLayerParts, dropout_rate, is_plain, is_plain_norm

LINEARS = ("query", "key", "value", "attention_output", "intermediate", "output")


class Refused(Exception):  # noqa: N818
    """The layers need the general path; the argument says why."""


class _Packed:
    """Packed weights, and what they were made of. The arrays keep the memory that the C++ module reads."""

    def __init__(self, layers: Sequence[EncoderLayerParts], tensors: list[list[Tensor]], key: list[Any]):
        first = layers[0]
        self.key = key
        self.arrays = [[x.detach().numpy() for x in layer] for layer in tensors]
        hidden_size, intermediate_size = tensors[0][0].shape[0], tensors[0][10].shape[0]
        activation: Any = first.activation
        self.encoder = _C.Encoder(hidden_size, hidden_size // first.head_size, intermediate_size, activation)
        for layer, arrays in zip(layers, self.arrays, strict=True):
            attention_norm: Any = layer.attention_norm
            output_norm: Any = layer.output_norm
            self.encoder.add_layer(arrays, attention_norm.eps, output_norm.eps, torch.get_num_threads())


_packed: weakref.WeakKeyDictionary[nn.Module, _Packed] = weakref.WeakKeyDictionary()


def forget(owner: nn.Module) -> None:
    """Gives up the packed weights of an encoder; the next call packs them anew."""
    _packed.pop(owner, None)


def _is_ordinary(x: Tensor | None) -> bool:
    return (
        x is not None
        and type(x) in (nn.Parameter, Tensor)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
    )


def _tensors(layer: EncoderLayerParts, number: int) -> list[Tensor]:
    """The layer's parameters in the order of _C.Encoder.add_layer.

    Raises:
        Refused: a part is not what the engine computes.
    """
    if not isinstance(layer.activation, str):
        raise Refused(f"layer {number}: the activation is not GELU")
    if layer.attention_dropout_p or dropout_rate(layer.attention_output_dropout) or dropout_rate(layer.output_dropout):
        raise Refused("dropout is on")
    result: list[Tensor] = []
    modules = (
        layer.query, layer.key, layer.value, layer.attention_output, layer.attention_norm, layer.intermediate,
        layer.output, layer.output_norm,
    )  # fmt: skip
    for module in modules:
        if not (is_plain(module, nn.Linear) or is_plain_norm(module)):
            raise Refused(f"layer {number}: a {type(module).__name__} is not plain")
        for name in ("weight", "bias"):
            tensor = module._parameters.get(name)
            if tensor is None or not _is_ordinary(tensor):
                raise Refused(f"layer {number}: the {name} of a {type(module).__name__} is no float32 CPU parameter")
            result.append(tensor)
    return result


def _check_shapes(tensors: list[list[Tensor]], head_size: int) -> None:
    hidden, inner = tensors[0][0].shape[0], tensors[0][10].shape[0]
    if head_size > ops.MAX_HEAD_SIZE or hidden % head_size != 0:
        raise Refused(f"head size {head_size} of {hidden}")
    square, vector = (hidden, hidden), (hidden,)
    wanted = [*[square, vector] * 4, vector, vector, (inner, hidden), (inner,), (hidden, inner), vector, vector, vector]
    for layer in tensors:
        if any(tuple(x.shape) != shape for x, shape in zip(layer, wanted, strict=True)):
            raise Refused("layers of several shapes")


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # inference tensors have none


def _refusal(layers: Sequence[EncoderLayerParts], hidden: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "the call is compiled"
    if not layers or hidden.shape[0] == 0:
        return "nothing to compute"
    choice = ops.choose("attention", hidden.device.type, hidden.dtype, layers[0].head_size)
    if choice.path != "cpp":
        return choice.reason
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.is_grad_enabled() and hidden.requires_grad:
        return "gradients are wanted"
    return None


def _prepare(owner: nn.Module, layers: Sequence[EncoderLayerParts]) -> _Packed:
    """
    Raises:
        Refused: the layers need the general path.
    """
    tensors = [_tensors(layer, number) for number, layer in enumerate(layers)]
    if torch.is_grad_enabled() and any(x.requires_grad for layer in tensors for x in layer):
        raise Refused("gradients are wanted")
    norms: Any = [norm for layer in layers for norm in (layer.attention_norm, layer.output_norm)]
    kinds = [(layer.activation, layer.head_size) for layer in layers]
    key = [
        *((x.data_ptr(), x.shape, _version(x)) for layer in tensors for x in layer),
        *(norm.eps for norm in norms),
        *kinds,
    ]
    packed = _packed.get(owner)
    if packed is None or packed.key != key or not packed.encoder.is_current():
        if len(set(kinds)) > 1:
            raise Refused("layers of several kinds")
        _check_shapes(tensors, layers[0].head_size)
        packed = _packed[owner] = _Packed(layers, tensors, key)
    return packed


def why_not(owner: nn.Module, layers: Sequence[EncoderLayerParts], hidden: Tensor) -> str | None:
    """Why a call on these layers takes the general path; None: the engine serves it. Packs the weights in passing."""
    reason = _refusal(layers, hidden)
    if reason is not None:
        return reason
    try:
        _prepare(owner, layers)
    except Refused as refused:
        return str(refused)
    return None


def encode(
    owner: nn.Module,
    layers: Sequence[EncoderLayerParts],
    hidden: Tensor,
    batch: PackedBatch,
    *,
    needs_all: bool = False,
) -> list[Tensor] | None:
    """The encoder layers on packed rows.

    Args:
        owner: the module that the packed weights live and die with.
        layers: their parts.
        hidden: (tokens, hidden_size), the embeddings.
        batch: the boundaries.
        needs_all: whether every layer's output is wanted.

    Returns:
        Every layer's output (tokens, hidden_size) or, unless needs_all, the last one's alone; None where the call needs
        the general path.
    """
    if _refusal(layers, hidden) is not None:
        return None
    try:
        packed = _prepare(owner, layers)
    except Refused:
        return None
    x = ops.host_array(hidden.detach())
    outputs = [torch.empty(x.shape) for _ in (layers if needs_all else (None,))]
    arrays = [output.numpy() for output in outputs]
    targets = arrays if needs_all else arrays * len(layers)
    packed.encoder.run(x, ops.host_array(batch.tiles), ops.TILE_SIZE, targets, torch.get_num_threads())
    return outputs
