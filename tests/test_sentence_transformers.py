"""sentence-transformers and PyLate on a swapped encoder: every kind of model, beside itself unswapped."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_near, assert_same_gradients, gradients, one_thread, randomise, theirs, transformers  # noqa: F401
from torch import Tensor

import bert_fast
from bert_fast.swap import pooling as pooling_module

sentence_transformers: Any = pytest.importorskip("sentence_transformers", minversion="6.0")
base: Any = pytest.importorskip("sentence_transformers.base.modules")
dense: Any = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
losses: Any = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
sparse: Any = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
late: Any = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules")
tokenizers: Any = pytest.importorskip("tokenizers")

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "padding is waste said the tokenizer twice why 42 row of rag ##s ##ged ##x ! ? , . ( )"
VOCABULARY = {word: number for number, word in enumerate(SPECIALS + WORDS.split())}

# Of 3 to 34 tokens, in no order; no two of a batch are alike.
TEXTS = [
    " ".join(["Padding is waste, said the tokenizer (twice)!", "Why?", "42 rows of ragged rags."][i % 3 :][: 1 + i % 2])
    + " why" * (7 * i % 11)
    for i in range(17)
]

QUERIES = ["why padding", "42 rows?", "the tokenizer said twice (twice)"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def tokenizer() -> Any:
    """WordPiece with BERT's special tokens."""
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    words.normalizer = tokenizers.normalizers.BertNormalizer()
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, VOCABULARY[word]) for word in ("[CLS]", "[SEP]")],
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=37, **names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Where a checkpoint of a class of transformers lies."""

    @functools.cache
    def make(name: str) -> str:
        path: Path = tmp_path_factory.mktemp(name)
        config = {"num_labels": 1} if name == "BertForSequenceClassification" else {}
        theirs(name, vocab_size=len(VOCABULARY), **config).save_pretrained(path)
        tokenizer().save_pretrained(path)
        return str(path)

    return make


Folder = Callable[[str], str]


def transformer(path: str, **options: Any) -> Any:
    return base.Transformer(path, **options)


def embedder(folder: Folder, pooling: str = "mean", is_normal: bool = False, **options: Any) -> Any:
    modules = [transformer(folder("BertModel")), dense.Pooling(51, pooling)]
    modules += [base.Normalize()] if is_normal else []
    return sentence_transformers.SentenceTransformer(modules=modules, device="cpu", **options)


def swapped(model: Any) -> Any:
    return bert_fast.swap(copy.deepcopy(model))


def calls(model: Any) -> dict[str, int]:
    (encoder,) = bert_fast.report(model).encoders
    return dict(encoder.calls)


def encode(model: Any, texts: Any = TEXTS, **options: Any) -> Tensor:
    result = model.encode(texts, **{"convert_to_tensor": True, "show_progress_bar": False, **options})
    assert isinstance(result, Tensor)
    return result


# ---- one vector a text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("is_normal", [False, True])
def test_encode(folder: Folder, pooling: str, is_normal: bool) -> None:
    model = embedder(folder, pooling, is_normal)
    twin = swapped(model)
    assert_near(encode(twin), encode(model))
    assert calls(twin) == {"fast": 1}


@pytest.mark.parametrize("batch_size", [1, 5, 16, 100])
def test_batch_sizes(folder: Folder, batch_size: int) -> None:
    model = embedder(folder)
    twin = swapped(model)
    expected = encode(model)
    assert_near(encode(twin, batch_size=batch_size), expected)
    assert calls(twin) == {"fast": -(-len(TEXTS) // batch_size)}


@pytest.mark.parametrize("texts", [TEXTS[3], [], [""], ["", TEXTS[1], ""], ["why " * 99]], ids=str)
def test_odd_inputs(folder: Folder, texts: Any) -> None:
    model = embedder(folder)
    assert_near(encode(swapped(model), texts), encode(model, texts))


def test_outputs_by_token(folder: Folder) -> None:
    model = embedder(folder)
    found, expected = (
        each.encode(TEXTS, output_value="token_embeddings", show_progress_bar=False, batch_size=5)
        for each in (swapped(model), model)
    )
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


OPTIONS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "42 rows: "},
    "prompt_name": {"prompt_name": "query"},
    "truncate_dim": {"truncate_dim": 7},
    "normalize": {"normalize_embeddings": True},
    "numpy": {"convert_to_tensor": False},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_options(folder: Folder, name: str, include_prompt: bool) -> None:
    model = embedder(folder, prompts={"query": "why the rows ", "document": ""})
    model.set_pooling_include_prompt(include_prompt)
    twin = swapped(model)
    found, expected = (
        torch.as_tensor(each.encode(TEXTS, **{"convert_to_tensor": True, **OPTIONS[name]})) for each in (twin, model)
    )
    assert_near(found, expected)
    assert expected.shape == (len(TEXTS), 7 if name == "truncate_dim" else 51)
    assert set(calls(twin)) == {"fast"}


def test_queries_and_documents(folder: Folder) -> None:
    model = embedder(folder, prompts={"query": "why the rows ", "document": "row "}, similarity_fn_name="dot")
    twin = swapped(model)
    found, expected = (
        each.similarity(each.encode_query(QUERIES), each.encode_document(TEXTS)) for each in (twin, model)
    )
    assert_near(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(folder: Folder, dtype: torch.dtype) -> None:
    model = embedder(folder)
    exact = encode(copy.deepcopy(model).to(torch.float64))
    model.half() if dtype == torch.float16 else model.to(dtype)
    twin = swapped(model)
    found, expected = encode(twin), encode(model)
    assert found.dtype == expected.dtype
    error, torchs = ((x.double() - exact).abs().max() for x in (found, expected))
    assert error <= 2 * torchs + 1e-12
    assert calls(twin) == {"fast": 1}


def test_many_processes(folder: Folder) -> None:
    """Each process gets the swapped model, by pickle."""
    model = embedder(folder)
    twin = swapped(model)
    pool = twin.start_multi_process_pool(["cpu"])
    try:
        found = twin.encode(TEXTS, pool=pool, chunk_size=6, convert_to_tensor=True)
    finally:
        twin.stop_multi_process_pool(pool)
    assert_near(found, encode(model))
    assert calls(twin) == {}


@pytest.mark.parametrize("by_stock", [False, True])
def test_save(folder: Folder, by_stock: bool, tmp_path: Path) -> None:
    model = embedder(folder, "cls", is_normal=True, prompts={"query": "why "})
    (model if by_stock else swapped(model)).save(str(tmp_path), create_model_card=False)
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert type(loaded[0].auto_model) is transformers.BertModel
    assert torch.equal(encode(loaded), encode(model))
    assert_near(encode(bert_fast.swap(loaded)), encode(model))


def test_nothing_to_swap() -> None:
    static = dense.StaticEmbedding(tokenizer(), embedding_dim=7)
    model = sentence_transformers.SentenceTransformer(modules=[static], device="cpu")
    before = encode(model)
    with pytest.raises(ValueError, match="holds no encoder that bert_fast knows"):
        bert_fast.swap(model)
    assert torch.equal(encode(model), before)


# ---- training --------------------------------------------------------------------------------------------------------


LOSSES: dict[str, Callable[[Any], Any]] = {
    "MultipleNegativesRankingLoss": lambda model: losses.MultipleNegativesRankingLoss(model),
    "CachedMultipleNegativesRankingLoss": lambda model: losses.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=2
    ),
    "CosineSimilarityLoss": lambda model: losses.CosineSimilarityLoss(model),
}


@pytest.mark.parametrize("name", LOSSES)
def test_training(folder: Folder, name: str) -> None:
    model = embedder(folder)
    twin = swapped(model)
    results = []
    for each in (twin, model):
        each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        features = [each.preprocess(TEXTS[:5]), each.preprocess(TEXTS[5:10])]
        loss = LOSSES[name](each)(features, torch.linspace(0, 1, 5))
        grads = gradients(each, loss)
        torch.optim.SGD(each.parameters(), 0.01).step()
        each.eval()
        results.append((loss.detach(), grads, encode(each)))
    assert_near(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1])
    assert_near(results[0][2], results[1][2], 3e-5)


# ---- pooling on packed rows ------------------------------------------------------------------------------------------

PACKED = ("mean", "cls", "max", "mean_sqrt_len_tokens", ("cls", "mean", "max"))


class Poisoned(torch.nn.Module):
    """Stands between an encoder and its pooling, and spoils the padded rows of which the pooling should read none."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        found = features["token_embeddings"]
        rows = pooling_module._rows[found]
        poisoned = torch.full_like(found, torch.nan)
        pooling_module._rows[poisoned] = rows._replace(versions=(pooling_module._version(poisoned), rows.versions[1]))
        return {**features, "token_embeddings": poisoned}


def poison(model: Any) -> Any:
    model.insert(1, Poisoned())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", PACKED, ids=str)
def test_pooling_reads_packed_rows(folder: Folder, pooling: Any, dtype: torch.dtype) -> None:
    """Of padded rows that hold nothing but NaN it sees nothing, neither in answers nor in gradients."""
    model = embedder(folder, pooling).to(dtype).eval()
    twin = poison(swapped(model))
    results = []
    for each in (twin, model):
        found = each(each.preprocess(TEXTS))["sentence_embedding"]
        weights = torch.linspace(-0.1, 0.1, found.numel(), dtype=dtype).view(found.shape)
        results.append((found, gradients(each, (found * weights).sum())))
    (found, grads), (expected, expected_grads) = results
    assert found.dtype == expected.dtype
    if dtype == torch.float32:
        assert_near(found, expected)
        assert_same_gradients(grads, expected_grads)
    else:
        exact = copy.deepcopy(model).double()
        truth = exact(exact.preprocess(TEXTS))["sentence_embedding"]
        error, torchs = ((x.double() - truth).abs().max() for x in (found, expected))
        assert error <= 2 * torchs


@pytest.mark.parametrize("pooling", PACKED, ids=str)
def test_when_pooling_reads_padded_rows(folder: Folder, pooling: Any) -> None:
    """Where the packed rows are not what it would read, or nobody knows."""
    model = embedder(folder, pooling, prompts={"query": "why the rows "}).eval()
    twin = swapped(model)
    texts = ["", *TEXTS[:5]]

    def features(each: Any) -> dict[str, Any]:
        found: dict[str, Any] = each.preprocess(texts)
        return found

    def other_mask(each: Any) -> Any:
        some = each[0](features(each))
        some["attention_mask"] = some["attention_mask"].clone()
        some["attention_mask"][:, 2:] = 0
        return each[1](some)

    def mask_in_place(each: Any) -> Any:
        some = each[0](features(each))
        some["attention_mask"][:, 2:] = 0
        return each[1](some)

    def rows_in_place(each: Any) -> Any:
        some = each[0](features(each))
        with torch.no_grad():
            some["token_embeddings"].mul_(3)
        return each[1](some)

    def first_tokens(each: Any) -> Any:
        some = each[0](features(each))
        some["cls_token_embeddings"] = some["token_embeddings"][:, 1]
        some["token_weights_sum"] = torch.arange(1.0, 7.0)
        return each[1](some)

    def no_words(each: Any) -> Any:
        some = features(each)
        some["attention_mask"][1] = 0
        return each[1](each[0](some))

    for way in (other_mask, mask_in_place, rows_in_place, first_tokens, no_words):
        found, expected = (way(each)["sentence_embedding"] for each in (twin, model))
        if way is no_words:  # what stands at padding is nobody's affair
            found, expected = (torch.cat((x[:1], x[2:])) for x in (found, expected))
        assert_near(found, expected)
    for each in (model, twin):
        each.set_pooling_include_prompt(False)
    found, expected = (encode(each, texts, prompt_name="query") for each in (twin, model))
    assert_near(found, expected)


def test_packed_rows_are_forgotten(folder: Folder) -> None:
    model = swapped(embedder(folder))
    before = len(pooling_module._rows)
    features = model(model.preprocess(TEXTS))
    assert len(pooling_module._rows) == before + 1
    del features
    gc.collect()
    assert len(pooling_module._rows) == before
    bert_fast.restore(model)
    assert type(model[1]) is dense.Pooling
    model(model.preprocess(TEXTS))
    assert len(pooling_module._rows) == before


def test_report_names_the_pooling(folder: Folder) -> None:
    assert "pooling" in str(bert_fast.report(swapped(embedder(folder))))
    modules = [transformer(folder("BertModel")), base.Dense(51, 7, module_input_name="token_embeddings")]
    model = sentence_transformers.SentenceTransformer(modules=[*modules, dense.Pooling(7)], device="cpu")
    assert "pooling" not in str(bert_fast.report(swapped(model)))
    assert_near(encode(swapped(model)), encode(model))


# ---- pairs, sparse vectors, many vectors -----------------------------------------------------------------------------


def test_cross_encoder(folder: Folder) -> None:
    model = sentence_transformers.CrossEncoder(folder("BertForSequenceClassification"), device="cpu")
    twin = swapped(model)
    pairs = [(query, text) for query in QUERIES for text in TEXTS[:7]]
    options = {"batch_size": 5, "show_progress_bar": False, "convert_to_tensor": True}
    assert_near(twin.predict(pairs, **options), model.predict(pairs, **options))
    assert calls(twin) == {"fast": 5}
    found, expected = (each.rank(QUERIES[0], TEXTS, show_progress_bar=False) for each in (twin, model))
    assert [entry["corpus_id"] for entry in found] == [entry["corpus_id"] for entry in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_sparse_encoder(folder: Folder, pooling: str) -> None:
    modules = [
        transformer(folder("BertForMaskedLM"), transformer_task="fill-mask"),
        sparse.SpladePooling(pooling_strategy=pooling),
    ]
    model = sentence_transformers.SparseEncoder(modules=modules, device="cpu")
    twin = swapped(model)
    options = {"batch_size": 5, "show_progress_bar": False, "convert_to_sparse_tensor": False}
    found, expected = (each.encode(TEXTS, **options) for each in (twin, model))
    assert_near(found, expected)
    assert expected.shape == (len(TEXTS), len(VOCABULARY))
    assert calls(twin) == {"fast": 4}


@pytest.mark.parametrize("strategy", ["fixed", "min"])
@pytest.mark.parametrize("attend", [True, False])
def test_many_vectors(folder: Folder, strategy: str, attend: bool) -> None:
    """Queries are filled up with [MASK], and the scores read what becomes of those, also where the mask hides them."""
    expansion = {"strategy": strategy, "length": 17, "attend": attend}
    modules = [
        transformer(folder("BertModel"), query_expansion=expansion),
        base.Dense(51, 7, bias=False, module_input_name="token_embeddings"),
        late.MultiVectorMask(skiplist_words=["!", "?"]),
    ]
    randomise(modules[1])
    model = sentence_transformers.MultiVectorEncoder(
        modules=modules, device="cpu", prompts={"query": "why ", "document": "row "}
    )
    twin = swapped(model)
    for name, texts in (("encode_document", TEXTS), ("encode_query", QUERIES)):
        found, expected = (getattr(each, name)(texts, batch_size=5) for each in (twin, model))
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
        assert name == "encode_document" or {len(one) for one in expected} == {17}
    assert set(calls(twin)) == {"fast"}


@pytest.mark.parametrize("attend", [True, False])
def test_colbert(folder: Folder, attend: bool) -> None:
    models = pytest.importorskip("pylate.models", exc_type=ImportError)
    torch.manual_seed(0)
    model = models.ColBERT(
        model_name_or_path=folder("BertModel"),
        embedding_size=7,
        query_length=11,
        document_length=23,
        attend_to_expansion_tokens=attend,
        device="cpu",
    )
    twin = swapped(model)
    for is_query, texts in ((True, QUERIES), (False, TEXTS)):
        options = {"is_query": is_query, "batch_size": 5, "show_progress_bar": False, "convert_to_tensor": True}
        found, expected = (each.encode(texts, **options) for each in (twin, model))
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    assert set(calls(twin)) == {"fast"}


# ---- inputs without padding ------------------------------------------------------------------------------------------


def flatten(model: Any) -> None:
    """As sentence-transformers does it for flash attention, which no CPU has: texts one after another, in one row."""
    module = model[0]
    module.can_flatten_inputs = True
    module.data_collator = transformers.DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    module._flatten_position_offset = 0


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_flattened(folder: Folder, pooling: str, is_swapped: bool) -> None:
    bert_fast.register_attention()
    model = embedder(folder, pooling)
    twin = copy.deepcopy(model)
    twin[0].auto_model.set_attn_implementation("bert_fast")
    flatten(twin)
    features = twin.preprocess(TEXTS)
    given = ("input_ids", "position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    assert set(given) <= set(features)
    assert "attention_mask" not in features
    assert features["input_ids"].shape[0] == 1
    if is_swapped:
        bert_fast.swap(twin)
    assert_near(encode(twin), encode(model))


def test_no_flattening_by_itself(folder: Folder) -> None:
    """The name of our attention is not one that sentence-transformers takes for flash attention."""
    bert_fast.register_attention()
    model = embedder(folder)
    twin = swapped(model)
    twin[0].auto_model.set_attn_implementation("bert_fast")
    twin[0].unpad_inputs = True
    assert not twin[0].can_flatten_inputs
    assert "attention_mask" in twin.preprocess(TEXTS)
    assert_near(encode(twin), encode(model))
    assert calls(twin) == {"fast": 1}
