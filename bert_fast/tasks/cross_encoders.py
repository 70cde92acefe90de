"""Scores of pairs of texts by sentence-transformers' cross-encoders, in batches of about equal lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .embeddings import Array, default_prompt, feature_batches, limit_length
from .hugging_face import is_evaluating, quiet
from .task import Model

__all__ = ["cross_scores", "load_cross_encoder"]

HEAD = "ForSequenceClassification"


def load_cross_encoder(source: str, max_length: int | None = None, *, is_new: bool = False) -> Model:
    """A CrossEncoder with one output, in float32.

    Args:
        source: a folder, which is read without a network, or a name on the hub.
        max_length: tokens of the longest pair; None: as the model says.
        is_new: whether an encoder without a head gets a new one, whose scores mean nothing before it is trained.

    Raises:
        OSError, ValueError: sentence-transformers' own; there is no such model, or it has no head with one output;
            `max_length` is more than it has positions.
    """
    from sentence_transformers import CrossEncoder

    options = {"dtype": torch.float32, "ignore_mismatched_sizes": is_new}
    with quiet():
        module = CrossEncoder(
            source,
            device="cpu",
            local_files_only=Path(source).is_dir(),
            num_labels=1 if is_new else None,
            model_kwargs=options,
        )
    heads = module.config.architectures or ["a model without a name"]
    if not is_new and not any(name.endswith(HEAD) for name in heads):
        raise ValueError(
            f"{source} holds {', '.join(heads)}, which is no cross-encoder; it would have a name with {HEAD}"
        )
    if module.num_labels != 1:
        raise ValueError(f"{source} gives a pair {module.num_labels} scores; a model with one is needed")
    limit_length(module, max_length)
    return Model(module, module.tokenizer)


def cross_scores(
    model: Model, pairs: Sequence[tuple[str, str]], tokens_per_batch: int, *, prompt: str | None = None
) -> Array:
    """(pairs,) float32: what CrossEncoder.predict gives, in the order of the pairs.

    Args:
        model: from load_cross_encoder.
        pairs: any number of them; for reranking the query before the passage.
        tokens_per_batch: see budget_batches.
        prompt: what is put before each pair; None: the model's default prompt, if it has one.
    """
    module: Any = model.module
    prompt = default_prompt(module) if prompt is None else prompt
    result = np.empty(len(pairs), np.float32)
    with is_evaluating(module):
        for indices, features in feature_batches(module, pairs, tokens_per_batch, prompt):
            scores = module.activation_fn(module(features)["scores"].float())
            result[indices] = scores[:, 0].cpu().numpy()
    return result
