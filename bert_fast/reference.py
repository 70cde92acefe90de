"""The oracle: BERT in plain torch, one sequence and one step at a time, in whatever dtype the weights have.

Nothing here is fast or shared with the code that it checks. In float64 its error is far below that of any other path,
so it decides what the right answer is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ACTIVATIONS, BertConfig


class ReferenceOutput(NamedTuple):
    """
    Attributes:
        hidden_states: embeddings and every layer's output, each (batch, length, hidden_size).
        pooled: tanh of the pooler's linear layer on the first token, (batch, hidden_size); None without a pooler.
    """

    hidden_states: list[Tensor]
    pooled: Tensor | None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """LayerNorm of x + residual over the last dimension (Ba et al. 2016)."""
    if residual is not None:
        x = x + residual
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + bias


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """GELU of x + bias (Hendrycks and Gimpel 2016), by erf or by the tanh formula."""
    if bias is not None:
        x = x + bias
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def activate(x: Tensor, activation: str | Callable[[Tensor], Tensor]) -> Tensor:
    """ReLU by "relu", GELU by its `approximate`, or the function itself."""
    if not isinstance(activation, str):
        return activation(x)
    return x.clamp(min=0) if activation == "relu" else gelu(x, approximate=activation)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Attention of queries (queries, heads, size) over keys and values (keys, heads, size); zeros without a key.

    `bias` (heads, queries, keys) is added to the scores; keys more than `window` rows away are not seen.
    """
    if k.shape[0] == 0:
        return torch.zeros_like(q)
    if window is not None:
        rows = []
        for row in range(len(q)):
            near = slice(min(max(row - window, 0), len(k)), row + window + 1)
            rows.append(attend(q[row : row + 1], k[near], v[near], scale))
        return torch.cat(rows) if rows else torch.zeros_like(q)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if bias is not None:
        scores = scores + bias
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    num_keys: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention within packed sequences.

    Args:
        q, k, v: (tokens, heads, head_size).
        cu_seqlens: (sequences + 1,) bounds of the sequences.
        scale: factor of the scores.
        num_keys: (sequences,) how many of a sequence's first rows are keys; None: all.
        window: how many rows from a query its farthest key may be; None: anywhere.

    Returns:
        (tokens, heads, head_size).
    """
    bounds = cu_seqlens.tolist()
    outputs = []
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        last_key = stop if num_keys is None else start + int(num_keys[sequence])
        outputs.append(attend(q[start:stop], k[start:last_key], v[start:last_key], scale, window=window))
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


class TorchLayer(NamedTuple):
    """
    Attributes:
        weights: tensors under the names of torch.nn.TransformerEncoderLayer's state.
        num_heads: of the attention.
        activation: "none" or "tanh" for GELU, or "relu".
        norm_first: whether norms stand before attention and feed-forward layer.
        eps: of the two norms.
    """

    weights: Mapping[str, Tensor]
    num_heads: int
    activation: str
    norm_first: bool
    eps: tuple[float, float]


def torch_encoder(layers: Sequence[TorchLayer], x: Tensor, keys: Tensor | None = None) -> Tensor:
    """torch.nn.TransformerEncoder without its last norm (Vaswani et al. 2017; Xiong et al. 2020); no dropout.

    Args:
        layers: its layers.
        x: (batch, length, width).
        keys: (batch, length) bool, where tokens are attended to; None: everywhere.

    Returns:
        (batch, length, width).
    """
    keys = torch.ones(x.shape[:2], dtype=torch.bool) if keys is None else keys
    for layer in layers:
        x = _torch_layer(layer, x, keys)
    return x


def _torch_layer(layer: TorchLayer, x: Tensor, keys: Tensor) -> Tensor:
    weights = layer.weights

    def linear(name: str, values: Tensor) -> Tensor:
        separator = "_" if name.endswith("in_proj") else "."
        result = values @ weights[f"{name}{separator}weight"].T
        bias = weights.get(f"{name}{separator}bias")
        return result if bias is None else result + bias

    def normalise(number: int, values: Tensor) -> Tensor:
        weight = weights[f"norm{number}.weight"]
        bias = weights.get(f"norm{number}.bias", torch.zeros_like(weight))
        return layer_norm(values, weight, bias, layer.eps[number - 1])

    def attended(values: Tensor) -> Tensor:
        heads = linear("self_attn.in_proj", values).unflatten(-1, (3, layer.num_heads, -1))
        scale = 1 / math.sqrt(heads.shape[-1])
        rows = []
        for row, is_key in zip(heads, keys, strict=True):
            q, k, v = row.unbind(1)
            rows.append(attend(q, k[is_key], v[is_key], scale).flatten(1))
        return linear("self_attn.out_proj", torch.stack(rows) if rows else values)

    def fed_forward(values: Tensor) -> Tensor:
        return linear("linear2", activate(linear("linear1", values), layer.activation))

    if layer.norm_first:
        x = x + attended(normalise(1, x))
        return x + fed_forward(normalise(2, x))
    x = normalise(1, x + attended(x))
    return normalise(2, x + fed_forward(x))


class RotaryLayer(NamedTuple):
    """
    Attributes:
        weights: tensors under the names of a layer of Hugging Face's ModernBertModel; "attn_norm" may be missing.
        num_heads: of the attention.
        activation: "none" or "tanh" for GELU, "relu", or any function.
        eps: of the two norms.
        window: how many rows from a query its farthest key may be; None: anywhere.
        cosines, sines: (batch or 1, length, head_size / 2), of the angles of each place.
    """

    weights: Mapping[str, Tensor]
    num_heads: int
    activation: str | Callable[[Tensor], Tensor]
    eps: float
    window: int | None
    cosines: Tensor
    sines: Tensor


def rotary_encoder(layers: Sequence[RotaryLayer], x: Tensor, keys: Tensor | None = None) -> Tensor:
    """The layers of ModernBERT (Warner et al. 2024), without the norm after the last; no dropout.

    Args:
        layers: its layers.
        x: (batch, length, width).
        keys: (batch, length) bool, where tokens are attended to; None: everywhere.

    Returns:
        (batch, length, width).
    """
    keys = torch.ones(x.shape[:2], dtype=torch.bool) if keys is None else keys
    for layer in layers:
        x = _rotary_layer(layer, x, keys)
    return x


def _rotary_layer(layer: RotaryLayer, x: Tensor, keys: Tensor) -> Tensor:
    weights = layer.weights
    length = x.shape[1]
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    is_near = distance <= (length if layer.window is None else layer.window)

    def linear(name: str, values: Tensor) -> Tensor:
        result = values @ weights[f"{name}.weight"].T
        bias = weights.get(f"{name}.bias")
        return result if bias is None else result + bias

    def normalise(name: str, values: Tensor) -> Tensor:
        weight = weights.get(f"{name}.weight")
        if weight is None:
            return values
        return layer_norm(values, weight, weights.get(f"{name}.bias", torch.zeros_like(weight)), layer.eps)

    def turn(values: Tensor) -> Tensor:
        first, second = values.chunk(2, -1)
        turned = torch.complex(first, second) * torch.complex(layer.cosines, layer.sines)[:, :, None]
        return torch.cat((turned.real, turned.imag), -1)

    q, k, v = linear("attn.Wqkv", normalise("attn_norm", x)).unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
    q, k = turn(q), turn(k)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    is_seen = (keys[:, None, :] & is_near)[:, None]
    probabilities = torch.softmax(scores.masked_fill(~is_seen, float("-inf")), -1)
    # A query without any key has no probabilities.
    probabilities = probabilities.masked_fill(~is_seen.any(-1, keepdim=True), 0.0)
    x = x + linear("attn.Wo", torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2))
    inner, gate = linear("mlp.Wi", normalise("mlp_norm", x)).chunk(2, -1)
    return x + linear("mlp.Wo", activate(inner, layer.activation) * gate)


def bert(
    weights: Mapping[str, Tensor],
    config: BertConfig,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> ReferenceOutput:
    """The encoder of Devlin et al. (2018) on a padded batch; no dropout.

    Args:
        weights: tensors under Hugging Face's BertModel names ("encoder.layer.0.attention.self.query.weight", ...), and
            ELECTRA's projection of the embeddings, if there is one; there may be no token types.
        config: sizes; hidden_act and layer_norm_eps matter here.
        input_ids: (batch, length), or None with inputs_embeds (batch, length, hidden_size).
        attention_mask: (batch, length), not zero where a token is attended to; None: everywhere. Other tokens are
            computed all the same, as queries.
        token_type_ids: (batch, length); None: zeros.
        position_ids: (batch or 1, length); None: the column.
        score_bias: (heads, length, length), added to attention's scores.
    """
    words = weights["embeddings.word_embeddings.weight"]
    embedded = words[input_ids] if inputs_embeds is None else inputs_embeds
    batch, length = embedded.shape[:2]
    types = torch.zeros(batch, length, dtype=torch.long) if token_type_ids is None else token_type_ids
    columns = torch.arange(length)[None] if position_ids is None else position_ids
    valid = torch.ones(batch, length) if attention_mask is None else attention_mask
    if "embeddings.token_type_embeddings.weight" in weights:
        embedded = embedded + weights["embeddings.token_type_embeddings.weight"][types]
    embedded = embedded + weights["embeddings.position_embeddings.weight"][columns]

    def normalise(name: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps, residual)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def split(x: Tensor) -> Tensor:
        return x.view(batch, length, config.num_attention_heads, config.head_size)

    hidden = normalise("embeddings.LayerNorm", embedded)
    if "embeddings_project.weight" in weights:
        hidden = linear("embeddings_project", hidden)
    hidden_states = [hidden]
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layer.{index}"
        q, k, v = (split(linear(f"{layer}.attention.self.{name}", hidden)) for name in ("query", "key", "value"))
        context = []
        for row in range(batch):
            keys = torch.nonzero(valid[row]).flatten()
            bias = None if score_bias is None else score_bias[:, :, keys]
            context.append(attend(q[row], k[row, keys], v[row, keys], 1 / math.sqrt(config.head_size), bias).flatten(1))
        attended = linear(f"{layer}.attention.output.dense", torch.stack(context) if context else hidden)
        attended = normalise(f"{layer}.attention.output.LayerNorm", attended, hidden)
        expanded = gelu(linear(f"{layer}.intermediate.dense", attended), approximate=ACTIVATIONS[config.hidden_act])
        hidden = normalise(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", expanded), attended)
        hidden_states.append(hidden)

    pooled = None
    if "pooler.dense.weight" in weights:
        pooled = torch.tanh(linear("pooler.dense", hidden[:, 0]))
    return ReferenceOutput(hidden_states, pooled)
