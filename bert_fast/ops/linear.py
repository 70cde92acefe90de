"""bert_fast::linear: x W^T + b in C++, on CPUs alone; elsewhere the library's product is the fastest there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from ._path import array, define, differentiate, optional_array, optional_contiguous, or_empty, threads


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (m, k) b (k, n) + bias (n,), each matrix contiguous in one dimension."""
    out = torch.empty(a.shape[0], b.shape[1])
    _C.matrix_product(array(a), array(b), optional_array(bias), array(out), threads())
    return out


def launch_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of rows (rows, inputs), weight (outputs, inputs), float32 on the CPU, without autograd."""
    return _product(x.contiguous(), weight.contiguous().t(), optional_contiguous(bias))


def launch_linear_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x (rows, inputs), weight (outputs, inputs) and bias (outputs,), None where not needed."""
    grad_y = grad_y.contiguous()
    return (
        _product(grad_y, weight.contiguous()) if needs_x else None,
        _product(grad_y.t(), x.contiguous()) if needs_weight else None,
        grad_y.sum(0) if needs_bias else None,
    )


def _linear_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = launch_linear_backward(grad_y, x, weight, needs_x, needs_weight, needs_bias)
    return tuple(or_empty(grad, x) for grad in grads)  # type: ignore[return-value]


define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    launch_linear,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),  # noqa: ARG005
)
define(
    "linear_backward(Tensor grad_y, Tensor x, Tensor weight, bool needs_x, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _linear_backward,
    lambda grad_y, x, weight, needs_x, needs_weight, needs_bias: (
        or_empty(x.new_empty(x.shape) if needs_x else None, x),
        or_empty(weight.new_empty(weight.shape) if needs_weight else None, x),
        or_empty(grad_y.new_empty(grad_y.shape[1]) if needs_bias else None, x),
    ),
)


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _grad(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = torch.ops.bert_fast.linear_backward(grad_y, x, weight, *needs)
    return tuple(grad if is_needed else None for grad, is_needed in zip(grads, needs, strict=True))


differentiate("linear", _save, _grad)
