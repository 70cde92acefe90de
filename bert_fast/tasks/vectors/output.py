"""Blocks joined to a finished file of vectors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..packages import package
from .blocks import vectors_in

__all__ = ["Shape", "ids_file", "record_file", "write_vectors"]


@dataclass(frozen=True)
class Shape:
    """What blocks add up to.

    Attributes:
        rows, dimensions: of all vectors.
        dtype: "float32" or "float16".
        has_ids: whether the texts have ids.
    """

    rows: int
    dimensions: int
    dtype: str
    has_ids: bool


def ids_file(file: Path) -> Path:
    """The file of a .npy file's ids, one a line; the line of a text that could not be read is empty."""
    return file.with_suffix(".ids.txt")


def record_file(file: Path) -> Path:
    """The JSON file beside a file of vectors that says what they are of."""
    return file.with_name(f"{file.name}.json")


def write_vectors(out: Path, tables: Iterable[Any], shape: Shape) -> None:
    """Joins blocks, one of which is in memory; `out` appears whole or not at all, and after its ids.

    Args:
        out: .npy (rows, dimensions), with ids, if there are any, in `ids_file`; or .parquet with columns id (the row
            from 0 where the texts have none), text where it was kept, and embedding, a list of fixed size.
        tables: the blocks', in order.
        shape: of them all.
    """
    if out.suffix.lower() == ".npy":
        _write_npy(out, tables, shape)
    else:
        _write_parquet(out, tables, shape)


def _write_npy(out: Path, tables: Iterable[Any], shape: Shape) -> None:
    ids = ids_file(out)
    with _part(out) as vectors, _part(ids) as names:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(shape.dtype)),
            "fortran_order": False,
            "shape": (shape.rows, shape.dimensions),
        }
        np.lib.format.write_array_header_1_0(vectors, header)
        for table in tables:
            vectors.write(vectors_in(table["embedding"]).tobytes())
            names.write("".join(f"{name or ''}\n" for name in table["id"].to_pylist()).encode("utf-8"))
    if shape.has_ids:
        os.replace(_beside(ids), ids)
    else:
        _beside(ids).unlink()
    os.replace(_beside(out), out)


def _write_parquet(out: Path, tables: Iterable[Any], shape: Shape) -> None:
    arrow = package("pyarrow", "a .parquet file")
    parquet = package("pyarrow.parquet", "a .parquet file")
    with _part(out) as stream:
        writer = None
        row = 0
        for table in tables:
            table = table.replace_schema_metadata(None)
            if not shape.has_ids:
                table = table.set_column(0, "id", arrow.array(np.arange(row, row + len(table))))
            writer = writer or parquet.ParquetWriter(stream, table.schema, compression="zstd", use_dictionary=False)
            writer.write_table(table)
            row += len(table)
        writer.close()  # type: ignore[union-attr]  # there is a block
    os.replace(_beside(out), out)


@contextmanager
def _part(file: Path) -> Iterator[BinaryIO]:
    """What is written beside the file, and on the disk afterwards."""
    with _beside(file).open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.part")
