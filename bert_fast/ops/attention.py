"""bert_fast::attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# torch comes first: the extension then binds to the OpenMP library that torch brought, and shares its threads.
from .. import _C
from ._path import array, define, device_of, differentiate, drawn, kernel_path, or_empty, threads

TILE_SIZE = 128
"""Query rows of one entry in the tile list of bert_fast.masking; kernels._launch has the same number."""


def max_seqlen_bucket(max_seqlen: int) -> int:
    """The longest row whose kernels have the same launch sizes; so a graph or a binary serves the bucket."""
    from ..kernels.attention import SHORT

    return SHORT if max_seqlen <= SHORT else 2 * SHORT


def _within_token(x: Tensor) -> Tensor:
    """x (tokens, heads, head_size) with its heads side by side, copied only if they are not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    max_seqlen: int,
    scale: float,
    seed: Tensor | None = None,
    stream: int = 0,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within packed sequences, without autograd.

    Args:
        q, k, v: (tokens, heads, head_size).
        tiles: (tiles, 4) int32 on q's device, from bert_fast.masking.
        max_seqlen: rows of the longest sequence.
        scale: factor of the scores.
        seed, stream, dropout_p: dropout of the probabilities; see functional.draw_seed.
        bias: (heads, 2 * reach + 1), added to the score of rows i and j at column j - i + reach.
        window: how many rows from a query its farthest key may be; None: all keys are seen. Not with a bias.

    Returns:
        The result (tokens, heads, head_size) and the natural log-sum-exp (heads, tokens), float32.
    """
    q, k, v = _within_token(q), _within_token(k), _within_token(v)
    if kernel_path("attention", q, q.shape[2]) == "triton":
        from ..kernels import attention

        with device_of(q):
            extras = attention.Extras(seed, stream, dropout_p, None if bias is None else bias.contiguous(), window)
            return attention.attention(q, k, v, tiles, max_seqlen, scale, extras)
    out = torch.empty(q.shape)
    lse = torch.empty(q.shape[1], q.shape[0])
    _C.attention(
        array(q), array(k), array(v), array(tiles), TILE_SIZE, scale, *drawn(seed, stream, dropout_p),
        _bias_array(bias), _window(window), array(out), array(lse), threads(),
    )  # fmt: skip
    return out, lse


def launch_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    max_seqlen: int,
    scale: float,
    seed: Tensor | None = None,
    stream: int = 0,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    window: int | None = None,
    wants_grad_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v, each (tokens, heads, head_size), contiguous, and of the bias, float32, if wanted."""
    grad_out, q, k, v = _within_token(grad_out), _within_token(q), _within_token(k), _within_token(v)
    if kernel_path("attention", q, q.shape[2]) == "triton":
        from ..kernels import attention

        with device_of(q):
            extras = attention.Extras(seed, stream, dropout_p, None if bias is None else bias.contiguous(), window)
            return attention.attention_backward(
                grad_out, q, k, v, out, lse, tiles, max_seqlen, scale, extras, wants_grad_bias=wants_grad_bias
            )
    grad_q, grad_k, grad_v = torch.empty(q.shape), torch.empty(k.shape), torch.empty(v.shape)
    grad_bias = torch.empty(bias.shape) if wants_grad_bias and bias is not None else None
    _C.attention_backward(
        array(grad_out), array(q), array(k), array(v), array(out), array(tiles), TILE_SIZE, scale,
        *drawn(seed, stream, dropout_p), _bias_array(bias), _window(window), array(grad_q), array(grad_k),
        array(grad_v), None if grad_bias is None else array(grad_bias), threads(),
    )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_bias


def _bias_array(bias: Tensor | None) -> Any:
    return None if bias is None else array(bias.float().contiguous())


def _window(window: int | None) -> int:
    return -1 if window is None else window


def _attention_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v, grad_bias = launch_attention_backward(*args)
    return grad_q, grad_k, grad_v, or_empty(grad_bias, grad_q)


def _backward_shapes(
    grad_out: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    tiles: Tensor,  # noqa: ARG001
    max_seqlen: int,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    seed: Tensor | None = None,  # noqa: ARG001
    stream: int = 0,  # noqa: ARG001
    dropout_p: float = 0.0,  # noqa: ARG001
    bias: Tensor | None = None,
    window: int | None = None,  # noqa: ARG001
    wants_grad_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = bias.new_empty(bias.shape, dtype=torch.float32) if wants_grad_bias and bias is not None else None
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), or_empty(grad_bias, q)


_EXTRAS = "Tensor? seed=None, int stream=0, float dropout_p=0.0, Tensor? bias=None, int? window=None"

define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor tiles, SymInt max_seqlen, float scale, "
    f"{_EXTRAS}) -> (Tensor, Tensor)",
    launch_attention,
    lambda q, *_: (q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)),
)
define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor tiles, "
    f"SymInt max_seqlen, float scale, {_EXTRAS}, bool wants_grad_bias=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _backward_shapes,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, tiles, ctx.max_seqlen, ctx.scale, seed, ctx.stream, ctx.dropout_p, bias, ctx.window = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, tiles, seed, bias)


def _grad(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, tiles, seed, bias = ctx.saved_tensors
    wants_grad_bias = any(ctx.needs_input_grad[9:10])
    grad_q, grad_k, grad_v, grad_bias = torch.ops.bert_fast.attention_backward(
        grad_out, q, k, v, out, lse, tiles, ctx.max_seqlen, ctx.scale, seed, ctx.stream, ctx.dropout_p, bias,
        ctx.window, wants_grad_bias,
    )  # fmt: skip
    grad_bias = grad_bias.to(bias.dtype) if wants_grad_bias else None
    return grad_q, grad_k, grad_v, None, None, None, None, None, None, grad_bias, None


differentiate("attention", _save, _grad)
