"""residual + LayerNorm, forward and backward, one pass over memory each.

Supported: float32, float16, bfloat16; rows of 1 to MAX_LAYER_NORM_WIDTH features, contiguous. A row lives in registers,
its statistics are float32 there and in memory. The weight gradients are partial sums over a fixed number of programs.

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
"""

import torch
import triton
import triton.language as tl

from ._launch import Launch, next_power_of_2

# Programs of the backward pass, and so rows of the partial sums: a few per multiprocessor of the largest GPUs, whatever
# the number of tokens, so that the sums have one order on every device.
BACKWARD_PROGRAMS = 512


def launch(width: int) -> Launch:
    """One row a program; a warp for every 256 features, so that a lane holds eight."""
    block = next_power_of_2(width)
    return Launch(1, block, min(max(block // 256, 1), 16), 1)


@triton.jit
def _layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, width, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_STATISTICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = (x + residual - mean) * rstd * weight + bias for one row."""
    row = tl.program_id(0).to(tl.int64)
    column_idx = tl.arange(0, BLOCK)
    mask = column_idx < width
    offs = row * width + column_idx
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / width
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    weight = tl.load(weight_ptr + column_idx, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column_idx, mask=mask, other=0.0).to(tl.float32)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    if HAS_STATISTICS:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_grad_kernel(
    grad_y_ptr, x_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr,
    grad_x_ptr, grad_weight_ptr, grad_bias_ptr, rows, width,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th row; grad_weight and grad_bias receive this program's partial sums."""
    program = tl.program_id(0)
    column_idx = tl.arange(0, BLOCK)
    mask = column_idx < width
    weight = tl.load(weight_ptr + column_idx, mask=mask, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        offs = tl.cast(row, tl.int64) * width + column_idx  # the interpreter counts in Python integers
        grad_y = tl.load(grad_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        normalised = tl.where(mask, (x - mean) * rstd, 0.0)
        weighted = grad_y * weight
        mean_weighted = tl.sum(weighted, 0) / width
        mean_product = tl.sum(weighted * normalised, 0) / width
        grad_x = rstd * (weighted - mean_weighted - normalised * mean_product)
        tl.store(grad_x_ptr + offs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        weight_sum += grad_y * normalised
        bias_sum += grad_y
    partial_offs = program.to(tl.int64) * width + column_idx
    tl.store(grad_weight_ptr + partial_offs, weight_sum, mask=mask)
    tl.store(grad_bias_ptr + partial_offs, bias_sum, mask=mask)


def layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    has_statistics: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """LayerNorm(x + residual) * weight + bias.

    Args:
        x, residual: (rows, width), contiguous; the residual may have another dtype, or be absent.
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
            x, residual, weight, bias, y, mean, rstd, width, eps,
            HAS_RESIDUAL=residual is not None, HAS_STATISTICS=has_statistics, BLOCK=sizes.columns, **sizes.options,
        )  # fmt: skip
    return y, mean, rstd


def layer_norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_x (rows, width) in x's dtype, also the residual's gradient; grad_weight and grad_bias (width,) float32."""
    rows, width = x.shape
    grad_x = torch.empty_like(x)
    programs = min(BACKWARD_PROGRAMS, rows)
    partial_sums = torch.empty((2, programs, width), dtype=torch.float32, device=x.device)
    if rows > 0:
        sizes = launch(width)
        _layer_norm_grad_kernel[(programs,)](
            grad_y, x, residual, weight, mean, rstd, grad_x, partial_sums[0], partial_sums[1], rows, width,
            HAS_RESIDUAL=residual is not None, BLOCK=sizes.columns, **sizes.options,
        )  # fmt: skip
    grad_weight, grad_bias = partial_sums.sum(1)
    return grad_x, grad_weight, grad_bias
