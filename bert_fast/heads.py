"""The encoder with BERT's heads (Devlin et al. 2018, sections 3.1 and 4), each on packed rows.

Losses are means over what is labelled; a label of -100 is not. Logits at padding are not computed: a padded tensor has
zeros there, or the lowest finite number where they would compete (question answering).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from . import checkpoint, functional
from .config import ACTIVATIONS, BertConfig
from .encoder import BertModel, BertOutput, initialise
from .functional import IGNORED
from .masking import PackedBatch
from .nn import LayerNorm, expand, normalise

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "HeadOutput",
]


@dataclass(frozen=True, eq=False)
class HeadOutput:
    """
    Attributes:
        loss: scalar, or None without labels.
        logits: what the head says; each class gives the shape.
        encoder: the encoder's output.
    """

    loss: Tensor | None
    logits: Tensor
    encoder: BertOutput


class BertHead(nn.Module, ABC):
    """An encoder and a head. The name of a class is that of transformers' class with the same weights."""

    has_pooler: ClassVar[bool]
    has_labels: ClassVar[bool] = False  # whether there are num_labels classes

    def __init__(self, config: BertConfig, *, num_labels: int = 2) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; it must be at least 1")
        self.config = config
        self.num_labels = num_labels
        self.bert = BertModel(config, has_pooler=self.has_pooler)
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.build()
        with torch.no_grad():
            for part in self.children():
                if part is not self.bert:
                    initialise(part, config.initializer_range)

    @abstractmethod
    def build(self) -> None:
        """Adds the modules of the head."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *, num_labels: int | None = None) -> Self:
        """The model in a Hugging Face folder; a head that it lacks is initialised, with a warning.

        Args:
            path: the folder.
            num_labels: classes; None: as many as the checkpoint's classifier has, or 2.

        Raises:
            FileNotFoundError, ValueError: see BertModel.from_pretrained.
        """
        weights = checkpoint.load(path)
        if num_labels is None:
            classifier = weights.get("classifier.weight")
            num_labels = 2 if classifier is None else classifier.shape[0]
        model = cls(BertConfig.from_pretrained(path), num_labels=num_labels)
        checkpoint.apply(model, weights)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json and model.safetensors, which transformers' class of the same name loads."""
        num_labels = self.num_labels if self.has_labels else None
        checkpoint.save(self, self.config, type(self).__name__, path, num_labels=num_labels)


class MaskedLMHead(nn.Module):
    """Linear, GELU, LayerNorm, and the transposed word embeddings with a bias."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.approximate = ACTIVATIONS[config.hidden_act]
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transformed(self, rows: Tensor) -> Tensor:
        """(rows, hidden_size) -> (rows, hidden_size), what meets the word embeddings."""
        return normalise(self.norm, expand(self.transform, self.approximate, rows))

    def forward(self, rows: Tensor, word_embeddings: Tensor) -> Tensor:
        """(rows, hidden_size), (vocab_size, hidden_size) -> (rows, vocab_size)."""
        return F.linear(self.transformed(rows), word_embeddings, self.bias)

    def loss(self, rows: Tensor, word_embeddings: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of (rows,) targets; the logits never exist as a whole."""
        return functional.linear_cross_entropy(self.transformed(rows), word_embeddings, self.bias, targets)


@dataclass(frozen=True, eq=False)
class MaskedLMOutput:
    """
    Attributes:
        loss: scalar, or None without labels.
        encoder: the encoder's output.
        rows: (rows, hidden_size), what the head reads: the labelled rows, or all.
        word_embeddings: (vocab_size, hidden_size).
        head: computes the logits.
        has_labels: whether the masked language model has labels; `loss` may be that of another head alone.
    """

    loss: Tensor | None
    encoder: BertOutput
    rows: Tensor
    word_embeddings: Tensor
    head: MaskedLMHead
    has_labels: bool

    @cached_property
    def logits(self) -> Tensor:
        """(labelled, vocab_size) with labels, (batch, length, vocab_size) without; computed when they are asked for."""
        logits: Tensor = self.head(self.rows, self.word_embeddings)
        return logits if self.has_labels else self.encoder.batch.pad(logits)


def _masked_lm(
    head: MaskedLMHead, model: BertModel, output: BertOutput, labels: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """The loss, or None without labels, and the rows that the head reads."""
    if labels is None:
        return None, output.packed
    labelled = output.batch.kept
    assert labelled is not None
    rows = output.packed if output.rows is not None else output.packed.index_select(0, labelled)
    targets = output.batch.select(labels).index_select(0, labelled)
    return head.loss(rows, model.embeddings.word.weight, targets), rows


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled; 0, not NaN, where nothing is labelled."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _kept(input_ids: Tensor | PackedBatch, labels: Tensor | None) -> Tensor | None:
    """Labelled tokens are computed even where the mask hides them; a packed batch holds what is computed."""
    return None if labels is None or isinstance(input_ids, PackedBatch) else labels != IGNORED


def _labelled(input_ids: Tensor | PackedBatch, labels: Tensor | None) -> Tensor | PackedBatch:
    """The input; a packed batch with its labelled rows marked."""
    if labels is None or not isinstance(input_ids, PackedBatch) or input_ids.kept is not None:
        return input_ids
    return replace(input_ids, kept=(input_ids.select(labels) != IGNORED).nonzero()[:, 0])


class BertForMaskedLM(BertHead):
    """Masked language model.

    Attributes:
        needs_labelled_only: whether, given labels, the last layer runs on the labelled rows alone; the encoder's last
            hidden state is then not to be had. False at first.
    """

    has_pooler = False
    needs_labelled_only = False

    def build(self) -> None:
        self.mlm = MaskedLMHead(self.config)

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MaskedLMOutput:
        """labels (batch, length) -> logits (labelled, vocab_size); without labels (batch, length, vocab_size).

        A PackedBatch, with which no mask is given, takes labels of its padded batch; those of masking.from_flattened
        are (1, tokens). What it keeps, if anything, are the labelled rows.
        """
        output = self.bert(
            _labelled(input_ids, labels),
            attention_mask,
            token_type_ids,
            keep=_kept(input_ids, labels),
            needs_kept_rows_only=self.needs_labelled_only,
        )
        loss, rows = _masked_lm(self.mlm, self.bert, output, labels)
        return MaskedLMOutput(loss, output, rows, self.bert.embeddings.word.weight, self.mlm, labels is not None)


class BertForNextSentencePrediction(BertHead):
    """Whether the second segment follows the first (class 0) or is random (class 1)."""

    has_pooler = True

    def build(self) -> None:
        self.nsp = nn.Linear(self.config.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """labels (batch,) -> logits (batch, 2)."""
        output = self.bert(input_ids, attention_mask, token_type_ids)
        logits = self.nsp(output.pooled)
        return HeadOutput(None if labels is None else _cross_entropy(logits, labels), logits, output)


@dataclass(frozen=True, eq=False)
class PreTrainingOutput(MaskedLMOutput):
    """
    Attributes:
        next_sentence_logits: (batch, 2).
        masked_lm_loss, next_sentence_loss: scalars, what `loss` is the sum of, each None without its labels.
    """

    next_sentence_logits: Tensor
    masked_lm_loss: Tensor | None
    next_sentence_loss: Tensor | None


class BertForPreTraining(BertHead):
    """Masked language model and next-sentence prediction.

    Attributes:
        needs_labelled_only: as BertForMaskedLM's.
    """

    has_pooler = True
    needs_labelled_only = False

    def build(self) -> None:
        self.mlm = MaskedLMHead(self.config)
        self.nsp = nn.Linear(self.config.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> PreTrainingOutput:
        """labels as BertForMaskedLM's, next_sentence_label (batch,) -> logits as BertForMaskedLM's.

        The losses are added. A packed batch has as many next_sentence_label as sequences.
        """
        output = self.bert(
            _labelled(input_ids, labels),
            attention_mask,
            token_type_ids,
            keep=_kept(input_ids, labels),
            needs_kept_rows_only=self.needs_labelled_only,
        )
        masked_loss, rows = _masked_lm(self.mlm, self.bert, output, labels)
        next_logits = self.nsp(output.pooled)
        next_loss = None if next_sentence_label is None else _cross_entropy(next_logits, next_sentence_label)
        losses = [loss for loss in (masked_loss, next_loss) if loss is not None]
        return PreTrainingOutput(
            sum(losses[1:], losses[0]) if losses else None,
            output,
            rows,
            self.bert.embeddings.word.weight,
            self.mlm,
            labels is not None,
            next_logits,
            masked_loss,
            next_loss,
        )


class BertForSequenceClassification(BertHead):
    """A class, a set of classes or a number for each sequence or pair."""

    has_pooler = True
    has_labels = True

    def build(self) -> None:
        self.classifier = nn.Linear(self.config.hidden_size, self.num_labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """logits (batch, num_labels); the form of the labels chooses the loss.

        One label: numbers (batch,), mean squared error. Several: int (batch,), cross-entropy; float (batch,
        num_labels), one logistic loss a class.
        """
        output = self.bert(input_ids, attention_mask, token_type_ids)
        logits = self.classifier(self.dropout(output.pooled))
        if labels is None:
            return HeadOutput(None, logits, output)
        if self.num_labels == 1:
            loss = F.mse_loss(logits.flatten().float(), labels.flatten().float())
        elif not labels.is_floating_point():
            loss = _cross_entropy(logits, labels)
        else:
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return HeadOutput(loss, logits, output)


class BertForTokenClassification(BertHead):
    """A class for each token."""

    has_pooler = False
    has_labels = True

    def build(self) -> None:
        self.classifier = nn.Linear(self.config.hidden_size, self.num_labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """labels (batch, length) -> logits (batch, length, num_labels), zeros at the padding."""
        output = self.bert(input_ids, attention_mask, token_type_ids, keep=_kept(input_ids, labels))
        logits = self.classifier(self.dropout(output.packed))
        loss = None if labels is None else _cross_entropy(logits, output.batch.select(labels))
        return HeadOutput(loss, output.batch.pad(logits), output)


class BertForQuestionAnswering(BertHead):
    """Start and end of an answer in the text."""

    has_pooler = False

    def build(self) -> None:
        self.qa = nn.Linear(self.config.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> HeadOutput:
        """logits (2, batch, length): start and end, the lowest finite number at padding; positions (batch,).

        A position outside [0, length), or at padding, is ignored, as for an answer that was cut off.
        """
        output = self.bert(input_ids, attention_mask, token_type_ids)
        batch = output.batch
        padded = batch.pad(self.qa(output.packed))
        is_token = batch.pad(torch.ones_like(batch.positions, dtype=torch.bool))
        logits = padded.masked_fill(~is_token[..., None], torch.finfo(padded.dtype).min).permute(2, 0, 1)
        if start_positions is None or end_positions is None:
            return HeadOutput(None, logits, output)
        last = batch.shape[1] - 1
        start, end = (
            _cross_entropy(
                scores,
                target.where(
                    (target >= 0) & (target <= last) & is_token.gather(1, target.clamp(0, last)[:, None])[:, 0], IGNORED
                ),
            )
            for scores, target in zip(logits, (start_positions, end_positions), strict=True)
        )
        return HeadOutput((start + end) / 2, logits, output)


class BertForMultipleChoice(BertHead):
    """Which of several sequences fits best."""

    has_pooler = True

    def build(self) -> None:
        self.classifier = nn.Linear(self.config.hidden_size, 1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """input_ids, ... (batch, choices, length), labels (batch,) -> logits (batch, choices)."""
        flat = [None if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, token_type_ids)]
        output = self.bert(*flat)
        logits = self.classifier(self.dropout(output.pooled)).view(input_ids.shape[:2])
        return HeadOutput(None if labels is None else _cross_entropy(logits, labels), logits, output)
