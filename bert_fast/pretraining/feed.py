"""The packs that a process reads, in this process or in others that read ahead."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..masking import PackedBatch
from .batches import VocabularyLike, assemble
from .stream import PackId, PackStream


class Unmasked(NamedTuple):
    """
    Attributes:
        number: of the pack in its stream.
        id: see PackId.
        batch: without masks.
        classes: (sequences,) int64, the pairs' classes.
        counts: what the stream knows of its pools by then; see PackStream.
    """

    number: int
    id: PackId
    batch: PackedBatch
    classes: Tensor
    counts: tuple[tuple[int, ...], ...]


class Feed(IterableDataset[Unmasked]):
    """Packs number start, start + step, ... of a stream.

    Args:
        stream: see PackStream.
        vocabulary: of its tokens.
        start, step: see PackStream.packs.
        workers: processes that read ahead; 0: none.
    """

    def __init__(
        self, stream: PackStream, vocabulary: VocabularyLike, *, start: int = 0, step: int = 1, workers: int = 0
    ) -> None:
        self.stream, self.vocabulary = stream, vocabulary
        self.start, self.step, self.workers = start, step, workers

    def __iter__(self) -> Iterator[Unmasked]:
        info = get_worker_info()
        part, parts = (0, 1) if info is None else (info.id, info.num_workers)
        number, step = self.start + part * self.step, self.step * parts
        for pack in self.stream.packs(number, step):
            batch, classes = assemble(pack, self.vocabulary)
            yield Unmasked(number, pack.id, batch, classes, tuple(map(tuple, self.stream.counts)))
            number += step

    def packs(self) -> Iterator[Unmasked]:
        """The packs, in order. A DataLoader takes turns with its workers, so that theirs come in order, too."""
        if self.workers == 0:
            yield from self
            return
        can_fork = sys.platform == "linux" and not torch.cuda.is_initialized()
        yield from DataLoader(
            self,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=4,
            # Not by a fork server, which is their parent, and lives on with them when this process is killed.
            multiprocessing_context="fork" if can_fork else "spawn",
        )
