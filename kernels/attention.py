"""Bidirectional attention within packed sequences, forward and backward.

Supported: float32, float16, bfloat16; head sizes 1-128; any sequence lengths; the first `num_keys` rows of a sequence
are its keys. Each program owns one tile of one head, finds its sequence in the tile list and walks the other side of
the score matrix in blocks, so nothing is padded and no result depends on the order in which programs run.

Sources: Dao, "FlashAttention-2" (2023), section 3; Milakov and Gimelshein, "Online normalizer calculation" (2018).
"""

import torch
import triton
import triton.language as tl

from ._launch import TILE_SIZE, Launch, is_half, next_power_of_2

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Longest row, in tokens, for which the small tile is taken.
SHORT = 64


def forward_launch(dtype: torch.dtype, head_size: int, max_seqlen: int) -> Launch:
    """Rows are queries, columns keys."""
    if not is_half(dtype):
        # Without tensor cores the operands of a product live in registers: small tiles and many warps, or they spill.
        return Launch(32, 32, 4, 1) if head_size <= 64 else Launch(16, 32, 8, 1)
    if max_seqlen <= SHORT:
        return Launch(64, 64, 4, 1)  # one block of keys: nothing to pipeline
    if head_size <= 64:
        return Launch(128, 64, 4, 3)
    # Twice the accumulator, so half the rows: 128 spill, with four warps on NVIDIA's, with eight on gfx942.
    return Launch(64, 64, 4, 2)


def backward_launch(dtype: torch.dtype, head_size: int, max_seqlen: int) -> Launch:
    """Rows are what the program owns (keys for dK and dV, queries for dQ), columns what it walks over."""
    if not is_half(dtype):
        # dQ holds whole rows of Q, K, V and dO as operands: at 128 columns only eight warps have the registers.
        return Launch(32, 16, 4, 1) if head_size <= 64 else Launch(16, 16, 8, 1)
    if max_seqlen <= SHORT:
        return Launch(64, 32, 4, 1)  # two blocks at most: more programs at a time hide more than a pipeline would
    if head_size <= 64:
        return Launch(128, 32, 4, 2)  # dK and dV: two programs fill a multiprocessor. 64 columns spill on gfx942
    return Launch(64, 32, 4, 1)  # dK and dV are twice as wide: half the rows; on gfx942 a pipeline spills


@triton.jit
def _tile(tiles_ptr, SUBTILES: tl.constexpr, BLOCK: tl.constexpr):
    """The program's place: sequence start (int64), rows and keys of the sequence, first row of the program."""
    program = tl.program_id(0)
    entry_ptr = tiles_ptr + 4 * (program // SUBTILES).to(tl.int64)
    sequence_start = tl.load(entry_ptr).to(tl.int64)
    num_rows = tl.load(entry_ptr + 1)
    num_keys = tl.load(entry_ptr + 2)
    first_row = tl.load(entry_ptr + 3) + (program % SUBTILES) * BLOCK
    return sequence_start, num_rows, num_keys, first_row


@triton.jit
def _load_rows(
    ptr, row_stride, first_row, num_rows, BLOCK: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """(BLOCK, BLOCK_D) rows from first_row on, zero beyond num_rows and beyond HEAD_SIZE."""
    row_idx = first_row + tl.arange(0, BLOCK)
    size_idx = tl.arange(0, BLOCK_D)
    offs = row_idx.to(tl.int64)[:, None] * row_stride + size_idx[None, :]
    mask = (row_idx < num_rows)[:, None] & (size_idx < HEAD_SIZE)[None, :]
    return tl.load(ptr + offs, mask=mask, other=0.0)


@triton.jit
def _store_rows(
    ptr, row_stride, first_row, num_rows, value, BLOCK: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    row_idx = first_row + tl.arange(0, BLOCK)
    size_idx = tl.arange(0, BLOCK_D)
    offs = row_idx.to(tl.int64)[:, None] * row_stride + size_idx[None, :]
    mask = (row_idx < num_rows)[:, None] & (size_idx < HEAD_SIZE)[None, :]
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["lse_stride"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr,
    q_stride, k_stride, v_stride, out_stride, lse_stride, scale,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against all keys of their sequence, with a running softmax in base 2."""
    sequence_start, num_rows, num_keys, first_query = _tile(tiles_ptr, SUBTILES, BLOCK_M)
    if first_query >= num_rows:
        return
    head_offs = tl.program_id(1) * HEAD_SIZE
    k_ptr += sequence_start * k_stride + head_offs
    v_ptr += sequence_start * v_stride + head_offs
    query = _load_rows(
        q_ptr + sequence_start * q_stride + head_offs, q_stride, first_query, num_rows, BLOCK_M, HEAD_SIZE, BLOCK_D
    )
    log2_scale = scale * LOG2_E

    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first_key in range(0, num_keys, BLOCK_N):
        key = _load_rows(k_ptr, k_stride, first_key, num_keys, BLOCK_N, HEAD_SIZE, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
        key_valid = first_key + tl.arange(0, BLOCK_N) < num_keys
        scores = tl.where(key_valid[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        probs = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(running_max - new_max)
        running_sum = running_sum * decay + tl.sum(probs, 1)
        value = _load_rows(v_ptr, v_stride, first_key, num_keys, BLOCK_N, HEAD_SIZE, BLOCK_D)
        result = result * decay[:, None]
        result = tl.dot(probs.to(value.dtype), value, result, input_precision="ieee")
        running_max = new_max

    # A query without keys has an empty sum: divided by one its output is zero, and its log-sum-exp -inf.
    running_sum = tl.where(num_keys > 0, running_sum, 1.0)
    result = result / running_sum[:, None]
    _store_rows(
        out_ptr + sequence_start * out_stride + head_offs,
        out_stride, first_query, num_rows, result, BLOCK_M, HEAD_SIZE, BLOCK_D,
    )  # fmt: skip
    lse = (running_max + tl.log2(running_sum)) * LN_2
    query_idx = first_query + tl.arange(0, BLOCK_M)
    lse_ptr += tl.program_id(1).to(tl.int64) * lse_stride + sequence_start
    tl.store(lse_ptr + query_idx, lse, mask=query_idx < num_rows)


@triton.jit(do_not_specialize=["lse_stride"])
def _attention_grad_q_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, grad_q_ptr, tiles_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, out_stride, grad_q_stride, lse_stride, scale,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries; also delta = rowsum(dO * O), which the other kernel reads."""
    sequence_start, num_rows, num_keys, first_query = _tile(tiles_ptr, SUBTILES, BLOCK_M)
    if first_query >= num_rows:
        return
    head_offs = tl.program_id(1) * HEAD_SIZE
    k_ptr += sequence_start * k_stride + head_offs
    v_ptr += sequence_start * v_stride + head_offs
    query = _load_rows(
        q_ptr + sequence_start * q_stride + head_offs, q_stride, first_query, num_rows, BLOCK_M, HEAD_SIZE, BLOCK_D
    )
    grad_out = _load_rows(
        grad_out_ptr + sequence_start * grad_out_stride + head_offs,
        grad_out_stride, first_query, num_rows, BLOCK_M, HEAD_SIZE, BLOCK_D,
    )  # fmt: skip
    out = _load_rows(
        out_ptr + sequence_start * out_stride + head_offs,
        out_stride, first_query, num_rows, BLOCK_M, HEAD_SIZE, BLOCK_D,
    )  # fmt: skip
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    query_idx = first_query + tl.arange(0, BLOCK_M)
    statistic_offs = tl.program_id(1).to(tl.int64) * lse_stride + sequence_start + query_idx
    tl.store(delta_ptr + statistic_offs, delta, mask=query_idx < num_rows)
    log2_lse = tl.load(lse_ptr + statistic_offs, mask=query_idx < num_rows, other=float("inf")) * LOG2_E
    log2_scale = scale * LOG2_E

    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first_key in range(0, num_keys, BLOCK_N):
        key = _load_rows(k_ptr, k_stride, first_key, num_keys, BLOCK_N, HEAD_SIZE, BLOCK_D)
        value = _load_rows(v_ptr, v_stride, first_key, num_keys, BLOCK_N, HEAD_SIZE, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
        key_valid = first_key + tl.arange(0, BLOCK_N) < num_keys
        scores = tl.where(key_valid[None, :], scores, float("-inf"))
        probs = tl.exp2(scores - log2_lse[:, None])
        grad_probs = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        grad_scores = probs * (grad_probs - delta[:, None])
        grad_q = tl.dot(grad_scores.to(key.dtype), key, grad_q, input_precision="ieee")

    _store_rows(
        grad_q_ptr + sequence_start * grad_q_stride + head_offs,
        grad_q_stride, first_query, num_rows, grad_q * scale, BLOCK_M, HEAD_SIZE, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["lse_stride"])
def _attention_grad_kv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, tiles_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, grad_k_stride, grad_v_stride, lse_stride, scale,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_M keys, over all queries of their sequence in blocks of BLOCK_N; the scores are transposed."""
    sequence_start, num_rows, num_keys, first_key = _tile(tiles_ptr, SUBTILES, BLOCK_M)
    if first_key >= num_rows:
        return
    head_offs = tl.program_id(1) * HEAD_SIZE
    q_ptr += sequence_start * q_stride + head_offs
    grad_out_ptr += sequence_start * grad_out_stride + head_offs
    statistic_offs = tl.program_id(1).to(tl.int64) * lse_stride + sequence_start
    key = _load_rows(
        k_ptr + sequence_start * k_stride + head_offs, k_stride, first_key, num_keys, BLOCK_M, HEAD_SIZE, BLOCK_D
    )
    value = _load_rows(
        v_ptr + sequence_start * v_stride + head_offs, v_stride, first_key, num_keys, BLOCK_M, HEAD_SIZE, BLOCK_D
    )
    log2_scale = scale * LOG2_E

    grad_k = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Rows that are no keys have no gradient, and queries without keys no finite log-sum-exp.
    last_query = tl.where(first_key < num_keys, num_rows, 0)
    for first_query in range(0, last_query, BLOCK_N):
        query = _load_rows(q_ptr, q_stride, first_query, num_rows, BLOCK_N, HEAD_SIZE, BLOCK_D)
        grad_out = _load_rows(grad_out_ptr, grad_out_stride, first_query, num_rows, BLOCK_N, HEAD_SIZE, BLOCK_D)
        query_idx = first_query + tl.arange(0, BLOCK_N)
        # Rows beyond the sequence have an infinite log-sum-exp, and so no probability.
        log2_lse = tl.load(lse_ptr + statistic_offs + query_idx, mask=query_idx < num_rows, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + statistic_offs + query_idx, mask=query_idx < num_rows, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * log2_scale
        probs = tl.exp2(scores - log2_lse[None, :])
        grad_v = tl.dot(probs.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        grad_probs = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        grad_scores = probs * (grad_probs - delta[None, :])
        grad_k = tl.dot(grad_scores.to(query.dtype), query, grad_k, input_precision="ieee")

    # A row that is no key has spoilt no other row: masking it here costs the loop nothing.
    key_valid = first_key + tl.arange(0, BLOCK_M) < num_keys
    grad_k = tl.where(key_valid[:, None], grad_k * scale, 0.0)
    grad_v = tl.where(key_valid[:, None], grad_v, 0.0)
    _store_rows(
        grad_k_ptr + sequence_start * grad_k_stride + head_offs,
        grad_k_stride, first_key, num_rows, grad_k, BLOCK_M, HEAD_SIZE, BLOCK_D,
    )  # fmt: skip
    _store_rows(
        grad_v_ptr + sequence_start * grad_v_stride + head_offs,
        grad_v_stride, first_key, num_rows, grad_v, BLOCK_M, HEAD_SIZE, BLOCK_D,
    )  # fmt: skip


def _sizes(launch: Launch, head_size: int) -> dict[str, int]:
    return {
        "HEAD_SIZE": head_size,
        "BLOCK_D": max(16, next_power_of_2(head_size)),
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.columns,
        "SUBTILES": TILE_SIZE // launch.rows,
        **launch.options,
    }


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor, max_seqlen: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T) V within each sequence.

    Args:
        q, k, v: (tokens, heads, head_size), contiguous within a token.
        tiles: (tiles, 4) int32: sequence start, rows, keys, first row.
        max_seqlen: rows of the longest sequence; chooses the launch sizes.
        scale: factor of the scores.

    Returns:
        The result (tokens, heads, head_size), in q's dtype, and the natural log-sum-exp (heads, tokens), float32.
    """
    tokens, heads, head_size = q.shape
    out = torch.empty((tokens, heads, head_size), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if tokens > 0:
        sizes = _sizes(forward_launch(q.dtype, head_size, max_seqlen), head_size)
        _attention_kernel[(tiles.shape[0] * sizes["SUBTILES"], heads)](
            q, k, v, out, lse, tiles,
            q.stride(0), k.stride(0), v.stride(0), out.stride(0), tokens, scale,
            **sizes,
        )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiles: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each (tokens, heads, head_size). Deterministic: every value has one writer."""
    tokens, heads, head_size = q.shape
    grad_q, grad_k, grad_v = (
        torch.empty((tokens, heads, head_size), dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    delta = torch.empty_like(lse)
    if tokens > 0:
        sizes = _sizes(backward_launch(q.dtype, head_size, max_seqlen), head_size)
        grid = (tiles.shape[0] * sizes["SUBTILES"], heads)
        _attention_grad_q_kernel[grid](
            grad_out, q, k, v, out, lse, delta, grad_q, tiles,
            grad_out.stride(0), q.stride(0), k.stride(0), v.stride(0), out.stride(0), grad_q.stride(0), tokens,
            scale, **sizes,
        )  # fmt: skip
        _attention_grad_kv_kernel[grid](
            grad_out, q, k, v, lse, delta, grad_k, grad_v, tiles,
            grad_out.stride(0), q.stride(0), k.stride(0), v.stride(0), grad_k.stride(0), grad_v.stride(0), tokens,
            scale, **sizes,
        )  # fmt: skip
    return grad_q, grad_k, grad_v
