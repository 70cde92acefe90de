"""Files of each kind, and rows of data sets, as documents; see read_documents and documents_of."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from .problems import OnProblem, Problem

MAX_LINE = 2**26
"""Bytes of the longest line that is read, and about the characters of the longest document in a .txt file: what is held
in memory at once. A file with longer ones most often lacks line ends, or blank lines between documents."""

ROWS = 256  # of a Parquet file in memory at once

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def _open(file: Path) -> BinaryIO:
    openers: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".xz": lzma.open}
    return cast(BinaryIO, openers.get(file.suffix.lower(), open)(file, "rb"))


def _lines(file: Path, on_problem: OnProblem) -> Iterator[tuple[int, str]]:
    """The lines that can be read, with their numbers from 1; none after a NUL character."""
    number = 0
    try:
        with _open(file) as stream:
            while raw := stream.readline(MAX_LINE):
                number += 1
                is_long = len(raw) == MAX_LINE and not raw.endswith(b"\n")
                if b"\0" in (_last_block(stream, raw) if is_long else raw):
                    reason = "NUL character, so this is no UTF-8 text; the rest of the file is skipped"
                    on_problem(Problem(file, number, reason))
                    return
                if is_long:
                    on_problem(Problem(file, number, f"line longer than {MAX_LINE} bytes; it is skipped"))
                    continue
                try:
                    yield number, raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
                except UnicodeDecodeError as error:
                    on_problem(Problem(file, number, f"not UTF-8 at byte {error.start} of the line; it is skipped"))
    except DAMAGED as error:
        on_problem(Problem(file, number + 1, f"damaged or cut ({error}); the rest of the file is skipped"))


def _last_block(stream: BinaryIO, block: bytes) -> bytes:
    """The block that ends the line which this one starts, or one before it with a NUL character."""
    while block and b"\0" not in block and not block.endswith(b"\n"):
        block = stream.readline(MAX_LINE)
    return block


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
        document = document_in(row, field, file, number, on_problem)
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
                    document = document_in({field: value}, field, file, number, on_problem)
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


def document_in(row: Any, field: str, file: Path, number: int, on_problem: OnProblem) -> list[str]:
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
