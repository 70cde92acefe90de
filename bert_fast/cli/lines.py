"""How commands print and write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Prints a line as it stands."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def write_lines(out: Path, lines: Sequence[str]) -> None:
    """Writes lines; the file appears whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(part, out)
