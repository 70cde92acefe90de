"""Swapping: the same model object, weights and answers, by another forward of its encoder."""

from .attention_interface import register_attention
from .core import restore, swap
from .patch import patch, unpatch
from .report import report
from .verify import VerificationError, verify

__all__ = ["VerificationError", "patch", "register_attention", "report", "restore", "swap", "unpatch", "verify"]
