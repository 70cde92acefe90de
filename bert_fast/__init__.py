"""BERT encoders without padding: Triton kernels on GPUs, C++ kernels on CPUs, the same weights and answers."""

from . import functional, masking, nn
from .collator import FlatteningCollator
from .config import BertConfig
from .encoder import BertModel
from .heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from .masking import PackedBatch
from .swap import VerificationError, patch, register_attention, report, restore, swap, unpatch, verify

__version__ = "0.1.0"

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "FlatteningCollator",
    "PackedBatch",
    "VerificationError",
    "__version__",
    "functional",
    "masking",
    "nn",
    "patch",
    "register_attention",
    "report",
    "restore",
    "swap",
    "unpatch",
    "verify",
]
