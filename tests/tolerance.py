"""What the kernel tests share: the places where an operator runs, and how far from the truth its results may lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast import ops

# Units in the last place of the largest value that are granted beside twice torch's error. A sum in float32 has another
# order than torch's; a result in 16 bits comes from such a sum and is rounded once. In float64 the oracle errs as well.
GRANTED_ULPS = {torch.float64: 256, torch.float32: 4, torch.float16: 1, torch.bfloat16: 1}


class Place(NamedTuple):
    """
    Attributes:
        path: of bert_fast.ops. "triton" on the device "cpu" is Triton's interpreter.
        device: of the tensors.
        dtype: of the activations.
    """

    path: ops.Path
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.path}-{self.device}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def is_interpreter(self) -> bool:
        return self.path == "triton" and self.device == "cpu"

    def forced(self) -> AbstractContextManager[None]:
        return ops.forced_path(self.path)

    def put(self, x: Tensor) -> Tensor:
        """x with this place's dtype and device."""
        return x.to(self.device, self.dtype)


def error(x: Tensor, oracle: Tensor) -> float:
    """The largest absolute difference; 0 where there is nothing to compare."""
    return float((x.detach().cpu().double() - oracle.detach().cpu()).abs().max()) if x.numel() else 0.0


def magnitude(*tensors: Tensor) -> float:
    return max((float(x.detach().abs().max()) for x in tensors if x.numel()), default=0.0)


def assert_twice_torch(name: str, ours: Tensor, torchs: Tensor, oracle: Tensor, scale: float | None = None) -> None:
    """Our error is at most twice torch's, and a few units in the last place.

    Args:
        name: of the result, for the message.
        ours, torchs: computed in the precision under test.
        oracle: computed in float64.
        scale: the magnitude whose last place counts; None: the oracle's largest value.
    """
    assert ours.shape == torchs.shape == oracle.shape
    assert ours.dtype == torchs.dtype, f"{name} is {ours.dtype}; torch's is {torchs.dtype}"
    assert oracle.dtype == torch.float64
    our_error, torch_error = error(ours, oracle), error(torchs, oracle)
    scale = magnitude(oracle) if scale is None else scale
    bound = 2 * torch_error + GRANTED_ULPS[ours.dtype] * torch.finfo(ours.dtype).eps * scale
    assert our_error <= bound, f"{name}: error {our_error:.3e} above {bound:.3e}; torch's is {torch_error:.3e}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
