"""BertConfig: what it takes, what it refuses, and Hugging Face's configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bert_fast.config import ACTIVATIONS, BertConfig


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertConfig().to_dict()
    ours = BertConfig().to_dict()
    assert {name: theirs[name] for name in ours if name in theirs} == {
        name: value for name, value in ours.items() if name in theirs
    }
    assert len(ours.keys() & theirs.keys()) >= 13


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size is 0; it must be at least 1"),
        ({"hidden_size": -3}, r"hidden_size is -3"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        ({"type_vocab_size": 0}, r"type_vocab_size is 0"),
        ({"hidden_size": 50, "num_attention_heads": 3}, r"hidden_size is 50 and num_attention_heads is 3"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob is 1.0; it must lie in \[0, 1\)"),
        ({"attention_probs_dropout_prob": -0.1}, r"attention_probs_dropout_prob is -0.1"),
        ({"classifier_dropout": 1.5}, r"classifier_dropout is 1.5"),
        ({"hidden_act": "swish"}, r"hidden_act is 'swish'; it must be one of gelu"),
        ({"pad_token_id": 30522}, r"pad_token_id is 30522; it must lie in \[0, 30522\)"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BertConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_other_architectures_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict(values)


def test_from_dict_takes_what_it_knows() -> None:
    config = BertConfig.from_dict(
        {"hidden_size": 132, "num_attention_heads": 3, "torchscript": True, "vocab_size": None}
    )
    assert (config.hidden_size, config.head_size, config.vocab_size) == (132, 44, 30522)


def test_round_trip(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=132, num_attention_heads=3, hidden_act="gelu_new", classifier_dropout=0.3)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert BertConfig.from_pretrained(tmp_path) == config


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        BertConfig.from_pretrained(tmp_path)


def test_activations_are_what_transformers_computes() -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    for name, approximate in ACTIVATIONS.items():
        expected = torch.nn.functional.gelu(x, approximate=approximate)
        torch.testing.assert_close(transformers.activations.ACT2FN[name](x), expected)
