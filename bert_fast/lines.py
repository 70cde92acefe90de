"""Lines of text files, plain or compressed, and what is wrong with them."""

from __future__ import annotations

import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

__all__ = ["MAX_LINE", "OnProblem", "Problem", "bare_suffix", "open_bytes", "read_lines"]

MAX_LINE = 2**26
"""Bytes of the longest line that is read. A file with longer ones most often lacks line ends."""

OPENERS: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".xz": lzma.open}

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@dataclass(frozen=True)
class Problem:
    """Something in a file that cannot be read.

    Attributes:
        file: where it is; "dataset" for a data set.
        line: its line, or its row in a Parquet file or a data set, from 1; None: the file as a whole.
        reason: what is wrong.
        ends_file: whether nothing after it can be read, not the line alone.
    """

    file: Path
    line: int | None
    reason: str
    ends_file: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" if self.line is None else f"{self.file}:{self.line}: {self.reason}"


OnProblem: TypeAlias = Callable[[Problem], None]


def bare_suffix(file: Path) -> str:
    """The suffix in lower case, of what is compressed that before .gz or .xz: ".jsonl" of "a.JSONL.gz"."""
    suffix = file.suffix.lower()
    return file.with_suffix("").suffix.lower() if suffix in OPENERS else suffix


def open_bytes(file: Path) -> BinaryIO:
    """The file's bytes; those of .gz and .xz are decompressed."""
    return cast(BinaryIO, OPENERS.get(file.suffix.lower(), open)(file, "rb"))


def read_lines(file: Path, on_problem: OnProblem) -> Iterator[tuple[int, str]]:
    """The lines that can be read, with their ends and their numbers from 1; none after a NUL character.

    Args:
        file: UTF-8, with or without a byte order mark; decompressed if its name ends with .gz or .xz.
        on_problem: hears of lines that are no UTF-8 or longer than MAX_LINE, of NUL characters and damaged archives. If
            it returns, the line, or the rest of the file, is skipped.

    Raises:
        OSError: the file cannot be opened.
    """
    number = 0
    try:
        with open_bytes(file) as stream:
            while raw := stream.readline(MAX_LINE):
                number += 1
                is_long = len(raw) == MAX_LINE and not raw.endswith(b"\n")
                if b"\0" in (_last_block(stream, raw) if is_long else raw):
                    reason = "NUL character, so this is no UTF-8 text; the rest of the file is skipped"
                    on_problem(Problem(file, number, reason, ends_file=True))
                    return
                if is_long:
                    on_problem(Problem(file, number, f"line longer than {MAX_LINE} bytes; it is skipped"))
                    continue
                try:
                    yield number, raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
                except UnicodeDecodeError as error:
                    on_problem(Problem(file, number, f"not UTF-8 at byte {error.start} of the line; it is skipped"))
    except DAMAGED as error:
        reason = f"damaged or cut ({error}); the rest of the file is skipped"
        on_problem(Problem(file, number + 1, reason, ends_file=True))


def _last_block(stream: BinaryIO, block: bytes) -> bytes:
    """The block that ends the line which this one starts, or one before it with a NUL character."""
    while block and b"\0" not in block and not block.endswith(b"\n"):
        block = stream.readline(MAX_LINE)
    return block
