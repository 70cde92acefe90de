"""Files of vectors, read in parts: .npy, mapped into memory, and .parquet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..data.problems import bad_line
from ..packages import package
from .blocks import vectors_in
from .output import ids_file

__all__ = ["Array", "Label", "Vectors", "open_vectors"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

KINDS = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Label:
    """What a row is of; None where the file does not say."""

    id: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Vectors(ABC):
    """
    Attributes:
        file: from embed, or from elsewhere.
        rows, dimensions: of its array.
    """

    file: Path
    rows: int
    dimensions: int

    def chunks(self, size: int) -> Iterator[tuple[int, Array]]:
        """The first row's number, from 0, and at most `size` rows (rows, dimensions) float32, again and again.

        Raises:
            DataError: a row has no vector, one of another length, or a number that is not finite.
        """
        start = 0
        for part in self._parts(size):
            finite = np.isfinite(part).all(1)
            if not finite.all():
                raise bad_line(
                    self.file, start + int(finite.argmin()) + 1, "the vector has a number that is not finite"
                )
            yield start, np.require(part, np.float32, ["C", "W"])  # torch takes no other
            start += len(part)

    @abstractmethod
    def _parts(self, size: int) -> Iterator[np.ndarray[Any, Any]]:
        """At most `size` rows (rows, dimensions) of the file's dtype, again and again."""

    @abstractmethod
    def labels(self, rows: Collection[int]) -> dict[int, Label]:
        """What these rows are of, in one pass over the file."""

    def whole(self) -> Array:
        """All rows."""
        parts = [part for _, part in self.chunks(2**16)]
        return np.concatenate(parts) if parts else np.empty((0, self.dimensions), np.float32)


def open_vectors(file: Path) -> Vectors:
    """
    Raises:
        DataError: the file is neither .npy nor .parquet with vectors.
        OSError: it cannot be opened.
    """
    readers = {".npy": _open_npy, ".parquet": _open_parquet}
    if file.suffix.lower() not in readers:
        raise bad_line(file, None, "no known suffix; it must be .npy or .parquet")
    return readers[file.suffix.lower()](file)


# ---- .npy ------------------------------------------------------------------------------------------------------------


def _open_npy(file: Path) -> Vectors:
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except ValueError as error:
        raise bad_line(file, None, f"damaged, cut or no .npy ({error})") from None
    if array.ndim != 2 or array.dtype.name not in KINDS:
        raise bad_line(file, None, f"holds {array.dtype} of shape {array.shape}; rows of {', '.join(KINDS)} are needed")
    return _Npy(file, *array.shape)


class _Npy(Vectors):
    def _parts(self, size: int) -> Iterator[np.ndarray[Any, Any]]:
        array = np.lib.format.open_memmap(self.file, mode="r")
        for start in range(0, self.rows, size):
            yield np.array(array[start : start + size])

    def labels(self, rows: Collection[int]) -> dict[int, Label]:
        file, wanted = ids_file(self.file), set(rows)
        if not file.is_file():
            return dict.fromkeys(rows, Label())
        found: dict[int, Label] = {}
        count = 0
        with file.open(encoding="utf-8", newline="\n") as lines:
            for count, line in enumerate(lines, 1):
                if count - 1 in wanted:
                    found[count - 1] = Label(line.rstrip("\n") or None)
        if count != self.rows:
            raise bad_line(file, None, f"{count:,} ids; {self.file} has {self.rows:,} rows")
        return found


# ---- .parquet --------------------------------------------------------------------------------------------------------


def _open_parquet(file: Path) -> Vectors:
    arrow, parquet = package("pyarrow", "reading .parquet"), package("pyarrow.parquet", "reading .parquet")
    try:
        with parquet.ParquetFile(file) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
            first = next(opened.iter_batches(1, columns=["embedding"]), None) if "embedding" in schema.names else None
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        raise bad_line(file, None, f"damaged, cut or no Parquet ({error})") from None
    if "embedding" not in schema.names:
        raise bad_line(file, None, f"no column 'embedding'; there are {', '.join(map(repr, schema.names)) or 'none'}")
    kind = schema.field("embedding").type
    if str(getattr(kind, "value_type", None)) not in ("halffloat", "float", "double"):
        raise bad_line(file, None, f"column 'embedding' is of type {kind}; lists of numbers are needed")
    dimensions = getattr(kind, "list_size", None)
    if dimensions is None and first is not None:
        dimensions = len(first.column(0)[0].as_py() or ())
    if rows and not dimensions:
        raise bad_line(file, 1, "no vector")
    return _Parquet(file, rows, dimensions or 0)


class _Parquet(Vectors):
    def _parts(self, size: int) -> Iterator[np.ndarray[Any, Any]]:
        start = 0
        with package("pyarrow.parquet", "reading .parquet").ParquetFile(self.file) as opened:
            for batch in opened.iter_batches(size, columns=["embedding"]):
                column = batch.column(0)
                self._check(column, start)
                yield vectors_in(column)
                start += len(column)

    def _check(self, column: Any, start: int) -> None:
        """Refuses rows without a vector, and lists of other lengths."""
        lengths = package("pyarrow.compute", "reading .parquet").list_value_length(column)
        for row, length in enumerate(lengths.to_numpy(zero_copy_only=False)):
            if length != self.dimensions:
                has = "no vector" if length is None or np.isnan(length) else f"{int(length)} dimensions"
                raise bad_line(self.file, start + row + 1, f"{has}; the first row has {self.dimensions} dimensions")

    def labels(self, rows: Collection[int]) -> dict[int, Label]:
        found: dict[int, Label] = {}
        with package("pyarrow.parquet", "reading .parquet").ParquetFile(self.file) as opened:
            columns = [name for name in ("id", "text") if name in opened.schema_arrow.names]
            start = 0
            for group in range(opened.num_row_groups):
                end = start + opened.metadata.row_group(group).num_rows
                wanted = [row for row in rows if start <= row < end]
                if wanted and columns:
                    table = opened.read_row_group(group, columns=columns).take([row - start for row in wanted])
                    values = [
                        table[name].to_pylist() if name in columns else [None] * len(wanted) for name in ("id", "text")
                    ]
                    for row, name, text in zip(wanted, *values, strict=True):
                        found[row] = Label(None if name is None else str(name), text)
                start = end
        return {row: found.get(row, Label()) for row in rows}
