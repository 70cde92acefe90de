"""What the tests of tasks share: folders of tiny BERT models with random weights and a tokenizer of some words."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

transformers: Any = pytest.importorskip("transformers")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

GOOD = ("good", "fine", "great", "lovely", "bright")
BAD = ("bad", "poor", "awful", "dull", "grim")
OTHER = ("the", "a", "film", "book", "day", "was", "is", "very", "and", "not", "with", "of")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 48,
    "initializer_range": 0.05,  # with BERT's own 0.02 models of this size learn nothing in a few steps
}


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 1 to 12 words, no two the same, each with one word of GOOD or of BAD, and which of them as its label."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        label, words = draw.choice((("good", GOOD), ("bad", BAD)))
        text = [*draw.choices(OTHER, k=draw.randrange(12)), draw.choice(words)]
        draw.shuffle(text)
        found[" ".join(text)] = label
    return list(found.items())


def save_tsv(file: Path, rows: Iterable[Sequence[object]], header: Sequence[str] = ("text", "label")) -> Path:
    """Writes a table."""
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in (header, *rows)), encoding="utf-8")
    return file


def save_tokenizer(folder: Path, words: Sequence[str] = (*GOOD, *BAD, *OTHER), max_length: int = 48) -> None:
    """A lower-casing WordPiece tokenizer of whole words, letters and digits, as folders of BERT have it."""
    letters = [mark + letter for mark in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"]
    vocabulary = list(dict.fromkeys((*SPECIAL, *(word.lower() for word in words), *letters)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def save_encoder(
    folder: Path,
    words: Sequence[str] = (*GOOD, *BAD, *OTHER),
    *,
    architecture: str = "BertModel",
    seed: int = 1,
    **config: Any,
) -> Path:
    """Writes a BERT and its tokenizer.

    Args:
        folder: is made.
        words: that are one token each.
        architecture: class of transformers, such as "BertForSequenceClassification".
        seed: of the weights.
        config: stronger than SIZES, such as num_labels or hidden_dropout_prob.
    """
    save_tokenizer(folder, words, config.get("max_position_embeddings", SIZES["max_position_embeddings"]))
    count = len((folder / "vocab.txt").read_text(encoding="utf-8").split())
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(transformers.BertConfig(vocab_size=count, **{**SIZES, **config}))
    model.save_pretrained(folder)
    return folder
