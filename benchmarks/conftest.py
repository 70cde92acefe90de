"""What a result says of where it was made: device, versions, threads; no name of a host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .facts import versions

PACKAGES = ("bert-fast", "torch", "triton", "transformers", "numpy")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    from bert_fast import _C

    machine_info.pop("node", None)
    machine_info.pop("release", None)
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine_info["instruction_set"] = _C.instruction_set()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = versions(PACKAGES)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(autouse=True)
def _true_float32() -> None:
    """Peers and floor compute what they are compared with: no TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
