"""bias + GELU, erf and tanh, forward and backward.

Supported: float32, float16, bfloat16; (rows, width), contiguous. Only the pre-activation is read again by the backward
pass, which also sums the bias gradient: partial sums over a fixed number of programs, so it is deterministic.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
"""

import torch
import triton
import triton.language as tl

from ._launch import Launch, ceil_div

# 4,096 elements a program, eight 16-byte loads a lane in 16 bits: enough in flight to reach the memory's speed.
LAUNCH = Launch(rows=4, columns=1024, num_warps=4, num_stages=1)

# Two tensors to read, and more to compute: at four rows float32 spills.
BACKWARD_LAUNCH = Launch(rows=2, columns=1024, num_warps=4, num_stages=1)

# Programs along the rows in the backward pass, and so rows of the partial sums.
BACKWARD_PROGRAMS = 256


@triton.jit
def _erf_gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _erf_gelu_slope(x):
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def _tanh_decay(x):
    """exp(-2u) with 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u)): the logistic form keeps its digits where tanh is near -1.

    Its exponent is bounded, so that the product with a vanishing gate stays finite.
    """
    return tl.exp(tl.minimum(-1.5957691216057308 * (x + 0.044715 * x * x * x), 80.0))


@triton.jit
def _tanh_gelu(x):
    return x / (1.0 + _tanh_decay(x))


@triton.jit
def _tanh_gelu_slope(x):
    decay = _tanh_decay(x)
    gate = 1.0 / (1.0 + decay)
    rest = decay * gate  # 1 - gate, with all its digits
    return gate + x * gate * rest * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit(do_not_specialize=["rows"])
def _gelu_kernel(
    x_ptr, bias_ptr, y_ptr, rows, width,
    HAS_BIAS: tl.constexpr, IS_TANH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """BLOCK_ROWS x BLOCK_COLUMNS elements."""
    row_idx = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column_idx = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offs = row_idx[:, None] * width + column_idx[None, :]
    mask = (row_idx < rows)[:, None] & (column_idx < width)[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + column_idx, mask=column_idx < width, other=0.0).to(tl.float32)[None, :]
    if IS_TANH:
        y = _tanh_gelu(x)
    else:
        y = _erf_gelu(x)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gelu_grad_kernel(
    grad_y_ptr, x_ptr, bias_ptr, grad_x_ptr, grad_bias_ptr, rows, width,
    HAS_BIAS: tl.constexpr, IS_TANH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of columns, every PROGRAMS-th block of rows; grad_bias receives this program's partial sum."""
    column_idx = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = column_idx < width
    bias_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column_idx, mask=column_mask, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row_idx = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offs = row_idx[:, None] * width + column_idx[None, :]
        mask = (row_idx < rows)[:, None] & column_mask[None, :]
        grad_y = tl.load(grad_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias[None, :]
        if IS_TANH:
            grad_x = grad_y * _tanh_gelu_slope(x)
        else:
            grad_x = grad_y * _erf_gelu_slope(x)
        tl.store(grad_x_ptr + offs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            bias_sum += tl.sum(grad_x, 0)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + tl.program_id(0).to(tl.int64) * width + column_idx, bias_sum, mask=column_mask)


def _sizes(launch: Launch, bias: torch.Tensor | None, approximate: str) -> dict[str, int]:
    return {
        "HAS_BIAS": bias is not None,
        "IS_TANH": approximate == "tanh",
        "BLOCK_ROWS": launch.rows,
        "BLOCK_COLUMNS": launch.columns,
        **launch.options,
    }


def gelu(x: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    """GELU(x + bias).

    Args:
        x: (rows, width), contiguous.
        bias: (width,) or None.
        approximate: "none" (erf) or "tanh".

    Returns:
        (rows, width) in x's dtype.
    """
    rows, width = x.shape
    y = torch.empty_like(x)
    if rows > 0:
        grid = (ceil_div(rows, LAUNCH.rows), ceil_div(width, LAUNCH.columns))
        _gelu_kernel[grid](x, bias, y, rows, width, **_sizes(LAUNCH, bias, approximate))
    return y


def gelu_backward(
    grad_y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, approximate: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """grad_x (rows, width) in x's dtype and grad_bias (width,) float32, or None without a bias."""
    rows, width = x.shape
    grad_x = torch.empty_like(x)
    programs = min(BACKWARD_PROGRAMS, ceil_div(rows, BACKWARD_LAUNCH.rows))
    partial_sums = None
    if bias is not None:
        partial_sums = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    if rows > 0:
        grid = (programs, ceil_div(width, BACKWARD_LAUNCH.columns))
        _gelu_grad_kernel[grid](
            grad_y, x, bias, grad_x, partial_sums, rows, width, **_sizes(BACKWARD_LAUNCH, bias, approximate)
        )
    return grad_x, None if partial_sums is None else partial_sums.sum(0)
