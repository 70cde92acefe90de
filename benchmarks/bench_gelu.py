"""bias + GELU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast import functional

from .compare import compare

ROWS = {"cpu": 4096, "cuda": 16384}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(benchmark: Any, device: str, approximate: str, direction: str) -> None:
    width = 1536
    x, grad = (torch.randn(ROWS[device], width, device=device, dtype=DTYPES[device]) for _ in range(2))
    bias = torch.randn(width, device=device, dtype=DTYPES[device])
    inputs = [t.requires_grad_(direction == "both") for t in (x, bias)]

    def ours() -> Tensor:
        return functional.gelu(x, bias, approximate)

    def in_torch() -> Tensor:
        return F.gelu(x + bias, approximate=approximate)

    def with_gradients(forward: Any) -> Any:
        return lambda: torch.autograd.grad(forward(), inputs, grad)

    torch.testing.assert_close(ours(), in_torch())
    if direction == "forward":
        compare(benchmark, ours, {"torch": in_torch}, device=device)
    else:
        compare(benchmark, with_gradients(ours), {"torch": with_gradients(in_torch)}, device=device)
