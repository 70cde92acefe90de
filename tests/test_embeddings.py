"""Vectors and scores in batches by tokens, beside what sentence-transformers itself computes, text by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401
from sentence_models import TEXTS, base, embedder, save_encoder, sentence_transformers

import bert_fast
from bert_fast.tasks.cross_encoders import cross_scores, load_cross_encoder
from bert_fast.tasks.embeddings import embed_texts, is_cosine, load_sentence_transformer, nearest
from bert_fast.tasks.task import Model

PROMPT = "query : why "
PAIRS = [(TEXTS[i], TEXTS[(7 * i + 2) % len(TEXTS)]) for i in range(len(TEXTS))]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "cross", "BertForSequenceClassification", num_labels=1)


def saved(module: Any, folder: Path) -> str:
    module.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


def one_by_one(module: Any, texts: list[str], **options: Any) -> Any:
    return np.stack([module.encode([text], show_progress_bar=False, **options)[0] for text in texts])


def dense(width: int) -> Any:
    torch.manual_seed(5)
    return base.Dense(32, width)


# ---- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("prompt", [None, "", PROMPT])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "cls"},
        {"pooling": "lasttoken"},
        {"pooling": ("mean", "max")},
        {"include_prompt": False},
        {"truncate_dim": 5},
        {"prompts": {"usual": "the cat "}, "default_prompt_name": "usual"},
    ],
    ids=str,
)
def test_like_encode(encoder: str, options: dict[str, Any], prompt: str | None, is_swapped: bool) -> None:
    module = embedder(encoder, **options)
    expected = one_by_one(module, TEXTS, prompt=prompt)
    if is_swapped:
        bert_fast.swap(module)
    found = embed_texts(Model(module, module.tokenizer), TEXTS, 40, prompt=prompt)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("more", ["normalize", "dense"])
def test_further_modules(encoder: str, tmp_path: Path, more: str) -> None:
    module = embedder(encoder, base.Normalize() if more == "normalize" else dense(7))
    model = load_sentence_transformer(saved(module, tmp_path / "model"))
    found = embed_texts(model, TEXTS, 100)
    assert found.shape == (len(TEXTS), 32 if more == "normalize" else 7)
    np.testing.assert_allclose(found, one_by_one(module, TEXTS), atol=2e-5)


def test_prompt_in_and_out_of_pooling_differ(encoder: str) -> None:
    found = [
        embed_texts(Model(module, module.tokenizer), TEXTS, 100, prompt=PROMPT)
        for module in (embedder(encoder), embedder(encoder, include_prompt=False))
    ]
    assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.parametrize("tokens", [1, 17, 10_000])
def test_batches_do_not_matter(encoder: str, tokens: int) -> None:
    model = load_sentence_transformer(encoder)
    np.testing.assert_allclose(embed_texts(model, TEXTS, tokens), one_by_one(model.module, TEXTS), atol=2e-5)


def test_padding_on_the_left_is_cut(encoder: str) -> None:
    """Each text alone, as BERT's positions count padding on the left."""
    module = embedder(encoder)
    module.tokenizer.padding_side = "left"
    expected = one_by_one(module, TEXTS)
    np.testing.assert_allclose(embed_texts(Model(module, module.tokenizer), TEXTS, 1), expected, atol=2e-5)


def test_many_chunks_keep_the_order(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bert_fast.tasks.embeddings.CHUNK", 4)
    model = load_sentence_transformer(encoder)
    np.testing.assert_allclose(embed_texts(model, TEXTS, 40), one_by_one(model.module, TEXTS), atol=2e-5)


def test_no_texts(encoder: str) -> None:
    module = embedder(encoder, dense(7))
    assert embed_texts(Model(module, module.tokenizer), [], 40).shape == (0, 7)


def test_mode_stays(encoder: str) -> None:
    model = load_sentence_transformer(encoder)
    model.module.train()
    embed_texts(model, TEXTS[:2], 40)
    assert model.module.training


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_plain_encoder_gets_mean_pooling(encoder: str) -> None:
    model = load_sentence_transformer(encoder)
    pooling: Any = model.module[1]  # type: ignore[index]
    assert pooling.pooling_mode == "mean"
    assert model.module.max_seq_length == 48


def test_halves_are_loaded_as_floats(encoder: str, tmp_path: Path) -> None:
    folder = saved(embedder(encoder).bfloat16(), tmp_path / "half")
    assert {p.dtype for p in load_sentence_transformer(folder).module.parameters()} == {torch.float32}


@pytest.mark.parametrize("load", ["bi", "cross"])
def test_max_length(encoder: str, cross: str, load: str) -> None:
    def length(max_length: int | None) -> Any:
        if load == "bi":
            return load_sentence_transformer(encoder, max_length).module.max_seq_length
        return load_cross_encoder(cross, max_length).module.max_seq_length

    assert length(7) == 7
    assert length(None) == 48
    with pytest.raises(ValueError, match="max_length is 49; it must be within 3 and the model's 48"):
        length(49)


def test_max_length_may_be_more_than_the_folder_says(encoder: str, tmp_path: Path) -> None:
    module = embedder(encoder)
    module.max_seq_length = 9
    folder = saved(module, tmp_path / "model")
    assert load_sentence_transformer(folder).module.max_seq_length == 9
    assert load_sentence_transformer(folder, 30).module.max_seq_length == 30


def test_no_transformer_is_refused(encoder: str, tmp_path: Path) -> None:
    tokenizer = embedder(encoder).tokenizer.backend_tokenizer
    static = pytest.importorskip("sentence_transformers.sentence_transformer.modules").StaticEmbedding
    module = sentence_transformers.SentenceTransformer(modules=[static(tokenizer, embedding_dim=8)], device="cpu")
    with pytest.raises(ValueError, match="StaticEmbedding, not of a transformer"):
        load_sentence_transformer(saved(module, tmp_path / "static"))


# ---- search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_nearest(encoder: str, similarity: str) -> None:
    module = embedder(encoder, similarity_fn_name=similarity)
    draw = np.random.default_rng(1)
    queries, documents = (
        (draw.normal(size=(count, 6)) * draw.uniform(0.1, 9, (count, 1))).astype(np.float32) for count in (5, 31)
    )
    scores = queries @ documents.T
    if similarity == "cosine":
        scores /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(documents, axis=1)
    found = nearest(Model(module, module.tokenizer), queries, documents, 4)
    for row, hits in enumerate(found):
        assert [document for document, _ in hits] == np.argsort(-scores[row])[:4].tolist()
        np.testing.assert_allclose([score for _, score in hits], np.sort(scores[row])[::-1][:4], rtol=1e-4)


def test_other_similarity_is_refused(encoder: str) -> None:
    module = embedder(encoder, similarity_fn_name="euclidean")
    with pytest.raises(ValueError, match="similarity is 'euclidean'"):
        is_cosine(Model(module, module.tokenizer))


# ---- cross-encoders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("prompt", [None, PROMPT])
@pytest.mark.parametrize("activation", [torch.nn.Sigmoid(), torch.nn.Identity()], ids=str)
def test_like_predict(cross: str, activation: Any, prompt: str | None, is_swapped: bool) -> None:
    model = load_cross_encoder(cross)
    module: Any = model.module
    module.activation_fn = activation
    expected = [module.predict([pair], prompt=prompt, show_progress_bar=False)[0] for pair in PAIRS]
    if is_swapped:
        bert_fast.swap(module)
    found = cross_scores(model, PAIRS, 60, prompt=prompt)
    assert found.shape == (len(PAIRS),)
    assert np.ptp(found) > 0.05
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_no_pairs(cross: str) -> None:
    assert cross_scores(load_cross_encoder(cross), [], 60).shape == (0,)


def test_cut_pairs(cross: str) -> None:
    model = load_cross_encoder(cross, 9)
    expected = model.module.predict(PAIRS, show_progress_bar=False)  # type: ignore[operator]
    np.testing.assert_allclose(cross_scores(model, PAIRS, 60), expected, atol=2e-5)


def test_encoder_is_no_cross_encoder(encoder: str) -> None:
    with pytest.raises(ValueError, match="holds BertModel, which is no cross-encoder"):
        load_cross_encoder(encoder)
    model = load_cross_encoder(encoder, is_new=True)
    assert cross_scores(model, PAIRS[:3], 60).shape == (3,)


def test_many_outputs(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "three", "BertForSequenceClassification", num_labels=3)
    with pytest.raises(ValueError, match="gives a pair 3 scores; a model with one is needed"):
        load_cross_encoder(folder)
    assert cross_scores(load_cross_encoder(folder, is_new=True), PAIRS[:3], 60).shape == (3,)
