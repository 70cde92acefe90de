"""An endless sequence of packs of instances, each of them a function of the seed and its number.

Which process reads a pack changes nothing in it, so a run that is continued, or goes on with more or fewer processes,
sees the same data in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import masking
from . import instances
from .instances import Array, Instances, Kind, ShardLike

# Tokens of the shards whose instances are mixed with one another, and kept in memory as a table.
POOL_TOKENS = 2**26

# Packs that are filled together: the more, the fuller they get; then each is full to that share, or filled anew.
WINDOW, FULL = 64, 0.98


class PackId(NamedTuple):
    """What a pack is made of.

    Attributes:
        epoch: pass over the corpus, or number of the static duplicate.
        pool: number of the pool within the pass.
        number: of the pack within the pool's plan.
    """

    epoch: int
    pool: int
    number: int


class Pack(NamedTuple):
    """
    Attributes:
        id: see PackId.
        shards: that the instances are of.
        instances: the pool's.
        rows: (sequences,) int64, which of them the pack holds.
    """

    id: PackId
    shards: Sequence[ShardLike]
    instances: Instances
    rows: Array


class _Plan(NamedTuple):
    shards: Sequence[ShardLike]
    instances: Instances
    order: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.offsets) - 1


def draws(*numbers: int) -> np.random.Generator:
    """A generator of its own for these numbers, the same on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def fill(lengths: Array, capacity: int) -> tuple[Array, Array]:
    """Distributes sequences over packs, in their order as far as that goes.

    Windows of sequences are packed by best-fit decreasing; what is in packs that did not get full waits for the next
    window, so that only the very last ones may stay emptier.

    Args:
        lengths: (sequences,) int64 in [1, capacity].
        capacity: tokens of a pack.

    Returns:
        order: (sequences,) int64, numbers of sequences, pack after pack.
        offsets: (packs + 1,) int64.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    packs: list[Array] = []
    waiting = np.empty(0, np.int64)
    start = 0
    while start < len(lengths):
        room = WINDOW * capacity - int(lengths[waiting].sum())
        stop = max(int(np.searchsorted(ends, ends[start] + room, side="right")) - 1, start + 1)
        window = np.concatenate([waiting, np.arange(start, stop)])
        bins = masking.pack(torch.from_numpy(lengths[window]), capacity)
        found = np.split(window[bins.order.numpy()], bins.offsets.numpy()[1:-1])
        open_packs = [rows for rows in found if lengths[rows].sum() < FULL * capacity]
        if stop == len(lengths) or len(open_packs) > WINDOW // 2:  # some lengths never fill a pack
            open_packs = []
        waits = {id(rows) for rows in open_packs}
        packs += [rows for rows in found if id(rows) not in waits]
        waiting = np.concatenate([np.empty(0, np.int64), *open_packs])
        start = stop
    sizes = [len(rows) for rows in packs]
    return np.concatenate([np.empty(0, np.int64), *packs]), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@dataclass(eq=False)
class PackStream:
    """The packs of a phase of training.

    Attributes:
        shards: of the corpus.
        kind: of instances, see instances.build.
        max_length: tokens of the longest sequence.
        capacity: tokens of a pack.
        seed: of everything.
        short_seq_prob: see instances.build.
        duplicates: 0: every pass over the corpus has new instances, and new masks; n: there are n different ones, which
            come again and again, as in the released code of Devlin et al. 2018.
        counts: packs in the pools so far, which the stream finds as it goes; given back to another stream with the same
            settings they spare it the plans of what it passes over.
    """

    shards: Sequence[ShardLike]
    kind: Kind
    max_length: int
    capacity: int
    seed: int = 0
    short_seq_prob: float = 0.1
    duplicates: int = 0
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.capacity < self.max_length:
            raise ValueError(f"capacity is {self.capacity}; it must be at least max_length, {self.max_length}")
        if sum(len(shard.tokens) for shard in self.shards) == 0:
            raise ValueError("the shards hold no tokens")
        self._plans: dict[tuple[int, int], _Plan] = {}

    def packs(self, start: int = 0, step: int = 1) -> Iterator[Pack]:
        """Packs number start, start + step, ... without an end.

        Args:
            start: number of the first.
            step: distance of the numbers, such as the number of processes that share the stream.
        """
        wanted, first, pool = start, 0, 0
        while True:
            count = self.counts[pool] if pool < len(self.counts) else None
            if count is None or wanted < first + count:
                epoch, number = divmod(pool, len(self._pools(0)))
                plan = self._plan(self._source(epoch), number)
                count = len(plan)
                if pool == len(self.counts):
                    self.counts.append(count)
                shown = draws(self.seed, epoch, number, 1).permutation(count)
                while wanted < first + count:
                    yield self._pack(plan, PackId(self._source(epoch), number, int(shown[wanted - first])))
                    wanted += step
            first += count
            pool += 1

    def packs_of_pass(self) -> int:
        """Packs of the first pass over the corpus."""
        return sum(len(self._plan(0, number)) for number in range(len(self._pools(0))))

    def _source(self, epoch: int) -> int:
        return epoch % self.duplicates if self.duplicates else epoch

    def _pools(self, epoch: int) -> list[Array]:
        """Numbers of the shards of each pool."""
        tokens = sum(len(shard.tokens) for shard in self.shards)
        number = min(len(self.shards), -(-tokens // POOL_TOKENS))
        return np.array_split(draws(self.seed, epoch, 0).permutation(len(self.shards)), number)

    def _plan(self, epoch: int, number: int) -> _Plan:
        """What the packs of a pool hold; the last pool's plan is kept."""
        if (epoch, number) not in self._plans:
            shards = [self.shards[i] for i in self._pools(epoch)[number]]
            generator = draws(self.seed, epoch, number, 2)
            table = instances.build(
                shards,
                self.kind,
                max_length=self.max_length,
                short_seq_prob=self.short_seq_prob,
                seed=int(generator.integers(2**63)),
            )
            mixed = generator.permutation(len(table))
            order, offsets = fill(table.lengths[mixed], self.capacity)
            self._plans = {(epoch, number): _Plan(shards, table, mixed[order], offsets)}
        return self._plans[epoch, number]

    @staticmethod
    def _pack(plan: _Plan, identity: PackId) -> Pack:
        start, stop = plan.offsets[identity.number : identity.number + 2]
        return Pack(identity, plan.shards, plan.instances, plan.order[start:stop])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}
