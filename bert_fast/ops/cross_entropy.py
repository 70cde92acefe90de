"""bert_fast::linear_cross_entropy: a linear layer and its cross-entropy, in chunks of rows, without all the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._path import choose, define, device_of, differentiate, or_empty

CHUNK_BYTES = 64 << 20
"""Bytes of logits that a chunk may have: enough rows for a fast matrix product, little beside a training step."""


def chunk_rows(classes: int, item_size: int) -> int:
    """Rows of a chunk: a multiple of 64, at least 64."""
    return max(CHUNK_BYTES // max(classes * item_size, 1) // 64 * 64, 64)


def launch_linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, has_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The sum of the cross-entropies of x W^T + b, and its gradients, without autograd.

    Args:
        x: (rows, width).
        weight: (classes, width), in x's dtype.
        bias: (classes,) or None, in x's dtype.
        targets: (rows,) int64, below classes; rows with a negative one count for nothing.
        has_gradient: whether the gradients are wanted.

    Returns:
        The sum, (), float32; the gradients of x (rows, width) in its dtype, of weight and bias in float32, or None.
    """
    rows, width = x.shape
    classes = weight.shape[0]
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_x = grad_weight = grad_bias = None
    if has_gradient:
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros((classes, width), dtype=torch.float32, device=x.device)
        grad_bias = None if bias is None else torch.zeros(classes, dtype=torch.float32, device=x.device)
    step = min(chunk_rows(classes, x.element_size()), rows)
    # Rows that begin on a 128-byte line: 30,522 logits of 16 bits would not, which matrix products and loads pay for.
    buffer = torch.empty((step, -(-classes // 64) * 64), dtype=x.dtype, device=x.device)
    for start in range(0, rows, max(step, 1)):
        stop = min(start + step, rows)
        chunk, logits = x[start:stop], buffer[: stop - start, :classes]
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        total += _cross_entropy(logits, targets[start:stop], has_gradient).sum()
        if grad_x is not None and grad_weight is not None:
            torch.mm(logits, weight, out=grad_x[start:stop])
            _add_product(grad_weight, logits, chunk)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
    return total, grad_x, grad_weight, grad_bias


def _cross_entropy(logits: Tensor, targets: Tensor, has_gradient: bool) -> Tensor:
    """The loss of each row, float32; with has_gradient the logits become the gradients of the losses."""
    if choose("cross_entropy", logits.device.type, logits.dtype, logits.shape[1]).path == "triton":
        from ..kernels import cross_entropy

        with device_of(logits):
            return cross_entropy.cross_entropy(logits, targets.contiguous(), has_gradient)
    is_counted = targets >= 0
    safe = targets.clamp(min=0)[:, None]
    log_probs = logits.log_softmax(1, dtype=torch.float32)
    losses = torch.where(is_counted, -log_probs.gather(1, safe)[:, 0], 0.0)
    if has_gradient:
        gradient = log_probs.exp_()
        gradient.scatter_add_(1, safe, gradient.new_full((1, 1), -1.0).expand(safe.shape))
        logits.copy_(gradient.mul_(is_counted[:, None]))
    return losses


def _add_product(total: Tensor, grad_logits: Tensor, x: Tensor) -> None:
    """total += grad_logits^T x; the product is of the inputs' dtype, the sum over chunks float32."""
    if total.dtype == x.dtype:
        total.addmm_(grad_logits.t(), x)
    else:
        total += grad_logits.t() @ x


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, has_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, *grads = launch_linear_cross_entropy(x, weight, bias, targets, has_gradient)
    grad_x, grad_weight, grad_bias = (or_empty(grad, x) for grad in grads)
    return total, grad_x, grad_weight, grad_bias


def _shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,  # noqa: ARG001
    has_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty((), dtype=torch.float32)
    if not has_gradient:
        return total, or_empty(None, x), or_empty(None, x), or_empty(None, x)
    grad_bias = None if bias is None else bias.new_empty(bias.shape, dtype=torch.float32)
    return total, x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32), or_empty(grad_bias, x)


define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, bool has_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
    _shapes,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, weight, bias, _, has_gradient = inputs
    if not has_gradient:
        raise ValueError("has_gradient is False, and a gradient is asked for")
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _grad(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    grad_x, grad_weight, grad_bias = ctx.saved_tensors
    weight_dtype, bias_dtype = ctx.dtypes
    return (
        (grad_x * grad).to(grad_x.dtype),
        (grad_weight * grad).to(weight_dtype),
        None if bias_dtype is None else (grad_bias * grad).to(bias_dtype),
        None,
        None,
    )


differentiate("linear_cross_entropy", _save, _grad)
