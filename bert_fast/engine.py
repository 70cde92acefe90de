"""The CPU engine: all encoder layers in one call of the C++ module, from packed weights, where no gradient is wanted.

A weight is packed when it is first used, and again when it has changed: when its parameter holds other memory, when
autograd's version counter has moved (optimizers, load_state_dict, any operation in place), or when one of a few of its
elements differs, which is how most writes behind autograd's back (`weight.data.mul_(2)`) show. One that changes none of
these, such as `weight.data[3, 5] = 0`, goes unseen: `forget` is for that. So may a small step by way of `data` in 16
bits, where few elements change at all. Biases and LayerNorm parameters of a float32 model are read where they are;
those of a model in 16 bits are copied, and watched as the weights are.

Everything but the factors of products is float32, whatever the model's dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from . import _C, ops
from .masking import PackedBatch
from .nn import EncoderLayerParts, Slice, dropout_rate, is_linear, is_plain_norm

NAMES = ("weight", "bias")
LINEARS = ("query", "key", "value", "attention_output", "intermediate", "output")
WEIGHTS = (0, 2, 4, 6, 10, 12)  # theirs, among the tensors of a layer
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Products = Literal["float32", "bfloat16", "int8"]


class Refused(Exception):  # noqa: N818
    """The layers need the general path; the argument says why."""


@dataclass(eq=False)
class Stack:
    """Encoder layers as the engine sees them.

    Attributes:
        layers: their parts.
        wanted: what the linear layers are to multiply in.
        exact: those that multiply in float32 all the same.
        refusal: why the engine does not serve them; None: it does.
        tensors: their parameters, 16 a layer, in the order of _C.Encoder.add_layer.
        roots: the whole parameters that those are, or are parts of.
        products: what the linear layers multiply in, but for those of `exact`: see `products_of`.
        are_narrow: for each layer which of LINEARS multiply in fewer bits than float32's.
        kind: what, beside the tensors, the packed form depends on.
    """

    layers: Sequence[EncoderLayerParts]
    wanted: Products = "float32"
    exact: frozenset[nn.Module] = frozenset()
    refusal: str | None = None
    tensors: list[Tensor] = field(default_factory=list)
    roots: list[Tensor] = field(default_factory=list)
    products: Products = "float32"
    are_narrow: list[list[bool]] = field(default_factory=list)
    kind: tuple[Any, ...] = ()

    def look_through(self) -> None:
        """Sets all that follows from the layers as they are now."""
        self.refusal, self.tensors, self.roots, self.are_narrow, self.kind = None, [], [], [], ()
        try:
            if not self.layers:
                raise Refused("there are no layers")
            for number, layer in enumerate(self.layers):
                tensors, roots = _tensors(layer, number)
                self.tensors += tensors
                self.roots += roots
            _check_shapes(self.layers, self.tensors)
        except Refused as refused:
            self.refusal = str(refused)
            return
        self.products = products_of(self.wanted, self.dtype)
        self.are_narrow = [
            [self.products != "float32" and not self._is_exact(getattr(layer, name)) for name in LINEARS]
            for layer in self.layers
        ]
        norms: Any = [norm for layer in self.layers for norm in (layer.attention_norm, layer.output_norm)]
        flags = (flag for layer in self.are_narrow for flag in layer)
        first = self.layers[0]
        self.kind = (
            first.activation,
            first.head_size,
            first.norm_first,
            *(norm.eps for norm in norms),
            self.products,
            *flags,
        )

    def _is_exact(self, module: nn.Module) -> bool:
        return module in self.exact or module.__dict__.get("owner") in self.exact

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.tensors[0].dtype

    def state(self) -> list[Any]:
        """Changes whenever a tensor is replaced or, by autograd's count, written to."""
        return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in self.roots]


def products_of(wanted: Products, dtype: torch.dtype) -> Products:
    """What linear layers multiply in where `wanted` is asked for and the parameters have this dtype.

    bfloat16 only where the machine has an instruction for it: everywhere else it would be slower than float32.
    """
    if wanted == "float32" and dtype == torch.bfloat16:
        wanted = "bfloat16"
    return "float32" if wanted == "bfloat16" and not _C.has_bfloat16() else wanted


def stack(
    layers: Sequence[EncoderLayerParts], wanted: Products = "float32", exact: frozenset[nn.Module] = frozenset()
) -> Stack:
    """Looks encoder layers through; the arguments are those of Stack."""
    result = Stack(layers, wanted, exact)
    result.look_through()
    return result


def _is_ordinary(x: Tensor | None) -> bool:
    return (
        x is not None
        and type(x) in (nn.Parameter, Tensor)
        and x.dtype in DTYPES
        and x.device.type == "cpu"
        and x.is_contiguous()
    )


def _tensors(layer: EncoderLayerParts, number: int) -> tuple[list[Tensor], list[Tensor]]:
    """The layer's parameters, and the whole ones where those are parts.

    Raises:
        Refused: a part is not what the engine computes.
    """
    if not isinstance(layer.activation, str):
        raise Refused("the activation is neither GELU nor ReLU")
    dropouts = (layer.attention_output_dropout, layer.inner_dropout, layer.output_dropout)
    if layer.attention_dropout_p != 0.0 or any(dropout_rate(dropout) != 0.0 for dropout in dropouts):
        raise Refused("dropout is on")
    tensors: list[Tensor] = []
    roots: list[Tensor] = []
    modules = (
        layer.query, layer.key, layer.value, layer.attention_output, layer.attention_norm, layer.intermediate,
        layer.output, layer.output_norm,
    )  # fmt: skip
    for module in modules:
        if not (is_linear(module) or is_plain_norm(module)):
            raise Refused(f"layer {number} has a {type(module).__name__} that is hooked or not torch's own")
        wholes = module.roots if isinstance(module, Slice) else [module._parameters.get(name) for name in NAMES]
        for name, whole in zip(NAMES, wholes, strict=True):
            if whole is None or not _is_ordinary(whole):
                kind = type(module).__name__
                raise Refused(f"layer {number}: the {name} of a {kind} is not dense, in 32 or 16 bits and on the CPU")
            roots.append(whole)
            tensors.append(getattr(module, name).detach() if isinstance(module, Slice) else whole)
    return tensors, roots


def _check_shapes(layers: Sequence[EncoderLayerParts], tensors: list[Tensor]) -> None:
    if len({(layer.activation, layer.head_size, layer.norm_first) for layer in layers}) > 1:
        raise Refused("the layers are of several kinds")
    if len({x.dtype for x in tensors}) > 1:
        raise Refused("the parameters have several dtypes")
    hidden, inner, head_size = tensors[0].shape[0], tensors[10].shape[0], layers[0].head_size
    square, vector = (hidden, hidden), (hidden,)
    wanted = [*[square, vector] * 4, vector, vector, (inner, hidden), (inner,), (hidden, inner), vector, vector, vector]
    if hidden % head_size != 0 or any(
        tuple(x.shape) != shape for x, shape in zip(tensors, wanted * len(layers), strict=True)
    ):
        raise Refused("the layers are of several shapes")


class _Packed:
    """Packed weights, and what they were made of. `arrays` keeps the memory that the C++ module reads."""

    def __init__(self, stack: Stack, state: list[Any]) -> None:
        self.stack = stack
        self.state = state
        self.arrays: list[np.ndarray[Any, Any]] = []
        hidden_size, intermediate_size = stack.tensors[0].shape[0], stack.tensors[10].shape[0]
        activation, head_size, norm_first, *_ = stack.kind
        self.encoder = _C.Encoder(
            hidden_size, hidden_size // head_size, intermediate_size, activation, stack.products, norm_first
        )
        for number in range(len(stack.layers)):
            self._add_layer(number)

    def _add_layer(self, number: int) -> None:
        norms: Any = (self.stack.layers[number].attention_norm, self.stack.layers[number].output_norm)
        tensors = [x.detach() for x in self.stack.tensors[16 * number : 16 * number + 16]]
        arrays = [x.float().numpy() for x in tensors]
        if self.stack.dtype == torch.float32:
            watched = [arrays[at] for at in WEIGHTS]
        else:
            watched = [x.view(torch.int16).numpy() for x in tensors]
        self.encoder.add_layer(
            arrays, norms[0].eps, norms[1].eps, self.stack.are_narrow[number], watched, torch.get_num_threads()
        )
        self.arrays += watched + [x for at, x in enumerate(arrays) if at not in WEIGHTS]

    def is_current(self, stack: Stack, state: list[Any]) -> bool:
        if self.state != state or not self.encoder.is_current():
            return False
        if self.stack is not stack:  # the modules were looked through again
            if self.stack.kind != stack.kind:
                return False
            self.stack = stack
        return True


_packed: weakref.WeakKeyDictionary[nn.Module, _Packed] = weakref.WeakKeyDictionary()


def forget(owner: nn.Module) -> None:
    """Gives up the packed weights of an encoder; the next call packs them anew."""
    _packed.pop(owner, None)


def why_not(stack: Stack, hidden: Tensor) -> str | None:
    """Why layers take the general path on such activations; None: the engine serves them."""
    if not stack.layers:
        return stack.refusal
    dtype = torch.float32 if hidden.dtype in DTYPES else hidden.dtype
    choice = ops.choose("attention", hidden.device.type, dtype, stack.layers[0].head_size)
    if choice.path != "cpp":
        return choice.reason
    if stack.refusal is not None:
        stack.look_through()  # a parameter may have another form since, by way of its `data`
        if stack.refusal is not None:
            return stack.refusal
    if hidden.dtype != stack.dtype:
        return f"the activations are {hidden.dtype} and the parameters {stack.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.is_grad_enabled() and (hidden.requires_grad or any(x.requires_grad for x in stack.roots)):
        return "gradients are recorded"
    return None


def encode(
    owner: nn.Module,
    stack: Stack,
    hidden: Tensor,
    batch: PackedBatch,
    *,
    bias: Tensor | None = None,
    needs_all: bool = False,
    rows: Tensor | None = None,
) -> list[Tensor] | None:
    """Encoder layers on packed rows.

    Args:
        owner: the module that the packed weights live and die with.
        stack: its layers.
        hidden: (tokens, hidden_size), the embeddings.
        batch: the boundaries.
        bias: of the scores, by relative position; see functional.attention.
        needs_all: whether every layer's output is wanted.
        rows: (rows,) int64, the packed rows for which the last layer's output is wanted; None: all.

    Returns:
        Every layer's output (tokens, hidden_size) or, unless needs_all, the last one's alone, (rows, hidden_size) where
        rows are given; None where the call needs the general path.
    """
    if hidden.shape[0] == 0 or why_not(stack, hidden) is not None:
        return None
    state = stack.state()
    packed = _packed.get(owner)
    if packed is None or not packed.is_current(stack, state):
        stack.look_through()
        if stack.refusal is not None:
            return None
        packed = _packed[owner] = _Packed(stack, state)
    order = None if rows is None else rows.argsort()
    in_order = None if rows is None else ops.host_array(rows[order])
    x = ops.host_array(hidden.detach().float())
    last = torch.empty(x.shape if rows is None else (len(rows), x.shape[1]))
    if needs_all:
        before = [torch.empty(x.shape) for _ in stack.layers[1:]]
    else:
        before = [torch.empty(x.shape) if rows is not None else last] * (len(stack.layers) - 1)
    packed.encoder.run(
        x,
        ops.host_array(batch.tiles),
        ops.TILE_SIZE,
        in_order,
        [output.numpy() for output in (*before, last)],
        torch.get_num_threads(),
        None if bias is None else ops.host_array(bias.detach().float().contiguous()),
    )
    if order is not None:
        last = torch.empty_like(last).index_copy_(0, order, last)
    return [x.to(hidden.dtype) for x in ([*before, last] if needs_all else [last])]
