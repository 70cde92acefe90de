"""Tiny sentence-transformers models with random weights, and texts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import transformers

sentence_transformers: Any = pytest.importorskip("sentence_transformers", minversion="6.0")
base: Any = pytest.importorskip("sentence_transformers.base.modules")
dense: Any = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

COLOURS, ANIMALS, VERBS = ["red", "blue", "green", "white"], ["cat", "dog", "bird", "fish"], ["runs", "sleeps", "eats"]
WORDS = [*COLOURS, *ANIMALS, *VERBS, "in", "on", "under", "the", "a", "query", ":", "why"]

TEXTS = [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(1 + 5 * i % 13)) for i in range(23)]
"""Of 1 to 13 words, in no order."""


def save_encoder(folder: Path, name: str = "BertModel", **config: Any) -> str:
    """A class of transformers with its tokenizer in a folder, which must be new."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    options = {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 48,
        "initializer_range": 0.4,
        **sizes,
        **config,
    }
    transformers.set_seed(3)
    getattr(transformers, name)(transformers.BertConfig(**options)).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=48).save_pretrained(folder)
    return str(folder)


def embedder(encoder: str, *more: Any, pooling: Any = "mean", include_prompt: bool = True, **options: Any) -> Any:
    """A SentenceTransformer on a folder of save_encoder."""
    modules = [base.Transformer(encoder), dense.Pooling(32, pooling, include_prompt=include_prompt), *more]
    return sentence_transformers.SentenceTransformer(modules=modules, device="cpu", **options)
