"""Word + position (+ token-type) embeddings, LayerNorm and dropout on packed ids, forward and backward.

Supported: tables in float32, float16, bfloat16; rows of 1 to MAX_LAYER_NORM_WIDTH features, contiguous. The forward
pass is one kernel that gathers those rows and writes one. The backward pass gathers them again, so nothing but the
statistics is kept, and gives the gradient of the sum; the tables' gradients are torch's embedding_dense_backward of it,
which sorts the ids and so is deterministic.

A row whose id, position or token type lies outside its table becomes NaN: nothing can raise there without waiting.

Sources: Devlin et al., "BERT" (2018), figure 2; Ba, Kiros and Hinton, "Layer Normalization" (2016).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _random
from ._random import keep_features, load_seed
from .layer_norm import BACKWARD_PROGRAMS, _load_features, launch, normalise, normalise_grad


class Tables(NamedTuple):
    """The embeddings (entries, width), of one dtype, and where they are looked up.

    Args:
        word, position, token_type: the tables; token_type None: the sum is of two.
        ids, positions: (rows,) int64 or int32.
        token_types: (rows,), or None: 0 everywhere.
    """

    word: torch.Tensor
    position: torch.Tensor
    token_type: torch.Tensor | None
    ids: torch.Tensor
    positions: torch.Tensor
    token_types: torch.Tensor | None

    @property
    def entries(self) -> tuple[int, int, int]:
        types = 0 if self.token_type is None else self.token_type.shape[0]
        return self.word.shape[0], self.position.shape[0], types

    @property
    def flags(self) -> dict[str, bool]:
        return {"HAS_TABLE": self.token_type is not None, "HAS_TYPES": self.token_types is not None}


@triton.jit
def _gather(table_ptr, entry, entries, column_idx, mask, width):
    """A row of a table, NaN where there is none."""
    inside = tl.minimum(tl.maximum(entry, 0), entries - 1)
    shift = tl.where(entry == inside, 0.0, float("nan"))
    return _load_features(table_ptr, inside * width + column_idx, mask) + shift


@triton.jit
def _sum_embeddings(
    word_ptr, position_ptr, type_ptr, ids_ptr, positions_ptr, types_ptr, words, positions, types, row, column_idx, mask,
    width, HAS_TABLE: tl.constexpr, HAS_TYPES: tl.constexpr,
):  # fmt: skip
    x = _gather(word_ptr, tl.load(ids_ptr + row).to(tl.int64), words, column_idx, mask, width)
    if HAS_TYPES:
        x += _gather(type_ptr, tl.load(types_ptr + row).to(tl.int64), types, column_idx, mask, width)
    elif HAS_TABLE:
        x += _load_features(type_ptr, column_idx, mask)
    return x + _gather(position_ptr, tl.load(positions_ptr + row).to(tl.int64), positions, column_idx, mask, width)


@triton.jit(do_not_specialize=["stream", "threshold"])
def _embedding_kernel(
    word_ptr, position_ptr, type_ptr, ids_ptr, positions_ptr, types_ptr, seed_ptr, weight_ptr, bias_ptr,
    y_ptr, mean_ptr, rstd_ptr, words, positions, types, stream, threshold, keep_scale, width, eps,
    HAS_TABLE: tl.constexpr, HAS_TYPES: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column_idx = tl.arange(0, BLOCK)
    mask = column_idx < width
    x = _sum_embeddings(
        word_ptr, position_ptr, type_ptr, ids_ptr, positions_ptr, types_ptr, words, positions, types, row, column_idx,
        mask, width, HAS_TABLE, HAS_TYPES,
    )  # fmt: skip
    normalised, mean, rstd = normalise(x, mask, width, eps)
    y = normalised * _load_features(weight_ptr, column_idx, mask) + _load_features(bias_ptr, column_idx, mask)
    if HAS_DROPOUT:
        is_kept = keep_features(load_seed(seed_ptr, stream), row, column_idx, threshold)
        y = tl.where(is_kept, y * keep_scale, 0.0)
    tl.store(y_ptr + row * width + column_idx, y.to(y_ptr.dtype.element_ty), mask=mask)
    if HAS_STATISTICS:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows", "stream", "threshold"])
def _embedding_grad_kernel(
    grad_y_ptr, word_ptr, position_ptr, type_ptr, ids_ptr, positions_ptr, types_ptr, seed_ptr, weight_ptr,
    mean_ptr, rstd_ptr, grad_sum_ptr, grad_weight_ptr, grad_bias_ptr,
    words, positions, types, stream, threshold, keep_scale, rows, width,
    HAS_TABLE: tl.constexpr, HAS_TYPES: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th row: the gradient of the sum of embeddings; grad_weight and grad_bias receive partial sums."""
    program = tl.program_id(0)
    column_idx = tl.arange(0, BLOCK)
    mask = column_idx < width
    weight = _load_features(weight_ptr, column_idx, mask)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    seed = load_seed(seed_ptr, stream) if HAS_DROPOUT else None
    for row in range(program, rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)  # the interpreter counts in Python integers
        x = _sum_embeddings(
            word_ptr, position_ptr, type_ptr, ids_ptr, positions_ptr, types_ptr, words, positions, types, wide_row,
            column_idx, mask, width, HAS_TABLE, HAS_TYPES,
        )  # fmt: skip
        grad_y = _load_features(grad_y_ptr, wide_row * width + column_idx, mask)
        if HAS_DROPOUT:
            grad_y = tl.where(keep_features(seed, wide_row, column_idx, threshold), grad_y * keep_scale, 0.0)
        rstd = tl.load(rstd_ptr + row)
        normalised = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        grad_sum = normalise_grad(grad_y, weight, normalised, rstd, width)
        tl.store(grad_sum_ptr + wide_row * width + column_idx, grad_sum.to(grad_sum_ptr.dtype.element_ty), mask=mask)
        weight_sum += grad_y * normalised
        bias_sum += grad_y
    partial_offs = program.to(tl.int64) * width + column_idx
    tl.store(grad_weight_ptr + partial_offs, weight_sum, mask=mask)
    tl.store(grad_bias_ptr + partial_offs, bias_sum, mask=mask)


def embedding(
    tables: Tables,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    seed: torch.Tensor | None = None,
    stream: int = 0,
    dropout_p: float = 0.0,
    has_statistics: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dropout(LayerNorm(word[ids] + position[positions] + token_type[token_types]) * weight + bias).

    Args:
        tables: the embeddings and the indices.
        weight, bias: (width,).
        eps: added to the variance.
        seed: (1,) int64, draws the dropout.
        stream: number of the place in the model.
        dropout_p: rate, in [0, 1).
        has_statistics: whether mean and rstd are wanted, as the backward pass does.

    Returns:
        y (rows, width) in the tables' dtype; mean and rstd (rows,) float32, or None.
    """
    rows, width = tables.ids.shape[0], tables.word.shape[1]
    device = tables.word.device
    y = torch.empty((rows, width), dtype=tables.word.dtype, device=device)
    mean = rstd = None
    if has_statistics:
        mean, rstd = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    if rows > 0:
        sizes = launch(width)
        _embedding_kernel[(rows,)](
            *tables, seed if dropout_p > 0 else None, weight, bias, y, mean, rstd, *tables.entries,
            stream, _random.threshold(dropout_p), _random.scale(dropout_p), width, eps, **tables.flags,
            HAS_DROPOUT=dropout_p > 0, HAS_STATISTICS=has_statistics, BLOCK=sizes.columns, **sizes.options,
        )  # fmt: skip
    return y, mean, rstd


def embedding_backward(
    grad_y: torch.Tensor,
    tables: Tables,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None = None,
    stream: int = 0,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of the sum of embeddings (rows, width) in grad_y's dtype; of weight and bias (width,) float32."""
    rows, width = grad_y.shape
    grad_sum = torch.empty_like(grad_y)
    programs = min(BACKWARD_PROGRAMS, rows)
    parts = torch.empty((2, programs, width), dtype=torch.float32, device=grad_y.device)
    if rows > 0:
        sizes = launch(width)
        _embedding_grad_kernel[(programs,)](
            grad_y, *tables, seed if dropout_p > 0 else None, weight, mean, rstd, grad_sum, parts[0], parts[1],
            *tables.entries, stream, _random.threshold(dropout_p), _random.scale(dropout_p), rows, width,
            **tables.flags, HAS_DROPOUT=dropout_p > 0, BLOCK=sizes.columns, **sizes.options,
        )  # fmt: skip
    return grad_sum, parts[0].sum(0), parts[1].sum(0)
