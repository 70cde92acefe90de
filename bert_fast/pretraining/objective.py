"""What pretraining minimises and what it is judged by, each as sums that processes can add up."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from ..functional import IGNORED
from ..heads import BertForPreTraining
from .batches import PretrainingBatch

# Predicted rows whose logits exist at a time.
ROWS = 512

SUMS = ("masked_lm_loss", "masked_lm_correct", "predicted", "next_sentence_loss", "next_sentence_correct", "pairs")


class Objective(nn.Module):
    """A model with its losses, which is what gets wrapped for several processes.

    Args:
        model: of which the last layer runs on the rows that are read.
    """

    def __init__(self, model: BertForPreTraining) -> None:
        super().__init__()
        self.model = model
        self.model.needs_labelled_only = True

    def forward(self, batch: PretrainingBatch, *, is_judged: bool = False) -> tuple[Tensor, Tensor]:
        """The sums of the losses of predicted tokens and of pairs, (), in float32; judged: SUMS, (6,), in their place.

        Args:
            batch: on the model's device.
            is_judged: whether the model is judged, without gradients, rather than trained.
        """
        if is_judged:
            found = self._judge(batch)
            return found, found
        output = self.model(batch.packed, labels=batch.labels, next_sentence_label=batch.next_sentence)
        masked = output.masked_lm_loss * batch.predicted
        # Of pretraining without pairs the layers on [CLS] get no gradient, but processes wait for one.
        pairs = (output.next_sentence_logits * 0).sum()
        if batch.next_sentence is not None:
            pairs = output.next_sentence_loss * (batch.next_sentence != IGNORED).sum()
        return masked, pairs

    def _judge(self, batch: PretrainingBatch) -> Tensor:
        output = self.model(batch.packed, labels=batch.labels)
        assert batch.packed.kept is not None
        targets = batch.packed.select(batch.labels).index_select(0, batch.packed.kept)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=targets.device)
        for rows, classes in zip(output.rows.split(ROWS), targets.split(ROWS), strict=True):
            sums[:3] += _judged(output.head(rows, output.word_embeddings), classes)
        if batch.next_sentence is not None:
            sums[3:] += _judged(output.next_sentence_logits, batch.next_sentence)
        return sums


def _judged(logits: Tensor, classes: Tensor) -> Tensor:
    """Sum of the losses, number of right answers, and number of classes; (3,) float64."""
    loss = nn.functional.cross_entropy(logits.float(), classes, ignore_index=IGNORED, reduction="sum")
    correct = (logits.argmax(-1) == classes).sum()
    return torch.stack([loss.double(), correct.double(), (classes != IGNORED).sum().double()])


def checkpoint_activations(model: BertForPreTraining) -> None:
    """From now on the layers' activations are computed again in the backward pass instead of being kept."""
    for layer in model.bert.layers:
        original: Any = layer.forward
        layer.forward = functools.partial(checkpoint, original, use_reentrant=False)


def shard(objective: Objective, device: torch.device, processes: int, dtype: torch.dtype) -> None:
    """Spreads weights, gradients and moments over the processes, layer by layer (FSDP2; Zhao et al. 2023).

    accelerate does so on accelerators alone and leaves CPUs with whole weights, without a word.

    Args:
        objective: of which every process has the same weights.
        device: of this process.
        processes: their number, all of one group.
        dtype: of the weights in the forward and the backward pass; those of the optimizer stay in float32.
    """
    # We change nothing in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (processes,))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*objective.to(device).model.bert.layers, objective):
        fully_shard(part, mesh=mesh, mp_policy=policy)
