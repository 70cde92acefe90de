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
from .nn import NAMES, EncoderLayerParts, Rotations, Slice, dropout_rate, is_linear, is_plain, is_plain_norm

LINEARS = ("query", "key", "value", "attention_output", "intermediate", "gate", "output")
NORMS = ("attention_norm", "output_norm")
TENSORS = 2 * (len(LINEARS) + len(NORMS))  # of a layer: weight and bias of each, in this order
WEIGHTS = tuple(range(0, 2 * len(LINEARS), 2))  # of its linear layers
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
        tensors: their parameters, TENSORS a layer, in the order of _C.Encoder.add_layer; None where there is none.
        roots: the whole parameters that those are, or are parts of.
        products: what the linear layers multiply in, but for those of `exact`: see `products_of`.
        are_narrow: for each layer which of LINEARS multiply in fewer bits than float32's.
        kind: what, beside the tensors, the packed form depends on.
    """

    layers: Sequence[EncoderLayerParts]
    wanted: Products = "float32"
    exact: frozenset[nn.Module] = frozenset()
    refusal: str | None = None
    tensors: list[Tensor | None] = field(default_factory=list)
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
            [self.products != "float32" and self._is_rounded(getattr(layer, name)) for name in LINEARS]
            for layer in self.layers
        ]
        self.kind = (
            *_common(self.layers[0]),
            self.products,
            *((*_own(layer), *flags) for layer, flags in zip(self.layers, self.are_narrow, strict=True)),
        )

    def _is_rounded(self, module: nn.Module | None) -> bool:
        return not (module is None or module in self.exact or module.__dict__.get("owner") in self.exact)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.roots[0].dtype

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


def _common(layer: EncoderLayerParts) -> tuple[Any, ...]:
    """What all layers must share."""
    return layer.activation, layer.head_size, layer.norm_first, layer.gate is not None


def _own(layer: EncoderLayerParts) -> tuple[Any, ...]:
    """What each layer has for itself, beside its tensors."""
    return _eps(layer.attention_norm), _eps(layer.output_norm), layer.window, layer.rotation


def _eps(norm: nn.Module) -> float:
    eps: float = getattr(norm, "eps", 0.0)
    return eps


def _is_ordinary(x: Tensor) -> bool:
    return type(x) in (nn.Parameter, Tensor) and x.dtype in DTYPES and x.device.type == "cpu" and x.is_contiguous()


def _tensors(layer: EncoderLayerParts, number: int) -> tuple[list[Tensor | None], list[Tensor]]:
    """The layer's parameters, and the whole ones where those are parts.

    Raises:
        Refused: a part is not what the engine computes.
    """
    if not isinstance(layer.activation, str):
        raise Refused("the activation is neither GELU nor ReLU")
    dropouts = (layer.attention_output_dropout, layer.inner_dropout, layer.output_dropout)
    if layer.attention_dropout_p != 0.0 or any(dropout_rate(dropout) != 0.0 for dropout in dropouts):
        raise Refused("dropout is on")
    tensors: list[Tensor | None] = []
    roots: list[Tensor] = []
    for name in (*LINEARS, *NORMS):
        module = getattr(layer, name)
        is_norm = name in NORMS
        if module is None or (name == "attention_norm" and layer.norm_first and is_plain(module, nn.Identity)):
            tensors += [None, None]
            continue
        if not (is_plain_norm(module) if is_norm else is_linear(module)):
            raise Refused(f"layer {number} has a {type(module).__name__} that is hooked or not torch's own")
        wholes = module.roots if isinstance(module, Slice) else [module._parameters.get(name) for name in NAMES]
        for kind, whole in zip(NAMES, wholes, strict=True):
            if whole is None and kind == "bias":
                tensors.append(module.weight.new_zeros(len(module.weight)).detach() if is_norm else None)
                continue
            if whole is None or not _is_ordinary(whole):
                owner = type(module).__name__
                raise Refused(f"layer {number}: the {kind} of a {owner} is not dense, in 32 or 16 bits and on the CPU")
            roots.append(whole)
            tensors.append(getattr(module, kind).detach() if isinstance(module, Slice) else whole)
    return tensors, roots


def _check_shapes(layers: Sequence[EncoderLayerParts], tensors: list[Tensor | None]) -> None:
    if len({_common(layer) for layer in layers}) > 1:
        raise Refused("the layers are of several kinds")
    if len({x.dtype for x in tensors if x is not None}) > 1:
        raise Refused("the parameters have several dtypes")
    hidden, inner, head_size = len(_there(tensors[0])), len(_there(tensors[8])), layers[0].head_size
    square, up, down = (hidden, hidden), (inner, hidden), (hidden, inner)
    weights = [*[square] * 4, up, up, down, (hidden,), (hidden,)]
    wanted = [shape for weight in weights for shape in (weight, weight[:1])] * len(layers)
    if hidden % head_size != 0 or any(
        x is not None and tuple(x.shape) != shape for x, shape in zip(tensors, wanted, strict=True)
    ):
        raise Refused("the layers are of several shapes")


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


class _Packed:
    """Packed weights, and what they were made of. `arrays` keeps the memory that the C++ module reads."""

    def __init__(self, stack: Stack, state: list[Any]) -> None:
        self.stack = stack
        self.state = state
        self.arrays: list[np.ndarray[Any, Any]] = []
        hidden_size, intermediate_size = len(_there(stack.tensors[0])), len(_there(stack.tensors[8]))
        activation, head_size, norm_first, has_gates = _common(stack.layers[0])
        self.encoder = _C.Encoder(
            hidden_size, hidden_size // head_size, intermediate_size, activation, stack.products, norm_first, has_gates
        )
        for number in range(len(stack.layers)):
            self._add_layer(number)

    def _add_layer(self, number: int) -> None:
        attention_eps, output_eps, window, rotation = _own(self.stack.layers[number])
        tensors = [
            None if x is None else x.detach() for x in self.stack.tensors[TENSORS * number : TENSORS * (number + 1)]
        ]
        arrays = [None if x is None else ops.array(x.float()) for x in tensors]
        if self.stack.dtype == torch.float32:
            watched = [array for at in WEIGHTS if (array := arrays[at]) is not None]
        else:
            watched = [ops.array(x.view(torch.int16)) for x in tensors if x is not None]
        self.encoder.add_layer(
            arrays,
            attention_eps,
            output_eps,
            self.stack.are_narrow[number],
            watched,
            torch.get_num_threads(),
            -1 if window is None else window,
            -1 if rotation is None else rotation,
        )
        self.arrays += watched + [x for at, x in enumerate(arrays) if x is not None and at not in WEIGHTS]

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


def _host(x: Tensor) -> np.ndarray[Any, Any]:
    return ops.host_array(x.detach().float().contiguous())


def encode(
    owner: nn.Module,
    stack: Stack,
    hidden: Tensor,
    batch: PackedBatch,
    *,
    bias: Tensor | None = None,
    rotations: Rotations = (),
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
        rotations: of the tokens.
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
        None if bias is None else _host(bias),
        [(_host(cosines), _host(sines)) for cosines, sines in rotations],
    )
    if order is not None:
        last = torch.empty_like(last).index_copy_(0, order, last)
    return [x.to(hidden.dtype) for x in ([*before, last] if needs_all else [last])]
