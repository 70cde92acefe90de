"""The batches that the benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor

SEED = 0


def ragged_lengths(count: int, low: int = 4, high: int = 256, mu: float = 3.6) -> Tensor:
    """(count,) int64: log-normal(mu, 0.8), clipped; like sentences and paragraphs of real text."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.exp(torch.randn(count, generator=generator) * 0.8 + mu).clamp(low, high).long()


def right_padded(lengths: Tensor, length: int | None = None) -> Tensor:
    """(count, length) int64 mask: ones, then zeros."""
    columns = torch.arange(int(lengths.max()) if length is None else length)
    return (columns[None] < lengths[:, None]).long()


def token_batches(lengths: Tensor, size: int, vocab_size: int = 30522, pad_id: int = 0) -> list[dict[str, Tensor]]:
    """Batches of `size` texts with random ids, padded to the longest of each."""
    generator = torch.Generator().manual_seed(SEED)
    result = []
    for part in lengths.split(size):
        mask = right_padded(part)
        ids = torch.randint(1000, vocab_size, mask.shape, generator=generator)
        result.append({"input_ids": ids.masked_fill(mask == 0, pad_id), "attention_mask": mask})
    return result
