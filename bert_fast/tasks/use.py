"""Fine-tuned models in use: predictions and measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..swap import swap
from . import record
from .cross_encoders import load_cross_encoder
from .task import Model, Prediction, Task

__all__ = ["TOKENS_PER_BATCH", "Tuned", "open_cross_encoder", "open_model"]

TOKENS_PER_BATCH = 16_384


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model with its task.

    Attributes:
        task: as trained.
        model: swapped, in evaluation mode.
    """

    task: Task[Any]
    model: Model

    def predict(self, examples: Sequence[Any], tokens_per_batch: int = TOKENS_PER_BATCH) -> list[Prediction]:
        """What the model says of each example, in their order; see Task.read for examples.

        Args:
            examples: of the task.
            tokens_per_batch: of a batch of texts of about equal length.

        Raises:
            DataError: the examples do not go with what the model was trained on.
        """
        self.task.check(examples, is_labelled=False)
        return self.task.predict(self.model, examples, tokens_per_batch)

    def measure(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """How right the predictions are.

        Raises:
            DataError: the examples do not go with what the model was trained on.
        """
        self.task.check(examples)
        return self.task.measure(examples, predictions)


def open_model(
    folder: Path, task: str | None = None, *, device: torch.device | None = None, int8: bool = False, **settings: Any
) -> Tuned:
    """A fine-tuned model, swapped.

    Args:
        folder: from finetune, or of a model that was fine-tuned elsewhere, with all its weights.
        task: name of the task; None: what the folder says, or the model's head.
        device: None: a GPU if there is one.
        int8: whether products are in 8 bits, on CPUs; see swap.
        settings: stronger than those with which the model was trained, such as columns.

    Raises:
        ValueError: the folder says of no task, or of another, or its run has not come to its end; a setting is not
            allowed.
        OSError: the model cannot be read.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = record.load(folder, task, **settings)
    model = found.load(str(folder))
    model.module.eval().to(device)
    swap(model.module, int8=int8)
    return Tuned(found.of_model(model), model)


def open_cross_encoder(
    source: str, *, max_length: int | None = None, device: torch.device | str | None = None, int8: bool = False
) -> Model:
    """A cross-encoder, swapped, in evaluation mode, for rerank.

    Args:
        source: folder, or name on the hub.
        max_length: tokens of the longest pair; None: what the model takes.
        device: None: a GPU if there is one.
        int8: see open_model.

    Raises:
        OSError, ValueError: sentence-transformers' own; there is no such model.
    """
    model = load_cross_encoder(source, max_length)
    model.module.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    swap(model.module, int8=int8)
    return model
