"""What the steps between two reports add up to."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..config import BertConfig
from .batches import PretrainingBatch
from .flops import training_flops


class Tally:
    """Sums over this process's packs. The losses stay on the device, so that nobody waits for them.

    Args:
        config: of the model.
        device: of the losses.

    Attributes:
        norm: of the last gradient.
    """

    def __init__(self, config: BertConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.clear()

    def clear(self) -> None:
        """Begins anew, its clock as well."""
        self.losses = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.counts = torch.zeros(5, dtype=torch.float64)
        self.norm: Tensor | None = None
        self.started = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leaves out time in which no step was made."""
        self.started += seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def count(self, batch: PretrainingBatch) -> None:
        """Counts a pack, which is on the host."""
        lengths = batch.packed.cu_seqlens.diff().long()
        tokens, sequences = batch.packed.total_tokens, len(lengths)
        work = training_flops(self.config, int((lengths * lengths).sum()), tokens, batch.predicted, sequences)
        self.counts += torch.tensor([batch.predicted, batch.pairs, tokens, sequences, work], dtype=torch.float64)

    def add(self, masked: Tensor, pairs: Tensor) -> None:
        """Adds a pack's losses, which are sums."""
        self.losses += torch.stack([masked.detach(), pairs.detach()]).double()

    def sums(self) -> Tensor:
        """(7,) float64 on the device: both losses, predicted tokens, pairs, tokens, sequences, operations."""
        return torch.cat([self.losses, self.counts.to(self.device)])
