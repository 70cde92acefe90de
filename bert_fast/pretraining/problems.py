"""What is wrong with a corpus: what is skipped, and what ends the reading."""

from __future__ import annotations

from ..lines import OnProblem, Problem

__all__ = ["CorpusError", "OnProblem", "Problem", "refuse"]


class CorpusError(ValueError):
    """There is no text, or what should be text cannot be read."""


def refuse(problem: Problem) -> None:
    """An on_problem that takes no problem.

    Raises:
        CorpusError: always.
    """
    raise CorpusError(str(problem))
