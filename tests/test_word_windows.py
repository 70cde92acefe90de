"""Words and pieces: alignment by hand, windows that label every word once."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.tasks.word_windows import make_windows, owners_of, spans_of

transformers: Any = pytest.importorskip("transformers")

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Os", "##lo", "##s", "rain", "in", ".", "a", "##b"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    )
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def ids(pieces: str) -> list[int]:
    return [VOCABULARY.index(piece) for piece in pieces.split()]


def test_alignment(tokenizer: Any) -> None:
    """The second word loses all of its characters; the fourth is unknown, the last has punctuation within."""
    words = ["Oslo", "\u200b", "rains", "Ünknown", "in.a"]
    first, second = make_windows(tokenizer, [words, ["a"]], 20, None)
    assert first.row["input_ids"] == ids("[CLS] Os ##lo rain ##s [UNK] in . a [SEP]")
    assert first.row["attention_mask"] == [1] * 10
    assert first.owned == {0: 1, 2: 3, 3: 5, 4: 6}
    assert (first.sentence, second.sentence, second.owned) == (0, 1, {0: 1})


def test_nothing_to_label(tokenizer: Any) -> None:
    assert make_windows(tokenizer, [], 20, None) == []
    assert [window.sentence for window in make_windows(tokenizer, [["\u200b"], ["a"]], 20, None)] == [1]


def test_windows_by_hand(tokenizer: Any) -> None:
    """Room for 5 pieces, 2 of them shared; the fourth word has one word to its right in the second window alone."""
    words = ["a", "Oslo", "a", "a", "ab", "a"]
    assert spans_of([1, 2, 1, 1, 2, 1], 5, 2) == [(0, 4), (2, 6)]
    assert owners_of([(0, 4), (2, 6)]) == [0, 0, 0, 1, 1, 1]
    first, second = make_windows(tokenizer, [words], 7, 2)
    assert first.row["input_ids"] == ids("[CLS] a Os ##lo a a [SEP]")
    assert second.row["input_ids"] == ids("[CLS] a a a ##b a [SEP]")
    assert (first.owned, second.owned) == ({0: 1, 1: 2, 2: 4}, {3: 2, 4: 3, 5: 5})


@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    room=st.integers(1, 9),
    stride=st.integers(0, 8),
)
@settings(max_examples=200, deadline=None)
def test_every_word_has_one_window(counts: list[int], room: int, stride: int) -> None:
    stride = min(stride, room - 1)
    spans = spans_of(counts, room, stride)
    assert all(sum(counts[start:end]) <= room or end - start == 1 for start, end in spans)
    assert all(sum(counts[b:end]) <= stride for (_, end), (b, _) in pairwise(spans))
    owners = owners_of(spans)
    assert len(owners) == len(counts)
    for word, owner in enumerate(owners):
        contexts = [min(word - start, end - 1 - word) for start, end in spans]  # negative outside
        assert contexts[owner] == max(contexts) >= 0


@pytest.mark.parametrize("stride", [0, 3, None])
def test_long_words_lose_no_label(tokenizer: Any, stride: int | None) -> None:
    words = ["a", "a" + "b" * 30, "a", "\u200b", "Oslo", "a" + "b" * 30] * 3
    windows = make_windows(tokenizer, [words], 9, stride)
    owned = sorted(word for window in windows for word in window.owned)
    assert owned == [word for word in range(18) if word % 6 != 3]
    assert max(len(window.row["input_ids"]) for window in windows) == 9
    for window in windows:
        for word, place in window.owned.items():
            piece = VOCABULARY[window.row["input_ids"][place]]
            assert piece == {"Oslo": "Os"}.get(words[word], "a")


def test_stride_beyond_the_window(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"stride is 5; it must be within 0 and 4, as a window has 5 pieces"):
        make_windows(tokenizer, [["a"]], 7, 5)
