"""bert-fast verify: a checkpoint, or a small model of every class, swapped, against itself and float64."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bert_fast
from bert_fast.swap.core import FAST
from bert_fast.swap.parity import HEADER, NUMBERS, Parity, Row, lines, markdown, rows

from . import models

BATCH_SIZE = 8
SEED = 0
NUMBER_WIDTH = 7  # 1.2e-07


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


def run_all(console: Console, device: torch.device, markdown_file: Path | None, json_file: Path | None) -> bool:
    """Prints the parity table and writes it where it is wanted; whether nothing is wrong."""
    found: list[Row] = []
    with models.quiet(), console.status("measuring") as status:
        for row in rows(device=device):
            found.append(row)
            status.update(f"{row.family}: {row.model}")
    parity = Parity(tuple(found), str(device))
    show_parity(console, parity)
    if markdown_file is not None:
        markdown_file.write_text(markdown(parity), encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps(parity.as_json(), indent=1) + "\n", encoding="utf-8")
    return parity.is_right


def show_parity(console: Console, parity: Parity) -> None:
    """A table for each family, and a verdict."""
    for family, group in lines(parity.rows).items():
        table = Table(title=family, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("model", overflow="fold")
        for name in HEADER[NUMBERS.start : NUMBERS.stop]:
            table.add_column(name.replace(" ", "\n"), justify="right", min_width=NUMBER_WIDTH)
        for line in group:
            model, dtype, *numbers, path = line.cells
            label = f"{model}, {dtype}" + ("" if path == FAST else f": {path}")
            table.add_row(escape(label), *numbers, style="" if line.is_right else "bold red")
        console.print(table)
    wrong = sum(not line.is_right for group in lines(parity.rows).values() for line in group)
    if parity.is_right:
        console.print(f"[green]{len(parity.rows)} rows, all within bounds[/]; float64 of the same weights is the truth")
    else:
        console.print(f"[bold red]{wrong} lines are out of bounds or take the original path unexpectedly[/]")
