"""Attention on ragged and on full batches, against torch's on the padded batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast import functional, masking

from .compare import compare
from .workloads import ragged_lengths, right_padded

HEADS, HEAD_SIZE = 12, 32
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
LENGTHS = {
    "ragged": ragged_lengths(32),
    "full 128": torch.full((16,), 128),
    "full 512": torch.full((4,), 512),
}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
def test_attention(benchmark: Any, device: str, lengths: Tensor, direction: str) -> None:
    mask = right_padded(lengths)
    batch = masking.unpad(mask, device=device)
    packed = [torch.randn(batch.total_tokens, HEADS, HEAD_SIZE, device=device, dtype=DTYPES[device]) for _ in range(4)]
    padded = [batch.pad(x).transpose(1, 2).contiguous() for x in packed]
    visible = None if bool(mask.all()) else mask.bool().to(device)[:, None, None, :]
    for tensor in (*packed[:3], *padded[:3]):
        tensor.requires_grad_(direction == "both")
    q, k, v, grad = packed
    padded_q, padded_k, padded_v, padded_grad = padded

    def ours() -> Tensor:
        return functional.attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, tiles=batch.tiles)

    def in_torch() -> Tensor:
        return F.scaled_dot_product_attention(padded_q, padded_k, padded_v, attn_mask=visible)

    def ours_both() -> Any:
        return torch.autograd.grad(ours(), (q, k, v), grad)

    def torch_both() -> Any:
        return torch.autograd.grad(in_torch(), (padded_q, padded_k, padded_v), padded_grad)

    torch.testing.assert_close(ours(), batch.select(in_torch().transpose(1, 2)))
    peers = {"SDPA, padded": in_torch if direction == "forward" else torch_both}
    facts = {"padding": mask.numel() / batch.total_tokens}
    compare(benchmark, ours if direction == "forward" else ours_both, peers, device=device, facts=facts)
