"""The public functions: each checks its arguments, follows the path that bert_fast.ops chooses, and is differentiable.

Where nothing is recorded for a backward pass the kernels are called directly: at small batches the dispatcher and
autograd cost more than the arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from . import ops

__all__ = ["attention", "gelu", "layer_norm", "pad"]


def _needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a backward pass, or someone who traces, wants to see the operator."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    tiles: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention within packed sequences (Vaswani et al. 2017, equation 1), every token seeing all.

    Args:
        q, k, v: (tokens, heads, head_size), one dtype and device.
        cu_seqlens: (sequences + 1,) int32, bounds of the sequences: 0 first, tokens last.
        max_seqlen: tokens of the longest sequence.
        tiles: (tiles, 4) int32 on q's device, as PackedBatch.tiles; None: made from cu_seqlens, which asks its device.
        scale: factor of the scores; None: 1 / sqrt(head_size).
        dropout_p: dropout rate of the probabilities; above 0 the path is torch.

    Returns:
        (tokens, heads, head_size) in q's dtype. A sequence without keys gives zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; dropout_p outside [0, 1).
    """
    if not (q.dim() == 3 and q.shape == k.shape == v.shape):
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
            "one shape (tokens, heads, head_size) is needed"
        )
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"q, k and v are {q.dtype} on {q.device}, {k.dtype} on {k.device} and {v.dtype} on {v.device}; "
            "one dtype and one device are needed"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must lie in [0, 1)")
    if tiles is None:
        from .masking import make_tiles

        if int(cu_seqlens[-1]) != q.shape[0]:
            raise ValueError(f"cu_seqlens ends with {int(cu_seqlens[-1])} and q holds {q.shape[0]} tokens")
        tiles = make_tiles(cu_seqlens).to(q.device)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if dropout_p > 0.0 or ops.choose("attention", q.device.type, q.dtype, q.shape[2]).path == "torch":
        return _torch_attention(q, k, v, tiles, max_seqlen, scale, dropout_p)
    if _needs_dispatcher(q, k, v):
        out: Tensor = torch.ops.bert_fast.attention(q, k, v, tiles, max_seqlen, scale)[0]
        return out
    return ops.launch_attention(q, k, v, tiles, max_seqlen, scale)[0]


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, max_seqlen: int, scale: float, dropout_p: float
) -> Tensor:
    """torch's own attention on a padded copy: any dtype and device, dropout."""
    sequences = tiles[tiles[:, 3] == 0].long()  # the first tile of each sequence
    starts, num_rows, num_keys = sequences[:, 0:1], sequences[:, 1:2], sequences[:, 2:3]
    columns = torch.arange(max_seqlen, device=q.device)[None]
    is_row = columns < num_rows
    places = torch.where(is_row, starts + columns, 0)
    is_key = columns < num_keys
    # What is hidden has no weight, but a NaN would show through even so.
    query, key, value = (
        torch.where(is_visible[..., None, None], x[places], 0).transpose(1, 2)
        for x, is_visible in ((q, is_row), (k, is_key), (v, is_key))
    )
    is_key = is_key[:, None, None, :]
    has_key = (num_keys > 0)[:, None, None, :]
    # A row without any key would be NaN in some backends: let it see everything, then zero it.
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=is_key | ~has_key, dropout_p=dropout_p, scale=scale
    )
    out = torch.where(has_key, out, 0.0)
    return out.transpose(1, 2)[is_row].to(q.dtype)  # autocast computes it in its own dtype


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12, residual: Tensor | None = None) -> Tensor:
    """LayerNorm(x + residual) * weight + bias over the last dimension (Ba et al. 2016), as one pass over memory.

    Args:
        x, residual: (..., width), one shape; the wider of two dtypes is that of the result.
        weight, bias: (width,).
        eps: added to the variance.

    Returns:
        (..., width). Under CUDA autocast it is float32, as torch's is.

    Raises:
        ValueError: shapes that do not belong together.
    """
    width = x.shape[-1]
    if weight.shape != (width,) or bias.shape != (width,):
        raise ValueError(
            f"weight and bias have shapes {tuple(weight.shape)} and {tuple(bias.shape)}; ({width},) is needed"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)} and x {tuple(x.shape)}; one shape is needed")
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32
    x = x.to(dtype)
    is_uniform = all(t is None or t.dtype == torch.float32 for t in (residual, weight, bias))
    path = ops.choose("layer_norm", x.device.type, dtype, width).path
    if path == "torch" or (path == "cpp" and not is_uniform):
        x = x if residual is None else x + residual
        return F.layer_norm(x, (width,), weight.to(x.dtype), bias.to(x.dtype), eps)
    rows = x.reshape(-1, width)
    residual_rows = None if residual is None else residual.reshape(-1, width)
    if _needs_dispatcher(x, residual, weight, bias):
        y: Tensor = torch.ops.bert_fast.layer_norm(rows, residual_rows, weight, bias, eps)[0]
    else:
        y = ops.launch_layer_norm(rows, residual_rows, weight, bias, eps, has_statistics=False)[0]
    return y.view(x.shape)


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """GELU(x + bias) (Hendrycks and Gimpel 2016), as one pass over memory.

    Args:
        x: (..., width).
        bias: (width,) or None.
        approximate: "none" for erf, "tanh" for the tanh formula; one never stands in for the other.

    Returns:
        (..., width) in x's dtype.

    Raises:
        ValueError: another `approximate`, or a bias of another shape.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; it must be 'none' or 'tanh'")
    if x.dim() == 0:
        raise ValueError("x has shape (); (..., width) is needed")
    width = x.shape[-1]
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; ({width},) is needed")
    path = ops.choose("gelu", x.device.type, x.dtype, width).path
    if path == "torch" or (path == "cpp" and bias is not None and bias.dtype != torch.float32):
        return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)
    rows = x.reshape(-1, width)
    if _needs_dispatcher(x, bias):
        y: Tensor = torch.ops.bert_fast.gelu(rows, bias, approximate)
    else:
        y = ops.launch_gelu(rows, bias, approximate)
    return y.view(x.shape)


def pad(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    """Puts packed rows back at their places.

    Args:
        x: (tokens, ...), any dtype.
        indices: (tokens,) int64 on x's device, distinct, in [0, rows).
        rows: rows of the result.

    Returns:
        (rows, ...), zeros where no row goes.

    Raises:
        ValueError: a negative `rows`, another number of indices than x has rows; on the CPU also indices that repeat or
            lie outside [0, rows).
    """
    if rows < 0:
        raise ValueError(f"rows is {rows}; it must be at least 0")
    if x.dim() == 0 or indices.shape != x.shape[:1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and indices {tuple(indices.shape)}; one index a row is needed")
    if _needs_dispatcher(x):
        out: Tensor = torch.ops.bert_fast.pad(x, indices, rows)
        return out
    return ops.launch_pad(x, indices, rows)
