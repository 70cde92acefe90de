"""Where the sentences of a paragraph end, by a simple rule."""

from __future__ import annotations

from itertools import pairwise

TERMINALS = (".", "!", "?", "…")
CLOSING = "\"'”\u2019»)]}"
OPENING = "\"'“\u2018«„([{¿¡"

# The full stop after these does not end a sentence; single letters, and so "e.g." and "U.S.", need no entry.
ABBREVIATIONS = {
    "al", "capt", "cf", "col", "dr", "ft", "gen", "gov", "hon", "lt", "messrs", "mr", "mrs", "ms", "mt", "prof",
    "rep", "rev", "sen", "sgt", "st", "viz", "vs",
}  # fmt: skip
BEFORE_NUMBERS = {
    "apr", "aug", "art", "ca", "ch", "dec", "eq", "feb", "fig", "figs", "jan", "jul", "jun", "mar", "no", "nos",
    "nov", "nr", "oct", "op", "pp", "sec", "sect", "sep", "sept", "vol", "vols",
}  # fmt: skip


def split_sentences(text: str) -> list[str]:
    """A paragraph's sentences, by a simple rule for languages with spaces and full stops.

    A sentence ends with a word that ends with . ! ? or …, closing quotes and brackets aside, if the next word does not
    start with a lower-case letter. Abbreviations, initials and numbers of a list ("1. First") end none. No text is
    lost: the sentences, joined by spaces, are the text with its white space made single. Whoever has better boundaries
    writes one sentence a line and does not split.
    """
    words = text.split()
    sentences, start, has_letter = [], 0, False
    for index, (word, following) in enumerate(pairwise(words), 1):
        has_letter = has_letter or any(map(str.isalpha, word))
        if has_letter and word.rstrip(CLOSING).endswith(TERMINALS) and _is_end(word, following):
            sentences.append(" ".join(words[start:index]))
            start, has_letter = index, False
    if words:
        sentences.append(" ".join(words[start:]))
    return sentences


def _is_end(word: str, following: str) -> bool:
    """Whether a sentence ends between two words, the first of which ends with a terminal."""
    first = following.lstrip(OPENING)[:1]
    if not first.isalnum() or first.islower():
        return False
    stem = word.strip(OPENING + CLOSING)
    if not stem.endswith(".") or stem.endswith(".."):
        return True
    body = stem[:-1].lower()
    is_initial = body[-1:].isalpha() and not body[-2:-1].isalnum()
    is_number = body in BEFORE_NUMBERS and first.isdigit()
    return not (is_initial or is_number or body in ABBREVIATIONS)
