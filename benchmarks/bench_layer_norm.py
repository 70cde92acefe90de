"""residual + LayerNorm."""

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
@pytest.mark.parametrize("width", [384, 768])
def test_layer_norm(benchmark: Any, device: str, width: int, direction: str) -> None:
    x, residual, grad = (torch.randn(ROWS[device], width, device=device, dtype=DTYPES[device]) for _ in range(3))
    weight, bias = (torch.randn(width, device=device, dtype=DTYPES[device]) for _ in range(2))
    inputs = [t.requires_grad_(direction == "both") for t in (x, residual, weight, bias)]

    def ours() -> Tensor:
        return functional.layer_norm(x, weight, bias, 1e-12, residual)

    def in_torch() -> Tensor:
        return F.layer_norm(x + residual, (width,), weight, bias, 1e-12)

    def with_gradients(forward: Any) -> Any:
        return lambda: torch.autograd.grad(forward(), inputs, grad)

    torch.testing.assert_close(ours(), in_torch())
    if direction == "forward":
        compare(benchmark, ours, {"torch": in_torch}, device=device)
    else:
        compare(benchmark, with_gradients(ours), {"torch": with_gradients(in_torch)}, device=device)
