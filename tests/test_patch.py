"""patch: models come out of from_pretrained swapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    MIXED,
    any_path,
    assert_near,
    inputs,
    mask_of,
    one_thread,  # noqa: F401
    theirs,
    transformers,
)

import bert_fast
from bert_fast.swap.core import rounding_of, swapped_encoders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs("BertForSequenceClassification").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    bert_fast.unpatch()


def names(model: Any) -> list[str]:
    return [name for name, _ in swapped_encoders(model)]


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification", "BertForSequenceClassification"])
def test_from_pretrained(folder: Path, auto: str) -> None:
    cls = getattr(transformers, auto)
    before = cls.from_pretrained(folder)
    assert names(before) == []
    bert_fast.patch()
    model = cls.from_pretrained(folder)
    assert names(model) == ["" if auto == "AutoModel" else "bert"]
    assert type(model).__name__ == type(before).__name__
    batch = inputs(mask_of(MIXED))
    mask = batch["attention_mask"] != 0
    with torch.no_grad():
        found, expected = (each(**batch)[0] for each in (model, before))
    assert_near(*((x[mask] if auto == "AutoModel" else x) for x in (found, expected)))
    bert_fast.unpatch()
    assert names(cls.from_pretrained(folder)) == []
    assert names(model) != []


def test_options_and_repetition(folder: Path) -> None:
    bert_fast.patch()
    bert_fast.patch(int8=True)
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    rounding = rounding_of(model.bert)
    assert rounding is not None
    assert rounding.products == "int8"
    bert_fast.patch()
    assert rounding_of(transformers.BertForSequenceClassification.from_pretrained(folder).bert) is None
    with pytest.raises(ValueError, match="int8 and bf16 are both True"):
        bert_fast.patch(int8=True, bf16=True)


def test_loading_info(folder: Path) -> None:
    bert_fast.patch()
    model, info = transformers.BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert names(model) == ["bert"]
    assert not info["missing_keys"]


def test_unknown_models_stay(tmp_path: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=97,
        embedding_size=16,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    bert_fast.patch()
    model = transformers.AlbertModel.from_pretrained(tmp_path)
    assert names(model) == []
    batch = inputs(mask_of(MIXED))
    del batch["token_type_ids"]
    expected = model(**batch)[0]
    model.set_attn_implementation("bert_fast")  # which patch has registered
    mask = batch["attention_mask"] != 0
    assert_near(model(**batch)[0][mask], expected[mask])


def test_sentence_transformer(tmp_path: Path) -> None:
    sentence_transformers: Any = pytest.importorskip("sentence_transformers")
    from test_sentence_transformers import embedder

    del sentence_transformers
    assert callable(embedder)
    theirs("BertModel").save_pretrained(tmp_path)
    bert_fast.patch()
    assert names(transformers.AutoModel.from_pretrained(tmp_path)) == [""]


def test_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERT_FAST", "off")
    with pytest.warns(UserWarning, match="BERT_FAST=off is set"):
        bert_fast.patch()
    with any_path():
        assert names(transformers.AutoModel.from_pretrained(folder)) == []
