"""Bidirectional attention within packed sequences, forward and backward.

Supported: float32, float16, bfloat16; head sizes 1-128; any sequence lengths; the first `num_keys` rows of a sequence
are its keys; a window around each query, beyond which it sees none; dropout of the probabilities; a bias of the scores
for each head and relative position, but not with a window. Each program owns one tile of one head, finds its sequence
in the tile list and walks the other side of the score matrix in blocks, so nothing is padded and no result depends on
the order in which programs run.

Sources: Dao, "FlashAttention-2" (2023), section 3; Milakov and Gimelshein, "Online normalizer calculation" (2018);
relative bias: Raffel et al., "T5" (2020), section 2.1, as MPNet has it; window: Beltagy et al., "Longformer" (2020),
section 3.1, as ModernBERT has it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _random
from ._launch import TILE_SIZE, Launch, ceil_div, is_half, next_power_of_2
from ._random import keep_scores, load_seed

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Longest row, in tokens, for which the small tile is taken.
SHORT = 64


def forward_launch(
    dtype: torch.dtype, head_size: int, max_seqlen: int, has_dropout: bool = False, has_window: bool = False
) -> Launch:
    """Rows are queries, columns keys."""
    if not is_half(dtype):
        # Without tensor cores the operands of a product live in registers: small tiles and many warps, or they spill.
        if head_size > 64:
            return Launch(16, 32, 8, 1)
        return Launch(16, 32, 4, 1) if has_dropout and has_window else Launch(32, 32, 4, 1)
    if max_seqlen <= SHORT and not (has_dropout and head_size > 64):
        return Launch(64, 64, 4, 1)  # one block of keys: nothing to pipeline
    if head_size <= 64:
        # The random numbers of 128 rows, or their distances, do not fit beside the accumulators of four warps; and of a
        # window fewer rows see fewer keys in vain.
        return Launch(64, 64, 4, 2) if has_dropout or has_window else Launch(128, 64, 4, 3)
    # Twice the accumulator, so half the rows: 128 spill, with four warps on NVIDIA's, with eight on gfx942.
    # Dropout and windows have registers of their own.
    return Launch(64, 32 if has_dropout or has_window else 64, 4, 2)


def backward_launch(
    dtype: torch.dtype,
    head_size: int,
    max_seqlen: int,
    has_dropout: bool = False,
    has_bias: bool = False,
    has_window: bool = False,
) -> Launch:
    """Rows are what the program owns (keys for dK and dV, queries for dQ), columns what it walks over."""
    if not is_half(dtype):
        # dQ holds whole rows of Q, K, V and dO as operands: at 128 columns only eight warps have the registers.
        if head_size > 64:
            return Launch(16, 16, 8, 1)
        return Launch(16, 16, 4, 1) if has_bias else Launch(32, 16, 4, 1)
    # 128 rows, or 64 columns, spill in one release of Triton or another; these leave room for three programs of dK and
    # dV on a multiprocessor, which hide what a pipeline would. Where registers are short, a pipeline spills, too: with
    # dropout, bias or window on sm_100, at 128 columns on gfx942. Rows of two blocks at most have nothing to pipeline.
    is_pipelined = head_size <= 64 and max_seqlen > SHORT and not (has_dropout or has_bias or has_window)
    return Launch(64, 32, 4, 2 if is_pipelined else 1)


def splits_tail(dtype: torch.dtype, head_size: int) -> bool:
    """Whether the forward pass masks the last block of keys alone."""
    return is_half(dtype) and head_size <= 64


def bias_launch(dtype: torch.dtype, head_size: int) -> Launch:
    """Rows are both the queries of a step and the relative positions that a program owns."""
    if not is_half(dtype):
        return Launch(16, 32, 2, 1)
    return Launch(32, 64, 4, 1) if head_size <= 64 else Launch(32, 64, 8, 1)


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
def _rows_from(first_row, BLOCK: tl.constexpr):
    """A block's row numbers for dropout. first_row is a multiple of BLOCK: said in bits, the compiler sees what shares
    a counter."""
    return (first_row & -BLOCK) | tl.arange(0, BLOCK)


@triton.jit
def _kept(
    seed, sequence_start, head, first_query, first_key, threshold,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which scores of a tile dropout keeps."""
    query_idx, key_idx = _rows_from(first_query, QUERIES), _rows_from(first_key, KEYS)
    if IS_TRANSPOSED:
        is_kept = keep_scores(seed, sequence_start, head, query_idx[None, :], key_idx[:, None], threshold)
    else:
        is_kept = keep_scores(seed, sequence_start, head, query_idx[:, None], key_idx[None, :], threshold)
    return is_kept


@triton.jit
def _visible(first_row, num_others, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """From where, in whole blocks, and up to where the other side of the score matrix is seen by BLOCK_M rows."""
    first, last = 0, num_others
    if HAS_WINDOW:
        first = tl.maximum(first_row - window, 0) // BLOCK_N * BLOCK_N
        last = tl.minimum(first_row + BLOCK_M + window, num_others)
    return first, last


@triton.jit
def _load_rows(
    ptr, row_stride, first_row, num_rows,
    BLOCK: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_D) rows from first_row on, zero beyond HEAD_SIZE and, in a tail, beyond num_rows."""
    row_idx = first_row + tl.arange(0, BLOCK)
    size_idx = tl.arange(0, BLOCK_D)
    ptrs = ptr + row_idx.to(tl.int64)[:, None] * row_stride + size_idx[None, :]
    if IS_TAIL:
        return tl.load(ptrs, mask=(row_idx < num_rows)[:, None] & (size_idx < HEAD_SIZE)[None, :], other=0.0)
    if HEAD_SIZE < BLOCK_D:
        return tl.load(ptrs, mask=(size_idx < HEAD_SIZE)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _store_rows(
    ptr, row_stride, first_row, num_rows, value, BLOCK: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    row_idx = first_row + tl.arange(0, BLOCK)
    size_idx = tl.arange(0, BLOCK_D)
    offs = row_idx.to(tl.int64)[:, None] * row_stride + size_idx[None, :]
    mask = (row_idx < num_rows)[:, None] & (size_idx < HEAD_SIZE)[None, :]
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relative_bias(bias_ptr, reach, query_idx, key_idx):
    """The bias of each score, in base 2. Rows of a sequence are as far apart as their positions."""
    distance = tl.minimum(tl.maximum(key_idx - query_idx, -reach), reach)  # rows beyond the sequence stay in the table
    return tl.load(bias_ptr + reach + distance).to(tl.float32) * LOG2_E


@triton.jit
def _scores(
    query, key, first_query, first_key, num_keys, log2_scale, bias_ptr, reach, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_TAIL: tl.constexpr,
):  # fmt: skip
    """The scores of BLOCK_M queries and BLOCK_N keys in base 2; -inf beyond the window and, in a tail, for no key."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
    query_idx = first_query + tl.arange(0, BLOCK_M)
    key_idx = first_key + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        scores += _relative_bias(bias_ptr, reach, query_idx[:, None], key_idx[None, :])
    if HAS_WINDOW:
        scores = tl.where(tl.abs(query_idx[:, None] - key_idx[None, :]) <= window, scores, float("-inf"))
    if IS_TAIL:
        scores = tl.where((key_idx < num_keys)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _forward_block(
    query, k_ptr, v_ptr, k_stride, v_stride, first_key, num_keys, log2_scale, running_max, running_sum, result,
    sequence_start, head, first_query, seed, threshold, bias_ptr, reach, window,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum and sum of the softmax, and the weighted sum of the values."""
    key = _load_rows(k_ptr, k_stride, first_key, num_keys, BLOCK_N, HEAD_SIZE, BLOCK_D, IS_TAIL)
    scores = _scores(
        query, key, first_query, first_key, num_keys, log2_scale, bias_ptr, reach, window,
        BLOCK_M, BLOCK_N, HAS_BIAS, HAS_WINDOW, IS_TAIL,
    )  # fmt: skip
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    subtrahend = new_max
    if HAS_WINDOW:  # some of the queries may have seen no key yet
        subtrahend = tl.where(new_max == float("-inf"), 0.0, new_max)
    probs = tl.exp2(scores - subtrahend[:, None])
    decay = tl.exp2(running_max - subtrahend)
    running_sum = running_sum * decay + tl.sum(probs, 1)
    if HAS_DROPOUT:
        # After the sum: dropout is of the normalised probabilities. The factor of what is kept comes at the end.
        is_kept = _kept(
            seed, sequence_start, head, first_query, first_key, threshold, BLOCK_M, BLOCK_N, IS_TRANSPOSED=False
        )
        probs = tl.where(is_kept, probs, 0.0)
    value = _load_rows(v_ptr, v_stride, first_key, num_keys, BLOCK_N, HEAD_SIZE, BLOCK_D, IS_TAIL)
    result = result * decay[:, None]
    result = tl.dot(probs.to(value.dtype), value, result, input_precision="ieee")
    return new_max, running_sum, result


@triton.jit(do_not_specialize=["lse_stride", "stream", "threshold", "reach", "window"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, seed_ptr, bias_ptr,
    q_stride, k_stride, v_stride, out_stride, lse_stride, scale, stream, threshold, keep_scale, reach,
    window,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    SPLIT_TAIL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against the keys of their sequence, with a running softmax in base 2."""
    sequence_start, num_rows, num_keys, first_query = _tile(tiles_ptr, SUBTILES, BLOCK_M)
    if first_query >= num_rows:
        return
    head = tl.program_id(1)
    head_offs = head * HEAD_SIZE
    k_ptr += sequence_start * k_stride + head_offs
    v_ptr += sequence_start * v_stride + head_offs
    query = _load_rows(
        q_ptr + sequence_start * q_stride + head_offs,
        q_stride, first_query, num_rows, BLOCK_M, HEAD_SIZE, BLOCK_D, IS_TAIL=True,
    )  # fmt: skip
    query_idx = first_query + tl.arange(0, BLOCK_M)
    seed = load_seed(seed_ptr, stream) if HAS_DROPOUT else 0
    if HAS_BIAS:
        bias_ptr += head * (2 * reach + 1)
    log2_scale = scale * LOG2_E
    counter_start = sequence_start.to(tl.uint32)

    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Where registers are short, one loop that masks every block takes fewer than a loop and its tail.
    first_visible, last_visible = _visible(first_query, num_keys, window, BLOCK_M, BLOCK_N, HAS_WINDOW)
    full_keys = num_keys // BLOCK_N * BLOCK_N if SPLIT_TAIL else last_visible
    for first_key in range(first_visible, full_keys, BLOCK_N):
        running_max, running_sum, result = _forward_block(
            query, k_ptr, v_ptr, k_stride, v_stride, first_key, num_keys, log2_scale, running_max, running_sum, result,
            counter_start, head, first_query, seed, threshold, bias_ptr, reach, window,
            HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, HAS_DROPOUT, HAS_BIAS, HAS_WINDOW, IS_TAIL=not SPLIT_TAIL,
        )  # fmt: skip
    if SPLIT_TAIL and full_keys < num_keys:
        running_max, running_sum, result = _forward_block(
            query, k_ptr, v_ptr, k_stride, v_stride, full_keys, num_keys, log2_scale, running_max, running_sum, result,
            counter_start, head, first_query, seed, threshold, bias_ptr, reach, window,
            HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, HAS_DROPOUT, HAS_BIAS, HAS_WINDOW, IS_TAIL=True,
        )  # fmt: skip

    # A query without keys has an empty sum: divided by one its output is zero, and its log-sum-exp -inf.
    has_keys = running_max > float("-inf") if HAS_WINDOW else num_keys > 0
    running_sum = tl.where(has_keys, running_sum, 1.0)
    result = result / running_sum[:, None]
    if HAS_DROPOUT:
        result = result * keep_scale
    _store_rows(
        out_ptr + sequence_start * out_stride + head_offs,
        out_stride, first_query, num_rows, result, BLOCK_M, HEAD_SIZE, BLOCK_D,
    )  # fmt: skip
    lse = (running_max + tl.log2(running_sum)) * LN_2
    lse_ptr += head.to(tl.int64) * lse_stride + sequence_start
    tl.store(lse_ptr + query_idx, lse, mask=query_idx < num_rows)


@triton.jit
def _score_gradient(scores, log2_lse, grad_probs, delta, is_kept, keep_scale, HAS_DROPOUT: tl.constexpr):
    """The probabilities as the values saw them, and the gradient of the scores; statistics broadcast to the tile."""
    probs = tl.exp2(scores - log2_lse)
    if HAS_DROPOUT:
        grad_probs = tl.where(is_kept, grad_probs * keep_scale, 0.0)
        return tl.where(is_kept, probs * keep_scale, 0.0), probs * (grad_probs - delta)
    return probs, probs * (grad_probs - delta)


@triton.jit(do_not_specialize=["lse_stride", "stream", "threshold", "reach", "window"])
def _attention_grad_q_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, grad_q_ptr, tiles_ptr,
    seed_ptr, bias_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, out_stride, grad_q_stride, lse_stride, scale,
    stream, threshold, keep_scale, reach, window,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries; also delta = rowsum(dO * O), which the other kernels read."""
    sequence_start, num_rows, num_keys, first_query = _tile(tiles_ptr, SUBTILES, BLOCK_M)
    if first_query >= num_rows:
        return
    head = tl.program_id(1)
    head_offs = head * HEAD_SIZE
    k_ptr += sequence_start * k_stride + head_offs
    v_ptr += sequence_start * v_stride + head_offs
    query = _load_rows(
        q_ptr + sequence_start * q_stride + head_offs,
        q_stride, first_query, num_rows, BLOCK_M, HEAD_SIZE, BLOCK_D, IS_TAIL=True,
    )  # fmt: skip
    grad_out = _load_rows(
        grad_out_ptr + sequence_start * grad_out_stride + head_offs,
        grad_out_stride, first_query, num_rows, BLOCK_M, HEAD_SIZE, BLOCK_D, IS_TAIL=True,
    )  # fmt: skip
    out = _load_rows(
        out_ptr + sequence_start * out_stride + head_offs,
        out_stride, first_query, num_rows, BLOCK_M, HEAD_SIZE, BLOCK_D, IS_TAIL=True,
    )  # fmt: skip
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    query_idx = first_query + tl.arange(0, BLOCK_M)
    statistic_offs = head.to(tl.int64) * lse_stride + sequence_start + query_idx
    tl.store(delta_ptr + statistic_offs, delta, mask=query_idx < num_rows)
    log2_lse = tl.load(lse_ptr + statistic_offs, mask=query_idx < num_rows, other=float("inf")) * LOG2_E
    if HAS_WINDOW:  # without a key in it: all its scores are -inf
        log2_lse = tl.where(log2_lse == float("-inf"), 0.0, log2_lse)
    seed = load_seed(seed_ptr, stream) if HAS_DROPOUT else 0
    if HAS_BIAS:
        bias_ptr += head * (2 * reach + 1)
    log2_scale = scale * LOG2_E
    counter_start = sequence_start.to(tl.uint32)

    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first_visible, last_visible = _visible(first_query, num_keys, window, BLOCK_M, BLOCK_N, HAS_WINDOW)
    for first_key in range(first_visible, last_visible, BLOCK_N):
        key = _load_rows(k_ptr, k_stride, first_key, num_keys, BLOCK_N, HEAD_SIZE, BLOCK_D, IS_TAIL=True)
        value = _load_rows(v_ptr, v_stride, first_key, num_keys, BLOCK_N, HEAD_SIZE, BLOCK_D, IS_TAIL=True)
        scores = _scores(
            query, key, first_query, first_key, num_keys, log2_scale, bias_ptr, reach, window,
            BLOCK_M, BLOCK_N, HAS_BIAS, HAS_WINDOW, IS_TAIL=True,
        )  # fmt: skip
        grad_probs = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        is_kept = None
        if HAS_DROPOUT:
            is_kept = _kept(
                seed, counter_start, head, first_query, first_key, threshold, BLOCK_M, BLOCK_N, IS_TRANSPOSED=False
            )
        _, grad_scores = _score_gradient(
            scores, log2_lse[:, None], grad_probs, delta[:, None], is_kept, keep_scale, HAS_DROPOUT
        )
        grad_q = tl.dot(grad_scores.to(key.dtype), key, grad_q, input_precision="ieee")

    _store_rows(
        grad_q_ptr + sequence_start * grad_q_stride + head_offs,
        grad_q_stride, first_query, num_rows, grad_q * scale, BLOCK_M, HEAD_SIZE, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["lse_stride", "stream", "threshold", "reach", "window"])
def _attention_grad_kv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, tiles_ptr,
    seed_ptr, bias_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, grad_k_stride, grad_v_stride, lse_stride, scale,
    stream, threshold, keep_scale, reach, window,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_M keys, over the queries of their sequence in blocks of BLOCK_N; the scores are transposed."""
    sequence_start, num_rows, num_keys, first_key = _tile(tiles_ptr, SUBTILES, BLOCK_M)
    if first_key >= num_rows:
        return
    head = tl.program_id(1)
    head_offs = head * HEAD_SIZE
    q_ptr += sequence_start * q_stride + head_offs
    grad_out_ptr += sequence_start * grad_out_stride + head_offs
    lse_ptr += head.to(tl.int64) * lse_stride + sequence_start
    delta_ptr += head.to(tl.int64) * lse_stride + sequence_start
    key = _load_rows(
        k_ptr + sequence_start * k_stride + head_offs,
        k_stride, first_key, num_keys, BLOCK_M, HEAD_SIZE, BLOCK_D, IS_TAIL=True,
    )  # fmt: skip
    value = _load_rows(
        v_ptr + sequence_start * v_stride + head_offs,
        v_stride, first_key, num_keys, BLOCK_M, HEAD_SIZE, BLOCK_D, IS_TAIL=True,
    )  # fmt: skip
    key_idx = first_key + tl.arange(0, BLOCK_M)
    seed = load_seed(seed_ptr, stream) if HAS_DROPOUT else 0
    if HAS_BIAS:
        bias_ptr += head * (2 * reach + 1)
    log2_scale = scale * LOG2_E
    counter_start = sequence_start.to(tl.uint32)

    grad_k = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Rows that are no keys have no gradient, and queries without keys no finite log-sum-exp.
    num_queries = tl.where(first_key < num_keys, num_rows, 0)
    first_visible, last_visible = _visible(first_key, num_queries, window, BLOCK_M, BLOCK_N, HAS_WINDOW)
    for first_query in range(first_visible, last_visible, BLOCK_N):
        query = _load_rows(q_ptr, q_stride, first_query, num_queries, BLOCK_N, HEAD_SIZE, BLOCK_D, IS_TAIL=True)
        grad_out = _load_rows(
            grad_out_ptr, grad_out_stride, first_query, num_queries, BLOCK_N, HEAD_SIZE, BLOCK_D, IS_TAIL=True
        )
        query_idx = first_query + tl.arange(0, BLOCK_N)
        # Rows beyond the sequence have an infinite log-sum-exp, and so no probability.
        log2_lse = tl.load(lse_ptr + query_idx, mask=query_idx < num_queries, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + query_idx, mask=query_idx < num_queries, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * log2_scale
        if HAS_BIAS:
            scores += _relative_bias(bias_ptr, reach, query_idx[None, :], key_idx[:, None])
        if HAS_WINDOW:
            log2_lse = tl.where(log2_lse == float("-inf"), 0.0, log2_lse)
            scores = tl.where(tl.abs(query_idx[None, :] - key_idx[:, None]) <= window, scores, float("-inf"))
        grad_probs = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        is_kept = None
        if HAS_DROPOUT:
            is_kept = _kept(
                seed, counter_start, head, first_query, first_key, threshold, BLOCK_N, BLOCK_M, IS_TRANSPOSED=True
            )
        probs, grad_scores = _score_gradient(
            scores, log2_lse[None, :], grad_probs, delta[None, :], is_kept, keep_scale, HAS_DROPOUT
        )
        grad_v = tl.dot(probs.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        grad_k = tl.dot(grad_scores.to(query.dtype), query, grad_k, input_precision="ieee")

    # A row that is no key has spoilt no other row: masking it here costs the loop nothing.
    key_valid = key_idx < num_keys
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


@triton.jit(do_not_specialize=["lse_stride", "stream", "threshold", "reach", "num_tiles"])
def _attention_grad_bias_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_bias_ptr, tiles_ptr, seed_ptr, bias_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, lse_stride, scale, stream, threshold, keep_scale, reach, num_tiles,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SUBTILES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """The sum of the score gradients at BLOCK relative positions of one head, over every PARTS-th block of queries.

    BLOCK queries see, at those distances, a window of 2 * BLOCK keys; its diagonals are gathered into columns.
    """
    first_distance = tl.program_id(0) * BLOCK - reach
    head = tl.program_id(1)
    head_offs = head * HEAD_SIZE
    bias_ptr += head * (2 * reach + 1)
    seed = load_seed(seed_ptr, stream) if HAS_DROPOUT else 0
    log2_scale = scale * LOG2_E
    row_idx = tl.arange(0, BLOCK)
    diagonal_idx = row_idx[:, None] + row_idx[None, :]
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    for entry in range(tl.program_id(2), num_tiles * SUBTILES, tl.num_programs(2)):
        entry_ptr = tiles_ptr + 4 * tl.cast(entry // SUBTILES, tl.int64)
        sequence_start = tl.load(entry_ptr).to(tl.int64)
        num_rows = tl.load(entry_ptr + 1)
        num_keys = tl.load(entry_ptr + 2)
        first_query = tl.load(entry_ptr + 3) + (entry % SUBTILES) * BLOCK
        first_key = first_query + first_distance
        if num_keys > 0 and first_query < num_rows and first_key < num_keys and first_key + 2 * BLOCK > 0:
            query = _load_rows(
                q_ptr + sequence_start * q_stride + head_offs,
                q_stride, first_query, num_rows, BLOCK, HEAD_SIZE, BLOCK_D, IS_TAIL=True,
            )  # fmt: skip
            grad_out = _load_rows(
                grad_out_ptr + sequence_start * grad_out_stride + head_offs,
                grad_out_stride, first_query, num_rows, BLOCK, HEAD_SIZE, BLOCK_D, IS_TAIL=True,
            )  # fmt: skip
            query_idx = first_query + row_idx
            key_idx = first_key + tl.arange(0, 2 * BLOCK)
            size_idx = tl.arange(0, BLOCK_D)
            is_key = (key_idx >= 0) & (key_idx < num_keys)
            key_offs = sequence_start + key_idx
            key_mask = is_key[:, None] & (size_idx < HEAD_SIZE)[None, :]
            key = tl.load(
                k_ptr + head_offs + key_offs[:, None] * k_stride + size_idx[None, :], mask=key_mask, other=0.0
            )
            value = tl.load(
                v_ptr + head_offs + key_offs[:, None] * v_stride + size_idx[None, :], mask=key_mask, other=0.0
            )
            statistic_offs = head.to(tl.int64) * lse_stride + sequence_start + query_idx
            log2_lse = tl.load(lse_ptr + statistic_offs, mask=query_idx < num_rows, other=float("inf")) * LOG2_E
            delta = tl.load(delta_ptr + statistic_offs, mask=query_idx < num_rows, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
            scores += _relative_bias(bias_ptr, reach, query_idx[:, None], key_idx[None, :])
            scores = tl.where(is_key[None, :], scores, float("-inf"))
            grad_probs = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
            is_kept = None
            if HAS_DROPOUT:
                is_kept = keep_scores(
                    seed, sequence_start.to(tl.uint32), head, query_idx[:, None], key_idx[None, :], threshold
                )
            _, grad_scores = _score_gradient(
                scores, log2_lse[:, None], grad_probs, delta[:, None], is_kept, keep_scale, HAS_DROPOUT
            )
            grad_bias += tl.sum(tl.gather(grad_scores, diagonal_idx, 1), 0)
    width = 2 * reach + 1
    column_idx = tl.program_id(0) * BLOCK + row_idx
    grad_bias_ptr += (tl.program_id(2) * tl.num_programs(1) + head).to(tl.int64) * width
    tl.store(grad_bias_ptr + column_idx, grad_bias, mask=column_idx < width)


# Programs along the queries in the gradient of the bias, and so rows of its partial sums.
BIAS_PARTS = 16


MAX_WINDOW = 2**30


class Extras(NamedTuple):
    """What an attention call has besides the softmax.

    Args:
        seed: (1,) int64, draws the dropout; None without.
        stream: number of the place in the model, so that one seed serves many.
        dropout_p: rate, in [0, 1).
        bias: (heads, 2 * reach + 1), added to the score at column key - query + reach; None without.
        window: how many rows from a query its farthest key may be; None: all keys are seen. Not with a bias.
    """

    seed: torch.Tensor | None = None
    stream: int = 0
    dropout_p: float = 0.0
    bias: torch.Tensor | None = None
    window: int | None = None

    @property
    def pointers(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.seed if self.dropout_p > 0 else None, self.bias

    @property
    def reach(self) -> int:
        return 0 if self.bias is None else self.bias.shape[1] // 2

    @property
    def numbers(self) -> tuple[int, int, float, int]:
        """stream, threshold, keep_scale, reach."""
        return self.stream, _random.threshold(self.dropout_p), _random.scale(self.dropout_p), self.reach

    @property
    def width(self) -> int:
        """The window, such that sums with it have 32 bits."""
        return 0 if self.window is None else min(self.window, MAX_WINDOW)

    @property
    def needs(self) -> dict[str, bool]:
        """What the launch sizes of both passes depend on."""
        return {"has_dropout": self.dropout_p > 0, "has_window": self.window is not None}

    @property
    def flags(self) -> dict[str, bool]:
        return {
            "HAS_DROPOUT": self.dropout_p > 0,
            "HAS_BIAS": self.bias is not None,
            "HAS_WINDOW": self.window is not None,
        }


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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    max_seqlen: int,
    scale: float,
    extras: Extras = Extras(),  # noqa: B008
) -> tuple[torch.Tensor, torch.Tensor]:
    """dropout(softmax(scale * Q K^T + bias)) V within each sequence, and within the window.

    Args:
        q, k, v: (tokens, heads, head_size), contiguous within a token.
        tiles: (tiles, 4) int32: sequence start, rows, keys, first row.
        max_seqlen: rows of the longest sequence; chooses the launch sizes.
        scale: factor of the scores.
        extras: dropout, bias and window.

    Returns:
        The result (tokens, heads, head_size), in q's dtype, and the natural log-sum-exp (heads, tokens), float32.
    """
    tokens, heads, head_size = q.shape
    out = torch.empty((tokens, heads, head_size), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if tokens > 0:
        sizes = _sizes(forward_launch(q.dtype, head_size, max_seqlen, **extras.needs), head_size)
        _attention_kernel[(tiles.shape[0] * sizes["SUBTILES"], heads)](
            q, k, v, out, lse, tiles, *extras.pointers,
            q.stride(0), k.stride(0), v.stride(0), out.stride(0), tokens, scale, *extras.numbers,
            extras.width, **sizes, **extras.flags,
            SPLIT_TAIL=extras.window is None and splits_tail(q.dtype, head_size),
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
    extras: Extras = Extras(),  # noqa: B008
    *,
    wants_grad_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of q, k and v, each (tokens, heads, head_size), and of the bias (heads, 2 * reach + 1), float32.

    Deterministic: every value has one writer, and sums over programs have one order.
    """
    tokens, heads, head_size = q.shape
    grad_q, grad_k, grad_v = (
        torch.empty((tokens, heads, head_size), dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    delta = torch.empty_like(lse)
    grad_bias = None
    if tokens > 0:
        launch = backward_launch(q.dtype, head_size, max_seqlen, has_bias=extras.bias is not None, **extras.needs)
        sizes = _sizes(launch, head_size)
        grid = (tiles.shape[0] * sizes["SUBTILES"], heads)
        _attention_grad_q_kernel[grid](
            grad_out, q, k, v, out, lse, delta, grad_q, tiles, *extras.pointers,
            grad_out.stride(0), q.stride(0), k.stride(0), v.stride(0), out.stride(0), grad_q.stride(0), tokens,
            scale, *extras.numbers, extras.width, **sizes, **extras.flags,
        )  # fmt: skip
        _attention_grad_kv_kernel[grid](
            grad_out, q, k, v, lse, delta, grad_k, grad_v, tiles, *extras.pointers,
            grad_out.stride(0), q.stride(0), k.stride(0), v.stride(0), grad_k.stride(0), grad_v.stride(0), tokens,
            scale, *extras.numbers, extras.width, **sizes, **extras.flags,
        )  # fmt: skip
    if wants_grad_bias:
        assert extras.bias is not None
        grad_bias = _grad_bias(grad_out, q, k, v, lse, delta, tiles, scale, extras)
    return grad_q, grad_k, grad_v, grad_bias


def _grad_bias(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    extras: Extras,
) -> torch.Tensor:
    tokens, heads, head_size = q.shape
    width = 2 * extras.reach + 1
    launch = bias_launch(q.dtype, head_size)
    parts = torch.zeros((BIAS_PARTS, heads, width), dtype=torch.float32, device=q.device)
    if tokens > 0:
        _attention_grad_bias_kernel[(ceil_div(width, launch.rows), heads, BIAS_PARTS)](
            grad_out, q, k, v, lse, delta, parts, tiles, *extras.pointers,
            grad_out.stride(0), q.stride(0), k.stride(0), v.stride(0), tokens, scale, *extras.numbers, tiles.shape[0],
            HEAD_SIZE=head_size, BLOCK_D=max(16, next_power_of_2(head_size)), BLOCK=launch.rows,
            SUBTILES=TILE_SIZE // launch.rows, HAS_DROPOUT=extras.dropout_p > 0, **launch.options,
        )  # fmt: skip
    return parts.sum(0)
