"""Swapping: the same model object, weights and answers, by another forward of its encoder."""

from .core import restore, swap
from .report import report
from .verify import verify

__all__ = ["report", "restore", "swap", "verify"]
