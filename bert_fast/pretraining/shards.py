"""A prepared corpus on disk: token ids in .npy files that are mapped into memory, with sentence and document bounds.

A folder holds manifest.json, vocabulary/ and the shards. A shard NAME is NAME.tokens.npy (tokens,) uint16 or uint32,
NAME.sentences.npy (sentences + 1,) int64, bounds of the sentences in tokens, and NAME.documents.npy (documents + 1,)
int64, bounds of the documents in sentences.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from .vocabulary import Vocabulary

__all__ = ["FORMAT", "Corpus", "Shard", "open_shard", "token_dtype", "write_atomically", "write_shard"]

FORMAT = 1
MANIFEST = "manifest.json"
STARTED = "preparation.json"
"""What a preparation writes first; without a manifest beside it, it is unfinished."""

ARRAYS = ("tokens", "sentences", "documents")

AGAIN = "delete the folder and prepare the corpus again"


@dataclass(frozen=True, eq=False)
class Shard:
    """A part of a corpus. It is pickled by its name, not by its contents.

    Attributes:
        folder, name: where it is.
        tokens: (tokens,) uint16 or uint32, the ids of all sentences.
        sentences: (sentences + 1,) int64; sentence i is tokens[sentences[i] : sentences[i + 1]].
        documents: (documents + 1,) int64; document i is made of sentences documents[i] to documents[i + 1] - 1.
    """

    folder: Path
    name: str
    tokens: npt.NDArray[np.unsignedinteger[Any]]
    sentences: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_sentences(self) -> int:
        return len(self.sentences) - 1

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        return open_shard, (self.folder, self.name)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A part of a prepared corpus; see `open`.

    Attributes:
        folder: where it is.
        part: "train" or "held_out".
        shards: in the order of the text; none where no document came into this part.
        vocabulary: what its ids mean.
        fingerprint: SHA-256 of the vocabulary's and all shards' hashes, in hexadecimal.
    """

    folder: Path
    part: Literal["train", "held_out"]
    shards: tuple[Shard, ...]
    vocabulary: Vocabulary
    fingerprint: str

    @property
    def total_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def total_sentences(self) -> int:
        return sum(shard.num_sentences for shard in self.shards)

    @property
    def total_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @classmethod
    def open(cls, folder: str | Path, part: Literal["train", "held_out"] = "train", *, check: bool = False) -> Corpus:
        """Maps the shards of a part into memory.

        Args:
            folder: what prepare made.
            part: "train" or "held_out".
            check: whether every file is read and compared with its hash.

        Raises:
            ValueError: the folder is no finished corpus of this format, a file is missing, cut or changed, or `part` is
                another; the message names the file and says what to do.
        """
        from .vocabulary import load

        folder = Path(folder)
        manifest = read_manifest(folder)
        if part not in manifest["parts"]:
            raise ValueError(f"part is {part!r}; it must be one of {', '.join(map(repr, manifest['parts']))}")
        tokenizer = folder / "vocabulary" / "tokenizer.json"
        if not tokenizer.is_file() or _hash(tokenizer) != manifest["vocabulary"]:
            raise ValueError(f"{tokenizer} is missing or is not the one the corpus was prepared with; {AGAIN}")
        entries = manifest["parts"][part]
        shards = tuple(open_shard(folder, entry["name"], entry) for entry in entries)
        if check:
            for entry in entries:
                _check_hashes(folder, entry)
        hashes = [manifest["vocabulary"], *(entry["sha256"][array] for entry in entries for array in ARRAYS)]
        fingerprint = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        return cls(folder, part, shards, load(tokenizer), fingerprint)


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The dtype of token ids: uint16 up to 65,536 entries, else uint32."""
    return np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished corpus.

    Raises:
        ValueError: there is none, it cannot be read, or it is of another format.
    """
    file = folder / MANIFEST
    if not file.is_file():
        if (folder / STARTED).is_file():
            raise ValueError(
                f"{folder} is not prepared to the end; prepare it again, with the same sources and options"
            )
        raise ValueError(f"{file} does not exist; a folder with a prepared corpus is needed")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is damaged; {AGAIN}") from None
    if found != FORMAT:
        raise ValueError(f"{file} is of format {found!r}; this version reads {FORMAT}: {AGAIN}")
    return manifest


def open_shard(folder: Path, name: str, entry: Mapping[str, Any] | None = None) -> Shard:
    """Maps a shard into memory; with its entry in the manifest the sizes are compared.

    Raises:
        ValueError: a file is missing, cut, or does not fit to the others.
    """
    tokens, sentences, documents = (_map(folder / f"{name}.{array}.npy") for array in ARRAYS)
    is_sound = (
        tokens.dtype in (np.uint16, np.uint32)
        and sentences.dtype == documents.dtype == np.int64
        and (sentences[0], sentences[-1]) == (0, len(tokens))
        and (documents[0], documents[-1]) == (0, len(sentences) - 1)
    )
    shard = Shard(folder, name, tokens, sentences, documents)
    found = (shard.num_tokens, shard.num_sentences, shard.num_documents)
    if not is_sound or (entry is not None and found != tuple(entry[array] for array in ARRAYS)):
        raise ValueError(f"{folder / name}.*.npy do not belong together; {AGAIN}")
    return shard


def _map(file: Path) -> npt.NDArray[Any]:
    """A read-only array of a .npy file.

    np.load(mmap_mode="r") keeps a file descriptor for each array, and a process may often have no more than 1024; torch
    keeps none.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            start = stream.tell()
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; {AGAIN}") from None
    except ValueError:
        raise ValueError(f"{file} is no .npy file; {AGAIN}") from None
    if len(shape) != 1 or not shape[0] or size != start + shape[0] * dtype.itemsize:
        raise ValueError(f"{file} has {size} bytes, which is not what its header says; {AGAIN}")
    array: npt.NDArray[Any] = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
    array = array[start:].view(dtype)
    array.flags.writeable = False
    return array


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check_hashes(folder: Path, entry: Mapping[str, Any]) -> None:
    for array in ARRAYS:
        file = folder / f"{entry['name']}.{array}.npy"
        if _hash(file) != entry["sha256"][array]:
            raise ValueError(f"{file} has changed since it was written; {AGAIN}")


def write_shard(
    folder: Path, name: str, documents: Sequence[Sequence[Sequence[int]]], dtype: npt.DTypeLike
) -> dict[str, Any]:
    """Writes a shard; each file appears whole or not at all.

    Args:
        folder: an existing folder.
        name: of the shard.
        documents: at least one, each of at least one sentence, each of at least one token id.
        dtype: of the token ids, uint16 or uint32.

    Returns:
        The manifest's entry: name, numbers of tokens, sentences and documents, and the files' SHA-256.

    Raises:
        ValueError: something is empty, or an id does not fit into dtype.
    """
    sentences = [np.asarray(sentence, dtype=np.int64) for document in documents for sentence in document]
    if not sentences or not all(map(len, documents)) or not all(map(len, sentences)):
        raise ValueError(f"documents of shard {name} are empty, or one of them or a sentence is; each needs a token")
    tokens = np.concatenate(sentences)
    if tokens.min() < 0 or tokens.max() > np.iinfo(np.dtype(dtype)).max:
        raise ValueError(f"documents of shard {name} have ids from {tokens.min()} to {tokens.max()}, beyond {dtype}")
    arrays = (tokens.astype(dtype), _bounds(map(len, sentences)), _bounds(map(len, documents)))
    hashes = {}
    for array, values in zip(ARRAYS, arrays, strict=True):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, values, version=(1, 0), allow_pickle=False)
        hashes[array] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        write_atomically(folder / f"{name}.{array}.npy", buffer.getvalue())
    sizes = (len(tokens), len(sentences), len(documents))
    return {"name": name, **dict(zip(ARRAYS, sizes, strict=True)), "sha256": hashes}


def _bounds(lengths: Any) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)


def write_atomically(file: Path, content: bytes | str) -> None:
    """Writes a file beside and renames it, so that it appears whole or not at all; text is written as UTF-8."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with beside.open("wb") as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)
