"""An endless sequence of packs of instances, each of them a function of the seed and its number.

Which process reads a pack changes nothing in it, so a run that is continued, or goes on with more or fewer processes,
sees the same data in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import masking
from . import instances
from .instances import Array, Instances, Kind, ShardLike

# Tokens of the shards, over all lanes, whose instances are mixed with one another and kept in memory as tables.
POOL_TOKENS = 2**26

# Packs that are filled together: the more, the fuller they get; then each is full to that share, or filled anew.
WINDOW, FULL = 64, 0.98


class PackId(NamedTuple):
    """What a pack is made of.

    Attributes:
        epoch: pass over the corpus, or number of the static duplicate.
        lane: of the stream.
        pool: number of the pool within the lane's pass.
        number: of the pack within the pool's plan.
    """

    epoch: int
    lane: int
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

    Pack n is number n // lanes of lane n % lanes. A lane has shards of its own, so that one of several processes plans
    no more than the lanes that it reads.

    Attributes:
        shards: of the corpus.
        kind: of instances, see instances.build.
        max_length: tokens of the longest sequence.
        capacity: tokens of a pack.
        seed: of everything.
        short_seq_prob: see instances.build.
        duplicates: 0: every pass over the corpus has new instances, and new masks; n: there are n different ones, which
            come again and again, as in the released code of Devlin et al. 2018.
        lanes: how many.
        counts: for each lane, packs in its pools so far, which the stream finds as it goes; given back to another
            stream with the same settings they spare it the plans of what it passes over.
    """

    shards: Sequence[ShardLike]
    kind: Kind
    max_length: int
    capacity: int
    seed: int = 0
    short_seq_prob: float = 0.1
    duplicates: int = 0
    lanes: int = 1
    counts: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.capacity < self.max_length:
            raise ValueError(f"capacity is {self.capacity}; it must be at least max_length, {self.max_length}")
        shards = [shard for shard in self.shards if len(shard.tokens) > 0]
        if not shards:
            raise ValueError("the shards hold no tokens")
        if not 1 <= self.lanes <= len(shards):
            raise ValueError(f"lanes is {self.lanes}; it must lie in [1, {len(shards)}], the number of shards")
        self.counts += [[] for _ in range(self.lanes - len(self.counts))]
        order = draws(self.seed, 0).permutation(len(shards))
        self._lanes = [
            _Lane(self, number, [shards[i] for i in order[number :: self.lanes]], self.counts[number])
            for number in range(self.lanes)
        ]

    def packs(self, start: int = 0, step: int = 1) -> Iterator[Pack]:
        """Packs number start, start + step, ... without an end.

        Args:
            start: number of the first.
            step: distance of the numbers, such as the number of processes that share the stream.
        """
        # After so many packs it is the same lane's turn again.
        period = self.lanes // math.gcd(step, self.lanes)
        turns = []
        for number in range(start, start + period * step, step):
            lane = self._lanes[number % self.lanes]
            turns.append(lane.packs(number // self.lanes, step * period // self.lanes))
        for turn in itertools.cycle(turns):
            yield next(turn)

    def packs_of_pass(self) -> int:
        """Packs of a first pass over the corpus."""
        return sum(lane.packs_of_pass() for lane in self._lanes)


class _Lane:
    """A part of a stream's shards, in passes over pools of them.

    Args:
        stream: whose settings it has.
        number: of the lane.
        shards: of the lane.
        counts: packs in its pools so far.
    """

    def __init__(self, stream: PackStream, number: int, shards: list[ShardLike], counts: list[int]) -> None:
        self.stream, self.number, self.shards, self.counts = stream, number, shards, counts
        tokens = sum(len(shard.tokens) for shard in shards)
        self.pools = min(len(shards), -(-tokens * stream.lanes // POOL_TOKENS))
        self.planned: tuple[int, int, _Plan] | None = None

    def packs(self, start: int, step: int) -> Iterator[Pack]:
        """See PackStream.packs, with the lane's own numbers."""
        wanted, first = start, 0
        for pool in itertools.count():
            count = self.counts[pool] if pool < len(self.counts) else None
            if count is None or wanted < first + count:
                epoch, number = divmod(pool, self.pools)
                source = epoch % self.stream.duplicates if self.stream.duplicates else epoch
                plan = self.plan(source, number)
                count = len(plan)
                if pool == len(self.counts):
                    self.counts.append(count)
                shown = self.draws(epoch, number, 1).permutation(count)
                while wanted < first + count:
                    yield self.pack(plan, PackId(source, self.number, number, int(shown[wanted - first])))
                    wanted += step
            first += count

    def packs_of_pass(self) -> int:
        return sum(len(self.plan(0, number)) for number in range(self.pools))

    def draws(self, *numbers: int) -> np.random.Generator:
        return draws(self.stream.seed, self.number, *numbers)

    def plan(self, epoch: int, number: int) -> _Plan:
        """What the packs of a pool hold; the last pool's plan is kept."""
        if self.planned is None or self.planned[:2] != (epoch, number):
            order = self.draws(epoch, 0).permutation(len(self.shards))
            shards = [self.shards[i] for i in np.array_split(order, self.pools)[number]]
            generator = self.draws(epoch, number, 2)
            table = instances.build(
                shards,
                self.stream.kind,
                max_length=self.stream.max_length,
                short_seq_prob=self.stream.short_seq_prob,
                seed=int(generator.integers(2**63)),
            )
            mixed = generator.permutation(len(table))
            order, offsets = fill(table.lengths[mixed], self.stream.capacity)
            self.planned = epoch, number, _Plan(shards, table, mixed[order], offsets)
        return self.planned[2]

    @staticmethod
    def pack(plan: _Plan, identity: PackId) -> Pack:
        start, stop = plan.offsets[identity.number : identity.number + 2]
        return Pack(identity, plan.shards, plan.instances, plan.order[start:stop])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "planned": None}
