"""bert-fast verify: a checkpoint, swapped, against itself and float64."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

import bert_fast

from . import models

BATCH_SIZE = 8
SEED = 0


class CheckpointError(ValueError):
    """The folder holds no model that can be loaded or swapped."""


def random_batch(vocab_size: int, max_length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random ids under a ragged mask with holes, padding on both sides and an empty row."""
    generator = torch.Generator().manual_seed(SEED)
    length = min(128, max_length)
    ids = torch.randint(vocab_size, (BATCH_SIZE, length), generator=generator)
    lengths = torch.randint(1, length + 1, (BATCH_SIZE, 1), generator=generator)
    columns = torch.arange(length)[None]
    mask = columns < lengths
    mask[1] = mask[1].flip(0)
    mask[2] &= torch.rand(length, generator=generator) < 0.7
    mask[3] = False
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def run(console: Console, path: Path | None, device: torch.device) -> bool:
    """Prints the figures; whether they are within bounds.

    Raises:
        CheckpointError: transformers cannot load the folder, or bert_fast does not know the model.
    """
    folder = models.demo_folder() if path is None else path
    with console.status(f"loading {folder.name}"):
        try:
            model, _ = models.load(folder, device)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}") from None
    try:
        bert_fast.swap(model)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    config = model.config
    batch = random_batch(config.vocab_size, config.max_position_embeddings, device)
    with console.status("running the swapped model, the original and float64"):
        try:
            result = bert_fast.verify(model, batch)
        except bert_fast.VerificationError as error:
            result = error.result
    console.print(
        f"{BATCH_SIZE} sequences of random ids: ragged, with holes, left padding and an empty row, on {device}"
    )
    console.print(str(result), highlight=False, markup=False, soft_wrap=True)
    console.print("[green]within bounds[/]" if result.is_within else "[bold red]out of bounds[/]")
    return result.is_within
