"""What is wrong with a task's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...lines import Problem, read_lines


class DataError(ValueError):
    """A file that does not hold what a task needs; the message begins with its name and the first bad line."""


def bad_line(file: Path, line: int | None, reason: str) -> DataError:
    """The error for a line, from 1; None: for the file as a whole."""
    return DataError(str(Problem(file, line, reason)))


def refuse(problem: Problem) -> None:
    """An on_problem for read_lines that takes no problem: a task never trains on part of its data.

    Raises:
        DataError: always.
    """
    raise DataError(str(problem))


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """The file's lines without their ends, with their numbers from 1.

    Raises:
        DataError: a line is no UTF-8, too long or holds a NUL character, or the archive is damaged.
        OSError: the file cannot be opened.
    """
    for number, line in read_lines(file, refuse):
        yield number, line.rstrip("\r\n")
