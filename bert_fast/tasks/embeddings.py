"""Vectors of texts by sentence-transformers' models, in batches of about equal lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from .batching import budget_batches
from .hugging_face import is_evaluating, longest, quiet
from .task import Model

__all__ = [
    "default_prompt",
    "embed_texts",
    "feature_batches",
    "is_cosine",
    "limit_length",
    "load_sentence_transformer",
    "nearest",
]

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

CHUNK = 2048  # texts that are tokenised together


def load_sentence_transformer(source: str, max_length: int | None = None) -> Model:
    """A SentenceTransformer in float32; a plain encoder gets mean pooling, as sentence-transformers does it.

    Args:
        source: a folder, which is read without a network, or a name on the hub.
        max_length: tokens of the longest text; None: as the model says.

    Raises:
        OSError, ValueError: sentence-transformers' own; there is no such model, or it has no transformer, or fewer
            positions than `max_length`.
    """
    from sentence_transformers import SentenceTransformer

    is_local = Path(source).is_dir()
    with quiet():
        module = SentenceTransformer(
            source, device="cpu", local_files_only=is_local, model_kwargs={"dtype": torch.float32}
        )
    if module.transformers_model is None:
        raise ValueError(f"{source} holds a SentenceTransformer of {type(module[0]).__name__}, not of a transformer")
    limit_length(module, max_length)
    return Model(module, module.tokenizer)


def limit_length(module: Any, max_length: int | None) -> None:
    """Has a SentenceTransformer or a CrossEncoder cut its input at so many tokens, or at what it says itself.

    Raises:
        ValueError: the model has fewer positions.
    """
    if max_length is not None:
        module.max_seq_length = max_length
    if getattr(module.config, "max_position_embeddings", None) is not None:
        module.max_seq_length = longest(Model(module, module.tokenizer), max_length)


def embed_texts(model: Model, texts: Sequence[str], tokens_per_batch: int, *, prompt: str | None = None) -> Array:
    """(texts, dimensions) float32: what SentenceTransformer.encode gives, in the order of the texts.

    Args:
        model: from load_sentence_transformer.
        texts: any number of them.
        tokens_per_batch: see budget_batches.
        prompt: what is put before each text; None: the model's default prompt, if it has one.
    """
    module: Any = model.module
    prompt = default_prompt(module) if prompt is None else prompt
    result = np.empty((len(texts), module.get_embedding_dimension()), np.float32)
    with is_evaluating(module):
        for indices, features in feature_batches(module, texts, tokens_per_batch, prompt):
            vectors = module(features)["sentence_embedding"][:, : module.truncate_dim]
            result[indices] = vectors.float().cpu().numpy()
    return result


def default_prompt(module: Any) -> str | None:
    """What a SentenceTransformer or a CrossEncoder puts before each text if nothing else is asked for."""
    return None if module.default_prompt_name is None else module.prompts[module.default_prompt_name]


def nearest(model: Model, queries: Array, documents: Array, top: int) -> list[list[tuple[int, float]]]:
    """For each query the documents that are most similar by the model's own similarity, exactly, the best first.

    Args:
        model: from load_sentence_transformer; its device does the work.
        queries: (queries, dimensions), from embed_texts.
        documents: (documents, dimensions), likewise.
        top: documents for a query, at most.

    Returns:
        rows of `documents`, with their scores.
    """
    from sentence_transformers import util

    device = next(model.module.parameters()).device
    similarity: Any = util.cos_sim if is_cosine(model) else util.dot_score
    with torch.inference_mode():
        found = util.semantic_search(
            torch.from_numpy(queries).to(device),
            torch.from_numpy(documents).to(device),
            top_k=top,
            score_function=similarity,
        )
    return [[(int(hit["corpus_id"]), float(hit["score"])) for hit in hits] for hits in found]


def is_cosine(model: Model) -> bool:
    """Whether a SentenceTransformer compares by cosine; if not, by dot product.

    Raises:
        ValueError: by neither.
    """
    name: Any = model.module.similarity_fn_name
    if name not in ("cosine", "dot"):
        raise ValueError(f"the model's similarity is {name!r}; it must be 'cosine' or 'dot'")
    return bool(name == "cosine")


def feature_batches(
    module: Any, inputs: Sequence[Any], tokens: int, prompt: str | None
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """The inputs' indices and the features of each batch, on the model's device, the longest first.

    Args:
        module: a SentenceTransformer or a CrossEncoder.
        inputs: texts, or tuples of two.
        tokens: see budget_batches.
        prompt: what is put before each.
    """
    device = next(module.parameters()).device
    order = sorted(range(len(inputs)), key=lambda index: -_characters(inputs[index]))
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        features = module.preprocess([inputs[index] for index in chunk], prompt=prompt)
        mask = features["attention_mask"]
        for rows in budget_batches(mask.sum(1).tolist(), tokens):
            columns = mask[rows].any(0).nonzero()[:, 0]  # padding may be on the left
            part = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
            yield (
                [chunk[row] for row in rows],
                {
                    name: value[rows, part].to(device) if getattr(value, "shape", None) == mask.shape else value
                    for name, value in features.items()
                },
            )


def _characters(texts: str | Sequence[str]) -> int:
    return len(texts) if isinstance(texts, str) else sum(len(text) for text in texts)
