"""How a model is fine-tuned, whatever the task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["Precision", "Training"]

Precision = Literal["fp32", "bf16", "fp16"]


def positive(name: str, value: float) -> None:
    """
    Raises:
        ValueError: the value is not a positive, finite number.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive")


def at_least(name: str, value: float, least: float) -> None:
    """
    Raises:
        ValueError: the value is below, or no number.
    """
    if not least <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be at least {least:g}")


def one_of(name: str, value: Any, kinds: Any) -> None:
    """
    Raises:
        ValueError: the value is none of a Literal's.
    """
    if value not in get_args(kinds):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(kinds))}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the loop, with the recommendations of Devlin et al. 2018, appendix A.3, as defaults.

    Attributes:
        epochs: passes over the training examples.
        batch_size: examples of a batch on each device.
        accumulation: batches of an optimizer step.
        learning_rate: of AdamW, its highest value.
        warmup: share of the steps in which it rises to that; afterwards it falls linearly to 0.
        weight_decay: of everything but biases and LayerNorm.
        max_grad_norm: to which gradients are clipped.
        precision: of autocast; fp32 means none. fp16 needs a GPU.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        seed: of new weights, order and dropout.
        eval_steps: optimizer steps between evaluations; None: one an epoch.
        patience: evaluations without a better one after which training stops; None: it never stops early.
        tokens_per_batch: of a batch in evaluation.
        keep: checkpoints that stay, the best among them.
        tensorboard: whether curves are written for TensorBoard.
        workers: processes that load batches; 0: none.

    Raises:
        ValueError: a value is not allowed.
    """

    epochs: float = 3.0
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    seed: int = 1
    eval_steps: int | None = None
    patience: int | None = None
    tokens_per_batch: int = 16_384
    keep: int = 2
    tensorboard: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            positive(name, getattr(self, name))
        for name in ("batch_size", "accumulation", "tokens_per_batch", "keep"):
            at_least(name, getattr(self, name), 1)
        for name in ("weight_decay", "seed", "workers"):
            at_least(name, getattr(self, name), 0)
        for name in ("eval_steps", "patience"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}; it must be within 0 and 1")
        one_of("precision", self.precision, Precision)
