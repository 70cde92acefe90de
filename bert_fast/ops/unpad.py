"""bert_fast::unpad: what a mask says about a batch, as an operator, so that torch.compile sees through it.

Its results have sizes that depend on the mask, which the host must see; a mask on a device is copied there.
"""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ._path import define, threads
from .attention import TILE_SIZE

Array: TypeAlias = np.ndarray[Any, Any]

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


def packing_arrays(
    mask: Tensor, keep: Tensor | None, keep_first: bool
) -> tuple[Array, Array, Array, Array, Array, int, bool, bool, Array | None]:
    """The packing of a mask (batch, length) of any dtype; keep (batch, length) bool.

    Returns:
        indices, positions, cu_seqlens, num_keys, tiles and max_seqlen as masking.PackedBatch has them; whether every
        token is a key, so that the padded rows are the packed rows; PackedBatch.is_plain; the rows that `keep` marks,
        None without it.
    """
    if mask.requires_grad:
        mask = mask.detach()
    if mask.dtype not in MASK_DTYPES:
        mask = mask != 0 if mask.element_size() > 1 else mask.float() != 0
    if keep is None:
        return (*_C.unpad(host_array(mask), None, keep_first, TILE_SIZE, threads()), None)
    is_kept = host_array(keep.detach().bool())
    found = _C.unpad(host_array(mask), is_kept, keep_first, TILE_SIZE, threads())
    return (*found, np.flatnonzero(is_kept.reshape(-1)[found[0]]))


def host_array(x: Tensor) -> Array:
    """x as a contiguous array on the host. Nothing is called that is not needed: unpad takes microseconds."""
    if not x.is_cpu:
        x = x.cpu()
    return cast("Array", x.numpy() if x.is_contiguous() else x.contiguous().numpy())


def _unpad(
    mask: Tensor, keep: Tensor | None, keep_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *arrays, _, _, _, kept = packing_arrays(mask, keep, keep_first)
    indices, positions, cu_seqlens, num_keys, tiles = (torch.from_numpy(x) for x in arrays)
    return (
        indices,
        positions,
        cu_seqlens,
        num_keys,
        tiles,
        torch.from_numpy(np.empty(0, np.int64) if kept is None else kept),
    )


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
