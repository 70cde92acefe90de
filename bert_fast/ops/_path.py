"""Where an operator runs, and what all of them share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch._C import _to_dlpack as to_dlpack
from torch.utils.dlpack import from_dlpack

# torch comes first; see ops/attention.py.
from .. import _C

Path = Literal["triton", "cpp", "torch"]
Op = Literal["attention", "layer_norm", "gelu", "embedding", "cross_entropy", "linear"]

MAX_HEAD_SIZE = 128
MAX_LAYER_NORM_WIDTH = 8192

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Operators with a C++ kernel; on the CPU the others are a composition of torch's.
_CPP_OPS = ("attention", "layer_norm", "gelu", "linear")


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


def _why_not_cpp(op: Op, dtype: torch.dtype) -> str | None:
    if op not in _CPP_OPS:
        return f"{op} has no C++ kernel"
    if dtype != torch.float32:
        return f"{str(dtype).removeprefix('torch.')} on the CPU: the C++ kernels take float32"
    if op == "linear" and _C.instruction_set() != "avx512":
        return "the library's matrix product, which packs nothing; ours is faster with AVX-512"
    return None


def _why_not_triton(op: Op, device_type: str, dtype: torch.dtype, width: int) -> str | None:
    if device_type != "cuda":
        return f"device {device_type}: the kernels are for cuda and cpu"
    if op == "linear":
        return "the library's matrix product"
    if not has_triton():
        return "triton is not installed"
    if dtype not in _KERNEL_DTYPES:
        return f"{str(dtype).removeprefix('torch.')}: the kernels take float32, float16 and bfloat16"
    if op in ("layer_norm", "embedding") and width > MAX_LAYER_NORM_WIDTH:
        return f"width {width} is above {MAX_LAYER_NORM_WIDTH}"
    return None


@functools.cache
def _choose(op: Op, device_type: str, dtype: torch.dtype, width: int, forced: Path | None) -> Choice:
    if forced is not None:
        is_missing = (forced == "cpp" and op not in _CPP_OPS) or (forced == "triton" and op == "linear")
        return Choice("torch" if is_missing else forced, "forced")
    if op == "attention" and width > MAX_HEAD_SIZE:
        return Choice("torch", f"head size {width} is above {MAX_HEAD_SIZE}")
    path: Path = "cpp" if device_type == "cpu" else "triton"
    reason = _why_not_cpp(op, dtype) if path == "cpp" else _why_not_triton(op, device_type, dtype, width)
    if reason is not None:
        return Choice("torch", reason)
    return Choice(path, f"{str(dtype).removeprefix('torch.')} on {'the CPU' if path == 'cpp' else device_type}")


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


def kernel_path(op: Op, x: Tensor, width: int) -> Literal["triton", "cpp"]:
    """The path of an operator that has been called, so must have a kernel."""
    path, reason = choose(op, x.device.type, x.dtype, width)
    if path == "torch":
        raise NotImplementedError(f"bert_fast::{op} has no kernel here: {reason}")
    return path


# ---- what implementations use ----------------------------------------------------------------------------------------


def array(x: Tensor) -> np.ndarray[Any, Any]:
    """x's memory. Through a storage of its own: `numpy()` forbids for good that x's is resized, as FSDP does."""
    x = x.detach()
    plain = from_dlpack(to_dlpack(x)) if type(x) is Tensor else x  # numpy() says that subclasses of tensors are refused
    return cast("np.ndarray[Any, Any]", plain.numpy())


def optional_array(x: Tensor | None) -> np.ndarray[Any, Any] | None:
    return None if x is None else array(x)


def optional_contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def drawn(seed: Tensor | None, stream: int, dropout_p: float) -> tuple[int, int, float]:
    """seed, stream and dropout_p of a C++ kernel; without a seed nothing is dropped."""
    return (0, 0, 0.0) if seed is None else (int(seed), stream, dropout_p)


def threads() -> int:
    return torch.get_num_threads()


def device_of(x: Tensor) -> torch.cuda.device_of:
    return torch.cuda.device_of(x)


# Operators return tensors only: one without elements stands for none.


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if x is None else x


# ---- registration ----------------------------------------------------------------------------------------------------


def define(schema: str, implementation: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Registers bert_fast::NAME(...) for every device, with the function that gives its results' shapes."""
    name, parenthesis, rest = schema.partition("(")
    torch.library.define(f"bert_fast::{name}", parenthesis + rest)
    torch.library.impl(f"bert_fast::{name}", "default", implementation)
    torch.library.register_fake(f"bert_fast::{name}", shapes)


def differentiate(name: str, save: Callable[..., None], grad: Callable[..., Any]) -> None:
    """Gives bert_fast::NAME its backward pass, and bert_fast::NAME_backward an error instead of one."""

    def backward(ctx: Any, *grads: Any) -> Any:
        # The dispatcher drops trailing arguments that have their default value; their gradients go as well.
        found = grad(ctx, *grads)
        return found[: len(ctx.needs_input_grad)] if isinstance(found, tuple) else found

    torch.library.register_autograd(f"bert_fast::{name}", backward, setup_context=save)
    if hasattr(torch.ops.bert_fast, f"{name}_backward"):
        torch.library.register_autograd(
            f"bert_fast::{name}_backward", _refuse_second_derivative, setup_context=_save_nothing
        )


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """The gradient's gradient is refused, so nothing is kept for it."""


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:  # noqa: ARG001
    raise RuntimeError(
        "bert_fast's kernels have no second derivative; within bert_fast.ops.forced_path('torch'), or after "
        "bert_fast.restore(model), torch computes it"
    )
