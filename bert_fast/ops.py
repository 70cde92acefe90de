"""One torch.library operator per kernel, with its shape function and its backward pass, and the choice of path.

A path is where an operator runs: "triton" (GPU), "cpp" (CPU, float32) or "torch" (everything else). The operators below
have kernels for the first two; `choose` says which path a call takes and why, and bert_fast.functional follows it.
The functions `launch_*` run the kernels without the dispatcher: that is the path of inference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

# torch comes first: the extension then binds to the OpenMP library that torch brought, and shares its threads.
from . import _C

Path = Literal["triton", "cpp", "torch"]
Op = Literal["attention", "layer_norm", "gelu"]

TILE_SIZE = 128
"""Query rows of one entry in the tile list of bert_fast.masking; kernels._launch has the same number."""

MAX_HEAD_SIZE = 128
MAX_LAYER_NORM_WIDTH = 8192

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """
    Attributes:
        path: where the call runs.
        reason: why, in a few words for people.
    """

    path: Path
    reason: str


_forced: ContextVar[Path | None] = ContextVar("bert_fast_forced_path", default=None)


@contextmanager
def forced_path(path: Path) -> Iterator[None]:
    """Within it every operator takes `path`; a call that the path cannot serve raises. For tests and measurement."""
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def has_triton() -> bool:
    return find_spec("triton") is not None


@functools.cache
def _choose(op: Op, device_type: str, dtype: torch.dtype, width: int, forced: Path | None) -> Choice:
    if forced is not None:
        return Choice(forced, "forced")
    if op == "attention" and width > MAX_HEAD_SIZE:
        return Choice("torch", f"head size {width} is above {MAX_HEAD_SIZE}")
    if device_type == "cpu":
        if dtype == torch.float32:
            return Choice("cpp", "float32 on the CPU")
        return Choice("torch", f"{str(dtype).removeprefix('torch.')} on the CPU: the C++ kernels take float32")
    if device_type != "cuda":
        return Choice("torch", f"device {device_type}: the kernels are for cuda and cpu")
    if not has_triton():
        return Choice("torch", "triton is not installed")
    if dtype not in _KERNEL_DTYPES:
        return Choice("torch", f"{str(dtype).removeprefix('torch.')}: the kernels take float32, float16 and bfloat16")
    if op == "layer_norm" and width > MAX_LAYER_NORM_WIDTH:
        return Choice("torch", f"width {width} is above {MAX_LAYER_NORM_WIDTH}")
    return Choice("triton", f"{str(dtype).removeprefix('torch.')} on {device_type}")


def choose(op: Op, device_type: str, dtype: torch.dtype, width: int) -> Choice:
    """The path of an operator.

    Args:
        op: its name.
        device_type: "cpu", "cuda", ...
        dtype: of the activations.
        width: the head size for attention, else the number of features.
    """
    if torch.compiler.is_compiling():  # which traces neither context variables nor caches
        return _choose.__wrapped__(op, device_type, dtype, width, None)
    return _choose(op, device_type, dtype, width, _forced.get())


def _kernel_path(op: Op, x: Tensor, width: int) -> Literal["triton", "cpp"]:
    path, reason = choose(op, x.device.type, x.dtype, width)
    if path == "torch":
        raise NotImplementedError(f"bert_fast::{op} has no kernel here: {reason}")
    return path


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    return x.detach().numpy()


def _optional_array(x: Tensor | None) -> np.ndarray[Any, Any] | None:
    return None if x is None else _array(x)


def _within_token(x: Tensor) -> Tensor:
    """x (tokens, heads, head_size) with its heads side by side, copied only if they are not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


# ---- attention -------------------------------------------------------------------------------------------------------


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention within packed sequences, without autograd.

    Args:
        q, k, v: (tokens, heads, head_size).
        tiles: (tiles, 4) int32 on q's device, from bert_fast.masking.
        max_seqlen: rows of the longest sequence.
        scale: factor of the scores.

    Returns:
        The result (tokens, heads, head_size) and the natural log-sum-exp (heads, tokens), float32.
    """
    q, k, v = _within_token(q), _within_token(k), _within_token(v)
    if _kernel_path("attention", q, q.shape[2]) == "triton":
        from .kernels import attention

        with _device_of(q):
            return attention.attention(q, k, v, tiles, max_seqlen, scale)
    out = torch.empty(q.shape)
    lse = torch.empty(q.shape[1], q.shape[0])
    _C.attention(
        _array(q), _array(k), _array(v), _array(tiles), TILE_SIZE, scale, _array(out), _array(lse), _threads()
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (tokens, heads, head_size), contiguous."""
    grad_out, q, k, v = _within_token(grad_out), _within_token(q), _within_token(k), _within_token(v)
    if _kernel_path("attention", q, q.shape[2]) == "triton":
        from .kernels import attention

        with _device_of(q):
            return attention.attention_backward(grad_out, q, k, v, out, lse, tiles, max_seqlen, scale)
    grad_q, grad_k, grad_v = torch.empty(q.shape), torch.empty(k.shape), torch.empty(v.shape)
    _C.attention_backward(
        _array(grad_out), _array(q), _array(k), _array(v), _array(out), _array(lse), _array(tiles), TILE_SIZE, scale,
        _array(grad_q), _array(grad_k), _array(grad_v), _threads(),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


# ---- layer_norm ------------------------------------------------------------------------------------------------------


def launch_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, has_statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """LayerNorm(x + residual) of rows (rows, width), without autograd; mean and 1 / std (rows,) float32 on request."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    if _kernel_path("layer_norm", x, x.shape[1]) == "triton":
        from .kernels import layer_norm

        with _device_of(x):
            return layer_norm.layer_norm(x, residual, weight, bias, eps, has_statistics)
    y = torch.empty_like(x)
    mean = torch.empty(x.shape[0]) if has_statistics else None
    rstd = torch.empty(x.shape[0]) if has_statistics else None
    _C.layer_norm(
        _array(x), _optional_array(residual), _array(weight), _array(bias), eps, _array(y), _optional_array(mean),
        _optional_array(rstd), _threads(),
    )  # fmt: skip
    return y, mean, rstd


def launch_layer_norm_backward(
    grad_y: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, and so of the residual, (rows, width); those of weight and bias (width,) float32."""
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    if _kernel_path("layer_norm", x, x.shape[1]) == "triton":
        from .kernels import layer_norm

        with _device_of(x):
            return layer_norm.layer_norm_backward(grad_y, x, residual, weight, mean, rstd)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty(x.shape[1]), torch.empty(x.shape[1])
    _C.layer_norm_backward(
        _array(grad_y), _array(x), _optional_array(residual), _array(weight), _array(mean), _array(rstd),
        _array(grad_x), _array(grad_weight), _array(grad_bias), _threads(),
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


# ---- gelu ------------------------------------------------------------------------------------------------------------


def launch_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU(x + bias) of rows (rows, width), without autograd."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    if _kernel_path("gelu", x, x.shape[1]) == "triton":
        from .kernels import gelu

        with _device_of(x):
            return gelu.gelu(x, bias, approximate)
    y = torch.empty_like(x)
    _C.gelu(_array(x), _optional_array(bias), approximate, _array(y), _threads())
    return y


def launch_gelu_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x (rows, width) and of the bias (width,) float32, None without one."""
    grad_y, x, bias = grad_y.contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    if _kernel_path("gelu", x, x.shape[1]) == "triton":
        from .kernels import gelu

        with _device_of(x):
            return gelu.gelu_backward(grad_y, x, bias, approximate)
    grad_x = torch.empty_like(x)
    grad_bias = None if bias is None else torch.empty(x.shape[1])
    _C.gelu_backward(
        _array(grad_y), _array(x), _optional_array(bias), approximate, _array(grad_x), _optional_array(grad_bias),
        _threads(),
    )  # fmt: skip
    return grad_x, grad_bias


# ---- pad -------------------------------------------------------------------------------------------------------------


def launch_pad(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    """(rows, ...) with x's rows at `indices` and zeros elsewhere; any dtype, without autograd."""
    if x.device.type != "cpu":
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, indices, x)
    x = x.resolve_conj().resolve_neg().contiguous()
    out = torch.empty((rows, *x.shape[1:]), dtype=x.dtype)
    _C.pad(_bytes(x), _array(indices), _bytes(out), _threads())
    return out


def _bytes(x: Tensor) -> np.ndarray[Any, Any]:
    """(rows, bytes of a row) of a contiguous tensor."""
    row_bytes = math.prod(x.shape[1:]) * x.element_size()
    if x.numel() == 0:
        return np.empty((x.shape[0], row_bytes), np.uint8)
    return _array(x.detach().flatten().view(torch.uint8)).reshape(x.shape[0], row_bytes)


# ---- registration ----------------------------------------------------------------------------------------------------


def _threads() -> int:
    return torch.get_num_threads()


def _device_of(x: Tensor) -> torch.cuda.device_of:
    return torch.cuda.device_of(x)


def _op_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = launch_layer_norm(x, residual, weight, bias, eps, has_statistics=True)
    assert mean is not None
    assert rstd is not None
    return y, mean, rstd


def _op_gelu_backward(grad_y: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = launch_gelu_backward(grad_y, x, bias, approximate)
    return grad_x, x.new_empty(0, dtype=torch.float32) if grad_bias is None else grad_bias


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _feature(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention(Tensor q, Tensor k, Tensor v, Tensor tiles, SymInt max_seqlen, float scale) -> (Tensor, Tensor)": (
        launch_attention,
        lambda q, k, v, tiles, max_seqlen, scale: (  # noqa: ARG005
            q.new_empty(q.shape),
            q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
        ),
    ),
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor tiles, "
    "SymInt max_seqlen, float scale) -> (Tensor, Tensor, Tensor)": (
        launch_attention_backward,
        lambda grad_out, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),  # noqa: ARG005
    ),
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)": (
        _op_layer_norm,
        lambda x, *_: (x.new_empty(x.shape), _statistic(x), _statistic(x)),
    ),
    "layer_norm_backward(Tensor grad_y, Tensor x, Tensor? residual, Tensor weight, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)": (
        launch_layer_norm_backward,
        lambda grad_y, x, *_: (x.new_empty(x.shape), _feature(x), _feature(x)),  # noqa: ARG005
    ),
    "gelu(Tensor x, Tensor? bias, str approximate) -> Tensor": (
        launch_gelu,
        lambda x, *_: x.new_empty(x.shape),
    ),
    "gelu_backward(Tensor grad_y, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)": (
        _op_gelu_backward,
        lambda grad_y, x, bias, approximate: (  # noqa: ARG005
            x.new_empty(x.shape),
            x.new_empty(0, dtype=torch.float32) if bias is None else _feature(x),
        ),
    ),
    "pad(Tensor x, Tensor indices, SymInt rows) -> Tensor": (
        launch_pad,
        lambda x, indices, rows: x.new_empty((rows, *x.shape[1:])),  # noqa: ARG005
    ),
}

for _schema, (_implementation, _shapes) in _OPS.items():
    _name = f"bert_fast::{_schema.partition('(')[0]}"
    torch.library.define(_name, _schema[_schema.index("(") :])
    torch.library.impl(_name, "default", _implementation)
    torch.library.register_fake(_name, _shapes)


def _save_attention(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, tiles, ctx.max_seqlen, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, tiles)


def _attention_grad(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, tiles = ctx.saved_tensors
    grads = torch.ops.bert_fast.attention_backward(grad_out, q, k, v, out, lse, tiles, ctx.max_seqlen, ctx.scale)
    return (*grads, None, None, None)


def _save_layer_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, residual, weight, mean, rstd)


def _layer_norm_grad(ctx: Any, grad_y: Tensor, _mean: Tensor, _rstd: Tensor) -> tuple[Any, ...]:
    x, residual, weight, mean, rstd = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = torch.ops.bert_fast.layer_norm_backward(grad_y, x, residual, weight, mean, rstd)
    grad_residual = None if residual is None else grad_x.to(residual.dtype)
    return grad_x, grad_residual, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None


def _save_gelu(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _gelu_grad(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.bert_fast.gelu_backward(grad_y, x, bias, ctx.approximate)
    return grad_x, None if bias is None else grad_bias.to(bias.dtype), None


def _save_pad(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[1])


def _pad_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return grad.index_select(0, indices), None, None


for _name, _save, _grad in (
    ("attention", _save_attention, _attention_grad),
    ("layer_norm", _save_layer_norm, _layer_norm_grad),
    ("gelu", _save_gelu, _gelu_grad),
    ("pad", _save_pad, _pad_grad),
):
    torch.library.register_autograd(f"bert_fast::{_name}", _grad, setup_context=_save)


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """The gradient's gradient is refused, so nothing is kept for it."""


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:  # noqa: ARG001
    raise RuntimeError(
        "bert_fast's kernels have no second derivative; within bert_fast.ops.forced_path('torch'), or after "
        "bert_fast.restore(model), torch computes it"
    )


for _name in ("attention", "layer_norm", "gelu"):
    torch.library.register_autograd(
        f"bert_fast::{_name}_backward", _refuse_second_derivative, setup_context=_save_nothing
    )
