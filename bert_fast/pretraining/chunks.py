"""Chunks of a corpus: cut from its documents, tokenised, and written as a shard of each part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from .folder import write_json
from .problems import CorpusError
from .sentences import split_sentences
from .shards import open_shard, token_dtype, write_shard
from .vocabulary import Vocabulary

PARTS = ("train", "held_out")
BATCH = 1024  # sentences for the tokenizer at once: more take memory and no less time

Entry: TypeAlias = dict[str, Any]
"""What is known of a finished chunk: "text", its digest, "bytes", and for each part the shard's entry as write_shard
returns it, or None where no document came into the part."""


@dataclass(frozen=True)
class Chunk:
    """Documents that make a shard of each part.

    Attributes:
        number: of the chunk, from 0.
        documents: lists of lines.
        size: bytes of their text.
        digest: SHA-256 of their text, in hexadecimal.
    """

    number: int
    documents: list[list[str]]
    size: int
    digest: str

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


def cut(documents: Iterable[list[str]], chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of whole documents, each but the last with at least chunk_bytes of UTF-8 text."""
    number, held, size, digest = 0, list[list[str]](), 0, hashlib.sha256()
    for document in documents:
        text = "\n".join(document).encode("utf-8")
        held.append(document)
        size += len(text)
        digest.update(text + b"\n\n")
        if size >= chunk_bytes:
            yield Chunk(number, held, size, digest.hexdigest())
            number, held, size, digest = number + 1, [], 0, hashlib.sha256()
    if held:
        yield Chunk(number, held, size, digest.hexdigest())


@dataclass(frozen=True)
class ChunkWriter:
    """Tokenises a chunk and writes its shards, and after them NAME.json, its entry, which says that it is finished.

    Attributes:
        folder: where to.
        vocabulary: the tokenizer.
        sentences: "lines": each line is a sentence; "split": each line is split by split_sentences.
        held_out: share of the documents that goes there, by a hash of their text.
    """

    folder: Path
    vocabulary: Vocabulary
    sentences: Literal["lines", "split"]
    held_out: float

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocabulary.size)

    def finished(self, chunk: Chunk) -> Entry | None:
        """The entry of a chunk that is finished already; None where a file is missing or damaged.

        Raises:
            CorpusError: it was made of another text.
        """
        try:
            entry: Entry = json.loads(self._file(chunk).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if entry["text"] != chunk.digest:
            raise CorpusError(f"{self.folder} was begun with another text (chunk {chunk.name}); use another folder")
        try:
            for shard in shards_in(entry):
                open_shard(self.folder, shard["name"], shard)
        except ValueError:
            return None
        return entry

    def __call__(self, chunk: Chunk) -> Entry:
        """Writes the chunk and returns its entry."""
        parts: dict[str, list[list[Any]]] = {part: [] for part in PARTS}
        for lines, document in zip(chunk.documents, self._encode(chunk.documents), strict=True):
            if document:
                parts[PARTS[_is_held_out(lines, self.held_out)]].append(document)
        entry: Entry = {"text": chunk.digest, "bytes": chunk.size}
        for part, documents in parts.items():
            name = f"{chunk.name}.{part}"
            entry[part] = write_shard(self.folder, name, documents, self.dtype) if documents else None
        write_json(self._file(chunk), entry)
        return entry

    def _file(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.name}.json"

    def _encode(self, documents: Sequence[Sequence[str]]) -> Iterator[list[Any]]:
        """The ids of each document's sentences that have any, as arrays."""
        is_split = self.sentences == "split"
        split = [
            [part for line in lines for part in split_sentences(line)] if is_split else lines for lines in documents
        ]
        ids = self._ids([sentence for document in split for sentence in document])
        for document in split:
            encoded = [next(ids) for _ in document]
            yield [sentence for sentence in encoded if len(sentence)]

    def _ids(self, sentences: Sequence[str]) -> Iterator[Any]:
        for start in range(0, len(sentences), BATCH):
            for ids in self.vocabulary.encode_lines(sentences[start : start + BATCH]):
                yield np.array(ids, dtype=self.dtype)


def shards_in(entry: Entry) -> list[dict[str, Any]]:
    """The shards' entries in a chunk's entry, one for each part that has documents."""
    return [entry[part] for part in PARTS if entry[part]]


def _is_held_out(lines: Sequence[str], share: float) -> bool:
    digest = hashlib.sha256("\n".join(lines).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share
