"""bert_fast::embedding: the sum of two or three embeddings, normalised, with dropout. Triton; C++ without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from ._path import array, define, device_of, differentiate, kernel_path, optional_contiguous, or_empty, threads
from .layer_norm import feature


def launch_embedding(
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    ids: Tensor,
    positions: Tensor,
    token_types: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int = -1,  # noqa: ARG001
    position_padding_idx: int = -1,  # noqa: ARG001
    seed: Tensor | None = None,
    stream: int = 0,
    dropout_p: float = 0.0,
    has_statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dropout(LayerNorm(word[ids] + position[positions] + token_type[token_types])), without autograd.

    Args:
        word, position, token_type: (entries, width), one dtype; token_type None: the sum is of the other two.
        ids, positions, token_types: (rows,) integers; token_types None: 0 everywhere.
        weight, bias: (width,).
        eps: added to the variance.
        padding_idx, position_padding_idx: entries of `word` and `position` without a gradient, -1 for none.
        seed, stream, dropout_p: see functional.draw_seed.
        has_statistics: whether the mean and 1 / std are wanted.

    Returns:
        (rows, width); mean and 1 / std (rows,) float32, or None.
    """
    kernel_path("embedding", word, word.shape[1])
    from ..kernels import embedding

    with device_of(word):
        tables = _tables(word, position, token_type, ids, positions, token_types)
        return embedding.embedding(
            tables, weight.contiguous(), bias.contiguous(), eps, seed, stream, dropout_p, has_statistics
        )


def launch_embedding_on_cpu(
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    ids: Tensor,
    positions: Tensor,
    token_types: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm(word[ids] + position[positions] + token_type[token_types]) in float32, (rows, width), without autograd.

    Raises:
        IndexError: an index outside its table.
    """
    out = torch.empty(ids.shape[0], word.shape[1])
    _C.embedding(
        array(word.contiguous()),
        array(position.contiguous()),
        None if token_type is None else array(token_type.contiguous()),
        array(ids.long().contiguous()),
        array(positions.long().contiguous()),
        None if token_types is None else array(token_types.long().contiguous()),
        array(weight.contiguous()),
        array(bias.contiguous()),
        eps,
        array(out),
        threads(),
    )
    return out


def _tables(*tensors: Tensor | None) -> Any:
    from ..kernels.embedding import Tables

    return Tables(*(optional_contiguous(x) for x in tensors))  # type: ignore[arg-type]


def launch_embedding_backward(
    grad_y: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    ids: Tensor,
    positions: Tensor,
    token_types: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int = -1,
    position_padding_idx: int = -1,
    seed: Tensor | None = None,
    stream: int = 0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The gradients of the tables, in their dtype, and of weight and bias (width,) float32."""
    kernel_path("embedding", word, word.shape[1])
    from ..kernels import embedding

    with device_of(word):
        tables = _tables(word, position, token_type, ids, positions, token_types)
        grad_sum, grad_weight, grad_bias = embedding.embedding_backward(
            grad_y.contiguous(), tables, weight.contiguous(), mean, rstd, seed, stream, dropout_p
        )
    grad_type = None
    if token_type is not None and token_types is None:
        grad_type = torch.zeros_like(token_type)
        grad_type[0] = grad_sum.sum(0)
    elif token_type is not None and token_types is not None:
        grad_type = _table_gradient(grad_sum, token_types, token_type, -1)
    grad_word = _table_gradient(grad_sum, ids, word, padding_idx)
    grad_position = _table_gradient(grad_sum, positions, position, position_padding_idx)
    return grad_word, grad_position, grad_type, grad_weight, grad_bias


def _table_gradient(grad: Tensor, indices: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    # An index outside its table has made its row NaN; here it would be written to as it is.
    inside = indices.clamp(0, table.shape[0] - 1)
    result: Tensor = torch.ops.aten.embedding_dense_backward(grad, inside, table.shape[0], padding_idx, False)
    return result


_TABLES = "Tensor word, Tensor position, Tensor? token_type, Tensor ids, Tensor positions, Tensor? token_types"
_EXTRAS = "int padding_idx, int position_padding_idx, Tensor? seed, int stream, float dropout_p"


def _row_statistic(word: Tensor, ids: Tensor) -> Tensor:
    return word.new_empty(ids.shape[0], dtype=torch.float32)


define(
    f"embedding({_TABLES}, Tensor weight, Tensor bias, float eps, {_EXTRAS}) -> (Tensor, Tensor, Tensor)",
    launch_embedding,
    lambda word, position, token_type, ids, *_: (  # noqa: ARG005
        word.new_empty((ids.shape[0], word.shape[1])),
        _row_statistic(word, ids),
        _row_statistic(word, ids),
    ),
)


def _embedding_backward(*args: Any) -> tuple[Tensor, ...]:
    grad_word, grad_position, grad_type, *others = launch_embedding_backward(*args)
    return grad_word, grad_position, or_empty(grad_type, grad_word), *others


define(
    f"embedding_backward(Tensor grad_y, {_TABLES}, Tensor weight, Tensor mean, Tensor rstd, {_EXTRAS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _embedding_backward,
    lambda grad_y, word, position, token_type, *_: (
        *(table.new_empty(table.shape) for table in (word, position)),
        or_empty(None if token_type is None else token_type.new_empty(token_type.shape), word),
        feature(grad_y),
        feature(grad_y),
    ),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    word, position, token_type, ids, positions, token_types, weight, bias, _, *extras = inputs
    *ctx.padding, seed, ctx.stream, ctx.dropout_p = extras
    _, mean, rstd = output
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(word, position, token_type, ids, positions, token_types, weight, mean, rstd, seed)


def _grad(ctx: Any, grad_y: Tensor, _mean: Tensor, _rstd: Tensor) -> tuple[Any, ...]:
    *tensors, seed = ctx.saved_tensors
    grad_word, grad_position, grad_type, grad_weight, grad_bias = torch.ops.bert_fast.embedding_backward(
        grad_y, *tensors, *ctx.padding, seed, ctx.stream, ctx.dropout_p
    )
    token_type, weight = tensors[2], tensors[6]
    grad_tables = (grad_word, grad_position, None if token_type is None else grad_type)
    grads = (*grad_tables, None, None, None, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype))
    return (*grads, None, None, None, None, None, None)


differentiate("embedding", _save, _grad)
