"""Sentences in words: from .jsonl, and from texts that have no labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from .problems import DataError, bad_line, lines_of
from .tables import Role, Row, read_table, text_in

__all__ = ["Sentence", "Words", "read_json_lines", "read_texts", "words_of"]

Words = Literal["blanks", "punctuation"]

PATTERNS = {"blanks": re.compile(r"\S+"), "punctuation": re.compile(r"\w+|[^\w\s]")}

LABELS = ("tags", "ner_tags", "pos_tags")


@dataclass(frozen=True)
class Sentence:
    """
    Attributes:
        place: where it begins.
        tokens: its words.
        labels: one of each word; None: not known.
        lines: of each word, where they stand on lines of their own.
        text: from which the words were cut; None: they came as words.
        spans: of each word, its first character in the text and the one after its last.
    """

    place: str
    tokens: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    lines: tuple[int, ...] = ()
    text: str | None = None
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> str:
        return " ".join(self.tokens)

    def refuse(self, word: int, reason: str) -> NoReturn:
        """
        Raises:
            DataError: always; it names the word's line.
        """
        place = f"{self.place.rpartition(':')[0]}:{self.lines[word]}" if self.lines else self.place
        raise DataError(f"{place}: word {word + 1}, {self.tokens[word]!r}: {reason}")


def words_of(place: str, text: str, words: Words) -> Sentence:
    """A text's words, with where they stand in it.

    Args:
        place: of the text.
        text: with at least one character that is not white.
        words: "blanks": what stands between white space; "punctuation": there, every character that belongs to no word
            is a word of its own, too.
    """
    found = list(PATTERNS[words].finditer(text))
    tokens = tuple(match.group() for match in found)
    return Sentence(place, tokens, text=text, spans=tuple(match.span() for match in found))


def read_texts(file: Path, words: Words) -> Iterator[Sentence]:
    """A sentence from each line of a text; blank lines are passed over.

    Raises:
        DataError: there are none, or the file has columns.
        OSError: the file cannot be opened.
    """
    is_empty = True
    for number, line in lines_of(file):
        if line.startswith("-DOCSTART-"):
            raise bad_line(file, number, "columns, but a .txt without labels is plain text; .conll names columns")
        if line.strip():
            is_empty = False
            yield words_of(f"{file}:{number}", line, words)
    if is_empty:
        raise bad_line(file, None, "no sentences")


def read_json_lines(file: Path, columns: Mapping[str, str], words: Words, *, is_labelled: bool) -> Iterator[Sentence]:
    """A sentence from each line: {"tokens": [...], "labels": [...]}; without labels also {"text": "..."}.

    Args:
        file: .jsonl.
        columns: other names of tokens, labels and text; see read_table.
        words: see words_of.
        is_labelled: whether the labels are needed. If not, they are not looked at.

    Raises:
        DataError: a line is no such object, a list is empty or holds something other than strings that are not blank,
            or there are more or fewer labels than tokens.
        OSError: the file cannot be opened.
    """
    roles = [
        Role("tokens", ("words",), is_labelled, is_labelled),
        Role("labels", LABELS, is_labelled, is_labelled),
        Role("text", ("sentence",), is_required=False),
    ]
    for row in read_table(file, roles, columns):
        if is_labelled:
            tokens, labels = _strings(row, "tokens"), _strings(row, "labels")
            if len(tokens) != len(labels):
                row.refuse(f"labels: {len(labels)}, but tokens: {len(tokens)}")
            yield Sentence(row.place, tokens, labels)
        elif "tokens" in row.values:
            yield Sentence(row.place, _strings(row, "tokens"))
        elif "text" in row.values:
            text_in(row, "text")
            yield words_of(row.place, row.values["text"], words)
        else:
            row.refuse("neither tokens nor text")


def _strings(row: Row, role: str) -> tuple[str, ...]:
    values: Any = row.values[role]
    if not isinstance(values, list):
        row.refuse(f"{role} is a {type(values).__name__}; a list of strings is needed")
    if not values:
        row.refuse(f"{role} is empty")
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            row.refuse(f"{role}, {number}: {value!r} is a {type(value).__name__}; a string is needed")
        if not value.strip(" \t\r\n"):
            row.refuse(f"{role}, {number}: {value!r} is empty")
    return tuple(values)
