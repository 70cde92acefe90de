"""From a corpus to shards: read in order, tokenised in parallel, continued where it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from .chunks import PARTS, ChunkWriter, Entry, cut, shards_in
from .corpus import documents_of, find_files, read_documents
from .folder import begin, finish, finished, only_process
from .problems import CorpusError, OnProblem, Problem
from .shards import ARRAYS, FORMAT
from .vocabulary import Vocabulary
from .workers import write_chunks

__all__ = ["Prepared", "Progress", "prepare"]

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
        problems: how many things were skipped; of a folder that was finished before, those of the call that did it.
        seconds: of this call.
    """

    folder: Path
    totals: dict[str, dict[str, int]]
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
    with only_process(out):
        begin(out, state)
        manifest = finished(out, state)
        if manifest is None:
            vocabulary.save(out / "vocabulary")
            write = ChunkWriter(out, vocabulary, sentences, held_out)
            chunks = cut(_documents(files, sources, field, count), shard_bytes)
            entries = write_chunks(write, chunks, workers, _Reporter(progress, started))
            manifest = _manifest(state, entries, problems, write.dtype.name)
            finish(out, manifest)
    return Prepared(out, manifest["totals"], manifest["problems"], time.perf_counter() - started)


class _Reporter:
    """Adds up the entries of finished chunks and tells the progress."""

    def __init__(self, progress: Callable[[Progress], None] | None, started: float) -> None:
        self.progress = progress
        self.started = started
        self.chunks = self.bytes_read = self.tokens = 0

    def __call__(self, entry: Entry) -> None:
        self.chunks += 1
        self.bytes_read += entry["bytes"]
        self.tokens += sum(shard["tokens"] for shard in shards_in(entry))
        if self.progress is not None:
            seconds = time.perf_counter() - self.started
            self.progress(Progress(self.chunks, self.bytes_read, self.tokens, seconds))


def _manifest(state: Mapping[str, Any], entries: Sequence[Entry], problems: int, dtype: str) -> dict[str, Any]:
    parts = {part: [entry[part] for entry in entries if entry[part]] for part in PARTS}
    if not any(parts.values()):
        names = ", ".join(str(source["file"] or source["dataset"]) for source in state["sources"][:5])
        raise CorpusError(f"no document found in {names}")
    totals = {
        part: {array: sum(shard[array] for shard in shards) for array in ARRAYS} for part, shards in parts.items()
    }
    return {**state, "dtype": dtype, "parts": parts, "problems": problems, "totals": totals}


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


def _files(sources: Sequence[Path] | Rows) -> list[Path]:
    """The files that are meant; none where sources is a data set."""
    if isinstance(sources, (str, Path)):
        sources = [Path(sources)]
    if isinstance(sources, (list, tuple)) and all(isinstance(source, (str, Path)) for source in sources):
        return find_files(sources)
    return []


def _documents(
    files: Sequence[Path], sources: Sequence[Path] | Rows, field: str, on_problem: OnProblem
) -> Iterator[list[str]]:
    if not files:
        yield from documents_of(cast(Rows, sources), field=field, on_problem=on_problem)
    for file in files:
        yield from read_documents(file, field=field, on_problem=on_problem)


def _identity(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"file": str(file.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _identity_of_rows(rows: object) -> dict[str, Any]:
    """datasets keeps a hash of each data set; other rows are known by their text alone, chunk by chunk."""
    known = getattr(rows, "_fingerprint", None)
    return {"file": None, "dataset": type(rows).__name__, "fingerprint": known if isinstance(known, str) else None}
