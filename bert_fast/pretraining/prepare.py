"""From a corpus to shards: read in order, tokenised in parallel, continued where it was interrupted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from .corpus import CorpusError, OnProblem, Problem, documents_of, find_files, read_documents, split_sentences
from .shards import ARRAYS, FORMAT, MANIFEST, STARTED, open_shard, token_dtype, write_atomically, write_shard
from .vocabulary import Vocabulary

__all__ = ["Prepared", "Progress", "prepare"]

PARTS = ("train", "held_out")
LOCK = ".lock"
BATCH = 1024  # sentences for the tokenizer at once: more take memory and no less time

Totals: TypeAlias = dict[str, dict[str, int]]
Rows: TypeAlias = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Progress:
    """How far a preparation is.

    Attributes:
        chunks: that are finished, those of an interrupted run included.
        bytes_read: of text in them.
        tokens: in them.
        seconds: since the call.
    """

    chunks: int
    bytes_read: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """What prepare made.

    Attributes:
        folder: for Corpus.open.
        totals: "train" and "held_out", each with its numbers of "documents", "sentences" and "tokens".
        problems: what was skipped.
        seconds: of this call.
    """

    folder: Path
    totals: Totals
    problems: int
    seconds: float


def prepare(
    out: Path,
    *,
    sources: Sequence[Path] | Rows,
    vocabulary: Vocabulary,
    field: str = "text",
    sentences: Literal["lines", "split"] = "split",
    held_out: float = 0.005,
    shard_bytes: int = 32 * 2**20,
    workers: int | None = None,
    on_problem: OnProblem,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Tokenises a corpus into the folder `out`, which Corpus.open reads.

    An interrupted preparation goes on where it was when it is called again with the same sources, vocabulary and
    options, and ends with the same files. The number of workers changes nothing. A script that calls this with workers
    needs `if __name__ == "__main__":`, because they are spawned.

    Args:
        out: a new or empty folder, or one of an earlier call.
        sources: files and folders as find_files takes them, or a data set as documents_of takes it.
        vocabulary: the tokenizer.
        field: key or column of the text in .jsonl, .parquet and data sets.
        sentences: "lines": each line is a sentence; "split": each line is split by split_sentences.
        held_out: share of the documents that are kept from training, in [0, 1); a hash of a document's text decides.
        shard_bytes: about how much UTF-8 text makes a chunk, from which one shard for each part is made.
        workers: processes; 0: the text is tokenised in this one; None: as many as there are cores.
        on_problem: gets what is skipped; may raise. A call that continues names the problems of the first again.
        progress: called after each chunk.

    Raises:
        CorpusError: there is no document; `out` holds something else, or is of other sources or options.
        ValueError: an argument is out of range.
        RuntimeError: another process prepares this folder, or a worker was killed.
    """
    started = time.perf_counter()
    options = {"field": field, "sentences": sentences, "held_out": held_out, "shard_bytes": shard_bytes}
    _check_options(options, workers)
    files = _files(sources)
    state = {
        "format": FORMAT,
        "vocabulary": vocabulary.fingerprint,
        "options": options,
        "sources": [_identity(file) for file in files] if files else [_identity_of_rows(sources)],
    }
    problems = 0

    def count(problem: Problem) -> None:
        nonlocal problems
        problems += 1
        on_problem(problem)

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with _only_process(out):
        is_new = _check_folder(out, state)
        finished = _finished(out, state)
        if finished:
            return Prepared(out, finished["totals"], finished["problems"], time.perf_counter() - started)
        if is_new:
            write_atomically(out / STARTED, _to_json(state))
        vocabulary.save(out / "vocabulary")
        write = ChunkWriter(out, vocabulary, sentences, held_out)
        chunks = _chunks(_documents(files, sources, field, count), shard_bytes)
        reporter = _Reporter(progress, started)
        entries = _run(write, chunks, _workers(workers), reporter)
        manifest = _manifest(state, entries, problems, np.dtype(write.dtype).name)
        _remove_rests(out)
        write_atomically(out / MANIFEST, _to_json(manifest))
    return Prepared(out, manifest["totals"], problems, time.perf_counter() - started)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_options(options: Mapping[str, Any], workers: int | None) -> None:
    if options["sentences"] not in ("lines", "split"):
        raise ValueError(f"sentences is {options['sentences']!r}; it must be 'lines' or 'split'")
    if not 0 <= options["held_out"] < 1:
        raise ValueError(f"held_out is {options['held_out']}; it must lie in [0, 1)")
    if options["shard_bytes"] < 1:
        raise ValueError(f"shard_bytes is {options['shard_bytes']}; it must be at least 1")
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0, or None")


def _workers(workers: int | None) -> int:
    if workers is not None:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _files(sources: Sequence[Path] | Rows) -> list[Path]:
    """The files that are meant; none where sources is a data set."""
    if isinstance(sources, (str, Path)):
        sources = [Path(sources)]
    if isinstance(sources, (list, tuple)) and all(isinstance(source, (str, Path)) for source in sources):
        return find_files(sources)
    return []


def _documents(
    files: Sequence[Path], sources: Sequence[Path] | Rows, name: str, on_problem: OnProblem
) -> Iterator[list[str]]:
    if not files:
        yield from documents_of(sources, field=name, on_problem=on_problem)  # type: ignore[arg-type]
    for file in files:
        yield from read_documents(file, field=name, on_problem=on_problem)


def _identity(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"file": str(file.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _identity_of_rows(rows: object) -> dict[str, Any]:
    """datasets keeps a hash of each data set; other rows are known by their text alone, chunk by chunk."""
    known = getattr(rows, "_fingerprint", None)
    return {"file": None, "dataset": type(rows).__name__, "fingerprint": known if isinstance(known, str) else None}


# ---- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def _only_process(out: Path) -> Iterator[None]:
    with (out / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError:
            raise RuntimeError(f"another process prepares {out}; one at a time can") from None
        yield


def _check_folder(out: Path, state: Mapping[str, Any]) -> bool:
    """Whether the folder is empty; where it is not, it must be of the same preparation."""
    file = out / STARTED
    if not file.is_file():
        others = [path for path in out.iterdir() if path.name != LOCK and not path.name.endswith(".tmp")]
        if others:
            raise CorpusError(f"{out} holds {others[0].name} and no preparation; a new or empty folder is needed")
        return True
    before = json.loads(file.read_text(encoding="utf-8"))
    if before["format"] == FORMAT:
        before["options"], options = {}, {**before["options"]}
        for name, value in state["options"].items():
            if options.get(name) != value:
                raise CorpusError(
                    f"{out} was begun with {name}={options.get(name)!r}, and {name} is {value!r} now; "
                    "go back to it, delete the folder or name another"
                )
    for name in ("format", "vocabulary", "sources"):
        if before[name] != state[name]:
            difference = _difference(before[name], state[name])
            raise CorpusError(
                f"{out} was begun with other {name} ({difference}); go back to it, delete the folder or name another"
            )
    return False


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, list):
        return f"{before} then, {now} now"
    changed = [source for source in before if source not in now] or [source for source in now if source not in before]
    if not changed:
        return "the same in another order"
    return f"{changed[0]['file'] or changed[0]['dataset']} is new, gone or changed"


def _finished(out: Path, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished folder, where it is certain that it is of these sources."""
    if not (out / MANIFEST).is_file() or any(source.get("fingerprint", "") is None for source in state["sources"]):
        return None
    manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _remove_rests(out: Path) -> None:
    """What killed processes left of files that they were writing."""
    for folder in (out, out / "vocabulary"):
        for file in folder.glob(".*.tmp"):
            file.unlink(missing_ok=True)


def _to_json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _manifest(
    state: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], problems: int, dtype: str
) -> dict[str, Any]:
    parts = {part: [entry[part] for entry in entries if entry[part]] for part in PARTS}
    if not any(parts.values()):
        names = ", ".join(str(source["file"] or source["dataset"]) for source in state["sources"][:5])
        raise CorpusError(f"no document found in {names}")
    totals = {
        part: {array: sum(shard[array] for shard in shards) for array in ARRAYS} for part, shards in parts.items()
    }
    return {**state, "dtype": dtype, "parts": parts, "problems": problems, "totals": totals}


# ---- chunks ----------------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Documents that make a shard of each part.

    Attributes:
        number: of the chunk, from 0.
        documents: lists of lines.
        size: bytes of their text.
        digest: of their text.
    """

    number: int
    documents: list[list[str]] = field(default_factory=list)
    size: int = 0
    digest: str = ""

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


def _chunks(documents: Iterable[list[str]], shard_bytes: int) -> Iterator[Chunk]:
    chunk, digest = Chunk(0), hashlib.sha256()
    for document in documents:
        text = "\n".join(document).encode("utf-8")
        chunk.documents.append(document)
        chunk.size += len(text)
        digest.update(text + b"\n\n")
        if chunk.size >= shard_bytes:
            chunk.digest = digest.hexdigest()
            yield chunk
            chunk, digest = Chunk(chunk.number + 1), hashlib.sha256()
    if chunk.documents:
        chunk.digest = digest.hexdigest()
        yield chunk


@dataclass(frozen=True)
class ChunkWriter:
    """Tokenises a chunk and writes its shards, and after them NAME.json, which says that it is finished.

    Attributes:
        folder: where to.
        vocabulary: the tokenizer.
        sentences: "lines" or "split".
        held_out: share of the documents.
    """

    folder: Path
    vocabulary: Vocabulary
    sentences: Literal["lines", "split"]
    held_out: float

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocabulary.size)

    def finished(self, chunk: Chunk) -> dict[str, Any] | None:
        """The entry of a chunk that is finished already.

        Raises:
            CorpusError: it was made of another text.
        """
        try:
            entry: dict[str, Any] = json.loads((self.folder / f"{chunk.name}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if entry["text"] != chunk.digest:
            raise CorpusError(f"{self.folder} was begun with another text (chunk {chunk.name}); use another folder")
        try:
            for part in PARTS:
                if entry[part]:
                    open_shard(self.folder, entry[part]["name"], entry[part])
        except ValueError:
            return None
        return entry

    def __call__(self, chunk: Chunk) -> dict[str, Any]:
        parts: dict[str, list[list[Any]]] = {part: [] for part in PARTS}
        for lines, document in zip(chunk.documents, self._encode(chunk.documents), strict=True):
            if document:
                parts[PARTS[_is_held_out(lines, self.held_out)]].append(document)
        entry: dict[str, Any] = {"text": chunk.digest, "bytes": chunk.size}
        for part, documents in parts.items():
            name = f"{chunk.name}.{part}"
            entry[part] = write_shard(self.folder, name, documents, self.dtype) if documents else None
        write_atomically(self.folder / f"{chunk.name}.json", _to_json(entry))
        return entry

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


def _is_held_out(lines: Sequence[str], share: float) -> bool:
    digest = hashlib.sha256("\n".join(lines).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


# ---- running ---------------------------------------------------------------------------------------------------------


class _Reporter:
    def __init__(self, progress: Callable[[Progress], None] | None, started: float) -> None:
        self.progress = progress
        self.started = started
        self.chunks = self.bytes_read = self.tokens = 0

    def __call__(self, entry: Mapping[str, Any]) -> None:
        self.chunks += 1
        self.bytes_read += entry["bytes"]
        self.tokens += sum(entry[part]["tokens"] for part in PARTS if entry[part])
        if self.progress is not None:
            seconds = time.perf_counter() - self.started
            self.progress(Progress(self.chunks, self.bytes_read, self.tokens, seconds))


def _run(
    write: ChunkWriter, chunks: Iterable[Chunk], workers: int, report: Callable[[Mapping[str, Any]], None]
) -> list[dict[str, Any]]:
    """The entries of all chunks, in order."""
    if workers == 0:
        entries = []
        with _one_thread():
            for chunk in chunks:
                entries.append(write.finished(chunk) or write(chunk))
                report(entries[-1])
        return entries
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        return _run_in(pool, write, chunks, 2 * workers, report)
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker was killed, perhaps for want of memory (fewer workers or shard_bytes need less); "
            "finished chunks are kept, and the same call goes on from there"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _run_in(
    pool: ProcessPoolExecutor,
    write: ChunkWriter,
    chunks: Iterable[Chunk],
    most: int,
    report: Callable[[Mapping[str, Any]], None],
) -> list[dict[str, Any]]:
    """As _run; no more than `most` chunks are in memory."""
    entries: dict[int, dict[str, Any]] = {}
    pending: dict[Future[dict[str, Any]], int] = {}

    def collect(limit: int) -> None:
        while len(pending) > limit:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                number = pending.pop(future)
                entries[number] = future.result()
                report(entries[number])

    for chunk in chunks:
        entry = write.finished(chunk)
        if entry is None:
            pending[pool.submit(write, chunk)] = chunk.number
            collect(most - 1)
        else:
            entries[chunk.number] = entry
            report(entry)
    collect(0)
    return [entries[number] for number in sorted(entries)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it tokenizers starts no threads, and later forks of this process are safe."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this worker when its parent ends; it would else wait for ever for work where the parent was killed."""
    wait_for([sentinel])
    os._exit(1)
