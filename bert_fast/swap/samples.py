"""A small model with random weights of every class that is known, and ragged batches with labels for it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core import argument_names
from .family import Family

SEED = 0

SIZES: Mapping[str, int] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 160,
    "max_position_embeddings": 61,
    "type_vocab_size": 2,
}

# By family: what makes a small model have all that a large one has.
EXTRAS: Mapping[str, Mapping[str, Any]] = {
    "ELECTRA": {"embedding_size": 40},
    "ModernBERT": {"global_attn_every_n_layers": 2, "local_attention": 10},
}

# torch's own fast path takes even numbers alone.
TORCH_HEADS = 4

LABELS = 3

# Tokens of each text, in twos for multiple choice. No output has as many labels as a batch has columns.
LENGTHS = (23, 5, 1, 17, 11, 22, 2, 14, 8, 20, 3, 19, 7, 23, 13, 4)

RAGGED, SCATTERED = LAYOUTS = ("padded at the end", "any mask")

DECODER = "is_decoder=True"

# Why some samples may take their original path; every other one must be fast.
LISTED_DECODER = "the model is a decoder"
SIDE_BY_SIDE = "a text's tokens are not side by side, as relative positions need them"
LISTED: Mapping[tuple[str, str], str] = {(SCATTERED, "MPNet"): SIDE_BY_SIDE, (SCATTERED, "ModernBERT"): SIDE_BY_SIDE}

Batch = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """
    Attributes:
        family: of its encoder.
        name: its class, and what is special about it.
        make: builds it, always with the same weights, in evaluation mode.
        layout: of its batch.
        listed: why it may take the original path; None: it must not.
    """

    family: Family
    name: str
    make: Callable[[], nn.Module]
    layout: str = RAGGED
    listed: str | None = None

    def tokens(self) -> Tensor:
        """(texts, columns) bool."""
        tokens = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        if self.layout == SCATTERED:
            tokens[1::2] = tokens[1::2].flip(1)
            tokens[::3, 2::3] = False
        return tokens

    def batch(self, model: nn.Module) -> tuple[Batch, Tensor]:
        """The arguments of model.forward, and where their tokens are. Hidden places hold ids like any other, so that a
        leak shows."""
        tokens, generator = self.tokens(), torch.Generator().manual_seed(SEED + 1)
        names = argument_names(type(model).forward)
        if "src" in names:
            source = _draw(*tokens.shape, SIZES["hidden_size"], generator=generator)
            return {"src": source, "src_key_padding_mask": ~tokens}, tokens
        ids = torch.randint(5, SIZES["vocab_size"], tokens.shape, generator=generator)
        types = torch.randint(SIZES["type_vocab_size"], tokens.shape, generator=generator)
        batch: Batch = {"input_ids": ids, "attention_mask": tokens.long()}
        if "token_type_ids" in names and getattr(model.config, "type_vocab_size", 0) > 1:
            batch["token_type_ids"] = types
        if type(model).__name__.endswith("MultipleChoice"):
            batch = {name: x.unflatten(0, (-1, 2)) for name, x in batch.items()}
            tokens = tokens.unflatten(0, (-1, 2))
        return batch | _labels(model, batch, tokens), tokens


def _draw(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _labels(model: nn.Module, batch: Batch, tokens: Tensor) -> Batch:
    """Labels of the form that the head's outputs call for, none of them at padding and some tokens without one."""
    names, generator = argument_names(type(model).forward), torch.Generator().manual_seed(SEED + 2)
    texts = len(tokens)
    if "start_positions" in names:
        ends = tokens.sum(1) - 1
        return {"start_positions": ends // 2, "end_positions": ends}
    if "labels" not in names:
        return {}
    with torch.no_grad():
        scores = model(**batch)[0]
    is_for_tokens = scores.shape[:2] == tokens.shape
    classes = scores.shape[-1] if scores.dim() == 3 or not is_for_tokens else 2
    labels = torch.randint(classes, tokens.shape if is_for_tokens else (texts,), generator=generator)
    if is_for_tokens and scores.dim() == 3:
        has_none = torch.rand(tokens.shape, generator=generator) < 0.3
        labels = labels.masked_fill(has_none | ~tokens, -100)
    result = {"labels": labels}
    if "next_sentence_label" in names:
        result["next_sentence_label"] = torch.randint(2, (texts,), generator=generator)
    return result


def randomise(model: nn.Module) -> nn.Module:
    """Gives the model weights that are nobody's defaults; returns it."""
    generator = torch.Generator().manual_seed(SEED)
    seen: set[Tensor] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            values = _draw(*parameter.shape, generator=generator)
            if parameter.dim() == 1:
                values = 0.2 * values + (1.0 if name == "weight" else 0.05)
            else:
                values *= 0.4 if isinstance(module, nn.Embedding) else 1.2 / parameter.shape[1] ** 0.5
            parameter.data.copy_(values)
    return model


# ---- transformers ----------------------------------------------------------------------------------------------------


def is_of_transformers(family: Family) -> bool:
    return family.module.startswith("transformers.")


def model_classes(family: Family) -> list[type[nn.Module]]:
    """The encoder's class, then all others that the family's module offers as models, by name."""
    from transformers import PreTrainedModel

    module = importlib.import_module(family.module)
    offered = [getattr(module, name) for name in sorted(module.__all__)]
    base: Any = PreTrainedModel
    classes: list[Any] = [x for x in offered if isinstance(x, type) and issubclass(x, base)]
    classes = [cls for cls in classes if cls.forward is not base.forward]
    return sorted(classes, key=lambda cls: cls.__name__ != family.encoder)


def config_of(family: Family, cls: Any, **others: Any) -> Any:
    """A small configuration without dropout."""
    defaults = cls.config_class().to_dict()
    names = getattr(cls.config_class, "attribute_map", {})
    sizes = {names.get(name, name): size for name, size in SIZES.items()}
    rates = {name: 0.0 for name, rate in defaults.items() if "dropout" in name and isinstance(rate, float)}
    special = {
        name: 1
        for name, number in defaults.items()
        if name.endswith("token_id") and isinstance(number, int) and number >= SIZES["vocab_size"]
    }
    known = {name: size for name, size in sizes.items() if name in defaults}
    return cls.config_class(**known, **rates, **special, **EXTRAS.get(family.name, {}), **others)


def _make(family: Family, cls: Any, **others: Any) -> nn.Module:
    labels = {"num_labels": LABELS} if cls.__name__.endswith(("SequenceClassification", "TokenClassification")) else {}
    model: nn.Module = cls(config_of(family, cls, **labels, **others))
    return randomise(model).eval()


def _of_transformers(family: Family) -> Iterator[Sample]:
    encoder, *heads = model_classes(family)
    for cls in (encoder, *heads):
        yield Sample(family, cls.__name__, functools.partial(_make, family, cls))
    make, listed = functools.partial(_make, family, encoder), LISTED.get((SCATTERED, family.name))
    yield Sample(family, f"{encoder.__name__}, {SCATTERED}", make, SCATTERED, listed)
    for cls in heads:
        if cls.__name__.endswith(("ForCausalLM", "LMHeadModel")):
            make = functools.partial(_make, family, cls, is_decoder=True)
            yield Sample(family, f"{cls.__name__}, {DECODER}", make, listed=LISTED_DECODER)


# ---- torch -----------------------------------------------------------------------------------------------------------


def _make_torch(family: Family, activation: str, norm_first: bool) -> nn.Module:
    width = SIZES["hidden_size"]
    layer = nn.TransformerEncoderLayer(
        width,
        TORCH_HEADS,
        SIZES["intermediate_size"],
        dropout=0.0,
        activation=activation,
        batch_first=True,
        norm_first=norm_first,
    )
    if family.encoder == "TransformerEncoderLayer":
        return randomise(layer).eval()
    norm = nn.LayerNorm(width) if norm_first else None
    return randomise(
        nn.TransformerEncoder(layer, SIZES["num_hidden_layers"], norm, enable_nested_tensor=not norm_first)
    ).eval()


def _of_torch(family: Family) -> Iterator[Sample]:
    for activation, norm_first in (("relu", False), ("gelu", True)):
        name = f"{family.encoder}, {activation}, norms {'first' if norm_first else 'last'}"
        yield Sample(family, name, functools.partial(_make_torch, family, activation, norm_first))
    make = functools.partial(_make_torch, family, "relu", False)
    yield Sample(family, f"{family.encoder}, {SCATTERED}", make, SCATTERED)


def samples(family: Family) -> list[Sample]:
    """The encoder, its heads, and what is special."""
    return list(_of_transformers(family) if is_of_transformers(family) else _of_torch(family))
