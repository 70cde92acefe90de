"""Files of each kind, and rows of data sets, as documents; see read_documents and documents_of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..lines import MAX_LINE, OnProblem, Problem, read_lines

ROWS = 256  # of a Parquet file in memory at once


def _read_txt(file: Path, _field: str, on_problem: OnProblem) -> Iterator[list[str]]:
    document: list[str] = []
    size = 0
    for number, text in read_lines(file, on_problem):
        line = text.strip()
        if line:
            document.append(line)
            size += len(line)
        if size >= MAX_LINE:  # what is held in memory at once
            reason = f"{MAX_LINE} characters without a blank line, which ends a document; the document is cut here"
            on_problem(Problem(file, number, reason))
        if document and (not line or size >= MAX_LINE):
            yield document
            document, size = [], 0
    if document:
        yield document


def _read_jsonl(file: Path, field: str, on_problem: OnProblem) -> Iterator[list[str]]:
    for number, line in read_lines(file, on_problem):
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
