"""Columns as the shared tasks of CoNLL have them: a word on each line, a blank line between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...lines import bare_suffix
from .problems import bad_line, lines_of
from .sentences import Sentence

__all__ = ["read_columns"]

DOCUMENT = "-DOCSTART-"

TAB, BLANKS = re.compile("\t"), re.compile("[ \t]+")

# Byte order marks are left within a file where others were joined to it.
WHITE = " \t\ufeff"

RANGE = re.compile(r"\d+[-.]\d+")  # identifiers of CoNLL-U's multiword tokens and empty nodes


def read_columns(file: Path, token_column: int, label_column: int | None) -> Iterator[Sentence]:
    """The sentences of a file in columns.

    Columns are divided by tabs if the first word's line has one, otherwise by blanks, and are as many on all lines.
    Passed over are lines that begin with -DOCSTART-, where a sentence ends, too; lines before a sentence's first word
    that begin with "#" and have more or fewer columns than the words, so that "#NFL<tab>O" stays a word; in .conllu the
    lines of multiword tokens (1-2) and of empty nodes (1.1).

    Args:
        file: UTF-8, also with .gz or .xz.
        token_column: of the words, from 1.
        label_column: of the labels, from 1, or from the end with -1 as the last; None: labels are not read.

    Raises:
        DataError: more or fewer columns than on the first line, none where words or labels are to be, an empty word or
            label, a file without sentences.
        OSError: the file cannot be opened.
    """
    lines = list(lines_of(file))
    layout = _layout(file, lines, token_column, label_column)
    passes_ranges = bare_suffix(file) == ".conllu"
    words: list[tuple[int, str, str | None]] = []
    for number, line in lines:
        columns = layout.divide(line)
        if _is_boundary(line):
            if words:
                yield _sentence(file, words)
            words = []
        elif not words and line.startswith("#") and len(columns) != layout.width:
            continue
        elif not (passes_ranges and RANGE.fullmatch(columns[0])):
            words.append((number, *layout.word(number, columns)))
    if words:
        yield _sentence(file, words)


@dataclass(frozen=True)
class _Layout:
    """
    Attributes:
        file: of which it is.
        first: line of the first word.
        divider: of its columns.
        width: their number.
        token: column of the words, from 0.
        label: column of the labels, from 0.
    """

    file: Path
    first: int
    divider: re.Pattern[str]
    width: int
    token: int
    label: int | None

    def divide(self, line: str) -> list[str]:
        return _divide(line, self.divider)

    def word(self, number: int, columns: Sequence[str]) -> tuple[str, str | None]:
        if len(columns) != self.width:
            raise bad_line(self.file, number, f"columns: {len(columns)}; line {self.first} has {self.width}")
        if not columns[self.token]:
            raise bad_line(self.file, number, "the token is empty")
        label = None if self.label is None else columns[self.label]
        if label == "":
            raise bad_line(self.file, number, "the label is empty")
        return columns[self.token], label


def _layout(file: Path, lines: Sequence[tuple[int, str]], token_column: int, label_column: int | None) -> _Layout:
    for number, line in lines:
        if _is_boundary(line) or line.startswith("#"):
            continue
        divider = TAB if "\t" in line else BLANKS
        width = len(_divide(line, divider))
        token = _place(file, number, width, "token_column", token_column)
        label = None if label_column is None else _place(file, number, width, "label_column", label_column)
        if token == label:
            reason = f"columns: {width}; token_column {token_column} and label_column {label_column} are the same"
            raise bad_line(file, number, reason)
        return _Layout(file, number, divider, width, token, label)
    raise bad_line(file, None, "no sentences")


def _place(file: Path, number: int, width: int, name: str, column: int) -> int:
    if not 1 <= abs(column) <= width:
        raise bad_line(file, number, f"columns: {width}; {name} is {column}")
    return column - 1 if column > 0 else width + column


def _divide(line: str, divider: re.Pattern[str]) -> list[str]:
    if divider is TAB:
        return [column.strip(" ") for column in divider.split(line)]
    return divider.split(line.strip(" \t"))


def _is_boundary(line: str) -> bool:
    return not line.strip(WHITE) or line.startswith(DOCUMENT)


def _sentence(file: Path, words: Sequence[tuple[int, str, str | None]]) -> Sentence:
    lines, tokens, labels = zip(*words, strict=True)
    return Sentence(f"{file}:{lines[0]}", tokens, None if labels[0] is None else labels, lines)
