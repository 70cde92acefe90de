"""bert_fast::pad: packed rows at their padded places."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ._path import array, define, differentiate, threads


def launch_pad(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    """(rows, ...) with x's rows at `indices` and zeros elsewhere; any dtype, without autograd."""
    if x.device.type != "cpu":
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, indices, x)
    x = x.resolve_conj().resolve_neg().contiguous()
    out = torch.empty((rows, *x.shape[1:]), dtype=x.dtype)
    _C.pad(_bytes(x), array(indices), _bytes(out), threads())
    return out


def _bytes(x: Tensor) -> np.ndarray[Any, Any]:
    """(rows, bytes of a row) of a contiguous tensor."""
    row_bytes = math.prod(x.shape[1:]) * x.element_size()
    if x.numel() == 0:
        return np.empty((x.shape[0], row_bytes), np.uint8)
    return array(x.detach().flatten().view(torch.uint8)).reshape(x.shape[0], row_bytes)


define(
    "pad(Tensor x, Tensor indices, SymInt rows) -> Tensor",
    launch_pad,
    lambda x, indices, rows: x.new_empty((rows, *x.shape[1:])),  # noqa: ARG005
)


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[1])


def _grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return grad.index_select(0, indices), None, None


differentiate("pad", _save, _grad)
