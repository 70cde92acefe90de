"""What the steps between two reports add up to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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

    def restore(self, sums: Sequence[float], seconds: float) -> None:
        """Goes on from what `sums` and `seconds` were when a checkpoint was written."""
        values = torch.tensor(sums, dtype=torch.float64)
        self.losses, self.counts = values[:2].to(self.device), values[2:]
        self.started = time.perf_counter() - seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of its body, in which no step is made."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - since

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
