"""bert-fast fill-mask: what a masked language model puts for [MASK]. Also reads models for bert-fast pretrain eval."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from bert_fast import checkpoint
from bert_fast.config import BertConfig
from bert_fast.functional import IGNORED
from bert_fast.heads import BertForMaskedLM, BertForPreTraining
from bert_fast.pretraining.vocabulary import PREFIX, Vocabulary
from bert_fast.pretraining.vocabulary import load as load_vocabulary

MASK = "[MASK]"
PAIRS = {"nsp.weight", "nsp.bias", "bert.pooler.weight", "bert.pooler.bias"}

Model = TypeVar("Model", BertForMaskedLM, BertForPreTraining)


class ModelError(ValueError):
    """A folder without a masked language model that can be read."""


class TextError(ValueError):
    """A text that cannot be filled in."""


class Candidate(NamedTuple):
    """
    Attributes:
        probability: in [0, 1].
        token: as the vocabulary has it.
    """

    probability: float
    token: str


# ---- models ----------------------------------------------------------------------------------------------------------


def load_model(folder: Path, kind: type[Model]) -> tuple[Model, bool]:
    """A BERT with its masked-LM head, in evaluation mode, and whether its folder has a next-sentence head.

    Args:
        folder: a Hugging Face checkpoint.
        kind: class of the model; a next-sentence head that the folder lacks is left as initialised.

    Raises:
        ModelError: there is no BERT, it cannot be read, or it has no masked-LM head.
    """
    try:
        weights = checkpoint.load(folder)
        model = kind(BertConfig.from_pretrained(folder))
        found = {checkpoint.to_ours(name) for name in weights}
        if checkpoint.TIED_BIAS in weights:
            found.add("mlm.bias")
        lacking = [name for name in model.state_dict() if name.startswith("mlm.") and name not in found]
        if lacking:
            theirs = ", ".join(str(checkpoint.to_hugging_face(name)) for name in lacking)
            raise ValueError(
                f"no masked-LM head ({theirs}); weights of BertForPreTraining or BertForMaskedLM are needed"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is initialised, which the caller learns from the result
            checkpoint.apply(model, weights)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ModelError(f"{folder} cannot be used: {str(error).splitlines()[0]}") from None
    return model.eval(), found >= PAIRS


# ---- texts -----------------------------------------------------------------------------------------------------------


def read_texts(file: Path) -> dict[str, str]:
    """The lines of a file that are not empty, by where they are.

    Raises:
        TextError: the file is not UTF-8, or has no text.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8 at byte {error.start}") from None
    texts = {f"{file}:{number}": line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not texts:
        raise TextError(f"{file} holds no text")
    return texts


def encode(texts: dict[str, str], model: BertForMaskedLM, vocabulary: Vocabulary) -> list[torch.Tensor]:
    """(tokens,) int64 of each text, with [CLS] and [SEP]; [MASK] and the like in a text are the special tokens.

    Args:
        texts: by where they are, for messages.
        model: that will read them.
        vocabulary: of the model.

    Raises:
        TextError: a text has no [MASK], or more tokens than the model has positions.
    """
    vocabulary.tokenizer.encode_special_tokens = False
    longest = model.config.max_position_embeddings
    encoded = []
    for place, text in texts.items():
        ids = vocabulary.tokenizer.encode(text).ids
        if vocabulary.mask_id not in ids:
            raise TextError(f"{place} has no {MASK}: {text[:60]!r}; the token to be found must be written {MASK}")
        if len(ids) > longest:
            raise TextError(f"{place} has {len(ids)} tokens; the model takes {longest} at most")
        encoded.append(torch.tensor(ids))
    return encoded


def candidates(model: BertForMaskedLM, vocabulary: Vocabulary, ids: torch.Tensor, top: int) -> list[list[Candidate]]:
    """The most probable tokens for each mask, the best first.

    Args:
        model: the masked language model.
        vocabulary: of its tokens.
        ids: (tokens,) int64.
        top: how many.
    """
    labels = torch.where(ids == vocabulary.mask_id, ids, IGNORED)
    with torch.no_grad():
        logits = model(ids[None], labels=labels[None]).logits  # (masks, vocab_size)
    # Models may have more rows than there are tokens.
    probabilities = logits.float().softmax(-1)[:, : vocabulary.size]
    best = probabilities.topk(min(top, vocabulary.size))
    return [
        [Candidate(value, str(vocabulary.tokenizer.id_to_token(index))) for value, index in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def filled(text: str, tokens: Sequence[str]) -> str:
    """The text with the tokens for its masks; "##s" goes without its signs to the end of what is before it."""
    result, *rest = text.split(MASK)
    for token, part in zip(tokens, rest, strict=True):
        is_continuation = token.startswith(PREFIX) and token != PREFIX
        result = result.rstrip() + token.removeprefix(PREFIX) if is_continuation else result + token
        result += part
    return result


# ---- the command -----------------------------------------------------------------------------------------------------


def run(console: Console, folder: Path, texts: dict[str, str], top: int) -> None:
    """Prints a table for each mask, and each text with the best tokens.

    Args:
        console: where to.
        folder: a Hugging Face checkpoint with its vocabulary.
        texts: by where they are, for messages.
        top: rows of a table.

    Raises:
        ModelError, TextError: see load_model and encode.
        FileNotFoundError, ValueError: the folder has no vocabulary, or another model's.
    """
    vocabulary = load_vocabulary(folder)
    model, _ = load_model(folder, BertForMaskedLM)
    if vocabulary.size > model.config.vocab_size:
        raise ModelError(
            f"{folder} has a vocabulary of {vocabulary.size} tokens; its model has only {model.config.vocab_size}"
        )
    for text, ids in zip(texts.values(), encode(texts, model, vocabulary), strict=True):
        found = candidates(model, vocabulary, ids, top)
        for number, rows in enumerate(found, 1):
            title = MASK if len(found) == 1 else f"{MASK} {number}"
            table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            table.add_column("probability", justify="right")
            table.add_column("token")
            for row in rows:
                table.add_row(f"{row.probability:.4f}", Text(row.token))
            console.print(table)
        best = filled(text, [rows[0].token for rows in found])
        console.print(best, markup=False, highlight=False, soft_wrap=True)
