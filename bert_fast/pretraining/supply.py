"""The packs of a run: which there are at a step of a phase, for which process, with which masks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .batches import Masking, PretrainingBatch, mask
from .config import ConfigError, Phase, RunConfig
from .feed import Feed, Unmasked
from .shards import Corpus
from .stream import PackStream, draws

__all__ = ["Supply"]


class Supply:
    """What one of a run's processes reads.

    Args:
        config: of the run.
        processes: of the run.
        index: of this one.

    Attributes:
        corpus, held_out: texts for training and for evaluation; a part may be empty.
        vocabulary: of both.
        counts: what the streams know of their pools, by phase; a checkpoint keeps it.

    Raises:
        ConfigError: the corpus has no text to train on, or too little of it, or its packs cannot be shared evenly.
    """

    def __init__(self, config: RunConfig, processes: int, index: int) -> None:
        self.config, self.processes, self.index = config, processes, index
        self.corpus = Corpus.open(config.data.corpus)
        self.held_out = Corpus.open(config.data.corpus, "held_out")
        self.vocabulary = self.corpus.vocabulary
        self.counts: dict[int, tuple[tuple[int, ...], ...]] = {}
        self._judges: dict[int, PackStream] = {}  # by length; a stream keeps its plan
        self._check_packs()
        self._check_documents()

    def _check_packs(self) -> None:
        lanes, shards = self.config.data.lanes, sum(len(shard.tokens) > 0 for shard in self.corpus.shards)
        if lanes > shards:
            raise ConfigError(f"data.lanes is {lanes}; it must be at most the corpus' shards, {shards}")
        for number, phase in enumerate(self.config.phases):
            packs = self.packs_of_step(phase)
            if packs % self.processes:
                raise ConfigError(
                    f"phases[{number}].tokens_per_step is {phase.tokens_per_step}, which makes {packs} packs of "
                    f"batch.tokens_per_pack, {self.config.batch.tokens_per_pack}; {self.processes} processes cannot "
                    "share them evenly"
                )

    def _check_documents(self) -> None:
        corpus = f"data.corpus is {self.config.data.corpus}, which"
        if self.corpus.total_tokens == 0:
            raise ConfigError(f"{corpus} holds no text to train on; prepare it with a smaller held-out share")
        for part in (self.corpus, self.held_out):
            if self.config.data.instances == "nsp" and part.total_documents == 1:
                raise ConfigError(
                    f'{corpus} has one document in its part "{part.part}"; data.instances "nsp" needs two to draw from'
                )

    def packs_of_step(self, phase: Phase) -> int:
        """Packs of an optimizer step, over all processes."""
        return phase.tokens_per_step // self.config.batch.tokens_per_pack

    def phase_at(self, share: float) -> int:
        """The phase that a share of the run lies in."""
        ends = itertools.accumulate(phase.share for phase in self.config.phases[:-1])
        return sum(share >= end - 1e-9 for end in ends)

    def steps(self, phase: int, done: int) -> Iterator[list[Unmasked]]:
        """This process's packs, step after step.

        Args:
            phase: its number.
            done: steps that the run has made in it.
        """
        packs = self.packs_of_step(self.config.phases[phase])
        feed = Feed(
            self._stream(phase),
            self.vocabulary,
            start=done * packs + self.index,
            step=self.processes,
            workers=self.config.data.workers,
        ).packs()
        while True:
            yield list(itertools.islice(feed, packs // self.processes))

    def _stream(self, phase: int) -> PackStream:
        config = self.config
        return PackStream(
            self.corpus.shards,
            config.data.instances,
            config.phases[phase].length,
            config.batch.tokens_per_pack,
            seed=int(draws(config.train.seed, phase, 5).integers(2**31)),
            short_seq_prob=config.data.short_seq_prob,
            duplicates=config.data.duplicates,
            lanes=config.data.lanes,
            counts=[list(counts) for counts in self.counts.get(phase, ())],
        )

    def masked(self, pack: Unmasked, share: float) -> PretrainingBatch:
        """The pack with masks, as they are at this share of the run."""
        rule, seed = self.config.masking, self.config.train.seed
        first, last = rule.rate if isinstance(rule.rate, tuple) else (rule.rate, rule.rate)
        return mask(
            pack.batch,
            pack.classes,
            pack.id,
            self.vocabulary,
            rate=first + (last - first) * share,
            seed=seed,
            rule=Masking(rule.unit, rule.mask_probability, rule.random_probability, rule.max_span),
        )

    def judge(self, phase: int) -> PackStream:
        """Held-out text in sequences of a phase's length."""
        length = self.config.phases[phase].length
        if length not in self._judges:
            self._judges[length] = PackStream(
                self.held_out.shards,
                self.config.data.instances,
                length,
                self.config.batch.tokens_per_pack,
                short_seq_prob=0.0,
            )
        return self._judges[length]
