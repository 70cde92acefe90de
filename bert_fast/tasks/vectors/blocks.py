"""Blocks: so many texts as are embedded, written and, after an interruption, not embedded again."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..data.texts import Text
from ..packages import package

__all__ = [
    "Block",
    "block_of",
    "cut",
    "digest_in",
    "dimensions_in",
    "read_ahead",
    "read_table",
    "table_of",
    "vectors_in",
    "write_table",
]

DIGEST = b"bert_fast.texts"
PURPOSE = "embedding files"


@dataclass(frozen=True)
class Block:
    """
    Attributes:
        number: of the block, from 0.
        start: row of its first text, from 0.
        texts: at least one.
        ids: None for a text without one.
        digest: SHA-256 of texts and ids, in hexadecimal.
        bad: how many of the texts stand for what could not be read.
    """

    number: int
    start: int
    texts: list[str]
    ids: list[str | None]
    digest: str
    bad: int = 0


def cut(texts: Iterable[Text], size: int) -> Iterator[Block]:
    """Blocks of `size` texts, the last of what is left."""
    rest = iter(texts)
    number = 0
    while rows := list(islice(rest, size)):
        strings, ids = [row.text for row in rows], [row.id for row in rows]
        bad = sum(row.is_bad for row in rows)
        yield Block(number, number * size, strings, ids, _digest(strings, ids), bad)
        number += 1


def _digest(texts: list[str], ids: list[str | None]) -> str:
    digest = hashlib.sha256()
    for part in (*texts, *ids):
        content = b"" if part is None else part.encode("utf-8")
        digest.update(b"%d:" % (-1 if part is None else len(content)))
        digest.update(content)
    return digest.hexdigest()


def read_ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """The blocks; while one is in use, the next is read by a thread."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, blocks, None)
        while (block := following.result()) is not None:
            following = reader.submit(next, blocks, None)
            yield block


# ---- files -----------------------------------------------------------------------------------------------------------


def table_of(block: Block, vectors: np.ndarray[Any, Any] | None = None, *, has_texts: bool = True) -> Any:
    """A pyarrow table with columns id, text and embedding, as far as they are wanted; the digest is in its metadata."""
    arrow = package("pyarrow", PURPOSE)
    columns = {"id": arrow.array(block.ids, arrow.string())}
    if has_texts:
        columns["text"] = arrow.array(block.texts, arrow.large_string())
    if vectors is not None:
        columns["embedding"] = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.ravel()), vectors.shape[1])
    return arrow.table(columns).replace_schema_metadata({DIGEST: block.digest})


def block_of(table: Any, number: int) -> Block:
    """The block of a table with texts."""
    digest = table.schema.metadata[DIGEST].decode()
    return Block(number, 0, table["text"].to_pylist(), table["id"].to_pylist(), digest)


def vectors_in(column: Any) -> np.ndarray[Any, Any]:
    """(rows, dimensions), of a column of fixed-size lists, or of lists of one length."""
    values = column.combine_chunks() if hasattr(column, "chunks") else column
    flat: np.ndarray[Any, Any] = values.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(values), -1) if len(values) else flat.reshape(0, 0)


def write_table(file: Path, table: Any) -> None:
    """Writes a Parquet file, which appears whole or not at all."""
    parquet = package("pyarrow.parquet", PURPOSE)
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    with beside.open("wb") as stream:
        parquet.write_table(table, stream, compression="zstd", use_dictionary=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)


def dimensions_in(file: Path) -> int:
    """Of the vectors of a file of write_table."""
    with package("pyarrow.parquet", PURPOSE).ParquetFile(file) as opened:
        return int(opened.schema_arrow.field("embedding").type.list_size)


def read_table(file: Path) -> Any:
    """The pyarrow table of a file of write_table."""
    with package("pyarrow.parquet", PURPOSE).ParquetFile(file) as opened:
        return opened.read()


def digest_in(file: Path) -> str | None:
    """The digest of the texts of a file of write_table; None: there is no such file, or it is damaged."""
    arrow = package("pyarrow", PURPOSE)
    try:
        with package("pyarrow.parquet", PURPOSE).ParquetFile(file) as opened:
            content: bytes = opened.schema_arrow.metadata[DIGEST]
    except (OSError, arrow.ArrowException, KeyError, TypeError):
        return None
    return content.decode()
