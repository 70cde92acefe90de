"""Drop-in modules over bert_fast.functional, and the encoder layer that BertModel and swapped models share.

LayerNorm and GELU are torch's own classes with another forward: state_dict, constructor and repr stay torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeGuard, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from . import functional, ops
from .masking import PackedBatch

__all__ = ["GELU", "EncoderLayer", "LayerNorm"]

Activation = Literal["none", "tanh", "relu"] | Callable[[Tensor], Tensor]
"""GELU by its `approximate` argument, which is fused with the bias before it; ReLU; or any function of a tensor."""

NO_DROPOUT = nn.Dropout(0.0).eval()
"""For a place where a model has none."""


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm with an optional residual, which costs no pass over memory of its own."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002
        """LayerNorm(input + residual); both (..., width) -> (..., width)."""
        if len(self.normalized_shape) != 1 or self.weight is None:
            return super().forward(input if residual is None else input + residual)
        return functional.layer_norm(input, self.weight, self.bias, self.eps, residual)


class GELU(nn.GELU):
    """torch.nn.GELU with an optional bias before it."""

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
        """GELU(input + bias); (..., width), (width,) -> (..., width)."""
        return functional.gelu(input, bias, self.approximate)


Rotations = Sequence[tuple[Tensor, Tensor]]
"""Cosines and sines of each token's angles, (tokens, head_size / 2) each, in as many kinds as a model's layers need."""


class EncoderLayerParts(Protocol):
    """What an encoder layer is made of, under whatever names its model gives to the parts.

    Where norm_first is true the attention norm may be an nn.Identity. `gate`, if there is one, is multiplied with the
    activation (Shazeer 2020, "GLU variants"); `window` is that of functional.attention; queries and keys are turned by
    the call's rotations of number `rotation`, if that is not None.
    """

    @property
    def query(self) -> nn.Module: ...
    @property
    def key(self) -> nn.Module: ...
    @property
    def value(self) -> nn.Module: ...
    @property
    def attention_output(self) -> nn.Module: ...
    @property
    def attention_norm(self) -> nn.Module: ...
    @property
    def intermediate(self) -> nn.Module: ...
    @property
    def output(self) -> nn.Module: ...
    @property
    def output_norm(self) -> nn.Module: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def attention_dropout_p(self) -> float: ...
    @property
    def attention_output_dropout(self) -> nn.Module: ...
    @property
    def output_dropout(self) -> nn.Module: ...
    @property
    def inner_dropout(self) -> nn.Module: ...
    @property
    def head_size(self) -> int: ...
    @property
    def norm_first(self) -> bool: ...
    @property
    def gate(self) -> nn.Module | None: ...
    @property
    def window(self) -> int | None: ...
    @property
    def rotation(self) -> int | None: ...


class Slice(nn.Module):
    """Some outputs of a linear map whose parameters another module holds, which is not this one's child.

    Args:
        owner: has the parameters. Under their usual names it is the linear map itself, or stands for it (adapters).
        first, last: of the outputs.
        weight, bias: names of the parameters.
    """

    owner: nn.Module

    def __init__(self, owner: nn.Module, first: int, last: int, weight: str = "weight", bias: str = "bias") -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self.first, self.last = first, last
        self.names = (weight, bias)

    @property
    def is_of_linear(self) -> bool:
        """Whether weight and bias say all."""
        return self.names != NAMES or is_plain(self.owner, *LINEARS)

    @property
    def roots(self) -> list[Tensor | None]:
        """The whole parameters."""
        return [self.owner._parameters.get(name) for name in self.names]

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs), a view."""
        weight = self.roots[0]
        assert weight is not None
        return weight[self.first : self.last]

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), a view, or None."""
        bias = self.roots[1]
        return None if bias is None else bias[self.first : self.last]

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if self.is_of_linear:
            return F.linear(x, self.weight, self.bias)
        whole: Tensor = self.owner(x)
        return whole[..., self.first : self.last]


NAMES = ("weight", "bias")
LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether the module is exactly of one of these classes and nobody hooks its calls, so that it may be fused."""
    return type(module) in classes and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def drop(module: nn.Module, x: Tensor) -> Tensor:
    return x if is_plain(module, nn.Dropout) and not module.training else module(x)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a plain linear map, so that its weight and bias say all."""
    if isinstance(module, Slice):
        return is_plain(module, Slice) and module.is_of_linear
    return is_plain(module, *LINEARS)


def dropout_rate(module: nn.Module) -> float | None:
    """The rate of a plain dropout, or of an identity, now; None where the module itself must be called."""
    if is_plain(module, nn.Identity):
        return 0.0
    if not is_plain(module, nn.Dropout):
        return None
    assert isinstance(module, nn.Dropout)
    if not module.training:
        return 0.0
    return module.p if module.p < 1.0 else None


def is_plain_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether it is LayerNorm over one dimension with a weight, and nothing else."""
    if not is_plain(norm, nn.LayerNorm, LayerNorm):
        return False
    assert isinstance(norm, nn.LayerNorm)
    return len(norm.normalized_shape) == 1 and norm.weight is not None


def path_of(op: ops.Op, x: Tensor) -> ops.Path:
    """Where the operator runs on tensors like x."""
    return ops.choose(op, x.device.type, x.dtype, x.shape[-1]).path


def normalise(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """norm(x + residual), fused where `norm` is a plain LayerNorm."""
    if is_plain_norm(norm):
        return functional.layer_norm(x, norm.weight, norm.bias, norm.eps, residual)
    result: Tensor = norm(x if residual is None else x + residual)
    return result


def multiply_slices(slices: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The results of several linear maps of x, in one product where they are all the slices of one in their order."""
    if not all(is_plain(part, Slice) for part in slices):
        return [multiply(part, x) for part in slices]
    parts = cast("Sequence[Slice]", slices)
    owner, names = parts[0].owner, parts[0].names
    bounds = [bound for part in parts for bound in (part.first, part.last)]
    is_one_after_another = bounds[0] == 0 and bounds[1:-1:2] == bounds[2::2]
    if not is_one_after_another or any(part.owner is not owner or part.names != names for part in parts):
        return [multiply(part, x) for part in slices]
    if parts[0].is_of_linear:
        weight, bias = parts[0].roots
        assert weight is not None
        product = functional.linear(x, weight, bias)
    else:
        product = owner(x)
    return [product[..., part.first : part.last] for part in parts]


def multiply(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), by the fastest product where it is a plain linear layer."""
    if x.device.type == "cpu" and is_linear(linear):
        return functional.linear(x, linear.weight, linear.bias)
    result: Tensor = linear(x)
    return result


def project(
    linear: nn.Module,
    dropout: nn.Module,
    norm: nn.Module,
    x: Tensor,
    residual: Tensor,
    seed: Tensor | None,
    stream: int,
) -> Tensor:
    """norm(dropout(linear(x)) + residual). All but the product is one kernel, which in Triton adds the bias, too."""
    rate, path = dropout_rate(dropout), path_of("layer_norm", residual)
    if rate is None or not is_plain_norm(norm) or path == "torch":
        return normalise(norm, drop(dropout, multiply(linear, x)), residual)
    input_bias = None
    if path == "triton" and is_linear(linear):
        x, input_bias = F.linear(x, linear.weight), linear.bias
    else:
        x = multiply(linear, x)
    return functional.layer_norm(
        x, norm.weight, norm.bias, norm.eps, residual, input_bias=input_bias, dropout_p=rate, seed=seed, stream=stream
    )


def expand(linear: nn.Module, activation: Activation, x: Tensor) -> Tensor:
    """activation(linear(x)); the bias of a plain linear layer is added by the GELU kernel."""
    if not isinstance(activation, str):
        return activation(multiply(linear, x))
    if activation == "relu":
        return F.relu(multiply(linear, x))
    if is_linear(linear) and linear.bias is not None:
        return functional.gelu(functional.linear(x, linear.weight), linear.bias, activation)
    return functional.gelu(linear(x), None, activation)


def expand_gated(linear: nn.Module, gate: nn.Module, activation: Activation, x: Tensor) -> Tensor:
    """activation(linear(x)) * gate(x)."""
    values, factors = multiply_slices((linear, gate), x)
    if not isinstance(activation, str):
        return activation(values) * factors
    return (F.relu(values) if activation == "relu" else functional.gelu(values, None, activation)) * factors


def _feed_forward(parts: EncoderLayerParts, x: Tensor) -> Tensor:
    """(rows, intermediate_size), what the layer's last linear map reads."""
    if parts.gate is None:
        expanded = expand(parts.intermediate, parts.activation, x)
    else:
        expanded = expand_gated(parts.intermediate, parts.gate, parts.activation, x)
    return drop(parts.inner_dropout, expanded)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Heads turned by their tokens' angles (Su et al. 2021, section 3.2.2), from float32 as in transformers.

    Args:
        x: (tokens, heads, head_size); features i and i + head_size / 2 are a point in the plane.
        cosines, sines: (tokens, head_size / 2).

    Returns:
        (tokens, heads, head_size) in x's dtype.
    """
    cosines, sines = cosines[:, None], sines[:, None]
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1).to(x.dtype)


def _heads(parts: EncoderLayerParts, x: Tensor, rotations: Rotations) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (tokens, heads, head_size)."""
    query, key, value = (
        projected.unflatten(-1, (-1, parts.head_size))
        for projected in multiply_slices((parts.query, parts.key, parts.value), x)
    )
    if parts.rotation is None:
        return query, key, value
    return rotate(query, *rotations[parts.rotation]), rotate(key, *rotations[parts.rotation]), value


def _layer_seed(parts: EncoderLayerParts, x: Tensor) -> Tensor | None:
    """One seed for the three dropouts of a layer, if any of them runs in a kernel."""
    rates = (
        parts.attention_dropout_p,
        dropout_rate(parts.attention_output_dropout) or 0.0,
        dropout_rate(parts.output_dropout) or 0.0,
    )
    return functional.draw_seed(x.device) if max(rates) > 0.0 and path_of("layer_norm", x) != "torch" else None


def encoder_layer(
    parts: EncoderLayerParts,
    hidden_states: Tensor,
    batch: PackedBatch,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    rotations: Rotations = (),
) -> Tensor:
    """One encoder layer (Devlin et al. 2018; Vaswani et al. 2017, section 3.1) on packed rows.

    Args:
        parts: its modules.
        hidden_states: (tokens, hidden_size).
        batch: the boundaries.
        rows: (rows,) int64, the packed rows whose result is needed; None: all. Everything after attention runs on
            these alone.
        bias: of the scores, by relative position; see functional.attention.
        rotations: of the tokens.

    Returns:
        (tokens or rows, hidden_size).
    """
    seed = _layer_seed(parts, hidden_states)
    x = normalise(parts.attention_norm, hidden_states) if parts.norm_first else hidden_states
    context = functional.attention(
        *_heads(parts, x, rotations),
        batch.cu_seqlens,
        batch.max_seqlen,
        tiles=batch.tiles,
        dropout_p=parts.attention_dropout_p,
        seed=seed,
        stream=0,
        bias=bias,
        window=parts.window,
    ).flatten(1)
    if rows is not None:
        context, hidden_states = context.index_select(0, rows), hidden_states.index_select(0, rows)
    if parts.norm_first:
        hidden_states = hidden_states + drop(parts.attention_output_dropout, multiply(parts.attention_output, context))
        expanded = _feed_forward(parts, normalise(parts.output_norm, hidden_states))
        return hidden_states + drop(parts.output_dropout, multiply(parts.output, expanded))
    attended = project(
        parts.attention_output, parts.attention_output_dropout, parts.attention_norm, context, hidden_states, seed, 1
    )
    expanded = _feed_forward(parts, attended)
    return project(parts.output, parts.output_dropout, parts.output_norm, expanded, attended, seed, 2)


class EncoderLayer(nn.Module):
    """A post-norm encoder layer that owns its parts."""

    inner_dropout = NO_DROPOUT
    norm_first = False
    gate = None
    window = None
    rotation = None

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        activation: Activation,
        attention_dropout: float,
        hidden_dropout: float,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.activation = activation
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.attention_output_dropout = nn.Dropout(hidden_dropout)
        self.attention_norm = LayerNorm(hidden_size, eps=layer_norm_eps)
        self.intermediate = nn.Linear(hidden_size, intermediate_size)
        self.output = nn.Linear(intermediate_size, hidden_size)
        self.output_dropout = nn.Dropout(hidden_dropout)
        self.output_norm = LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, hidden_states: Tensor, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """(tokens, hidden_size) -> (tokens or rows, hidden_size); see encoder_layer."""
        return encoder_layer(self, hidden_states, batch, rows)

    @property
    def attention_dropout_p(self) -> float:
        """Dropout rate of the attention probabilities now; 0 in evaluation."""
        return self.attention_dropout.p if self.training else 0.0


class EmbeddingParts(Protocol):
    """What the embedding of a batch is made of."""

    @property
    def word(self) -> nn.Module: ...
    @property
    def position(self) -> nn.Module | None: ...
    @property
    def token_type(self) -> nn.Module | None: ...
    @property
    def norm(self) -> nn.Module: ...
    @property
    def dropout(self) -> nn.Module: ...


def _is_plain_table(table: nn.Module) -> bool:
    """Whether it is an embedding whose only option, if any, is a padding entry."""
    if not is_plain(table, nn.Embedding):
        return False
    assert isinstance(table, nn.Embedding)
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


def _can_be_fused(parts: EmbeddingParts) -> bool:
    """Whether functional.embedding does what the parts do one after another."""
    if parts.position is None:
        return False
    tables = [table for table in (parts.word, parts.position, parts.token_type) if table is not None]
    if not (is_plain_norm(parts.norm) and parts.norm.bias is not None and all(map(_is_plain_table, tables))):
        return False
    dtypes = {cast("nn.Embedding", part).weight.dtype for part in (*tables, parts.norm)}
    return len(dtypes) == 1 and getattr(parts.token_type, "padding_idx", None) is None


def _words(table: nn.Module, batch: PackedBatch) -> Tensor:
    """(tokens, width). From ids without memory torch's own table would read something."""
    ids = batch.ids
    assert ids is not None
    if type(table) is nn.Embedding and ids.device != table.weight.device:
        raise ValueError(f"input_ids is on {ids.device} and its table on {table.weight.device}; one device is needed")
    words: Tensor = table(ids)
    return words


def embed(parts: EmbeddingParts, batch: PackedBatch, inputs_embeds: Tensor | None = None) -> Tensor:
    """Word, token-type and position embeddings, as far as there are any, normalised (Devlin et al. 2018, figure 2).

    Args:
        parts: its modules.
        batch: ids (unless inputs_embeds is given), token types and positions.
        inputs_embeds: (tokens, hidden_size) in place of the word embeddings.

    Returns:
        (tokens, hidden_size).
    """
    rate = dropout_rate(parts.dropout)
    if inputs_embeds is None and rate is not None and _can_be_fused(parts):
        word, position = (cast("nn.Embedding", x) for x in (parts.word, parts.position))
        token_type = None if parts.token_type is None else cast("nn.Embedding", parts.token_type).weight
        norm = cast("nn.LayerNorm", parts.norm)
        assert batch.ids is not None
        if word.weight.device.type == "cpu" or path_of("embedding", word.weight) == "triton":
            return functional.embedding(
                word.weight, position.weight, token_type, batch.ids, batch.positions, batch.token_types,
                norm.weight, norm.bias, norm.eps, padding_idx=word.padding_idx,
                position_padding_idx=position.padding_idx, dropout_p=rate,
            )  # fmt: skip
    words = _words(parts.word, batch) if inputs_embeds is None else inputs_embeds
    positions = None if parts.position is None else parts.position(batch.positions)
    beside = parts.norm.weight if positions is None and is_plain_norm(parts.norm) else positions
    if beside is not None and (words.shape[-1], words.device) != (beside.shape[-1], beside.device):
        raise ValueError(
            f"inputs_embeds has width {words.shape[-1]} on {words.device}; {beside.shape[-1]} on {beside.device} is "
            "needed"
        )
    if parts.token_type is None:
        types = None
    elif batch.token_types is not None:
        types = parts.token_type(batch.token_types)
    elif is_plain(parts.token_type, nn.Embedding):
        assert isinstance(parts.token_type, nn.Embedding)
        types = parts.token_type.weight[0]
    else:
        types = parts.token_type(torch.zeros_like(batch.positions))
    x = words if types is None else words + types
    return drop(parts.dropout, normalise(parts.norm, x) if positions is None else normalise(parts.norm, positions, x))
