"""Files of text, or data sets, as documents: lists of lines, each a paragraph or a sentence."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

__all__ = ["CorpusError", "Problem", "documents_of", "find_files", "read_documents", "refuse", "split_sentences"]

KINDS = (".txt", ".jsonl", ".parquet")
PACKED = (".gz", ".xz")
ALLOWED = ".txt, .jsonl (both also with .gz or .xz) or .parquet"

MAX_LINE = 2**26
"""Bytes of the longest line that is read, and about the characters of the longest document in a .txt file: what is held
in memory at once. A file with longer ones most often lacks line ends, or blank lines between documents."""

ROWS = 256  # of a Parquet file in memory at once

DATASET = Path("dataset")  # stands for a file's name in problems with data sets

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class CorpusError(ValueError):
    """There is no text, or what should be text cannot be read."""


@dataclass(frozen=True)
class Problem:
    """Something in the corpus that is skipped.

    Attributes:
        file: where it is; "dataset" for a data set.
        line: its line, or its row in a Parquet file or a data set, from 1; None: the file as a whole.
        reason: what is wrong.
    """

    file: Path
    line: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" if self.line is None else f"{self.file}:{self.line}: {self.reason}"


OnProblem: TypeAlias = Callable[[Problem], None]


def refuse(problem: Problem) -> None:
    """An on_problem that takes no problem.

    Raises:
        CorpusError: always.
    """
    raise CorpusError(str(problem))


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files of a corpus, each once, in the order of `paths`; a folder's files sorted by their paths.

    Folders are searched recursively for .txt, .jsonl (both also with .gz or .xz) and .parquet. Hidden files and folders
    are left out, and links to folders are not followed.

    Raises:
        CorpusError: a path does not exist, a file has another suffix, or nothing is found.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if _is_visible(file.relative_to(path)) and file.is_file())
        elif not path.exists():
            raise CorpusError(f"{path} does not exist; a file ({ALLOWED}) or a folder is needed")
        elif _kind(path) is None:
            raise CorpusError(f"{path} has no known suffix; it must be {ALLOWED}")
        else:
            files = [path]
        for file in files:
            if _kind(file) is not None:
                found.setdefault(file.resolve(), file)
    if not found:
        raise CorpusError(f"no files found in {', '.join(map(str, paths)) or 'no paths'}; they must be {ALLOWED}")
    return list(found.values())


def read_documents(file: Path, *, field: str = "text", on_problem: OnProblem) -> Iterator[list[str]]:
    """The documents of one file; each a list of its lines, stripped and none of them empty.

    .txt: UTF-8, blank lines between documents. .jsonl: an object a line. .parquet: a row each. Of the last two `field`
    is the document, a string with its lines or a list of strings. Files are streamed.

    Args:
        file: one of find_files.
        field: key or column of the text.
        on_problem: gets each line or row that is skipped because it is not UTF-8, holds NUL characters, is broken JSON,
            or lacks a text in `field`; a damaged or cut file, of which the rest is skipped; a line or a document that
            is longer than MAX_LINE, of which the first is skipped and the second cut in two; a file without any text.

    Raises:
        CorpusError: the file has an unknown suffix.
    """
    kind = _kind(file)
    if kind is None:
        raise CorpusError(f"{file} has no known suffix; it must be {ALLOWED}")
    is_empty = True
    for document in READERS[kind](file, field, on_problem):
        is_empty = False
        yield document
    if is_empty:
        on_problem(Problem(file, None, "holds no text"))


def documents_of(
    dataset: Iterable[Mapping[str, Any]], *, field: str = "text", on_problem: OnProblem
) -> Iterator[list[str]]:
    """The documents of a Hugging Face data set, a streamed one too, or of anything that yields mappings.

    Args:
        dataset: rows; `field` of each is a string with the document's lines, or a list of strings.
        field: key of the text.
        on_problem: gets each row that has no text in `field`, and a data set without any text.
    """
    is_empty = True
    for number, row in enumerate(dataset, 1):
        document = _document_in(row, field, DATASET, number, on_problem)
        if document:
            is_empty = False
            yield document
    if is_empty:
        on_problem(Problem(DATASET, None, "holds no text"))


# ---- files -----------------------------------------------------------------------------------------------------------


def _is_visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _kind(file: Path) -> str | None:
    """The suffix that says how to read a file; None where it is unknown."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        return suffixes[0] if len(suffixes) == 2 and suffixes[0] in (".txt", ".jsonl") else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def _open(file: Path) -> BinaryIO:
    openers: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".xz": lzma.open}
    return cast(BinaryIO, openers.get(file.suffix.lower(), open)(file, "rb"))


def _lines(file: Path, on_problem: OnProblem) -> Iterator[tuple[int, str]]:
    """The lines that can be read, with their numbers."""
    number = 0
    try:
        with _open(file) as stream:
            while raw := stream.readline(MAX_LINE):
                number += 1
                is_long = len(raw) == MAX_LINE and not raw.endswith(b"\n")
                first = raw
                while is_long and raw and b"\0" not in raw and not raw.endswith(b"\n"):
                    raw = stream.readline(MAX_LINE)
                if b"\0" in raw:
                    reason = "NUL character, so this is no UTF-8 text; the rest of the file is skipped"
                    on_problem(Problem(file, number, reason))
                    return
                if is_long:
                    on_problem(Problem(file, number, f"line longer than {MAX_LINE} bytes; it is skipped"))
                    continue
                try:
                    yield number, first.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
                except UnicodeDecodeError as error:
                    on_problem(Problem(file, number, f"not UTF-8 at byte {error.start} of the line; it is skipped"))
    except DAMAGED as error:
        on_problem(Problem(file, number + 1, f"damaged or cut ({error}); the rest of the file is skipped"))


def _read_txt(file: Path, _field: str, on_problem: OnProblem) -> Iterator[list[str]]:
    document: list[str] = []
    size = 0
    for number, text in _lines(file, on_problem):
        line = text.strip()
        if line:
            document.append(line)
            size += len(line)
        if size >= MAX_LINE:
            reason = f"{MAX_LINE} characters without a blank line, which ends a document; the document is cut here"
            on_problem(Problem(file, number, reason))
        if document and (not line or size >= MAX_LINE):
            yield document
            document, size = [], 0
    if document:
        yield document


def _read_jsonl(file: Path, field: str, on_problem: OnProblem) -> Iterator[list[str]]:
    for number, line in _lines(file, on_problem):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            on_problem(Problem(file, number, f"no JSON ({error}); the line is skipped"))
            continue
        document = _document_in(row, field, file, number, on_problem)
        if document:
            yield document


def _read_parquet(file: Path, field: str, on_problem: OnProblem) -> Iterator[list[str]]:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            reason = _missing_column(table.schema_arrow, field)
            if reason:
                on_problem(Problem(file, None, reason))
                return
            for batch in table.iter_batches(ROWS, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    document = _document_in({field: value}, field, file, number, on_problem)
                    if document:
                        yield document
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        on_problem(Problem(file, number + 1, f"damaged, cut or no Parquet ({error}); the rest of the file is skipped"))


def _missing_column(schema: Any, field: str) -> str | None:
    """Why a Parquet file has no texts in column `field`; None where it has."""
    if field not in schema.names:
        return f"no column {field!r}; there are {', '.join(map(repr, schema.names)) or 'none'}"
    kind = schema.field(field).type
    inner = kind
    while hasattr(inner, "value_type"):  # of lists and dictionaries
        inner = inner.value_type
    if str(inner) in ("string", "large_string", "string_view"):
        return None
    return f"column {field!r} is of type {kind}; strings or lists of strings are needed"


READERS: dict[str, Callable[[Path, str, OnProblem], Iterator[list[str]]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# ---- rows ------------------------------------------------------------------------------------------------------------


def _document_in(row: Any, field: str, file: Path, number: int, on_problem: OnProblem) -> list[str]:
    """The lines of one row; none where it is a problem, or has no text."""
    try:
        return _lines_in(row, field)
    except ValueError as error:
        on_problem(Problem(file, number, f"{error}; it is skipped"))
        return []


def _lines_in(row: Any, field: str) -> list[str]:
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is a {type(row).__name__}; an object with the field {field!r} is needed")
    if field not in row:
        raise ValueError(f"no field {field!r}; there are {', '.join(map(repr, row)) or 'none'}")
    value = row[field]
    if hasattr(value, "as_py"):
        value = value.as_py()  # an Arrow value; raises UnicodeDecodeError, a ValueError, where it is not UTF-8
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"field {field!r} is a {type(value).__name__}; a string or a list of strings is needed")
    whole = "\n".join(texts)
    if "\0" in whole:
        raise ValueError(f"field {field!r} holds a NUL character")
    whole.encode("utf-8")  # JSON can hold halves of surrogate pairs, which are no text: UnicodeEncodeError
    return [line for part in whole.split("\n") if (line := part.strip())]


# ---- sentences -------------------------------------------------------------------------------------------------------

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
