"""Checkpoints that are there whole or not at all.

A checkpoint is a folder that transformers loads (config.json, model.safetensors, the tokenizer's files) with what
training needs to go on beside it (optimizer.pt, state.json). It is written under another name, and renamed when every
file of it is on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .. import checkpoint
from ..heads import BertForPreTraining
from .vocabulary import Vocabulary

NAME = re.compile(r"step-(\d{8})")

# Whole tensors on the CPU of the first process, whatever the model is wrapped in.
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class CheckpointError(ValueError):
    """A checkpoint that training cannot go on from."""


def name(step: int) -> str:
    """Of the folder of a checkpoint."""
    return f"step-{step:08d}"


def find(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the latest last."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and NAME.fullmatch(entry.name))


def save(
    folder: Path,
    step: int,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    vocabulary: Vocabulary,
    state: Mapping[str, Any],
    keep: int,
    is_first: bool = True,
) -> Path:
    """Writes a checkpoint, and then removes all but the latest. Every process calls it.

    Args:
        folder: of the checkpoints.
        step: steps done.
        objective: an Objective, wrapped or not.
        optimizer: of its parameters.
        vocabulary: of the model.
        state: what else is needed to go on, as JSON takes it, and tensors of a gradient scaler.
        keep: checkpoints that stay, at least 1.
        is_first: whether this process is the one that writes.
    """
    weights = get_model_state_dict(objective, options=GATHERED)
    moments = get_optimizer_state_dict(objective, optimizer, options=GATHERED)
    path = folder / name(step)
    if not is_first:
        return path
    part = folder / f".{path.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _plain_model(objective, weights).save_pretrained(part)
    vocabulary.save(part)
    torch.save(moments, part / "optimizer.pt")
    (part / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
    for file in part.iterdir():
        _flush(file)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
    _flush(folder)
    for old in find(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def _plain_model(objective: nn.Module, weights: Mapping[str, Any]) -> BertForPreTraining:
    """The model with whole weights, whatever the objective is wrapped in."""
    inner: Any = objective.module if isinstance(objective, nn.parallel.DistributedDataParallel) else objective
    with torch.device("meta"):
        model = BertForPreTraining(inner.model.config)
    plain = {name.removeprefix("model."): value for name, value in weights.items()}
    model.load_state_dict(plain, assign=True)
    return model


def _flush(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_state(path: Path) -> dict[str, Any]:
    """What state.json says.

    Raises:
        CheckpointError: it is missing or broken, so that somebody else has written there.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        state["step"] = int(state["step"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} holds no training state ({error}); --resume needs a checkpoint of a run"
        ) from None
    return state


def load(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Takes up weights and the optimizer's moments, whatever the objective is wrapped in. Every process calls it.

    Raises:
        CheckpointError: a file is missing, or of another model.
    """
    inner: Any = objective.module if isinstance(objective, nn.parallel.DistributedDataParallel) else objective
    try:
        plain = BertForPreTraining(inner.model.config)
        checkpoint.apply(plain, checkpoint.load(path))
        moments = torch.load(path / "optimizer.pt", weights_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be gone on from: {error}") from None
    weights = {f"model.{name}": value for name, value in plain.state_dict().items()}
    is_alone = not torch.distributed.is_initialized()
    options = StateDictOptions(full_state_dict=True) if is_alone else SPREAD
    set_model_state_dict(objective, weights, options=options)
    set_optimizer_state_dict(objective, optimizer, moments, options=options)
