"""The folder beside an unfinished file of vectors: its blocks, and what they are of."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import blocks
from .blocks import Block

__all__ = ["Work", "check_state", "file_hash", "opened", "write_text"]

STATE, LOCK, DONE = "state.json", ".lock", re.compile(r"\d{8,}\.parquet")


@dataclass(frozen=True)
class Work:
    """
    Attributes:
        folder: that exists.
        keep_text: whether texts are written with their vectors.
    """

    folder: Path
    keep_text: bool

    def done(self, number: int) -> Path:
        """The file of a block's vectors."""
        return self.folder / f"{number:08}.parquet"

    def staged(self, number: int) -> Path:
        """The file of a block's texts, for a process that embeds it."""
        return self.folder / f"{number:08}.texts.parquet"

    def has(self, block: Block) -> bool:
        """Whether the block is done.

        Raises:
            ValueError: it was done with other texts.
        """
        before = blocks.digest_in(self.done(block.number))
        if before is not None and before != block.digest:
            rows = f"{block.start + 1:,} to {block.start + len(block.texts):,}"
            raise ValueError(
                f"{self.folder} was begun with other texts: rows {rows} have changed; go back to them, delete the "
                "folder or name another file"
            )
        return before is not None

    def save(self, block: Block, vectors: np.ndarray[Any, Any]) -> None:
        """Writes a block's vectors; the block is done."""
        blocks.write_table(self.done(block.number), blocks.table_of(block, vectors, has_texts=self.keep_text))

    def dimensions(self) -> int:
        """Of the vectors."""
        return blocks.dimensions_in(self.done(0))

    def state(self) -> dict[str, Any]:
        """What the folder was begun with."""
        state: dict[str, Any] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        return state

    def tables(self, count: int) -> Iterator[Any]:
        """The tables of blocks 0 to count - 1, one after another."""
        return (blocks.read_table(self.done(number)) for number in range(count))

    def check_count(self, count: int) -> None:
        """
        Raises:
            ValueError: more than `count` blocks were begun with.
        """
        if any(DONE.fullmatch(path.name) and int(path.stem) >= count for path in self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} was begun with more texts than the {count} blocks that there are now; go back to them, "
                "delete the folder or name another file"
            )


@contextmanager
def opened(folder: Path, state: Mapping[str, Any], *, keep_text: bool) -> Iterator[Work]:
    """A work folder, new or gone on with, for this process alone.

    Args:
        folder: whose parent exists.
        state: what the vectors depend on but for the texts, as JSON.
        keep_text: see Work.

    Raises:
        ValueError: the folder holds something else, or was begun with another state.
        BlockingIOError: another process uses it.
    """
    folder.mkdir(exist_ok=True)
    with (folder / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError:
            raise BlockingIOError(f"another process works in {folder}; one at a time can") from None
        _begin(folder, state)
        yield Work(folder, keep_text)


def _begin(folder: Path, state: Mapping[str, Any]) -> None:
    for rest in folder.glob(".*.tmp"):
        rest.unlink()
    file = folder / STATE
    if not file.is_file():
        others = [path.name for path in folder.iterdir() if path.name != LOCK]
        if others:
            raise ValueError(f"{folder} holds {others[0]} and no unfinished vectors; name another file")
    elif any(DONE.fullmatch(path.name) for path in folder.iterdir()):
        check_state(folder, json.loads(file.read_text(encoding="utf-8")), state)
        return
    write_text(file, json.dumps(state, indent=1, ensure_ascii=False) + "\n")


def check_state(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the states differ; the message names the first difference.
    """
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{place} is of {name} = {before.get(name)!r}, now it is {value!r}; go back to it, delete {place.name} "
                "or name another file"
            )


def write_text(file: Path, content: str) -> None:
    """Writes UTF-8; the file appears whole or not at all."""
    beside = file.with_name(f".{file.name}.tmp")
    with beside.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)


def file_hash(file: Path) -> str:
    """SHA-256 of its bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()
