"""Looking a model through for the parts of its encoder layers, to which nobody may listen, and running them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import engine
from .. import nn as fast
from ..masking import PackedBatch
from .family import Rounding

ACTIVATION_CLASSES: dict[str, fast.Activation] = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
}


class Layer(NamedTuple):
    """The parts of an encoder layer; see nn.EncoderLayerParts."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    attention_norm: nn.Module
    intermediate: nn.Module
    output: nn.Module
    output_norm: nn.Module
    activation: fast.Activation
    attention_dropout_p: float
    attention_output_dropout: nn.Module
    output_dropout: nn.Module
    head_size: int
    inner_dropout: nn.Module = fast.NO_DROPOUT
    norm_first: bool = False
    gate: nn.Module | None = None
    window: int | None = None
    rotation: int | None = None


class Refused(Exception):  # noqa: N818
    """A module within the encoder cannot be stepped over; the arguments are the module and what is the matter."""

    def text(self, root: nn.Module) -> str:
        """With the module's name in root."""
        culprit, matter = self.args
        name = next((name for name, module in root.named_modules() if module is culprit), "a module")
        return f"{name or type(culprit).__name__} {matter}"


# Hooks that mean the same on packed rows: transformers' recorders of outputs, asleep on the fast path, and the one that
# gradient checkpointing and PEFT put on the word embeddings.
HARMLESS_HOOKS = ("output_capturing_hook", "make_inputs_require_grads", "make_inputs_require_grad")


def is_listened_to(module: nn.Module) -> bool:
    """Whether somebody has hooked the module, and would see packed rows there."""
    hooks = module._forward_hooks
    if hooks and any(getattr(hook, "__name__", "") not in HARMLESS_HOOKS for hook in hooks.values()):
        return True
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def leaf(parent: nn.Module, name: str) -> nn.Module:
    """A module that the fast path calls, or fuses."""
    module = parent._modules.get(name)
    if module is None:
        raise Refused(parent, f"has no {name}")
    if is_listened_to(module):
        raise Refused(module, "has hooks")
    return module


def activation_in(parent: Any, name: str) -> fast.Activation:
    """The fused form of an activation that is known to be GELU or ReLU, else the module or function itself."""
    if name not in parent._modules:
        function: fast.Activation = getattr(parent, name)
        return function
    return activation_of(leaf(parent, name))


def activation_of(module: nn.Module) -> fast.Activation:
    """The fused form of a module that is known to be GELU or ReLU, else the module itself."""
    cls = type(module)
    if "forward" in module.__dict__:
        return module
    if cls is nn.ReLU:
        return "relu"
    if cls is nn.GELU:
        return "tanh" if module.approximate == "tanh" else "none"
    if cls.__module__ == "transformers.activations":
        return ACTIVATION_CLASSES.get(cls.__name__, module)
    return module


def stack_of(model: Any, parts: list[Layer]) -> engine.Stack:
    """The layers for the engine, with the products that swap was asked for."""
    rounding: Rounding | None = model.__dict__.get("bert_fast_rounding")
    if rounding is None:
        return engine.stack(parts)
    exact = frozenset(part for name in rounding.exact for part in model.get_submodule(name).modules())
    return engine.stack(parts, rounding.products, exact)


def run_layers(
    owner: nn.Module,
    stack: engine.Stack,
    layers: Sequence[Layer],
    hidden: Tensor,
    batch: PackedBatch,
    *,
    rows: Tensor | None = None,
    kept: list[Tensor] | None = None,
    **extras: Any,
) -> Tensor:
    """The last layer's output (tokens or rows, hidden_size), from the engine where it serves.

    Args:
        owner: the encoder.
        stack: its layers as the engine sees them.
        layers: the same layers.
        hidden: (tokens, hidden_size), what the first one reads.
        batch: the boundaries.
        rows: (rows,) int64, the packed rows for which the output is wanted; None: all.
        kept: receives `hidden` and every layer's output.
        extras: what else both take: bias, rotations.
    """
    outputs = None
    if not torch.compiler.is_compiling():
        outputs = engine.encode(owner, stack, hidden, batch, **extras, needs_all=kept is not None, rows=rows)
    if outputs is not None:
        if kept is not None:
            kept += [hidden, *outputs]
        return outputs[-1]
    for number, layer in enumerate(layers, 1):
        if kept is not None:
            kept.append(hidden)
        hidden = fast.encoder_layer(layer, hidden, batch, rows if number == len(layers) else None, **extras)
    if kept is not None:
        kept.append(hidden)
    return hidden if layers or rows is None else hidden.index_select(0, rows)


# Under these tensors have no values, or values that the C++ module would read and nobody record.
TRACING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def tracing_refusal() -> str | None:
    """Why no call at all is served now; None: some are."""
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return "the model is traced or exported"
    if torch._C._are_functorch_transforms_active():
        return "a function transform is active"
    if torch.compiler.is_compiling():
        return None
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in TRACING_MODES):
        return "the model is traced or exported"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None
