"""From files of texts to a file of vectors: block by block, gone on with where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..data.problems import DataError
from ..data.texts import find_texts, read_texts
from ..settings import one_of
from . import ray_engine
from .blocks import Block, cut, read_ahead
from .embedder import Embedder, Options, fingerprint
from .output import Shape, ids_file, record_file, write_vectors
from .ray_engine import Cluster
from .work import Work, check_state, opened, write_text

__all__ = ["Engine", "Progress", "Summary", "embed"]

Engine: TypeAlias = Literal["local", "ray"]

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far a call is.

    Attributes:
        texts: done, those of an interrupted call included.
        seconds: since the call.
        resumed: texts that were done before it.
    """

    texts: int
    seconds: float
    resumed: int = 0


@dataclass(frozen=True)
class Summary:
    """What embed made.

    Attributes:
        out: the file.
        rows, dimensions: of the vectors.
        empty: texts that are empty, or stand for what could not be read.
        bad: the latter.
        resumed: texts that were done before this call.
        seconds: of this call.
    """

    out: Path
    rows: int
    dimensions: int
    empty: int
    bad: int
    resumed: int
    seconds: float


@dataclass
class _Tally:
    """What has been read."""

    blocks: int = 0
    rows: int = 0
    empty: int = 0
    bad: int = 0
    resumed: int = 0
    has_ids: bool = False
    digest: Any = field(default_factory=hashlib.sha256)

    def of(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks, each counted."""
        for block in blocks:
            self.blocks += 1
            self.rows += len(block.texts)
            self.empty += sum(not text for text in block.texts)
            self.bad += block.bad
            self.has_ids = self.has_ids or any(name is not None for name in block.ids)
            self.digest.update(block.digest.encode())
            yield block

    def missing(self, blocks: Iterable[Block], work: Work) -> Iterator[Block]:
        """Those of the blocks that are not done."""
        for block in blocks:
            if work.has(block):
                self.resumed += len(block.texts)
            else:
                yield block


def embed(
    model: str | Path,
    source: Path | Sequence[Path],
    out: Path,
    *,
    options: Options | None = None,
    engine: Engine = "local",
    cluster: Cluster | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Writes the vector of every text into a file, in the order of the texts, in constant memory.

    An interrupted call goes on after its last whole block when it is made again, and ends with the same file: bit for
    bit where machine, number of threads and tokens_per_batch are the same. Made again after its end, it compares the
    texts and does nothing.

    Args:
        model: a folder, or a name on the hub, of a SentenceTransformer or an encoder, which gets mean pooling.
        source: files and folders, see find_texts and read_texts. An empty text gets a vector, too, so that rows are
            lines.
        out: a .npy file (rows, dimensions), with ids, if the texts have any, in NAME.ids.txt beside it; or .parquet
            with columns id and embedding. Beside it NAME.npy.json or NAME.parquet.json says what it is of, and the
            folder NAME.npy.work or NAME.parquet.work is there while it is unfinished.
        options: None: the defaults.
        engine: "local", or "ray": by several processes or machines, see ray_engine.
        cluster: for "ray"; None: the defaults.
        on_progress: called after each block.

    Raises:
        DataError: a text cannot be read, or there is none.
        ValueError: an argument is not allowed, or what was begun or is there is of something else.
        BlockingIOError: another process works on the same file.
        ImportError: a package is not installed.
        OSError: a file or the model cannot be read.
    """
    start = time.perf_counter()
    options = options or Options()
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    work_folder = _checked(out, sources, options)
    run = _engine(engine, str(model), options, cluster)
    files = find_texts(sources)
    state = {"format": FORMAT, "model": fingerprint(str(model)), **options.of_the_vectors()}
    tally = _Tally()
    blocks = tally.of(cut(read_texts(files, options.columns, options.on_problem), options.block))
    if out.is_file() and record_file(out).is_file():
        record = _same(out, state, blocks, tally)
    else:
        with opened(work_folder, state, keep_text=options.keep_text) as work:
            done = 0
            for count in run(tally.missing(blocks, work), work):
                done += count
                if on_progress is not None:
                    on_progress(Progress(tally.resumed + done, time.perf_counter() - start, tally.resumed))
            record = _join(out, work, state, tally, sources)
    shutil.rmtree(work_folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    return Summary(out, tally.rows, record["dimensions"], tally.empty, tally.bad, tally.resumed, seconds)


def _checked(out: Path, sources: Sequence[Path], options: Options) -> Path:
    """The work folder of the file."""
    if out.suffix.lower() not in (".npy", ".parquet"):
        raise ValueError(f"out is {out}; its suffix must be .npy or .parquet")
    if options.keep_text and out.suffix.lower() == ".npy":
        raise ValueError(f"keep_text is True, and out is {out}; only .parquet takes texts")
    if not out.parent.is_dir():
        raise ValueError(f"out is {out}; the folder {out.parent} does not exist")
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"out is {out}, which lies in the source {source}; it would be read as texts")
    work_folder = out.with_name(f"{out.name}.work")
    beside = [ids_file(out)] if out.suffix.lower() == ".npy" else []
    there = [file for file in (out, record_file(out), *beside) if file.exists()]
    if there and not work_folder.is_dir() and not {out, record_file(out)} <= set(there):
        names = ", ".join(file.name for file in there)
        raise ValueError(f"{names} without the rest of what embed writes; delete them or name another file than {out}")
    return work_folder


def _engine(
    engine: Engine, model: str, options: Options, cluster: Cluster | None
) -> Callable[[Iterator[Block], Work], Iterator[int]]:
    """What embeds blocks, and yields how many texts it has done."""
    one_of("engine", engine, Engine)
    if engine == "ray":
        return partial(ray_engine.run, model, options, cluster or Cluster())
    if cluster is not None:
        raise ValueError(f"cluster is {cluster}, and engine is 'local'; only 'ray' takes one")
    return partial(_run, model, options)


def _run(model: str, options: Options, blocks: Iterator[Block], work: Work) -> Iterator[int]:
    embedder = None
    for block in read_ahead(blocks):
        embedder = embedder or Embedder(model, options)  # not where everything is done
        work.save(block, embedder(block.texts))
        yield len(block.texts)


def _join(out: Path, work: Work, state: Mapping[str, Any], tally: _Tally, sources: Sequence[Path]) -> dict[str, Any]:
    """The finished file, with its record."""
    work.check_count(tally.blocks)
    if not tally.rows:
        shutil.rmtree(work.folder)
        raise DataError(f"{', '.join(map(str, sources))}: no texts")
    shape = Shape(tally.rows, work.dimensions(), state["dtype"], tally.has_ids)
    write_vectors(out, work.tables(tally.blocks), shape)
    record = {**state, "rows": shape.rows, "dimensions": shape.dimensions, "texts": tally.digest.hexdigest()}
    write_text(record_file(out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def _same(out: Path, state: Mapping[str, Any], blocks: Iterable[Block], tally: _Tally) -> dict[str, Any]:
    """The record of a finished file, which must be of the same."""
    record: dict[str, Any] = json.loads(record_file(out).read_text(encoding="utf-8"))
    check_state(out, record, state)
    for _ in blocks:
        pass
    if record["texts"] != tally.digest.hexdigest():
        raise ValueError(f"{out} is of other texts than there are now; delete it or name another file")
    tally.resumed = tally.rows
    return record
