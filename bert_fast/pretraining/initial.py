"""The weights that a run starts from, where they are not drawn."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from .. import checkpoint
from ..config import ACTIVATIONS, BertConfig
from ..heads import BertForPreTraining
from . import vocabulary
from .config import ConfigError


def start_from(folder: Path, model: BertForPreTraining, tokens: vocabulary.Vocabulary) -> None:
    """Gives the model the weights of a checkpoint that is of its sizes and its vocabulary.

    Raises:
        ConfigError: it is not, or cannot be read.
    """
    try:
        weights, theirs = checkpoint.load(folder), BertConfig.from_pretrained(folder)
        words = vocabulary.load(folder).tokenizer.get_vocab() if _has_vocabulary(folder) else None
        checkpoint.apply(model, weights)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.init is {folder}, which cannot be started from: {error}") from None
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_act"):
        mine, other = getattr(model.config, name), getattr(theirs, name)
        if ACTIVATIONS.get(mine, mine) != ACTIVATIONS.get(other, other):
            raise ConfigError(f"model.{name} is {mine}; model.init, {folder}, has {other}")
    if words is not None and words != tokens.tokenizer.get_vocab():
        raise ConfigError(f"model.init is {folder}, whose vocabulary is not the corpus'; prepare it with that one")


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
