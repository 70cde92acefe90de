"""What is wrong with a corpus: what is skipped, and what ends the reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


class CorpusError(ValueError):
    """There is no text, or what should be text cannot be read."""


@dataclass(frozen=True)
class Problem:
    """Something in the corpus that is skipped.

    Attributes:
        file: where it is; "dataset" for a data set.
        line: its line, or its row in a Parquet file or a data set, from 1; None: the file as a whole.
        reason: what is wrong.
    """

    file: Path
    line: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" if self.line is None else f"{self.file}:{self.line}: {self.reason}"


OnProblem: TypeAlias = Callable[[Problem], None]


def refuse(problem: Problem) -> None:
    """An on_problem that takes no problem.

    Raises:
        CorpusError: always.
    """
    raise CorpusError(str(problem))
