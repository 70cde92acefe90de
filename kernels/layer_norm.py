"""bias + dropout + residual + LayerNorm, forward and backward, one pass over memory each.

Supported: float32, float16, bfloat16; rows of 1 to MAX_LAYER_NORM_WIDTH features, contiguous. A row lives in registers,
its statistics are float32 there and in memory. The column sums of the backward pass are partial sums over a fixed
number of programs, so they are deterministic. The backward pass reads x and the residual again and draws the dropout
again: the sum that was normalised is never stored.

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _random
from ._launch import Launch, next_power_of_2
from ._random import keep_features, load_seed

# Programs of the backward pass, and so rows of the partial sums: a few per multiprocessor of the largest GPUs, whatever
# the number of tokens, so that the sums have one order on every device.
BACKWARD_PROGRAMS = 512


def launch(width: int) -> Launch:
    """One row a program; a warp for every 256 features, so that a lane holds eight."""
    block = next_power_of_2(width)
    return Launch(1, block, min(max(block // 256, 1), 16), 1)


class Addend(NamedTuple):
    """What happens to x before it is normalised.

    Args:
        bias: (width,), added to x first; None without.
        seed: (1,) int64, draws the dropout; None without.
        stream: number of the place in the model, so that one seed serves many.
        dropout_p: rate, in [0, 1).
        residual: (rows, width), added last, of any supported dtype; None without.
    """

    bias: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    stream: int = 0
    dropout_p: float = 0.0
    residual: torch.Tensor | None = None

    @property
    def pointers(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        return self.bias, self.residual, self.seed if self.dropout_p > 0 else None

    @property
    def numbers(self) -> tuple[int, int, float]:
        """stream, threshold, keep_scale."""
        return self.stream, _random.threshold(self.dropout_p), _random.scale(self.dropout_p)

    @property
    def flags(self) -> dict[str, bool]:
        return {
            "HAS_INPUT_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "HAS_DROPOUT": self.dropout_p > 0,
        }


@triton.jit
def _load_features(ptr, offs, mask):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _addend(
    x, input_bias, residual_ptr, offs, mask, seed, row, column_idx, threshold, keep_scale,
    HAS_INPUT_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """What is normalised, and which features dropout kept."""
    is_kept = mask
    if HAS_INPUT_BIAS:
        x += input_bias
    if HAS_DROPOUT:
        is_kept = keep_features(seed, row, column_idx, threshold)
        x = tl.where(is_kept, x * keep_scale, 0.0)
    if HAS_RESIDUAL:
        x += _load_features(residual_ptr, offs, mask)
    return x, is_kept


@triton.jit
def normalise(x, mask, width, eps):
    """(x - mean) * rstd of a row, zero beyond the width; mean; rstd."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * rstd, mean, rstd


@triton.jit
def normalise_grad(grad_y, weight, normalised, rstd, width):
    """The gradient of what was normalised; everything is zero beyond the width."""
    weighted = grad_y * weight
    mean_weighted = tl.sum(weighted, 0) / width
    mean_product = tl.sum(weighted * normalised, 0) / width
    return rstd * (weighted - mean_weighted - normalised * mean_product)


@triton.jit(do_not_specialize=["stream", "threshold"])
def _layer_norm_kernel(
    x_ptr, input_bias_ptr, residual_ptr, seed_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    stream, threshold, keep_scale, width, eps,
    HAS_INPUT_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column_idx = tl.arange(0, BLOCK)
    mask = column_idx < width
    offs = row * width + column_idx
    x = _load_features(x_ptr, offs, mask)
    input_bias = _load_features(input_bias_ptr, column_idx, mask) if HAS_INPUT_BIAS else None
    seed = load_seed(seed_ptr, stream) if HAS_DROPOUT else None
    x, _ = _addend(
        x, input_bias, residual_ptr, offs, mask, seed, row, column_idx, threshold, keep_scale,
        HAS_INPUT_BIAS, HAS_RESIDUAL, HAS_DROPOUT,
    )  # fmt: skip
    normalised, mean, rstd = normalise(x, mask, width, eps)
    y = normalised * _load_features(weight_ptr, column_idx, mask) + _load_features(bias_ptr, column_idx, mask)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    if HAS_STATISTICS:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows", "stream", "threshold"])
def _layer_norm_grad_kernel(
    grad_y_ptr, x_ptr, input_bias_ptr, residual_ptr, seed_ptr, weight_ptr, mean_ptr, rstd_ptr,
    grad_x_ptr, grad_residual_ptr, grad_weight_ptr, grad_bias_ptr, grad_input_bias_ptr,
    stream, threshold, keep_scale, rows, width,
    HAS_INPUT_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th row; the column sums receive this program's part. The residual's gradient is stored on its own
    only where dropout makes it another than that of x."""
    program = tl.program_id(0)
    column_idx = tl.arange(0, BLOCK)
    mask = column_idx < width
    weight = _load_features(weight_ptr, column_idx, mask)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    input_bias_sum = tl.zeros((BLOCK,), tl.float32)
    input_bias = _load_features(input_bias_ptr, column_idx, mask) if HAS_INPUT_BIAS else None
    seed = load_seed(seed_ptr, stream) if HAS_DROPOUT else None
    for row in range(program, rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)  # the interpreter counts in Python integers
        offs = wide_row * width + column_idx
        grad_y = _load_features(grad_y_ptr, offs, mask)
        x = _load_features(x_ptr, offs, mask)
        x, is_kept = _addend(
            x, input_bias, residual_ptr, offs, mask, seed, wide_row, column_idx, threshold, keep_scale,
            HAS_INPUT_BIAS, HAS_RESIDUAL, HAS_DROPOUT,
        )  # fmt: skip
        rstd = tl.load(rstd_ptr + row)
        normalised = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        grad_x = normalise_grad(grad_y, weight, normalised, rstd, width)
        if HAS_DROPOUT:
            if HAS_RESIDUAL:
                tl.store(grad_residual_ptr + offs, grad_x.to(grad_residual_ptr.dtype.element_ty), mask=mask)
            grad_x = tl.where(is_kept, grad_x * keep_scale, 0.0)
        tl.store(grad_x_ptr + offs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        weight_sum += grad_y * normalised
        bias_sum += grad_y
        input_bias_sum += grad_x
    partial_offs = program.to(tl.int64) * width + column_idx
    tl.store(grad_weight_ptr + partial_offs, weight_sum, mask=mask)
    tl.store(grad_bias_ptr + partial_offs, bias_sum, mask=mask)
    if HAS_INPUT_BIAS:
        tl.store(grad_input_bias_ptr + partial_offs, input_bias_sum, mask=mask)


def layer_norm(
    x: torch.Tensor,
    addend: Addend,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    has_statistics: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """LayerNorm(dropout(x + addend.bias) + addend.residual) * weight + bias.

    Args:
        x: (rows, width), contiguous, as the residual.
        addend: what happens to x first.
        weight, bias: (width,).
        eps: added to the variance.
        has_statistics: whether mean and rstd are wanted, as the backward pass does.

    Returns:
        y (rows, width) in x's dtype; mean and rstd (rows,) float32, or None.
    """
    rows, width = x.shape
    y = torch.empty_like(x)
    mean = rstd = None
    if has_statistics:
        mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows > 0:
        sizes = launch(width)
        _layer_norm_kernel[(rows,)](
            x, *addend.pointers, weight, bias, y, mean, rstd, *addend.numbers, width, eps,
            **addend.flags, HAS_STATISTICS=has_statistics, BLOCK=sizes.columns, **sizes.options,
        )  # fmt: skip
    return y, mean, rstd


class Gradients(NamedTuple):
    """Those of x and the residual (rows, width), each in its own dtype; those of the weights (width,), float32.

    Without dropout the residual's is that of x, and None here.
    """

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    input_bias: torch.Tensor | None


def layer_norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    addend: Addend,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> Gradients:
    """The gradients."""
    rows, width = x.shape
    grad_x = torch.empty_like(x)
    grad_residual = None
    if addend.residual is not None and addend.dropout_p > 0:
        grad_residual = torch.empty_like(addend.residual)
    programs = min(BACKWARD_PROGRAMS, rows)
    sums = 2 if addend.bias is None else 3
    parts = torch.empty((sums, programs, width), dtype=torch.float32, device=x.device)
    if rows > 0:
        sizes = launch(width)
        _layer_norm_grad_kernel[(programs,)](
            grad_y, x, *addend.pointers, weight, mean, rstd,
            grad_x, grad_residual, parts[0], parts[1], parts[2] if sums == 3 else None,
            *addend.numbers, rows, width, **addend.flags, BLOCK=sizes.columns, **sizes.options,
        )  # fmt: skip
    totals = [part.sum(0) for part in parts]  # each on its own: results of an operator must not share memory
    return Gradients(grad_x, grad_residual, totals[0], totals[1], totals[2] if sums == 3 else None)
