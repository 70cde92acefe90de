"""bert_fast::unpad: what a mask says about a batch, as an operator, so that torch.compile sees through it.

Its results have sizes that depend on the mask, which the host must see; a mask on a device is copied there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ._path import define, threads
from .attention import TILE_SIZE

# What the extension reads; everything else is compared with zero first.
MASK_DTYPES = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float32,
        torch.float64,
    }
)


class Packing(NamedTuple):
    """See masking.PackedBatch. On the CPU; kept has no elements without `keep`."""

    indices: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    num_keys: Tensor
    tiles: Tensor
    kept: Tensor | None
    max_seqlen: int


def launch_unpad(mask: Tensor, keep: Tensor | None, keep_first: bool) -> Packing:
    """The packing of a mask (batch, length) of any dtype; keep (batch, length) bool."""
    mask = mask.detach() if mask.requires_grad else mask
    if mask.dtype not in MASK_DTYPES:
        mask = mask != 0 if mask.element_size() > 1 else mask.float() != 0
    is_kept = None if keep is None else host_array(keep.detach().bool())
    indices, positions, cu_seqlens, num_keys, tiles, max_seqlen = _C.unpad(
        host_array(mask), is_kept, keep_first, TILE_SIZE, threads()
    )
    kept = None
    if is_kept is not None:
        kept = torch.from_numpy(np.flatnonzero(is_kept.reshape(-1)[indices]))
    return Packing(
        torch.from_numpy(indices),
        torch.from_numpy(positions),
        torch.from_numpy(cu_seqlens),
        torch.from_numpy(num_keys),
        torch.from_numpy(tiles),
        kept,
        max_seqlen,
    )


def host_array(x: Tensor) -> np.ndarray[Any, Any]:
    """x as a contiguous array on the host. Nothing is called that is not needed: unpad takes microseconds."""
    if not x.is_cpu:
        x = x.cpu()
    return cast("np.ndarray[Any, Any]", x.numpy() if x.is_contiguous() else x.contiguous().numpy())


def _unpad(
    mask: Tensor, keep: Tensor | None, keep_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    packing = launch_unpad(mask, keep, keep_first)
    kept = torch.empty(0, dtype=torch.int64) if packing.kept is None else packing.kept
    return packing.indices, packing.positions, packing.cu_seqlens, packing.num_keys, packing.tiles, kept


def _shapes(
    mask: Tensor,
    keep: Tensor | None,
    keep_first: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = mask.shape[0]
    tokens, tiles = _dynamic_size(), _dynamic_size()
    kept = 0 if keep is None else _dynamic_size()
    return (
        torch.empty(tokens, dtype=torch.int64),
        torch.empty(tokens, dtype=torch.int32),
        torch.empty(rows + 1, dtype=torch.int32),
        torch.empty(rows, dtype=torch.int32),
        torch.empty((tiles, 4), dtype=torch.int32),
        torch.empty(kept, dtype=torch.int64),
    )


def _dynamic_size() -> Any:
    """A size that only the data know.

    torch asks everyone to set torch._dynamo.config.capture_dynamic_output_shape_ops first, since not every program can
    go on from such a size. This one can, so nobody needs to.
    """
    context = torch.library.get_ctx()
    try:
        return context.new_dynamic_size()
    except torch._subclasses.fake_tensor.DynamicOutputShapeException:
        if context._shape_env is None:
            raise
        from torch._library.fake_impl import allocate_size

        return allocate_size(context._shape_env)


define(
    "unpad(Tensor mask, Tensor? keep, bool keep_first) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _unpad,
    _shapes,
)
