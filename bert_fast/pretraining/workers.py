"""Chunks written by several processes; those that an earlier call finished are left alone."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import TypeAlias

from .chunks import Chunk, ChunkWriter, Entry

Report: TypeAlias = Callable[[Entry], None]

PARALLELISM = "TOKENIZERS_PARALLELISM"  # the variable by which tokenizers' threads are turned off


def write_chunks(write: ChunkWriter, chunks: Iterable[Chunk], workers: int | None, report: Report) -> list[Entry]:
    """Writes the chunks that are not finished.

    Args:
        write: what writes one.
        chunks: numbered from 0.
        workers: processes; 0: this one; None: as many as there are cores.
        report: gets each chunk's entry when it is finished.

    Returns:
        The entries of all chunks, in order.

    Raises:
        CorpusError: a finished chunk was made of another text.
        RuntimeError: a worker was killed.
    """
    if workers == 0:
        return _write_here(write, chunks, report)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        return _write_in(pool, write, chunks, 2 * workers, report)
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker was killed, perhaps for want of memory (fewer workers or shard_bytes need less); "
            "finished chunks are kept, and the same call goes on from there"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_here(write: ChunkWriter, chunks: Iterable[Chunk], report: Report) -> list[Entry]:
    entries = []
    with _one_thread():
        for chunk in chunks:
            entries.append(write.finished(chunk) or write(chunk))
            report(entries[-1])
    return entries


def _write_in(
    pool: ProcessPoolExecutor, write: ChunkWriter, chunks: Iterable[Chunk], most: int, report: Report
) -> list[Entry]:
    """The entries, in order; no more than `most` chunks are in memory."""
    entries: dict[int, Entry] = {}
    pending: dict[Future[Entry], int] = {}

    def keep(number: int, entry: Entry) -> None:
        entries[number] = entry
        report(entry)

    def collect(limit: int) -> None:
        while len(pending) > limit:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                keep(pending.pop(future), future.result())

    for chunk in chunks:
        entry = write.finished(chunk)
        if entry is None:
            pending[pool.submit(write, chunk)] = chunk.number
            collect(most - 1)
        else:
            keep(chunk.number, entry)
    collect(0)
    return [entries[number] for number in sorted(entries)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it tokenizers starts no threads, and later forks of this process are safe."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


def _start_worker() -> None:
    os.environ[PARALLELISM] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this worker when its parent ends; it would else wait for ever for work where the parent was killed."""
    wait_for([sentinel])
    os._exit(1)
