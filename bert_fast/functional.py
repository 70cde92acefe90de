"""The public functions: each checks its arguments, follows the path that bert_fast.ops chooses, and is differentiable.

Where nothing is recorded for a backward pass the kernels are called directly: at small batches the dispatcher and
autograd cost more than the arithmetic.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from . import ops

__all__ = ["attention", "draw_seed", "embedding", "gelu", "layer_norm", "linear", "linear_cross_entropy", "pad"]

IGNORED = -100
"""The label of a row that does not count."""

FEWEST_ROWS = 64
"""Below this many rows packing a weight takes longer than a better product saves."""


def _needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a backward pass, or someone who traces, wants to see the operator."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64 from the device's default generator: the seed of the kernels' dropout.

    It is a tensor, so a CUDA graph draws a new one at every replay, and activation checkpointing, which restores the
    generator, draws the old one again. One seed serves many places, told apart by `stream`.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def _check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must lie in [0, 1)")


def _check_affine(weight: Tensor, bias: Tensor, width: int) -> None:
    if weight.shape != (width,) or bias.shape != (width,):
        raise ValueError(
            f"weight and bias have shapes {tuple(weight.shape)} and {tuple(bias.shape)}; ({width},) is needed"
        )


def _zeros(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A bias that is none. It is kept, since to make one takes a kernel's launch on a GPU; nobody may write to it."""
    if torch.compiler.is_compiling():
        return torch.zeros(width, dtype=dtype, device=device)
    return _kept_zeros(width, dtype, device)


@functools.lru_cache(maxsize=64)
def _kept_zeros(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve calls with gradients, too
        return torch.zeros(width, dtype=dtype, device=device)


def _seed(seed: Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    return draw_seed(device) if seed is None else seed


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
    seed: Tensor | None = None,
    stream: int = 0,
    bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Scaled dot-product attention within packed sequences (Vaswani et al. 2017, equation 1), in both directions.

    Args:
        q, k, v: (tokens, heads, head_size), one dtype and device.
        cu_seqlens: (sequences + 1,) int32, bounds of the sequences: 0 first, tokens last.
        max_seqlen: tokens of the longest sequence.
        tiles: (tiles, 4) int32 on q's device, as PackedBatch.tiles; None: made from cu_seqlens, which asks its device.
        scale: factor of the scores; None: 1 / sqrt(head_size).
        dropout_p: dropout rate of the probabilities, in [0, 1).
        seed: (1,) int64 on q's device, from draw_seed; None: drawn. The torch path draws from torch's generator.
        stream: number of the place, so that one seed serves many.
        bias: (heads, 2 * reach + 1), reach at least max_seqlen - 1: rows i and j of a sequence get column
            j - i + reach added to their score (relative positions). Differentiable.
        window: how many rows from a query its farthest key may be (Beltagy et al. 2020, section 3.1); None: every token
            sees all. Not with a bias.

    Returns:
        (tokens, heads, head_size) in q's dtype. A query without keys gives zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; dropout_p outside [0, 1); a bias that is too
            narrow; a negative window, or one with a bias.
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
    _check_dropout(dropout_p)
    if bias is not None and not (
        bias.dim() == 2
        and bias.shape[0] == q.shape[1]
        and bias.shape[1] % 2 == 1
        and bias.shape[1] >= 2 * max_seqlen - 1
    ):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; ({q.shape[1]}, 2 * reach + 1) with reach at least {max_seqlen - 1} "
            "is needed"
        )
    if window is not None and (window < 0 or bias is not None):
        raise ValueError(f"window is {window}; it must be at least 0, and None where there is a bias")
    if tiles is None:
        from .masking import make_tiles

        if int(cu_seqlens[-1]) != q.shape[0]:
            raise ValueError(f"cu_seqlens ends with {int(cu_seqlens[-1])} and q holds {q.shape[0]} tokens")
        tiles = make_tiles(cu_seqlens).to(q.device)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    path = ops.choose("attention", q.device.type, q.dtype, q.shape[2]).path
    if path == "torch":
        return _torch_attention(q, k, v, cu_seqlens, tiles, max_seqlen, scale, dropout_p, bias, window)
    seed = _seed(seed, dropout_p, q.device)
    if _needs_dispatcher(q, k, v, bias):
        out: Tensor = torch.ops.bert_fast.attention(
            q, k, v, tiles, max_seqlen, scale, seed, stream, dropout_p, bias, window
        )[0]
        return out
    return ops.launch_attention(q, k, v, tiles, max_seqlen, scale, seed, stream, dropout_p, bias, window)[0]


def _torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    bias: Tensor | None,
    window: int | None,
) -> Tensor:
    """torch's own attention on a padded copy: any dtype and device, dropout, bias or window."""
    bounds = cu_seqlens.long()
    starts, ends = bounds[:-1, None], bounds[1:]
    num_rows = ends[:, None] - starts
    # A tile's sequence is the first that ends behind its start; sequences without rows have no tile, and no keys.
    sequence_of_tile = torch.searchsorted(ends, tiles[:, 0].long(), right=True)
    num_keys = torch.zeros_like(num_rows).index_put((sequence_of_tile,), tiles[:, 2:3].long())
    rows = torch.arange(q.shape[0], device=q.device)
    sequence_of_row = torch.searchsorted(ends, rows, right=True)
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
    if window is not None:
        is_key = is_key & ((columns - columns.T).abs() <= window)
    has_key = is_key.any(-1, keepdim=True)
    # A row without any key would be NaN in some backends: let it see everything, then zero it.
    mask = is_key | ~has_key
    if bias is not None:
        distance = columns - columns.T + bias.shape[1] // 2
        mask = torch.where(mask, bias[:, distance].to(q.dtype), float("-inf"))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    out = torch.where(has_key, out, 0.0).transpose(1, 2).flatten(0, 1)
    out = out.index_select(0, sequence_of_row * max_seqlen + rows - starts[sequence_of_row, 0])
    return out.to(q.dtype)  # autocast computes it in its own dtype


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-12,
    residual: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """LayerNorm(dropout(x + input_bias) + residual) * weight + bias over the last dimension (Ba et al. 2016).

    One pass over memory; in C++ x + input_bias is a pass of its own.

    Args:
        x, residual: (..., width), one shape; the wider of two dtypes is that of the result.
        weight: (width,).
        bias: (width,), or None for zeros.
        eps: added to the variance.
        input_bias: (width,), that of the linear layer before.
        dropout_p: dropout rate, in [0, 1).
        seed, stream: as for attention.

    Returns:
        (..., width). Under CUDA autocast it is float32, as torch's is.

    Raises:
        ValueError: shapes that do not belong together; dropout_p outside [0, 1).
    """
    width = x.shape[-1]
    bias = _zeros(width, weight.dtype, weight.device) if bias is None else bias
    _check_affine(weight, bias, width)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)} and x {tuple(x.shape)}; one shape is needed")
    if input_bias is not None and input_bias.shape != (width,):
        raise ValueError(f"input_bias has shape {tuple(input_bias.shape)}; ({width},) is needed")
    _check_dropout(dropout_p)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32
    path = ops.choose("layer_norm", x.device.type, dtype, width).path
    if path != "triton" and input_bias is not None:
        x, input_bias = x + input_bias.to(x.dtype), None
    is_uniform = all(t is None or t.dtype == torch.float32 for t in (residual, weight, bias))
    if path == "torch" or (path == "cpp" and not is_uniform):
        x = F.dropout(x, dropout_p).to(dtype)
        x = x if residual is None else x + residual
        return F.layer_norm(x, (width,), weight.to(x.dtype), bias.to(x.dtype), eps)
    x = x.to(dtype)
    rows = x.reshape(-1, width)
    residual_rows = None if residual is None else residual.reshape(-1, width)
    extras = (input_bias, _seed(seed, dropout_p, x.device), stream, dropout_p)
    if _needs_dispatcher(x, residual, weight, bias, input_bias):
        y: Tensor = torch.ops.bert_fast.layer_norm(rows, residual_rows, weight, bias, eps, *extras)[0]
    else:
        y = ops.launch_layer_norm(rows, residual_rows, weight, bias, eps, *extras, has_statistics=False)[0]
    return y.view(x.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. For float32 on a CPU with AVX-512 a product of our own, from FEWEST_ROWS rows on; elsewhere torch's.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,) or None.

    Returns:
        (..., outputs).

    Raises:
        ValueError: shapes that do not belong together.
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; (..., inputs) and (outputs, inputs) are "
            "needed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; ({weight.shape[0]},) is needed")
    is_ours = (
        not torch.compiler.is_compiling()  # which has products of its own, with packed weights
        and all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in (x, weight, bias))
        and ops.choose("linear", "cpu", torch.float32, x.shape[-1]).path == "cpp"
        and not torch.is_autocast_enabled("cpu")
        and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0
        and weight.shape[0] > 0
    )
    if not is_ours:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if _needs_dispatcher(x, weight, bias):
        y: Tensor = torch.ops.bert_fast.linear(rows, weight, bias)
    else:
        y = ops.launch_linear(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


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


def _padding_entry(name: str, entry: int | None, entries: int) -> int:
    """As operators take it: not negative, or -1 for none."""
    if entry is None:
        return -1
    if not -entries <= entry < entries:
        raise ValueError(f"{name} is {entry}; it must lie in [-{entries}, {entries})")
    return entry % entries


def _check_indices(table: Tensor, ids: Tensor, positions: Tensor, token_types: Tensor | None) -> None:
    if ids.dim() != 1 or positions.shape != ids.shape or (token_types is not None and token_types.shape != ids.shape):
        raise ValueError(
            f"ids, positions and token_types have shapes {tuple(ids.shape)}, {tuple(positions.shape)} and "
            f"{None if token_types is None else tuple(token_types.shape)}; one shape (tokens,) is needed"
        )
    for name, indices in (("ids", ids), ("positions", positions), ("token_types", token_types)):
        if indices is not None and indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} has dtype {indices.dtype}; torch.int32 or torch.int64 is needed")
        if indices is not None and indices.device != table.device:
            raise ValueError(f"{name} is on {indices.device} and word on {table.device}; one device is needed")


def embedding(
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    ids: Tensor,
    positions: Tensor,
    token_types: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[positions] + token_type[token_types]) * weight + bias).

    One kernel on a GPU (Devlin et al. 2018, figure 2), and in float32 on a CPU where no gradient is wanted; elsewhere
    torch's lookups and layer_norm.

    Args:
        word, position, token_type: (entries, width), one dtype; token_type None: the sum is of the other two.
        ids, positions, token_types: (tokens,) integers; token_types None: 0 everywhere. On a GPU an index outside its
            table gives a row of NaN, elsewhere IndexError.
        weight, bias: (width,).
        eps: added to the variance.
        padding_idx, position_padding_idx: entries of `word` and `position` that get no gradient; a negative one counts
            from the end.
        dropout_p: dropout rate, in [0, 1).
        seed, stream: as for attention.

    Returns:
        (tokens, width) in the tables' dtype; under CUDA autocast float32.

    Raises:
        ValueError: tables of other widths or dtypes, indices of other shapes; token_types without a table; dropout_p
            outside [0, 1).
    """
    width = word.shape[-1]
    for name, table in (("position", position), ("token_type", token_type)):
        if table is not None and (table.dim() != 2 or table.shape[1] != width or table.dtype != word.dtype):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)} and {table.dtype}; (entries, {width}) and {word.dtype} "
                "are needed"
            )
    _check_affine(weight, bias, width)
    entries = (
        _padding_entry("padding_idx", padding_idx, word.shape[0]),
        _padding_entry("position_padding_idx", position_padding_idx, position.shape[0]),
    )
    _check_indices(word, ids, positions, token_types)
    if token_type is None and token_types is not None:
        raise ValueError(f"token_types has shape {tuple(token_types.shape)}, but token_type is None; None is allowed")
    _check_dropout(dropout_p)
    is_float32_wanted = word.device.type == "cuda" and torch.is_autocast_enabled("cuda") and word.dtype != torch.float32
    if is_float32_wanted or ops.choose("embedding", word.device.type, word.dtype, width).path != "triton":
        parts = (word, position, token_type, weight, bias)
        if (
            dropout_p == 0.0
            and not _needs_dispatcher(*parts)
            and all(x is None or (x.dtype == torch.float32 and x.device.type == "cpu") for x in parts)
            and ops.choose("layer_norm", "cpu", torch.float32, width).path == "cpp"
        ):
            return ops.launch_embedding_on_cpu(
                word, position, token_type, ids, positions, token_types, weight, bias, eps
            )
        x = F.embedding(ids, word, padding_idx)
        if token_type is not None:
            x = x + (token_type[0] if token_types is None else F.embedding(token_types, token_type))
        y = layer_norm(F.embedding(positions, position, position_padding_idx), weight, bias, eps, x)
        return F.dropout(y, dropout_p)
    tables = (word, position, token_type, ids, positions, token_types)
    extras = (*entries, _seed(seed, dropout_p, word.device), stream, dropout_p)
    if _needs_dispatcher(word, position, token_type, weight, bias):
        result: Tensor = torch.ops.bert_fast.embedding(*tables, weight, bias, eps, *extras)[0]
        return result
    return ops.launch_embedding(*tables, weight, bias, eps, *extras, has_statistics=False)[0]


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The mean cross-entropy of the classes x W^T + b, without ever holding all the logits.

    Rows go through in chunks; where a gradient is needed it is found in the same pass, so nothing is computed twice. No
    device is waited for.

    Args:
        x: (rows, width).
        weight: (classes, width).
        bias: (classes,) or None.
        targets: (rows,) int64 in [0, classes); IGNORED, or any negative number, for rows that do not count. One beyond
            the classes gives NaN on a GPU, elsewhere an error of torch's.

    Returns:
        (), float32; 0 where no row counts. Under autocast the products are of its dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"x, weight and targets have shapes {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}; "
            "(rows, width), (classes, width) and (rows,) are needed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; ({weight.shape[0]},) is needed")
    has_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    total = torch.ops.bert_fast.linear_cross_entropy(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets, has_gradient
    )[0]
    result: Tensor = total / (targets >= 0).sum().clamp(min=1)
    return result


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
