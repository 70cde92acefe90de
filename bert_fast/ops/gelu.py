"""bert_fast::gelu: GELU(x + bias)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from ._path import (
    array,
    define,
    device_of,
    differentiate,
    kernel_path,
    optional_array,
    optional_contiguous,
    or_empty,
    threads,
)
from .layer_norm import feature


def launch_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU(x + bias) of rows (rows, width), without autograd."""
    x, bias = x.contiguous(), optional_contiguous(bias)
    if kernel_path("gelu", x, x.shape[1]) == "triton":
        from ..kernels import gelu

        with device_of(x):
            return gelu.gelu(x, bias, approximate)
    y = torch.empty_like(x)
    _C.gelu(array(x), optional_array(bias), approximate, array(y), threads())
    return y


def launch_gelu_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x (rows, width) and of the bias (width,) float32, None without one."""
    grad_y, x, bias = grad_y.contiguous(), x.contiguous(), optional_contiguous(bias)
    if kernel_path("gelu", x, x.shape[1]) == "triton":
        from ..kernels import gelu

        with device_of(x):
            return gelu.gelu_backward(grad_y, x, bias, approximate)
    grad_x = torch.empty_like(x)
    grad_bias = None if bias is None else torch.empty(x.shape[1])
    _C.gelu_backward(
        array(grad_y), array(x), optional_array(bias), approximate, array(grad_x), optional_array(grad_bias), threads()
    )
    return grad_x, grad_bias


def _gelu_backward(grad_y: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = launch_gelu_backward(grad_y, x, bias, approximate)
    return grad_x, or_empty(grad_bias, x)


define(
    "gelu(Tensor x, Tensor? bias, str approximate) -> Tensor",
    launch_gelu,
    lambda x, *_: x.new_empty(x.shape),
)
define(
    "gelu_backward(Tensor grad_y, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    _gelu_backward,
    lambda grad_y, x, bias, approximate: (  # noqa: ARG005
        x.new_empty(x.shape),
        or_empty(None if bias is None else feature(x), x),
    ),
)


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _grad(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.bert_fast.gelu_backward(grad_y, x, bias, ctx.approximate)
    return grad_x, None if bias is None else grad_bias.to(bias.dtype), None


differentiate("gelu", _save, _grad)
