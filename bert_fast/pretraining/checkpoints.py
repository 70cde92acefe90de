"""Checkpoints that are there whole or not at all.

A checkpoint is a folder that transformers loads (config.json, model.safetensors, the tokenizer's files) with what
training needs to go on beside it (optimizer.pt, state.json). It is written under another name, and renamed when every
file of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from .. import checkpoint
from ..heads import BertForPreTraining
from .vocabulary import Vocabulary

NAME = re.compile(r"step-(\d{8})")

# Whole tensors on the CPU of the first process, whatever the model is wrapped in.
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

OTHERWISE = "without this folder the run goes on from the checkpoint before it"

# What state.json holds hashes of.
HASHED = ("config.json", "model.safetensors", "optimizer.pt")


class CheckpointError(ValueError):
    """A checkpoint that training cannot go on from."""


def name(step: int) -> str:
    """Of the folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The steps that were done by then."""
    return int(checkpoint.name.removeprefix("step-"))


def find(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the latest last."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and NAME.fullmatch(entry.name))


def remove_rests(folder: Path) -> None:
    """Removes what a killed run left of checkpoints that it was writing or removing."""
    for rest in folder.glob(".step-*.part"):
        shutil.rmtree(rest)


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

    Raises:
        CheckpointError: a weight is not finite; nothing is written or removed.
    """
    weights = get_model_state_dict(objective, options=GATHERED)
    moments = get_optimizer_state_dict(objective, optimizer, options=GATHERED)
    path = folder / name(step)
    if not is_first:
        return path
    _check_finite(weights, step, folder)
    part = folder / f".{path.name}.part"
    part.mkdir(parents=True)
    _plain_model(objective, weights).save_pretrained(part)
    vocabulary.save(part)
    torch.save(moments, part / "optimizer.pt")
    written = {"step": step, "files": {file: _hash(part / file) for file in HASHED}, **state}
    (part / "state.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    for file in (*part.iterdir(), part):
        _flush(file)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
    _flush(folder)
    for old in find(folder)[:-keep]:
        shutil.rmtree(old.rename(folder / f".{old.name}.part"))  # never seen in parts either
    return path


def _check_finite(weights: Mapping[str, Any], step: int, folder: Path) -> None:
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"after step {step} {key} holds numbers that are not finite, and training cannot go on from there; "
                f"what is in {folder} stays. A lower optimizer.learning_rate may help"
            )


def _hash(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _plain_model(objective: nn.Module, weights: Mapping[str, Any]) -> BertForPreTraining:
    """The model with whole weights, whatever the objective is wrapped in."""
    with torch.device("meta"):
        model = BertForPreTraining(_unwrapped(objective).model.config)
    plain = {name.removeprefix("model."): value for name, value in weights.items()}
    model.load_state_dict(plain, assign=True)
    return model


def _unwrapped(objective: nn.Module) -> Any:
    """Without DDP around it; FSDP changes a model in place."""
    return objective.module if isinstance(objective, nn.parallel.DistributedDataParallel) else objective


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
        CheckpointError: it, or another file, is missing, or is not what was written.
    """
    file = path / "state.json"
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        hashes = {name: state["files"][name] for name in HASHED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error!r}); {OTHERWISE}") from None
    for name, digest in hashes.items():
        if not (path / name).is_file() or _hash(path / name) != digest:
            raise CheckpointError(f"{path / name} is missing, or has changed since it was written; {OTHERWISE}")
    return state


def load(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Takes up weights and the optimizer's moments, whatever the objective is wrapped in. Every process calls it.

    Raises:
        CheckpointError: a file is missing, or of another model.
    """
    inner = _unwrapped(objective)
    try:
        plain = BertForPreTraining(inner.model.config)
        checkpoint.apply(plain, checkpoint.load(path))
        moments = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be gone on from: {error}") from None
    weights = {f"model.{name}": value for name, value in plain.state_dict().items()}
    # Whole weights every process takes from what it has read, for torch cannot spread those of DDP.
    options = SPREAD if isinstance(inner, FSDPModule) else StateDictOptions(full_state_dict=True)
    set_model_state_dict(inner, weights, options=options)
    set_optimizer_state_dict(inner, optimizer, moments, options=options)
