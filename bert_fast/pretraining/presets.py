"""Presets, and the defaults that depend on other keys, under what the user sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import Batch


def _sizes(layers: int, hidden_size: int) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": hidden_size}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"model": _sizes(2, 128)},
    "mini": {"model": _sizes(4, 256)},
    "small": {"model": _sizes(4, 512)},
    "medium": {"model": _sizes(8, 512)},
    "base": {"model": _sizes(12, 768)},
    "large": {"model": _sizes(24, 1024)},
    "cramming": {
        "data": {"instances": "full"},
        "masking": {"rate": 0.25},
        "model": {
            **_sizes(12, 768),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 128,
        },
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.98], "eps": 1e-12, "clip_norm": 0.5},
        "schedule": {"kind": "trapezoidal", "warmup": 0.5, "decay": 0.5, "minutes": 1440},
        "batch": {"tokens_per_step": 4096 * 128},
    },
}
"""What each preset sets unless the user does.

The sizes are those of Turc et al. 2019, table 1, and Devlin et al. 2018. "cramming" is the recipe of Geiping and
Goldstein 2023 for one GPU and one day, as far as the classic architecture goes: no dropout, a one-cycle learning rate,
sequences of 128 tokens. It computes in 16 bits there: choose train.precision for the device.
"""

LENGTHS = ("steps", "minutes")  # of a run, which has one of them


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The user's values on top of the preset's, with the defaults that depend on other keys.

    Where such another key is bad, anything good stands in for it, so that it alone is reported.
    """
    merged: dict[str, Any] = {"data": {}, "schedule": {}, "phases": [], **merge(_preset(values), values)}
    if isinstance(merged["model"], Mapping):
        merged["model"] = {**_derived_sizes(merged), **merged["model"]}
    if isinstance(merged["phases"], (list, tuple)):
        tokens = {"tokens_per_step": _size(merged, "batch", "tokens_per_step", Batch().tokens_per_step)}
        phases = merged["phases"] or [{"length": _size(merged, "model", "max_position_embeddings", 512)}]
        merged["phases"] = [{**tokens, **phase} if isinstance(phase, Mapping) else phase for phase in phases]
    return merged


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Both, table by table; high wins, and its steps or minutes replace whichever low has."""
    merged = dict(low)
    for key, value in high.items():
        before = low.get(key)
        if not isinstance(before, Mapping) or not isinstance(value, Mapping):
            merged[key] = value
            continue
        if any(value.get(name) is not None for name in LENGTHS):
            before = {name: old for name, old in before.items() if name not in LENGTHS}
        merged[key] = merge(before, value)
    return merged


def _preset(values: Mapping[str, Any]) -> Mapping[str, Any]:
    model = values.get("model")
    name = model.get("preset") if isinstance(model, Mapping) else None
    return PRESETS.get(name if isinstance(name, str) else "base", PRESETS["base"])


def _derived_sizes(values: Mapping[str, Any]) -> dict[str, int]:
    hidden_size = _size(values, "model", "hidden_size", 64)
    sizes = {"intermediate_size": 4 * hidden_size}
    if hidden_size % 64 == 0:
        sizes["num_attention_heads"] = hidden_size // 64
    return sizes


def _size(values: Mapping[str, Any], section: str, key: str, otherwise: int) -> int:
    """The value of a key, or the other where it has none or no size."""
    table = values.get(section)
    value = table.get(key) if isinstance(table, Mapping) else None
    return value if type(value) is int and value > 0 else otherwise
