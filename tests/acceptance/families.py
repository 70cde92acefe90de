"""transformers' own tests of models, for every family that bert_fast is to know; run.py runs them.

The sizes are those of transformers' tests: 13 texts of 7 tokens, 2 layers, 32 features, 4 heads, 99 words.
"""

from __future__ import annotations

import importlib
import os
import random
import unittest
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

try:
    common: Any = importlib.import_module("transformers_tests.test_modeling_common")
except ImportError as error:
    if error.name is None or not error.name.startswith("transformers_tests"):
        raise
    pytest.skip("transformers' tests are not here: run.py fetches them", allow_module_level=True)

if "BERT_FAST_ACCEPTANCE_CALLS" in os.environ:
    import swapping

    swapping.install(Path(os.environ["BERT_FAST_ACCEPTANCE_CALLS"]))

TOKEN_HEADS = ("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")
TEXT_HEADS = ("ForSequenceClassification", "ForMultipleChoice")

DROPOUTS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        prefix: of the classes' names.
        heads: the rest of them, in which "Model" is the encoder alone.
        config: what the configuration needs beyond the sizes.
        has_types: whether texts have token types.
        has_holes: whether masks hide any place but the first, not only the end of a text.
    """

    prefix: str
    heads: tuple[str, ...] = ("Model", *TOKEN_HEADS, *TEXT_HEADS)
    config: Mapping[str, Any] = field(default_factory=lambda: {"intermediate_size": 37, **DROPOUTS})
    has_types: bool = True
    has_holes: bool = True

    @property
    def test_class(self) -> str:
        return f"{self.prefix}ModelTest"

    def classes(self) -> tuple[Any, ...]:
        return tuple(getattr(transformers, f"{self.prefix}{head}") for head in self.heads)


ROBERTA_HEADS = (*Family.heads, "ForCausalLM")

FAMILIES: dict[str, Family] = {
    "bert": Family("Bert", (*Family.heads, "ForPreTraining", "ForNextSentencePrediction", "LMHeadModel")),
    "roberta": Family("Roberta", ROBERTA_HEADS),
    "distilbert": Family(
        "DistilBert", config={"hidden_dim": 37, "dropout": 0.1, "attention_dropout": 0.1}, has_types=False
    ),
    "electra": Family("Electra", (*Family.heads, "ForPreTraining", "ForCausalLM")),
    # Relative positions are those of packed texts only where the mask leaves a text's tokens side by side.
    "mpnet": Family("MPNet", has_types=False, has_holes=False),
    "camembert": Family("Camembert", ROBERTA_HEADS),
    "xlm_roberta": Family("XLMRoberta", ROBERTA_HEADS),
    "modernbert": Family(
        "ModernBert",
        config={
            "intermediate_size": 37,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        has_types=False,
        has_holes=False,
    ),
}


class Tester:
    """What transformers' tests ask for the models' sizes, configuration and batch."""

    batch_size = 13
    seq_length = 7
    num_choices = 4
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99
    type_vocab_size = 16
    is_training = True

    def __init__(self, family: Family) -> None:
        self.family = family

    def get_config(self) -> Any:
        base, *_ = self.family.classes()
        types = {"type_vocab_size": self.type_vocab_size} if self.family.has_types else {}
        return base.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=512,
            **types,
            **self.family.config,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        config = self.get_config()
        ids = common.ids_tensor(shape, self.vocab_size)
        # RoBERTa's positions do not count padding's number, and with embeddings given they would count its place.
        inputs = {"input_ids": ids.masked_fill(ids == config.pad_token_id, config.pad_token_id + 1)}
        if self.family.has_types:
            inputs["token_type_ids"] = common.ids_tensor(shape, self.type_vocab_size)
        mask = common.random_attention_mask(shape)
        inputs["attention_mask"] = mask if self.family.has_holes else mask.sort(1, descending=True).values
        return config, inputs


def _set_up(self: Any) -> None:
    """Stock and swapped models are given the same weights and batches."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    common.global_rng.seed(0)
    self.model_tester = Tester(self.family)


def _prepare_for_class(self: Any, inputs: Any, model_class: Any, return_labels: bool = False) -> Any:
    """Labels for pretraining, too, of which the mixin knows nothing."""
    inputs = common.ModelTesterMixin._prepare_for_class(self, inputs, model_class, return_labels)
    if return_labels and model_class.__name__.endswith("ForPreTraining"):
        tester = self.model_tester
        inputs["labels"] = torch.zeros(tester.batch_size, tester.seq_length, dtype=torch.long)
        if self.family.prefix == "Bert":
            inputs["next_sentence_label"] = torch.zeros(tester.batch_size, dtype=torch.long)
    return inputs


def _test_class(family: Family) -> type[unittest.TestCase]:
    classes = family.classes()
    generates = any(cls.can_generate() for cls in classes)
    mixins = (common.ModelTesterMixin, *([common.GenerationTesterMixin] if generates else []))
    attributes = {
        "__module__": __name__,
        "family": family,
        "all_model_classes": classes,
        "setUp": _set_up,
        "_prepare_for_class": _prepare_for_class,
    }
    return type(family.test_class, (*mixins, unittest.TestCase), attributes)


globals().update({family.test_class: _test_class(family) for family in FAMILIES.values()})
