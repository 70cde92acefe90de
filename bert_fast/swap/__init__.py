"""Swapping: the same model object, weights and answers, by another forward of its encoder."""

from .core import restore, swap
from .report import report
from .verify import VerificationError, verify

__all__ = ["VerificationError", "report", "restore", "swap", "verify"]
