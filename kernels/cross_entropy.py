"""Cross-entropy of rows of logits and its gradient, which takes the logits' place.

Supported: float32, float16, bfloat16 logits (rows, classes) with any distance between rows. A row whose target is below
0 is ignored; one beyond the classes has a loss of NaN, since nothing can raise there without waiting. One program owns
a row: one pass finds the maximum and the sum, the next writes the gradient.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

import torch
import triton
import triton.language as tl

from ._launch import Launch

LAUNCH = Launch(rows=1, columns=4096, num_warps=8, num_stages=2)


@triton.jit(do_not_specialize=["classes"])
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, row_stride, classes, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """loss = log(sum(exp(x))) - x[target]; x becomes softmax(x) - one_hot(target)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    is_counted = target >= 0
    column_idx = tl.arange(0, BLOCK)
    running_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, classes, BLOCK):
        mask = first + column_idx < classes
        x = tl.load(row_ptr + first + column_idx, mask=mask, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(running_max, x)
        # A lane that has seen nothing but -inf keeps an empty sum, not NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp(running_max - shift) + tl.exp(x - shift)
        running_max = new_max
    row_max = tl.max(running_max, 0)
    row_sum = tl.sum(running_sum * tl.exp(running_max - row_max), 0)
    is_inside = is_counted & (target < classes)
    at_target = tl.load(row_ptr + target, mask=is_inside, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(is_counted, tl.log(row_sum) + row_max - at_target, 0.0))
    if HAS_GRADIENT:
        # The target's logit has been read before any program's lane overwrites it.
        tl.debug_barrier()
        factor = tl.where(is_counted, 1.0 / row_sum, 0.0)
        for first in range(0, classes, BLOCK):
            mask = first + column_idx < classes
            x = tl.load(row_ptr + first + column_idx, mask=mask, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - row_max) * factor
            gradient -= tl.where(is_counted & (first + column_idx == target), 1.0, 0.0)
            tl.store(row_ptr + first + column_idx, gradient.to(row_ptr.dtype.element_ty), mask=mask)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, has_gradient: bool) -> torch.Tensor:
    """The loss of each row, 0 where it is ignored; with has_gradient the logits become the gradients of the losses.

    Args:
        logits: (rows, classes), contiguous within a row; overwritten with has_gradient.
        targets: (rows,) int64, below classes; ignored where negative.
        has_gradient: whether the gradient is wanted.

    Returns:
        (rows,) float32.
    """
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows > 0:
        _cross_entropy_kernel[(rows,)](
            logits, targets, losses, logits.stride(0), classes,
            HAS_GRADIENT=has_gradient, BLOCK=LAUNCH.columns, **LAUNCH.options,
        )  # fmt: skip
    return losses
