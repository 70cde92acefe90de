"""transformers' Trainer for every task: its arguments, and evaluation by what a user will see."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .settings import Training

__all__ = [
    "CHECKPOINTS",
    "DivergedError",
    "Judged",
    "add_callbacks",
    "arguments",
    "judged",
    "last_checkpoint",
    "place",
    "train",
]

CHECKPOINTS = "checkpoints"
CURVES = "tensorboard"
STATE = "trainer_state.json"  # the last file of a checkpoint that is written

LOGS = 50  # of the training loss in a run, about


class DivergedError(ValueError):
    """The loss or its gradient is no finite number; the message has the step."""


class Judged:
    """A mix-in for Trainers: evaluation is what `judge` finds, by predictions as users get them.

    A process trains on one GPU: Trainer's nn.DataParallel, which it takes where there are more, copies models in
    every step. torchrun starts a process for each.

    Attributes:
        judge: measures by name; every process calls it, and all of them go by what the first one finds.
    """

    judge: Callable[[], dict[str, float]]

    def __init__(self, *positional: Any, args: Any, **named: Any) -> None:
        if args.n_gpu > 1:
            args._n_gpu = 1
        super().__init__(*positional, args=args, **named)  # type: ignore[call-arg]

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trainer.train; afterwards the model computes without the autocast that accelerate put around it."""
        trainer: Any = self
        result = super().train(*arguments, **options)  # type: ignore[misc]
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        return result

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The measures, logged and told to callbacks as Trainer.evaluate does."""
        from accelerate.utils import broadcast_object_list

        del eval_dataset, ignore_keys
        trainer: Any = self
        (found,) = broadcast_object_list([self.judge()])
        measures = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        trainer.log(dict(measures))
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, measures)
        return measures


def judged(trainer: type) -> type:
    """The class of Trainers `trainer` with Judged before it."""
    return type(f"Judged{trainer.__name__}", (Judged, trainer), {})


# ---- where and how ---------------------------------------------------------------------------------------------------


def place(device: torch.device | None) -> Any:
    """Where a run takes place: TrainingArguments with device, process_index, world_size and main_process_first.

    Under torchrun it joins this process to the others, by gloo on CPUs and NCCL on GPUs.

    Args:
        device: a CPU, or the GPU of this process; None: a GPU if there is one.

    Raises:
        ValueError: a GPU with a number, which torchrun or CUDA_VISIBLE_DEVICES gives.
    """
    import transformers

    if device is not None and device.index:
        raise ValueError(f"device is {device}; it must be cpu or cuda, and CUDA_VISIBLE_DEVICES chooses among GPUs")
    is_cpu = not torch.cuda.is_available() if device is None else device.type == "cpu"
    return transformers.TrainingArguments(output_dir=".", use_cpu=is_cpu, report_to=[])


def arguments(
    training: Training, out: Path, *, examples: int, best: str | None, device: torch.device, is_quiet: bool = True
) -> dict[str, Any]:
    """What TrainingArguments of transformers and of sentence-transformers take.

    Args:
        training: the settings.
        out: folder of the run.
        examples: for training.
        best: measure of the best checkpoint, the higher the better; None: there is no evaluation.
        device: where to train.
        is_quiet: whether the Trainer's own progress bar stays off.
    """
    import torch.distributed

    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    steps_of_epoch = max(1, math.ceil(examples / (training.batch_size * processes * training.accumulation)))
    steps = max(1, math.ceil(steps_of_epoch * training.epochs))
    result: dict[str, Any] = {
        "output_dir": str(out / CHECKPOINTS),
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.accumulation,
        "learning_rate": training.learning_rate,
        "warmup_steps": round(steps * training.warmup),
        "lr_scheduler_type": "linear",
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": training.precision == "bf16",
        "fp16": training.precision == "fp16",
        "seed": training.seed,
        "data_seed": training.seed,
        "logging_strategy": "steps",
        "logging_steps": max(1, steps // LOGS),
        "logging_nan_inf_filter": False,
        "save_total_limit": training.keep,
        "restore_callback_states_from_checkpoint": True,
        "report_to": [],
        "dataloader_num_workers": training.workers,
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": is_quiet,
        "use_cpu": device.type == "cpu",
    }
    when: dict[str, Any] = {"save_strategy": "epoch"}
    if training.eval_steps is not None:
        when = {"save_strategy": "steps", "save_steps": training.eval_steps}
    if best is not None:
        when |= {
            "eval_strategy": when["save_strategy"],
            "eval_steps": training.eval_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{best}",
            "greater_is_better": True,
        }
    return result | when | (_checkpointing() if training.gradient_checkpointing else {})


def _checkpointing() -> dict[str, Any]:
    import transformers

    names = {field.name for field in fields(transformers.TrainingArguments)}
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


# ---- a run -----------------------------------------------------------------------------------------------------------


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint of a run; None where there is none."""
    found = [
        (int(folder.name.partition("-")[2]), folder)
        for folder in (out / CHECKPOINTS).glob("checkpoint-*")
        if folder.name.partition("-")[2].isdigit() and _state(folder) is not None
    ]
    return max(found)[1] if found else None


def _state(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state


def train(trainer: Any, checkpoint: Path | None) -> None:
    """Trains; afterwards the model has the weights of the best checkpoint or, without evaluation, the last ones.

    Args:
        trainer: of any of the tasks.
        checkpoint: from which it goes on; None: from the beginning. Where the run had come to its end, by its steps or
            early, nothing more is trained.

    Raises:
        DivergedError: the loss is no number any more.
    """
    if checkpoint is None:
        trainer.train()
        return
    state = _state(checkpoint) or {}
    if not state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    trainer.state = type(trainer.state).load_from_json(str(checkpoint / STATE))
    best = state.get("best_global_step") or state["global_step"]
    trainer._load_from_checkpoint(str(checkpoint.with_name(f"checkpoint-{best}")))


def add_callbacks(trainer: Any, patience: int | None, on_log: Callable[[dict[str, Any]], None] | None) -> None:
    """Gives a Trainer early stopping and somebody who hears its log, and takes its own printing.

    Args:
        trainer: of any of the tasks.
        patience: evaluations without a better one after which it stops; None: it does not.
        on_log: gets "step" and "steps" with each entry of the log; None: nobody.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            _find_best(Path(args.output_dir), state)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            control.should_log |= control.should_evaluate or control.should_save

        on_epoch_end = on_step_end

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
            _check_finite(args, state, logs or {})
            if on_log is not None and state.is_world_process_zero:
                on_log({"step": state.global_step, "steps": state.max_steps, **(logs or {})})

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch())
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=patience))


def add_curves(trainer: Any, out: Path) -> None:
    """Writes what a Trainer logs for TensorBoard, by the first process."""
    import transformers

    integrations: Any = transformers.integrations
    curves = integrations.TensorBoardCallback()
    curves.logging_dir = str(out / CURVES)
    trainer.add_callback(curves)


def _find_best(folder: Path, state: Any) -> None:
    """The best checkpoint of a run that goes on, where the run's folder is now."""
    if state.best_global_step:
        best = folder / f"checkpoint-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None


def _check_finite(args: Any, state: Any, logs: dict[str, Any]) -> None:
    # fp16 passes over steps whose gradients are infinite, and scales the loss down.
    for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
        if not math.isfinite(logs.get(name, 0.0)):
            what = {"loss": "the loss", "grad_norm": "the gradient's norm"}[name]
            raise DivergedError(
                f"{what} is {logs[name]} at step {state.global_step}, with learning_rate {args.learning_rate:g}; "
                "a lower one, more warmup or fp32 may help"
            )
