"""report: which path every part of a swapped model takes, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import _C, engine, ops
from .core import FAST, Swapped, is_off, rounding_of, swapped_encoders


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        name: what it is ("attention", ...).
        path: "triton", "cpp" or "torch".
        reason: why.
    """

    name: str
    path: str
    reason: str


@dataclass(frozen=True)
class EncoderReport:
    """
    Attributes:
        name: of the module in the model; "" for the model itself.
        class_name: its class.
        parts: the path of each part for calls that take the fast path.
        calls: how many calls took the fast path ("fast") or the original one (the reason).
    """

    name: str
    class_name: str
    parts: tuple[Part, ...]
    calls: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """What `print` shows.

    Attributes:
        device: of the model's parameters.
        encoders: one entry for each swapped encoder; empty where nothing is swapped.
    """

    device: str
    encoders: tuple[EncoderReport, ...]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"bert_fast on {self.device}; CPU kernels: {_C.instruction_set()}, {torch.get_num_threads()} threads"]
        lines += [f"  {note}" for note in self.notes]
        for encoder in self.encoders:
            lines.append(f"{encoder.name or 'model'}: {encoder.class_name}")
            lines += [f"  {part.name:<12}{part.path:<8}{part.reason}" for part in encoder.parts]
            for path, number in encoder.calls.items():
                name = "fast path" if path == FAST else f"original path, because {path}"
                lines.append(f"  {number} call{'s' if number > 1 else ''}: {name}")
        return "\n".join(lines)


def _parts(encoder: Any) -> tuple[Part, ...]:
    parameter = next(encoder.parameters(), None)
    if parameter is None:  # the first FSDP keeps them elsewhere
        return ()
    dtype, device = parameter.dtype, parameter.device.type
    widths = encoder.bert_fast_family.widths(encoder)
    parts = []
    if device == "cpu":
        parts.append(Part("padding", "cpp", "boundaries from the mask, on the host"))
    else:
        parts.append(
            Part("padding", "cpp", "boundaries from the mask, on the host; a mask on the device is copied there")
        )
    for op, width in widths.items():
        choice = ops.choose(op, device, dtype, width)
        parts.append(Part(op, choice.path, choice.reason))
    if device == "cpu":
        parts.append(_engine_part(encoder, parameter))
    choice = ops.choose("linear", device, dtype, widths.get("layer_norm", 1))
    parts.append(Part("linear", choice.path, f"{choice.reason}, on real tokens alone"))
    if "bert_fast_pooled" in encoder.__dict__:
        parts.append(Part("pooling", "torch", "mean, cls and max on packed rows"))
    return tuple(parts)


def _engine_part(encoder: Any, parameter: Any) -> Part:
    """Whether calls without gradients run through the CPU engine, in which case they use none of the other parts."""
    stack = encoder.bert_fast_family.stack(encoder)
    with torch.no_grad():
        reason = engine.why_not(stack, parameter)
    if reason is not None:
        return Part("layers", "torch", f"each part by itself, since {reason}")
    rounding = rounding_of(encoder)
    exact = () if rounding is None else rounding.exact
    products = f"{stack.products} on packed weights" + (f", but float32 in {', '.join(exact)}" if exact else "")
    if stack.products == "float32" and "bfloat16" in (stack.wanted, str(stack.dtype).removeprefix("torch.")):
        products += ": this machine has no instruction for bfloat16, with which they would be slower"
    return Part("layers", "cpp", f"without gradients all in one call, products in {products}")


def report(model: nn.Module) -> Report:
    """Which path every part of the model takes, and why; which calls took the original path.

    Args:
        model: swapped or not.
    """
    parameter = next(model.parameters(), None)
    encoders = tuple(
        EncoderReport(
            name=name,
            class_name=type(module).__name__,
            parts=_parts(module),
            calls=dict(module.__dict__.get("bert_fast_calls", {})),
        )
        for name, module in swapped_encoders(model)
    )
    notes = []
    if is_off():
        notes.append("BERT_FAST=off is set: swap does nothing")
    if not any(isinstance(module, Swapped) for module in model.modules()):
        notes.append("nothing is swapped: every call takes the original path")
    return Report("no device" if parameter is None else str(parameter.device), encoders, tuple(notes))
