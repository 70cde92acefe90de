"""bert_fast::layer_norm: LayerNorm(dropout(x + input_bias) + residual)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ._path import (
    array,
    define,
    device_of,
    differentiate,
    drawn,
    kernel_path,
    optional_array,
    optional_contiguous,
    or_empty,
    threads,
)


def launch_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    input_bias: Tensor | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
    dropout_p: float = 0.0,
    has_statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """LayerNorm(dropout(x + input_bias) + residual) of rows, without autograd.

    Args:
        x, residual: (rows, width).
        weight, bias: (width,).
        eps: added to the variance.
        input_bias: (width,). Triton only.
        seed, stream, dropout_p: see functional.draw_seed.
        has_statistics: whether the mean and 1 / std are wanted.

    Returns:
        (rows, width); mean and 1 / std (rows,) float32, or None.
    """
    x, weight, bias, residual = x.contiguous(), weight.contiguous(), bias.contiguous(), optional_contiguous(residual)
    if kernel_path("layer_norm", x, x.shape[1]) == "triton":
        from ..kernels import layer_norm

        with device_of(x):
            addend = layer_norm.Addend(optional_contiguous(input_bias), seed, stream, dropout_p, residual)
            return layer_norm.layer_norm(x, addend, weight, bias, eps, has_statistics)
    _refuse_bias(input_bias)
    y = torch.empty_like(x)
    mean = torch.empty(x.shape[0]) if has_statistics else None
    rstd = torch.empty(x.shape[0]) if has_statistics else None
    _C.layer_norm(
        array(x), optional_array(residual), array(weight), array(bias), eps, *drawn(seed, stream, dropout_p), array(y),
        optional_array(mean), optional_array(rstd), threads(),
    )  # fmt: skip
    return y, mean, rstd


class LayerNormGradients(NamedTuple):
    """
    Attributes:
        x: (rows, width).
        residual: (rows, width), None where it is that of x.
        weight, bias: (width,) float32.
        input_bias: (width,) float32, None without one.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    input_bias: Tensor | None


def launch_layer_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    input_bias: Tensor | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
    dropout_p: float = 0.0,
) -> LayerNormGradients:
    """The gradients."""
    grad_y, x, weight, residual = (
        grad_y.contiguous(),
        x.contiguous(),
        weight.contiguous(),
        optional_contiguous(residual),
    )
    if kernel_path("layer_norm", x, x.shape[1]) == "triton":
        from ..kernels import layer_norm

        with device_of(x):
            addend = layer_norm.Addend(optional_contiguous(input_bias), seed, stream, dropout_p, residual)
            return LayerNormGradients(*layer_norm.layer_norm_backward(grad_y, x, addend, weight, mean, rstd))
    _refuse_bias(input_bias)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty(x.shape[1]), torch.empty(x.shape[1])
    grad_residual = torch.empty_like(x) if dropout_p > 0 else None
    _C.layer_norm_backward(
        array(grad_y), array(x), optional_array(residual), array(weight), array(mean), array(rstd),
        *drawn(seed, stream, dropout_p), array(grad_x), optional_array(grad_residual), array(grad_weight),
        array(grad_bias), threads(),
    )  # fmt: skip
    return LayerNormGradients(grad_x, None if residual is None else grad_residual, grad_weight, grad_bias, None)


def _refuse_bias(input_bias: Tensor | None) -> None:
    if input_bias is not None:
        raise NotImplementedError("bert_fast::layer_norm has no input_bias in C++")


def _layer_norm_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = launch_layer_norm_backward(*args)
    return (
        grads.x,
        or_empty(grads.residual, grads.x),
        grads.weight,
        grads.bias,
        or_empty(grads.input_bias, grads.x),
    )


def statistic(x: Tensor) -> Tensor:
    """One float32 for each row."""
    return x.new_empty(x.shape[0], dtype=torch.float32)


def feature(x: Tensor) -> Tensor:
    """One float32 for each column."""
    return x.new_empty(x.shape[1], dtype=torch.float32)


_EXTRAS = "Tensor? input_bias=None, Tensor? seed=None, int stream=0, float dropout_p=0.0"

define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, "
    f"{_EXTRAS}) -> (Tensor, Tensor, Tensor)",
    launch_layer_norm,
    lambda x, *_: (x.new_empty(x.shape), statistic(x), statistic(x)),
)


def _backward_shapes(
    grad_y: Tensor,  # noqa: ARG001
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,  # noqa: ARG001
    mean: Tensor,  # noqa: ARG001
    rstd: Tensor,  # noqa: ARG001
    input_bias: Tensor | None = None,
    seed: Tensor | None = None,  # noqa: ARG001
    stream: int = 0,  # noqa: ARG001
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_residual = None if residual is None or dropout_p == 0 else residual.new_empty(residual.shape)
    grad_input_bias = None if input_bias is None else feature(x)
    return x.new_empty(x.shape), or_empty(grad_residual, x), feature(x), feature(x), or_empty(grad_input_bias, x)


define(
    "layer_norm_backward(Tensor grad_y, Tensor x, Tensor? residual, Tensor weight, Tensor mean, Tensor rstd, "
    f"{_EXTRAS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    _backward_shapes,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, bias, _, input_bias, seed, ctx.stream, ctx.dropout_p = inputs
    _, mean, rstd = output
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, residual, weight, mean, rstd, input_bias, seed)


def _grad(ctx: Any, grad_y: Tensor, _mean: Tensor, _rstd: Tensor) -> tuple[Any, ...]:
    x, residual, weight, mean, rstd, input_bias, seed = ctx.saved_tensors
    grad_x, grad_residual, grad_weight, grad_bias, grad_input_bias = torch.ops.bert_fast.layer_norm_backward(
        grad_y, x, residual, weight, mean, rstd, input_bias, seed, ctx.stream, ctx.dropout_p
    )
    if residual is not None and ctx.dropout_p == 0:
        grad_residual = grad_x.to(residual.dtype)
    return (
        grad_x,
        None if residual is None else grad_residual,
        grad_weight.to(weight.dtype),
        grad_bias.to(ctx.bias_dtype),
        None,
        None if input_bias is None else grad_input_bias.to(input_bias.dtype),
        None,
        None,
        None,
    )


differentiate("layer_norm", _save, _grad)
