"""Sentences in words as the model reads them: pieces of words, and windows of what is longer than the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Window", "make_windows", "owners_of", "spans_of"]


@dataclass(frozen=True)
class Window:
    """Words of a sentence that go through the model together.

    Attributes:
        sentence: which one.
        row: what the tokenizer makes of the words.
        owned: position in the row of the first piece of each word that is labelled here, by the word's place in the
            sentence.
    """

    sentence: int
    row: dict[str, list[int]]
    owned: Mapping[int, int]


def make_windows(
    tokenizer: Any, sentences: Sequence[Sequence[str]], max_length: int, stride: int | None
) -> list[Window]:
    """Windows in which each word of which the tokenizer leaves something is labelled exactly once.

    A word's first piece stands for it (Devlin et al. 2018, section 5.3). Longer sentences are cut between words; a word
    belongs to the window where the fewer of the words beside it, left or right, are most. Of a word with more pieces
    than a window has room for, only the first ones are read.

    Args:
        tokenizer: fast.
        sentences: words of each.
        max_length: tokens of a window, with special ones.
        stride: pieces that a window has in common with the next, at most; None: a quarter of a window.

    Raises:
        ValueError: `stride` leaves no room for other pieces.
    """
    if not sentences:
        return []
    room = max_length - tokenizer.num_special_tokens_to_add()
    stride = room // 4 if stride is None else stride
    if not 0 <= stride < room:
        raise ValueError(f"stride is {stride}; it must be within 0 and {room - 1}, as a window has {room} pieces")
    result = []
    encoded = tokenizer([list(words) for words in sentences], is_split_into_words=True, verbose=False)
    for index, words in enumerate(sentences):
        if len(encoded["input_ids"][index]) <= max_length:
            result.append(Window(index, _row(encoded, index), _first_pieces(encoded.word_ids(index))))
            continue
        counts = Counter(encoded.word_ids(index))
        spans = spans_of([counts[word] for word in range(len(words))], room, stride)
        result += _cut(tokenizer, index, words, spans, max_length)
    return [window for window in result if window.owned]


def _cut(
    tokenizer: Any, index: int, words: Sequence[str], spans: Sequence[tuple[int, int]], max_length: int
) -> list[Window]:
    owners = owners_of(spans)
    parts = [list(words[start:end]) for start, end in spans]
    encoded = tokenizer(parts, is_split_into_words=True, truncation=True, max_length=max_length)
    result = []
    for number, (start, _) in enumerate(spans):
        pieces = _first_pieces(encoded.word_ids(number)).items()
        owned = {start + word: place for word, place in pieces if owners[start + word] == number}
        result.append(Window(index, _row(encoded, number), owned))
    return result


def spans_of(counts: Sequence[int], room: int, stride: int) -> list[tuple[int, int]]:
    """First and last word, exclusive, of the windows of a sentence, together all of its words.

    Args:
        counts: pieces of each word.
        room: pieces of a window; one word is taken whatever it has.
        stride: pieces at the end of a window with which the next one begins, at most.
    """
    result = []
    start = end = 0
    while end < len(counts):
        end, left = start, room
        while end < len(counts) and (counts[end] <= left or end == start):
            left -= counts[end]
            end += 1
        result.append((start, end))
        start, left = end, stride
        while start - 1 > result[-1][0] and counts[start - 1] <= left:
            start -= 1
            left -= counts[start]
    return result


def owners_of(spans: Sequence[tuple[int, int]]) -> list[int]:
    """The window of each word in which it has most context; the first of several.

    Context is the number of words of the window to the left or to the right, whichever is less.
    """
    best: dict[int, tuple[int, int]] = {}
    for number, (start, end) in enumerate(spans):
        for word in range(start, end):
            context = min(word - start, end - 1 - word)
            if word not in best or context > best[word][0]:
                best[word] = context, number
    return [best[word][1] for word in range(len(best))]


def _first_pieces(word_ids: Sequence[int | None]) -> dict[int, int]:
    result: dict[int, int] = {}
    for place, word in enumerate(word_ids):
        if word is not None:
            result.setdefault(word, place)
    return result


def _row(encoded: Any, index: int) -> dict[str, list[int]]:
    return {name: values[index] for name, values in encoded.items()}
