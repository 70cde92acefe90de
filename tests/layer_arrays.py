"""A layer without a gate as _C.Encoder.add_layer takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

NAMES = ("query", "key", "value", "attention_output", "attention_norm", "intermediate", "output", "output_norm")
PRODUCTS = tuple(name for name in NAMES if "norm" not in name)
ARRAY_NAMES = (*PRODUCTS, "attention_norm", "output_norm")

GATE = 5  # its place before "output"


def layer_arrays(weights: Mapping[str, tuple[Tensor, Tensor]]) -> list[Any]:
    """Weight and bias of each part; the caller keeps the tensors."""
    arrays: list[Any] = [part.contiguous().numpy() for name in ARRAY_NAMES for part in weights[name]]
    return [*arrays[: 2 * GATE], None, None, *arrays[2 * GATE :]]


def layer_flags(flags: Sequence[bool]) -> list[bool]:
    """Of PRODUCTS."""
    return [*flags[:GATE], False, *flags[GATE:]]
