"""The training loop, on accelerate: it places and wraps the model; what is done in which order is said here.

transformers' Trainer would do as much, but finds its place in the data by reading all that came before, writes its
checkpoints file by file into their final folder, and counts steps alone. Here a pack is a function of its number, so
that a place in the data is a number; a checkpoint is there whole or not at all; and a run may end by the clock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from .. import checkpoint
from ..heads import BertForPreTraining
from . import checkpoints, optimizers, schedules
from .batches import Masking, PretrainingBatch, mask
from .config import ConfigError, Phase, RunConfig, differences, dump, from_dict
from .evaluation import evaluate
from .feed import Feed, Unmasked
from .flops import peak_flops
from .monitor import Evaluation, Monitor, Step
from .objective import Objective, checkpoint_activations
from .shards import Corpus
from .stream import PackStream, draws
from .tally import Tally

# Keys of the configuration, or what they begin with, that may change when a run is gone on with.
FREE = ("out", "data.corpus", "data.workers", "schedule.", "log.", "eval.", "checkpoint.", "train.fsdp")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        step: steps done.
        phase: number of the phase.
        phase_step: steps done in it.
        elapsed: seconds of work, those before a restart among them.
    """

    step: int = 0
    phase: int = 0
    phase_step: int = 0
    elapsed: float = 0.0


@dataclass(frozen=True)
class Result:
    """
    Attributes:
        folder: the last checkpoint, which transformers loads.
        progress: see Progress.
        evaluation: the last one; None: the corpus has no held-out text, or no step was made.
    """

    folder: Path
    progress: Progress
    evaluation: Evaluation | None


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Result:
    """Trains a model. Every process of a distributed run calls it.

    Args:
        config: see RunConfig.
        resume: whether to go on from the last checkpoint in config.out, or to start where there is none.
        console: where the run tells how it goes; None: nowhere.

    Raises:
        ConfigError: the configuration does not fit the machine, the corpus, or the run that is gone on with.
        CheckpointError: the checkpoint cannot be gone on from.
    """
    return Run(config, console).go(resume=resume)


class Run:
    """A training run, as far as this process takes part."""

    def __init__(self, config: RunConfig, console: Console | None = None) -> None:
        self.config = config
        self.accelerator = make_accelerator(config)
        self.console = console if self.accelerator.is_main_process else None
        self.corpus = Corpus.open(config.data.corpus)
        self.held_out = Corpus.open(config.data.corpus, "held_out")
        self.vocabulary = self.corpus.vocabulary
        minutes = config.schedule.minutes
        self.budget = schedules.Budget(steps=config.schedule.steps, seconds=None if minutes is None else 60 * minutes)
        self._check_packs()
        objective = Objective(self._model())
        if config.train.activation_checkpointing:
            checkpoint_activations(objective.model)
        self.tally = Tally(objective.model.config, self.accelerator.device)
        settings = config.optimizer
        optimizer = optimizers.build(
            settings.name,
            objective,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        )
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        # What the streams know of their pools, by phase.
        self.counts: dict[int, tuple[tuple[int, ...], ...]] = {}

    def _model(self) -> BertForPreTraining:
        torch.manual_seed(self.config.train.seed)  # every process starts from the same weights
        pad_id = self.vocabulary.pad_id
        model = BertForPreTraining(self.config.bert_config(self.vocabulary.size, pad_token_id=pad_id))
        if self.config.model.init is not None:
            checkpoint.apply(model, checkpoint.load(self.config.model.init))
        return model

    def _check_packs(self) -> None:
        lanes, shards = self.config.data.lanes, sum(len(shard.tokens) > 0 for shard in self.corpus.shards)
        if lanes > shards:
            raise ConfigError(f"data.lanes is {lanes}; it must be at most the corpus' shards, {shards}")
        for number, phase in enumerate(self.config.phases):
            packs, processes = self.packs_of_step(phase), self.accelerator.num_processes
            if packs % processes:
                raise ConfigError(
                    f"phases[{number}].tokens_per_step is {phase.tokens_per_step}, which makes {packs} packs of "
                    f"batch.tokens_per_pack, {self.config.batch.tokens_per_pack}; {processes} processes cannot share "
                    "them evenly"
                )

    # ---- the data ----

    def packs_of_step(self, phase: Phase) -> int:
        return phase.tokens_per_step // self.config.batch.tokens_per_pack

    def phase_at(self, share: float) -> int:
        """The phase that a share of the run lies in."""
        ends = itertools.accumulate(phase.share for phase in self.config.phases[:-1])
        return sum(share >= end - 1e-9 for end in ends)

    def stream(self, number: int) -> PackStream:
        """The packs of a phase."""
        config = self.config
        return PackStream(
            self.corpus.shards,
            config.data.instances,
            config.phases[number].length,
            config.batch.tokens_per_pack,
            seed=int(draws(config.train.seed, number, 5).integers(2**31)),
            short_seq_prob=config.data.short_seq_prob,
            duplicates=config.data.duplicates,
            lanes=config.data.lanes,
            counts=[list(counts) for counts in self.counts.get(number, ())],
        )

    def steps(self, progress: Progress) -> Iterator[list[Unmasked]]:
        """This process's packs, step after step, from where the run is in its phase."""
        processes = self.accelerator.num_processes
        packs = self.packs_of_step(self.config.phases[progress.phase])
        feed = Feed(
            self.stream(progress.phase),
            self.vocabulary,
            start=progress.phase_step * packs + self.accelerator.process_index,
            step=processes,
            workers=self.config.data.workers,
        ).packs()
        while True:
            yield list(itertools.islice(feed, packs // processes))

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

    # ---- the loop ----

    def go(self, *, resume: bool) -> Result:
        """From the start, or the last checkpoint, to the end of the budget."""
        progress = self._resumed() if resume else self._fresh()
        config = self.config
        evaluation = None
        steps: Iterator[list[Unmasked]] | None = None
        with self._monitor(progress) as monitor:
            self.tally.clear()
            while not self._is_over(progress):
                started = time.perf_counter()
                share = self.budget.progress(progress.step, progress.elapsed)
                if self.phase_at(share) != progress.phase:
                    progress, steps = progress._replace(phase=self.phase_at(share), phase_step=0), None
                steps = self.steps(progress) if steps is None else steps
                self._step(next(steps), progress, share)
                progress = progress._replace(step=progress.step + 1, phase_step=progress.phase_step + 1)
                progress = self._later(progress, started)
                is_last = self._is_over(progress)
                if is_last or progress.step % config.log.every == 0:
                    self._tell(monitor, progress, share)
                paused = time.perf_counter()
                if is_last or _is_due(config.eval.every, progress.step):
                    evaluation = self._evaluate(monitor, progress)
                if is_last or _is_due(config.checkpoint.every, progress.step):
                    self._save(self._later(progress, paused))
                progress = self._later(progress, paused)
                self.tally.pause(time.perf_counter() - paused)
        return Result(self._folder / checkpoints.name(progress.step), progress, evaluation)

    def _is_over(self, progress: Progress) -> bool:
        return self.budget.is_over(progress.step, progress.elapsed)

    def _later(self, progress: Progress, since: float) -> Progress:
        """With the time since then; where the clock decides, it is the first process's."""
        elapsed = progress.elapsed + time.perf_counter() - since
        if self.config.schedule.minutes is not None and self.accelerator.num_processes > 1:
            mine = elapsed if self.accelerator.is_main_process else 0.0
            elapsed = float(self._summed(torch.tensor([mine], dtype=torch.float64)))
        return progress._replace(elapsed=elapsed)

    def _step(self, packs: list[Unmasked], progress: Progress, share: float) -> None:
        """One optimizer step. Every predicted token, and every pair, weighs the same whoever has it."""
        accelerator, clip_norm = self.accelerator, self.config.optimizer.clip_norm
        batches = [self.masked(pack, share) for pack in packs]
        for batch in batches:
            self.tally.count(batch)
        counts = [sum(batch.predicted for batch in batches), sum(batch.pairs for batch in batches)]
        predicted, pairs = self._summed(torch.tensor(counts, dtype=torch.float32)).clamp(min=1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(share)
        for pack, batch in zip(packs, batches, strict=True):
            # Dropout, too, is a function of the pack.
            torch.manual_seed(int(draws(self.config.train.seed, progress.phase, pack.number, 4).integers(2**63)))
            with nullcontext() if pack is packs[-1] else accelerator.no_sync(self.objective):
                with accelerator.autocast():
                    masked_loss, pair_loss = self.objective(batch.to(accelerator.device))
                # Processes' gradients are averaged; theirs are parts of one sum.
                loss = (masked_loss / predicted + pair_loss / pairs) * accelerator.num_processes
                accelerator.backward(loss)
            self.tally.add(masked_loss, pair_loss)
        if clip_norm:
            self.tally.norm = accelerator.clip_grad_norm_(self.objective.parameters(), clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.counts[progress.phase] = packs[-1].counts

    def learning_rate(self, share: float) -> float:
        settings = self.config.schedule
        factor = schedules.factor(
            settings.kind, share, warmup=settings.warmup, decay=settings.decay, floor=settings.floor
        )
        return self.config.optimizer.learning_rate * factor

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        total: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return total

    # ---- what a run says ----

    def _monitor(self, progress: Progress) -> AbstractContextManager[Monitor | None]:
        if not self.accelerator.is_main_process:
            return nullcontext()
        peak = peak_flops(self.accelerator.device, DTYPES[self.config.train.precision])
        return Monitor(
            self.config.out,
            console=self.console,
            tensorboard=self.config.log.tensorboard,
            peak=None if peak is None else peak * self.accelerator.num_processes,
            every=1,  # this loop reports sums over steps already
            is_resumed_at=progress.step or None,
        )

    def _tell(self, monitor: Monitor | None, progress: Progress, share: float) -> None:
        """What the steps since the last time were like."""
        masked, pair_loss, predicted, pairs, tokens, sequences, flops = self._summed(self.tally.sums()).tolist()
        norm, seconds = self.tally.norm, self.tally.seconds
        self.tally.clear()
        if monitor is None:
            return
        mlm_loss, nsp_loss = masked / max(predicted, 1), pair_loss / pairs if pairs else None
        monitor.step(
            Step(
                step=progress.step,
                steps_total=self.config.schedule.steps,
                loss=mlm_loss + (nsp_loss or 0.0),
                mlm_loss=mlm_loss,
                nsp_loss=nsp_loss,
                learning_rate=self.learning_rate(share),
                grad_norm=None if norm is None else float(norm),
                tokens=int(tokens),
                sequences=int(sequences),
                seconds=seconds,
                progress=self.budget.progress(progress.step, progress.elapsed),
                remaining_seconds=self.budget.remaining_seconds(progress.step, progress.elapsed),
                flops=flops,
            )
        )

    def _evaluate(self, monitor: Monitor | None, progress: Progress) -> Evaluation | None:
        """What the model makes of the held-out text, if there is any, in sequences of the phase's length."""
        if self.held_out.total_tokens == 0:
            return None
        stream = PackStream(
            self.held_out.shards,
            self.config.data.instances,
            self.config.phases[progress.phase].length,
            self.config.batch.tokens_per_pack,
            short_seq_prob=0.0,
        )
        evaluation = evaluate(
            self.accelerator,
            self.objective,
            stream,
            self.vocabulary,
            packs=self.config.eval.packs,
            step=progress.step,
        )
        if monitor is not None:
            monitor.evaluation(evaluation)
        return evaluation

    # ---- checkpoints ----

    @property
    def _folder(self) -> Path:
        return self.config.out / "checkpoints"

    def _save(self, progress: Progress) -> None:
        scaler = self.accelerator.scaler
        checkpoints.save(
            self._folder,
            progress.step,
            self.objective,
            self.optimizer.optimizer,
            vocabulary=self.vocabulary,
            state={
                "progress": progress._asdict(),
                "config": dump(self.config),
                "corpus": self.corpus.fingerprint,
                "counts": {str(phase): counts for phase, counts in self.counts.items()},
                "scaler": None if scaler is None else scaler.state_dict(),
            },
            keep=self.config.checkpoint.keep,
            is_first=self.accelerator.is_main_process,
        )
        self.accelerator.wait_for_everyone()

    def _fresh(self) -> Progress:
        if checkpoints.find(self._folder):
            raise ConfigError(f"out is {self.config.out}, which holds checkpoints; --resume goes on with that run")
        return Progress()

    def _resumed(self) -> Progress:
        """Where the last checkpoint is, with everything as it was there; the start, where there is none."""
        found = checkpoints.find(self._folder)
        if not found:
            return Progress()
        state = checkpoints.load_state(found[-1])
        changed = differences(from_dict(state["config"]), self.config)
        changed = [key for key in changed if not key.startswith(FREE)]
        if changed:
            raise ConfigError(f"{found[-1]} was written with another {', '.join(changed)}; another `out` begins anew")
        if state["corpus"] != self.corpus.fingerprint:
            raise ConfigError(
                f"data.corpus is {self.config.data.corpus}, and {found[-1]} comes of another corpus; another `out` "
                "begins anew"
            )
        checkpoints.load(found[-1], self.objective, self.optimizer.optimizer)
        self.counts = {int(phase): tuple(map(tuple, counts)) for phase, counts in state["counts"].items()}
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return Progress(**state["progress"])


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def make_accelerator(config: RunConfig) -> Any:
    """accelerate's Accelerator for a run.

    Raises:
        ConfigError: the machine cannot compute in that precision.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    has_gpu = torch.cuda.is_available()
    if config.train.precision == "fp16" and not has_gpu:
        raise ConfigError('train.precision is "fp16", which needs a GPU; "fp32" and "bf16" work everywhere')
    sharding = None
    if config.train.fsdp:
        sharding = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["EncoderLayer"],
        )
    AcceleratorState._reset_state()  # of an earlier run in this process, which may have had another precision
    precision = "no" if config.train.precision == "fp32" else config.train.precision
    return Accelerator(mixed_precision=precision, fsdp_plugin=sharding, cpu=not has_gpu)
