"""The training loop, on accelerate: it places and wraps the model; what is done in which order is said here.

transformers' Trainer would do as much, but finds its place in the data by reading all that came before, writes its
checkpoints file by file into their final folder, and counts steps alone. Here a pack is a function of its number, so
that a place in the data is a number; a checkpoint is there whole or not at all; and a run may end by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..heads import BertForPreTraining
from . import checkpoints, optimizers, schedules
from .checkpoints import CheckpointError
from .config import ConfigError, RunConfig, differences, dump, from_dict
from .evaluation import evaluate
from .feed import Unmasked
from .flops import peak_flops
from .initial import start_from
from .machine import make_accelerator, only_run
from .monitor import Evaluation, Monitor, Step
from .objective import Objective, checkpoint_activations, shard
from .stream import draws
from .supply import Supply
from .tally import Tally

# Keys of the configuration, or what they begin with, that may change when a run is gone on with.
FREE = ("out", "data.corpus", "data.workers", "schedule.", "log.", "eval.", "checkpoint.", "train.fsdp")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        step: steps done.
        phase: number of the last step's phase.
        phase_steps: steps done in each phase; a longer schedule may lead back to one.
        elapsed: seconds of work, those before a restart among them.
    """

    step: int
    phase: int
    phase_steps: tuple[int, ...]
    elapsed: float

    def after_step(self) -> Progress:
        """With one more step of the phase."""
        steps = list(self.phase_steps)
        steps[self.phase] += 1
        return self._replace(step=self.step + 1, phase_steps=tuple(steps))


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
        CheckpointError: the checkpoint cannot be gone on from, or weights became infinite or NaN.
    """
    return Run(config, console).go(resume=resume)


class Run:
    """A training run, as far as this process takes part."""

    def __init__(self, config: RunConfig, console: Console | None = None) -> None:
        self.config = config
        self.accelerator = make_accelerator(config)
        self.console = console if self.accelerator.is_main_process else None
        self.supply = Supply(config, self.accelerator.num_processes, self.accelerator.process_index)
        minutes = config.schedule.minutes
        self.budget = schedules.Budget(steps=config.schedule.steps, seconds=None if minutes is None else 60 * minutes)
        # The checkpoint that there is to go on from.
        self.last = self._last_checkpoint()
        objective = Objective(self._model())
        if config.train.activation_checkpointing:
            checkpoint_activations(objective.model)
        self.tally = Tally(objective.model.config, self.accelerator.device)
        if config.train.fsdp and self.accelerator.num_processes > 1:
            dtype = DTYPES[config.train.precision]
            shard(objective, self.accelerator.device, self.accelerator.num_processes, dtype)
        else:
            objective = self.accelerator.prepare(objective)
        settings = config.optimizer
        optimizer = optimizers.build(
            settings.name,
            objective,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        )
        self.objective, self.optimizer = objective, self.accelerator.prepare(optimizer)
        # The last step that was told, evaluated and saved.
        self.done: dict[str, int] = {}

    def _model(self) -> BertForPreTraining:
        torch.manual_seed(self.config.train.seed)  # every process starts from the same weights
        pad_id = self.supply.vocabulary.pad_id
        model = BertForPreTraining(self.config.bert_config(self.supply.vocabulary.size, pad_token_id=pad_id))
        if self.config.model.init is not None and self.last is None:
            start_from(self.config.model.init, model, self.supply.vocabulary)
        return model

    # ---- the loop ----

    def go(self, *, resume: bool) -> Result:
        """From the start, or the last checkpoint, to the end of the budget."""
        with only_run(self.config.out) if self.accelerator.is_main_process else nullcontext():
            return self._go(self._resumed() if resume else self._fresh())

    def _go(self, progress: Progress) -> Result:
        if self.accelerator.is_main_process:
            checkpoints.remove_rests(self._folder)
        self.done = dict.fromkeys(("log", "eval", "checkpoint"), progress.step)
        self.evaluation: Evaluation | None = None
        self.began = time.perf_counter() - progress.elapsed
        share = 0.0
        steps: Iterator[list[Unmasked]] | None = None
        with self._monitor(progress) as monitor:
            while not self._is_over(progress):
                share = self.budget.progress(progress.step, progress.elapsed)
                if steps is None or self.supply.phase_at(share) != progress.phase:
                    progress = progress._replace(phase=self.supply.phase_at(share))
                    steps = self.supply.steps(progress.phase, progress.phase_steps[progress.phase])
                self._step(next(steps), progress, share)
                progress = self._now(progress.after_step())
                progress = self._look(monitor, progress, share, is_last=self._is_over(progress))
            # An evaluation, too, may bring a time to its end.
            self._look(monitor, progress, share, is_last=True)
        return Result(self._folder / checkpoints.name(progress.step), progress, self.evaluation)

    def _look(self, monitor: Monitor | None, progress: Progress, share: float, *, is_last: bool) -> Progress:
        """Tells, evaluates and saves where it is due, at last what is left to be; the progress after that."""
        if self._is_due("log", progress.step, is_last):
            self._tell(monitor, progress, share)
        if self._is_due("eval", progress.step, is_last):
            with self.tally.paused():
                self.evaluation = self._evaluate(monitor, progress)
            progress = self._now(progress)
        if self._is_due("checkpoint", progress.step, is_last):
            self._save(progress)
            progress = self._now(progress)
        return progress

    def _is_due(self, what: str, step: int, is_last: bool) -> bool:
        every = getattr(self.config, what).every
        is_due = self.done[what] < step and (is_last or (every > 0 and step % every == 0))
        if is_due:
            self.done[what] = step
        return is_due

    def _is_over(self, progress: Progress) -> bool:
        return self.budget.is_over(progress.step, progress.elapsed)

    def _now(self, progress: Progress) -> Progress:
        """With the time that it is; where the clock decides, it is the first process's."""
        elapsed = time.perf_counter() - self.began
        if self.config.schedule.minutes is not None and self.accelerator.num_processes > 1:
            mine = elapsed if self.accelerator.is_main_process else 0.0
            elapsed = float(self._summed(torch.tensor([mine], dtype=torch.float64)))
        return progress._replace(elapsed=elapsed)

    def _step(self, packs: list[Unmasked], progress: Progress, share: float) -> None:
        """One optimizer step. Every predicted token, and every pair, weighs the same whoever has it."""
        accelerator, clip_norm = self.accelerator, self.config.optimizer.clip_norm
        batches = [self.supply.masked(pack, share) for pack in packs]
        for batch in batches:
            self.tally.count(batch)
        counts = [sum(batch.predicted for batch in batches), sum(batch.pairs for batch in batches)]
        predicted, pairs = self._summed(torch.tensor(counts, dtype=torch.float32)).clamp(min=1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(share)
        for pack, batch in zip(packs, batches, strict=True):
            # Dropout, too, is a function of the pack.
            torch.manual_seed(int(draws(self.config.train.seed, progress.phase, pack.number, 4).integers(2**63)))
            with nullcontext() if pack is packs[-1] else self._no_sync():
                with accelerator.autocast():
                    masked_loss, pair_loss = self.objective(batch.to(accelerator.device))
                # Processes' gradients are averaged; theirs are parts of one sum.
                loss = (masked_loss / predicted + pair_loss / pairs) * accelerator.num_processes
                accelerator.backward(loss)
            self.tally.add(masked_loss, pair_loss)
        if clip_norm:
            norm: Any = accelerator.clip_grad_norm_(self.objective.parameters(), clip_norm)
            self.tally.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.supply.counts[progress.phase] = packs[-1].counts

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        """Gradients stay where they are, for more are added to them."""
        if not isinstance(self.objective, FSDPModule):
            with self.accelerator.no_sync(self.objective):
                yield
            return
        self.objective.set_requires_gradient_sync(False)
        yield
        self.objective.set_requires_gradient_sync(True)

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
            is_resumed_at=progress.step,  # what a run without a checkpoint has said is said again
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
        if self.supply.held_out.total_tokens == 0:
            return None
        evaluation = evaluate(
            self.accelerator,
            self.objective,
            self.supply.judge(progress.phase),
            self.supply.vocabulary,
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

    def _last_checkpoint(self) -> Path | None:
        found = checkpoints.find(self._folder)
        last = found[-1] if found else None
        step = torch.tensor([-1 if last is None else checkpoints.step_of(last)])
        if len(set(self.accelerator.gather(step.to(self.accelerator.device)).tolist())) > 1:
            raise CheckpointError(
                f"processes see different checkpoints in {self._folder}; it must be on a file system that all share"
            )
        return last

    def _save(self, progress: Progress) -> None:
        scaler = self.accelerator.scaler
        tally = {"sums": self._summed(self.tally.sums()).tolist(), "seconds": self.tally.seconds}
        with self.tally.paused():
            checkpoints.save(
                self._folder,
                progress.step,
                self.objective,
                self.optimizer.optimizer,
                vocabulary=self.supply.vocabulary,
                state={
                    "progress": progress._asdict(),
                    "tally": tally,
                    "config": dump(self.config),
                    "corpus": self.supply.corpus.fingerprint,
                    "counts": {str(phase): counts for phase, counts in self.supply.counts.items()},
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
                keep=self.config.checkpoint.keep,
                is_first=self.accelerator.is_main_process,
            )
            self.accelerator.wait_for_everyone()

    def _fresh(self) -> Progress:
        if self.last is not None:
            raise ConfigError(f"out is {self.config.out}, which holds checkpoints; --resume goes on with that run")
        self.tally.clear()
        return Progress(step=0, phase=0, phase_steps=(0,) * len(self.config.phases), elapsed=0.0)

    def _resumed(self) -> Progress:
        """Where the last checkpoint is, with everything as it was there; the start, where there is none."""
        if self.last is None:
            return self._fresh()
        state = checkpoints.load_state(self.last)
        before = from_dict(state["config"], source=f"{self.last}, state.json")
        changed = [key for key in differences(before, self.config) if not key.startswith(FREE)]
        if changed:
            raise ConfigError(f"{self.last} was written with another {', '.join(changed)}; another `out` begins anew")
        if state["corpus"] != self.supply.corpus.fingerprint:
            raise ConfigError(
                f"data.corpus is {self.config.data.corpus}, and {self.last} comes of another corpus; another `out` "
                "begins anew"
            )
        checkpoints.load(self.last, self.objective, self.optimizer.optimizer)
        self.supply.counts = {int(phase): tuple(map(tuple, counts)) for phase, counts in state["counts"].items()}
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.is_main_process:  # the sums are of all
            self.tally.restore(**state["tally"])
        progress = state["progress"]
        return Progress(**{**progress, "phase_steps": tuple(progress["phase_steps"])})
