"""bert-fast info: what is here and what it would use."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

import bert_fast
from bert_fast import _C, ops
from bert_fast.swap.supported import MarkersError, markdown, renew

__all__ = ["MarkersError", "show", "show_supported"]

PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "tokenizers", "safetensors", "numpy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS: tuple[ops.Op, ...] = ("attention", "layer_norm", "gelu")
HEAD_SIZE = 64
WIDTH = 768


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def show(console: Console) -> None:
    """Prints versions, devices, and a table of paths for BERT-base sizes."""
    facts = Table(show_header=False, box=None)
    facts.add_row("bert-fast", bert_fast.__version__)
    facts.add_row("python", platform.python_version())
    for package in PACKAGES:
        facts.add_row(package, _version(package))
    openmp = "shares torch's OpenMP threads" if _C.has_openmp() else "built without OpenMP: one thread"
    facts.add_row(
        "cpu", f"{platform.machine()}, {_C.instruction_set()} kernels, {torch.get_num_threads()} threads, {openmp}"
    )
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts.add_row("cuda", ", ".join(devices) or "no device")
    console.print(facts)

    table = Table(title="Paths (head size 64, width 768)", title_justify="left")
    for name in ("operator", "device", "dtype", "path", "why"):
        table.add_column(name)
    for device in ("cpu", "cuda") if devices else ("cpu",):
        for op in OPS:
            for dtype in DTYPES:
                choice = ops.choose(op, device, dtype, HEAD_SIZE if op == "attention" else WIDTH)
                table.add_row(op, device, str(dtype).removeprefix("torch."), choice.path, choice.reason)
    console.print(table)


def show_supported(file: Path | None) -> None:
    """Prints what swap serves, or writes it into a file.

    Raises:
        MarkersError: the file has no place for it.
    """
    if file is None:
        click.echo(markdown())
    else:
        renew(file)
